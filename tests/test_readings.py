"""Log-probabilities of prompts and vectors on tiny models, against a float64 model in numpy, whatever happens to a
request; nothing is compiled for them after ready."""

import functools
import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import Answer, Driver, chunked, log_softmax, shared_engine, shared_folder
from tiny_llama import numpy_forward, numpy_hidden, tiny_tokenizer

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.sizing import DeviceFacts, resolve
from jaxserve.engine.weights import read_model_config
from jaxserve.scheduling.picked import Picked
from jaxserve.scheduling.scheduler import SchedulerConfig
from jaxserve.types import SamplingParams

VOCAB = tiny_tokenizer().get_vocab_size()
TOLERANCE = 1e-4  # float32 against float64, over a context of up to 512 tokens
Pooling = Any


def scored(max_tokens: int = 0, num_top: int = 3, **changed: Any) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": max_tokens, "seed": 3, "temperature": 0.0, "num_prompt_logprobs": num_top}
    return SamplingParams(**(given | changed))


@functools.cache
def draw_prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng((length, salt)).integers(3, VOCAB, length).tolist())


@functools.cache
def expected_logprobs(name: str, prompt: tuple[int, ...]) -> np.ndarray:
    """[T, V]"""
    return log_softmax(numpy_forward(shared_folder(name), prompt))


def expected_vector(name: str, prompt: tuple[int, ...], pooling: Pooling) -> np.ndarray:
    hidden, _ = numpy_hidden(shared_folder(name), prompt)
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return vector / np.linalg.norm(vector)


def check_scores(answer: Answer, prompt: tuple[int, ...], num_top: int = 3, name: str = "grouped") -> None:
    table = expected_logprobs(name, prompt)
    assert len(answer.prompt_logprobs) == len(prompt)
    assert answer.prompt_logprobs[0] is None
    for position, item in enumerate(answer.prompt_logprobs[1:], start=1):
        row, token = table[position - 1], prompt[position]
        assert item is not None
        assert item.logprob == pytest.approx(row[token], abs=TOLERANCE)
        assert item.rank is not None
        assert np.sum(row > row[token] + TOLERANCE) < item.rank <= np.sum(row > row[token] - TOLERANCE)
        assert len(item.top_ids) == len(item.top_logprobs) == num_top
        best = np.argsort(-row)[:num_top]
        assert list(item.top_logprobs) == pytest.approx(row[best].tolist(), abs=TOLERANCE)
        assert row[list(item.top_ids)].tolist() == pytest.approx(row[best].tolist(), abs=TOLERANCE)


def check_vector(answer: Answer, prompt: tuple[int, ...], pooling: Pooling, name: str = "grouped") -> None:
    assert answer.vector is not None and answer.reason == "stop" and answer.token_ids == []
    assert np.linalg.norm(answer.vector) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(answer.vector, expected_vector(name, prompt, pooling), atol=TOLERANCE)


def sizes_of(name: str = "grouped", **changed: Any) -> SchedulerConfig:
    return replace(shared_engine(name).sizes.scheduler, **changed)


def driver(sizes: SchedulerConfig, name: str = "grouped", **options: Any) -> Driver:
    return Driver(shared_engine(name).runner, sizes, **options)


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("overlap", [True, False])
def test_scores_of_a_prompt_are_the_models_in_chunks_of_any_size(chunk: int, overlap: bool):
    prompt = draw_prompt(150)
    made = driver(chunked(sizes_of(), chunk), overlap=overlap)
    (answer,) = made.run([(prompt, scored())])
    check_scores(answer, prompt)
    assert (answer.token_ids, answer.reason) == ([], "length")
    assert made.stats.num_held_pages == 0 and made.stats.generation_tokens_total == 0


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_scores_and_vectors_of_other_kinds_of_model(name: str):
    prompt = draw_prompt(50)
    for pooling in ("last", "mean"):
        one, two = driver(sizes_of(name, pooling=pooling), name).run([(prompt, scored()), (prompt, None)])
        check_scores(one, prompt, name=name)
        check_vector(two, prompt, pooling, name)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_vectors_are_the_models_in_chunks_of_any_size(chunk: int, pooling: Pooling):
    prompts = [draw_prompt(length) for length in (150, 1, 16, 17, 64)]
    made = driver(chunked(sizes_of(pooling=pooling), chunk))
    for prompt, answer in zip(prompts, made.run([(prompt, None) for prompt in prompts]), strict=True):
        check_vector(answer, prompt, pooling)
    assert made.stats.num_held_pages == made.stats.generation_tokens_total == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_company_a_warm_prefix_cache_and_a_full_pool_change_nothing(pooling: Pooling):
    long, short, other = draw_prompt(100), draw_prompt(20), draw_prompt(33)
    greedy = SamplingParams(max_tokens=30, seed=0, temperature=0.0)
    plain = [(long, greedy), (short, greedy), (other, greedy)]
    texts = [driver(sizes_of()).run([each])[0].token_ids for each in plain]
    scoring = [(long, scored(5)), (short, scored(12, 0, temperature=1.0)), (other, scored(0, 20))]
    wanted = [*plain, *scoring, (long, None), (other, None)]
    made = driver(sizes_of(pooling=pooling))
    tight = driver(sizes_of(pooling=pooling, num_pages=14, policy="fcfs"))
    for each in (made, made, tight):
        answers = each.run(wanted)
        assert [answer.token_ids for answer in answers[:3]] == texts
        assert answers[3].token_ids == texts[0][:5] and len(answers[4].token_ids) == 12
        for answer, (prompt, params) in zip(answers[3:6], scoring, strict=True):
            check_scores(answer, prompt, params.num_prompt_logprobs or 0)
            assert answer.cached_tokens == 0
        check_vector(answers[6], long, pooling)
        check_vector(answers[7], other, pooling)
    assert answers[6].cached_tokens == 0 or pooling == "last"


