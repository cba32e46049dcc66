"""The compiled engine on tiny random Llamas against a float64 forward in numpy, however a prompt is cut into steps."""

import os
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import (
    MODELS,
    SMALL,
    Answer,
    Driver,
    build_engine,
    build_runner,
    chunked,
    greedy,
    log_softmax,
    shared_engine,
    shared_folder,
)
from flax import nnx
from tiny_llama import LLAMA3_SCALING, inverse_frequencies, numpy_forward, numpy_hidden, tiny_tokenizer

from jaxserve.config import ConfigError, ModelConfig
from jaxserve.engine.chains import SplitStep, StagedStep, WholeStep
from jaxserve.engine.grammars import load_vocabulary
from jaxserve.engine.processor import cpu_features, prefers_bfloat16
from jaxserve.engine.runner import ModelRunner
from jaxserve.model import llama
from jaxserve.model.partition import Shares
from jaxserve.model.sampling import Asks
from jaxserve.scheduling.scheduler import SchedulerConfig
from jaxserve.text.grammar import regex
from jaxserve.types import SamplingParams

VOCAB = tiny_tokenizer().get_vocab_size()
TOLERANCE = 1e-4  # of a log-probability, float32 against float64
Wanted = Sequence[tuple[list[int], SamplingParams]]