@pytest.mark.parametrize("radix_cache", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_preempted_prompt_is_told_once_and_only_what_was_read_comes_from_the_cache(
    pooling: Pooling, radix_cache: bool
):
    prompts = [draw_prompt(150), draw_prompt(90, 1), draw_prompt(140)]
    made = driver(chunked(sizes_of(pooling=pooling, radix_cache=radix_cache), 16))

    def preempt(turn: int) -> None:
        victim = made.scheduler._youngest()
        if turn in (1, 3, 4, 9, 15, 22) and victim is not None:
            made.scheduler._preempt(victim, Picked(made.config, {}, False))

    wanted = [(prompts[0], scored(4)), (prompts[1], scored(0)), (prompts[2], None)]
    answers = made.run(wanted, preempt)
    assert made.stats.preemptions_total >= 5
    check_scores(answers[0], prompts[0])
    check_scores(answers[1], prompts[1])
    check_vector(answers[2], prompts[2], pooling)
    assert len(answers[0].token_ids) == 4
    if radix_cache:
        assert any(plan.num_cached_tokens for plan in made.plans), "whoever returns computes everything again"


def test_a_scored_prompt_leaves_its_pages_to_those_who_need_no_scores():
    prompt = draw_prompt(100)
    made = driver(sizes_of())
    made.run([(prompt, scored())])
    (after,) = made.run([(prompt, SamplingParams(max_tokens=3, seed=0, temperature=0.0))])
    assert after.cached_tokens == 96


def test_one_token_and_a_whole_context_can_be_scored_and_embedded():
    whole = draw_prompt(sizes_of().max_model_len)
    made = driver(sizes_of())
    first, last, vector = made.run([((5,), scored(4)), (whole, scored()), (whole, None)])
    assert first.prompt_logprobs == [None] and len(first.token_ids) == 4
    check_scores(last, whole)
    check_vector(vector, whole, "last")


def test_nothing_is_compiled_for_readings_after_ready():
    engine = shared_engine()
    engine.counter.start_counting_this_thread()
    before = engine.counter.after_ready
    driver(sizes_of(pooling="mean")).run([(draw_prompt(90), scored(2, 20)), (draw_prompt(70), None)])
    assert engine.counter.after_ready == before


def pooling_file(**modes: bool) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    return {"word_embedding_dimension": 64} | {f"pooling_mode_{name}": modes.get(name, False) for name in names}


def test_the_model_says_how_its_vectors_are_pooled(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shared_folder("grouped"), folder)
    config = EngineConfig(str(folder), "cache")
    assert read_model_config(config).pooling == "last"
    (folder / "1_Pooling").mkdir()
    for modes, pooling in (({"mean_tokens": True}, "mean"), ({"lasttoken": True}, "last")):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling_file(**modes)))
        model = read_model_config(config)
        assert model.pooling == pooling
        assert resolve(model, config, DeviceFacts("cpu", 1, None)).scheduler.pooling == pooling
    for modes in ({"cls_token": True}, {"max_tokens": True}, {"mean_tokens": True, "lasttoken": True}):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling_file(**modes)))
        with pytest.raises(ConfigError, match="served"):
            read_model_config(config)