def draw_prompts(*lengths: int) -> list[list[int]]:
    seed = int(os.environ.get("SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"SEED={seed}")
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def assert_agrees(answer: Answer, prompt: list[int], logprobs: np.ndarray) -> None:
    """logprobs [T, V] of prompt and answer: every token is the likeliest, or ties with it."""
    for index, (token, told) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        want = logprobs[len(prompt) - 1 + index]
        assert told is not None
        assert want[token] >= want.max() - TOLERANCE, f"token {index} is {token}, not {want.argmax()}"
        assert told.logprob == pytest.approx(want[token], abs=TOLERANCE)
        np.testing.assert_allclose(told.top_logprobs, want[list(told.top_ids)], atol=TOLERANCE)
        np.testing.assert_allclose(told.top_logprobs, np.sort(want)[::-1][:20], atol=TOLERANCE)


def check_against_numpy(name: str, wanted: Wanted, answers: list[Answer]) -> None:
    for (prompt, params), answer in zip(wanted, answers, strict=True):
        assert (len(answer.token_ids), answer.reason) == (params.max_tokens, "length")
        assert_agrees(answer, prompt, log_softmax(numpy_forward(shared_folder(name), prompt + answer.token_ids)))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_llama_is_the_float64_forward_token_for_token(name):
    engine = shared_engine(name)
    wanted = [(prompt, greedy(12)) for prompt in draw_prompts(1, 16, 17, 75)]
    answers = Driver(engine.runner, engine.sizes.scheduler).run(wanted)
    check_against_numpy(name, wanted, answers)


@pytest.mark.parametrize("mixed", [False, True], ids=["alternating", "mixed"])
@pytest.mark.parametrize("sizes", [(16,), (64,), (16, 64)], ids=str)
def test_paged_and_chunked_is_one_shot_for_every_chunk_size_and_kind_of_step(sizes, mixed):
    engine = shared_engine()
    driver = Driver(engine.runner, chunked(engine.sizes.scheduler, *sizes, mixed=mixed))
    wanted = [(prompt, greedy(10)) for prompt in draw_prompts(64, 65, 130, 200, 33, 5)]
    answers = driver.run(wanted[:-1]) + driver.run(wanted[-1:])
    check_against_numpy("grouped", wanted, answers)
    buckets = [plan.bucket for plan in driver.plans]
    assert {bucket.num_prefill for bucket in buckets} == {0, *sizes}
    assert sum(bucket.num_prefill > 0 for bucket in buckets) >= 497 // max(sizes), "the prompts were not chunked"
    assert any(bucket.num_prefill and bucket.num_decode for bucket in buckets) == mixed
    assert any(len(plan.sequences) - plan.num_decode_rows > 1 for plan in driver.plans) == (sizes != (16,))


def test_a_cached_prefix_changes_no_log_probability():
    engine = shared_engine()
    driver = Driver(engine.runner, engine.sizes.scheduler)
    (prompt,) = draw_prompts(100)
    wanted = [(prompt, greedy(8))]
    cold, warm = driver.run(wanted), driver.run(wanted)
    assert (cold[0].cached_tokens, warm[0].cached_tokens) == (0, 96)
    check_against_numpy("grouped", wanted, cold)
    check_against_numpy("grouped", wanted, warm)


def test_a_token_that_was_prefilled_is_a_token_that_was_decoded():
    engine = shared_engine()
    (prompt,) = draw_prompts(7)
    (decoded,) = Driver(engine.runner, engine.sizes.scheduler).run([(prompt, greedy(40))])
    for count in (1, 8, 9, 25, 39):  # the same positions, now all in one chunk
        driver = Driver(engine.runner, engine.sizes.scheduler)
        (prefilled,) = driver.run([(prompt + decoded.token_ids[:count], greedy(1))])
        assert [plan.num_new_tokens for plan in driver.plans] == [7 + count]
        told, before = prefilled.logprobs[0], decoded.logprobs[count]
        assert told is not None and before is not None
        np.testing.assert_allclose(told.top_logprobs, before.top_logprobs, atol=2e-5)


def test_whole_and_staged_steps_and_all_layouts_give_the_same_log_probabilities(monkeypatch):
    """A platform's layout is only a matter of speed: all of them run on the CPU here."""
    name = "tied"  # its head is the embedding in some layouts and an array of its own in others
    staged = shared_engine(name)
    sizes = staged.sizes.scheduler
    assert all(isinstance(step, StagedStep) for step in staged.runner._programs.steps.values())
    wanted = [(prompt, greedy(4)) for prompt in draw_prompts(20, 3)]
    expected = Driver(staged.runner, sizes).run(wanted)
    check_against_numpy(name, wanted, expected)
    vocabulary = load_vocabulary(shared_folder(name), staged.model.vocab_size, staged.model.eos_token_ids)
    constrained = [(*wanted[0], regex("[0-9]{9}")), wanted[1]]
    masked = Driver(staged.runner, sizes, vocabulary=vocabulary).run(constrained)
    assert masked[1].token_ids == expected[1].token_ids
    told, plain = masked[0].logprobs[0], expected[0].logprobs[0]
    assert told is not None and plain is not None
    assert told.top_logprobs == plain.top_logprobs, "a mask changes no log-probability"
    for layout in ("cpu", "gpu", "tpu"):
        prefill_only = layout != "cpu"
        runner = build_runner(monkeypatch, shared_folder(name), sizes, layout=layout, prefill_only=prefill_only)
        made = SplitStep if layout == "gpu" else WholeStep
        assert all(isinstance(step, made) for step in runner._programs.steps.values())
        count = 1 if prefill_only else 4
        answers = Driver(runner, sizes).run([(prompt, greedy(count)) for prompt, _ in wanted])
        for want, got in zip(expected, answers, strict=True):
            assert want.token_ids[:count] == got.token_ids, layout
            for a, b in zip(want.logprobs[:count], got.logprobs, strict=True):
                assert a is not None and b is not None
                np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, atol=2e-5, err_msg=layout)
        answers = Driver(runner, sizes, vocabulary=vocabulary).run([(p, greedy(count), *g) for p, _, *g in constrained])
        for want, got in zip(masked, answers, strict=True):
            assert want.token_ids[:count] == got.token_ids, layout
        check_readings(runner, sizes, name, wanted[0][0], layout)


def check_readings(runner: ModelRunner, sizes: SchedulerConfig, name: str, prompt: list[int], layout: str) -> None:
    """What a prompt tells in a layout, against the reference: its log-probabilities and its mean vector."""
    ending = SamplingParams(max_tokens=0, seed=0, num_prompt_logprobs=0)
    driver = Driver(runner, replace(sizes, pooling="mean"))
    scored, embedded = driver.run([(prompt, ending), (prompt, None)])
    hidden, head = numpy_hidden(shared_folder(name), prompt)
    table = log_softmax(hidden @ head.T)
    told = [item.logprob for item in scored.prompt_logprobs if item is not None]
    np.testing.assert_allclose(told, table[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-5, err_msg=layout)
    mean = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
    assert embedded.vector is not None
    np.testing.assert_allclose(embedded.vector, mean, atol=2e-5, err_msg=layout)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3_SCALING], ids=str)
def test_rotary_frequencies_are_the_published_ones(scaling):
    dims = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 8}
    config = dims | {"vocab_size": 8, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}
    ours = llama.inverse_frequencies(ModelConfig.from_hf(config))
    np.testing.assert_allclose(ours, inverse_frequencies(config), rtol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_the_distance_only():
    rng = np.random.default_rng()
    config = ModelConfig.from_hf(
        {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    )
    q, k = rng.standard_normal((2, 1, 1, 32), np.float32)

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return np.asarray(llama.rotate(x, llama.rope_table(config, jax.numpy.array([position]))))[0, 0]

    assert np.linalg.norm(at(q, 77)) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    assert at(q, 9) @ at(k, 4) == pytest.approx(at(q, 105) @ at(k, 100), abs=1e-3)
    np.testing.assert_array_equal(at(q, 0), q[0, 0])


def test_padding_plans_change_no_page_and_no_slot_in_use():
    engine = shared_engine()
    sizes: SchedulerConfig = engine.sizes.scheduler
    Driver(engine.runner, sizes).run([(prompt, greedy(3)) for prompt in draw_prompts(30, 5)])
    before = jax.tree.map(np.array, engine.runner._state)
    for bucket in engine.runner._programs.steps:
        engine.runner._begin(bucket, engine.runner.padding_plan(bucket), Asks.ANYTHING)(None)
    after = jax.tree.map(np.array, engine.runner._state)
    np.testing.assert_array_equal(before.cache.pages[:, 1:], after.cache.pages[:, 1:])
    np.testing.assert_array_equal(before.last_token[:-1], after.last_token[:-1])
    for old, new in zip(jax.tree.leaves(before.sampling), jax.tree.leaves(after.sampling), strict=True):
        np.testing.assert_array_equal(old[:-1], new[:-1])


def test_the_tpu_kernels_give_the_same_tokens_as_xla_in_the_engine():
    """Scheduler, page layout and kernels together, in steps of every kind."""
    name = "biased"
    engine = shared_engine(name)
    pallas = build_engine(shared_folder(name), **SMALL | {"attention_backend": "pallas", "mixed_chunk": True})
    long, short, other = draw_prompts(37, 3, 18)
    rounds = [[(short, greedy(6)), (long, greedy(20))], [(long[:33] + other, greedy(5)), (other, greedy(16))]]
    ours, xla = Driver(pallas.runner, pallas.sizes.scheduler), Driver(engine.runner, engine.sizes.scheduler)
    for wanted in rounds:
        got, want = ours.run(wanted), xla.run(wanted)
        check_against_numpy(name, wanted, got)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    kinds = {(plan.bucket.num_decode > 0, plan.bucket.num_prefill > 0) for plan in ours.plans}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert got[0].cached_tokens == 32


@pytest.mark.parametrize("tokens", [2, 16])
def test_no_weight_is_converted_where_the_cpu_multiplies_bfloat16(tokens):
    if not prefers_bfloat16(cpu_features(), jax.__version_info__):
        pytest.skip("this processor, or this JAX, has no bfloat16 products")
    config = ModelConfig(1, 576, 9, 3, 64, 1536, 512, 512)
    block = llama.Block(config, Shares.of(config, 1), jnp.dtype("bfloat16"), llama.Layout.of("cpu"))
    definition, leaves = nnx.split(block)

    def run(leaves, x, rope):
        return nnx.merge(definition, leaves)(x, None, 0, rope, lambda q, k, v, cache, layer: (q * 2, cache))[0]

    angles = jnp.zeros((tokens, 32))
    compiled = jax.jit(run).lower(leaves, jnp.zeros((576, tokens), jnp.bfloat16), (angles, angles)).compile()
    shapes = {"960,576", "576,576", "3072,576", "576,1536"}
    text = compiled.as_text()
    assert all(f"bf16[{shape}]" in text for shape in shapes)
    assert not [shape for shape in shapes if f"f32[{shape}]" in text]


def test_a_step_that_the_devices_memory_cannot_hold_is_refused_naming_the_flags(monkeypatch):
    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.26GiB")

    monkeypatch.setattr(ModelRunner, "compile", lambda *_, **__: None)
    monkeypatch.setattr(ModelRunner, "load", full)
    with pytest.raises(ConfigError, match=r"--mem-fraction-static 0\.88.*--max-running-requests") as refused:
        build_engine(shared_folder("tied"), **SMALL)
    assert isinstance(refused.value.__cause__, jax.errors.JaxRuntimeError)
