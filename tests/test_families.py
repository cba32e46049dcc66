"""Every architecture that is served, by config.json alone, against logits that transformers gave in float32.

tests/record_families.py recorded them, from the same tiny random weights.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import Driver, build_engine, greedy, log_softmax, quiet
from families import CASES, EMBEDDERS, RECORDED, VOCAB, prompt_of, weights
from tiny_llama import write_safetensors, write_tiny_gguf

from checkpoints.files import SafetensorsSource
from checkpoints.gguf import GGUFSource, model_config
from jaxserve.config import DECODERS, ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.compile import layers_per_program
from jaxserve.engine.weights import load_params
from jaxserve.model.sharding import describe, make_mesh
from jaxserve.types import SamplingParams

FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all; make test takes those that differ most
FEW = ("mistral", "qwen2-window", "qwen3", "e5-mistral")
SIZES: dict[str, Any] = {"max_running": 2, "chunked_prefill_size": 16, "max_total_tokens": 512, "device": "cpu"}


@cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


def write_family(folder: Path, name: str) -> str:
    """The model of a case as Hugging Face publishes it; without a head its tensors have no "model." in front."""
    (folder / "config.json").write_text(json.dumps(CASES[name]))
    model = ModelConfig.from_hf(CASES[name])
    _, parameters = describe(model, jnp.dtype("float32"), make_mesh(jax.devices("cpu")[:1]), "cpu")
    shapes = {key: shape for p in jax.tree.leaves(parameters) for key, shape in p.tensors.items()}
    drawn = weights(name, shapes)
    if not model.generates:
        drawn = {key.removeprefix("model."): value for key, value in drawn.items()}
    write_safetensors(folder / "model.safetensors", drawn)
    return str(folder)


@pytest.mark.parametrize("name", [name for name in CASES if FULL or name in FEW])
def test_an_architecture_gives_what_transformers_gives(tmp_path, name):
    engine = build_engine(write_family(tmp_path, name), **SIZES)
    driver = Driver(engine.runner, engine.sizes.scheduler)
    prompt, want = prompt_of(name), recorded()[name]
    if name in EMBEDDERS:
        (answer,) = driver.run([(prompt, None)])
        assert answer.vector is not None
        np.testing.assert_allclose(answer.vector, want / np.linalg.norm(want), atol=1e-5)
        return
    logprobs = log_softmax(want.astype(np.float64))
    scored = SamplingParams(max_tokens=0, seed=0, num_prompt_logprobs=20)
    one, two = driver.run([(prompt, scored), (prompt, greedy(1))])
    assert len(one.prompt_logprobs) == len(prompt)
    for index, told in enumerate(one.prompt_logprobs[1:]):
        assert told is not None
        row = logprobs[index]
        assert told.logprob == pytest.approx(row[prompt[index + 1]], abs=1e-4), index
        np.testing.assert_allclose(told.top_logprobs, np.sort(row)[::-1][:20], atol=1e-4)
    # The last position, now with most of the prompt read from the cache, token by token.
    assert two.token_ids == [int(logprobs[-1].argmax())]
    told = two.logprobs[0]
    assert told is not None
    np.testing.assert_allclose(told.top_logprobs, np.sort(logprobs[-1])[::-1][:20], atol=1e-4)
    check_decoding(driver, prompt, logprobs)


def check_decoding(driver: Driver, prompt: list[int], logprobs: np.ndarray) -> None:
    """The second half of the prompt again, each token decoded: its bias leaves no other choice."""
    start = len(prompt) // 2
    for at in (start, len(prompt) - 2):
        bias = ((prompt[at], 100.0),)
        (answer,) = driver.run([(prompt[:at], greedy(2, logit_bias=bias))])
        assert answer.token_ids[0] == prompt[at]
        told = answer.logprobs[1]  # behind a token that passed through a decode step
        assert told is not None
        np.testing.assert_allclose(told.top_logprobs, np.sort(logprobs[at])[::-1][:20], atol=1e-4)


def test_the_recorded_cases_are_all_there_and_small():
    assert set(recorded()) == {*CASES, "versions"}
    assert all(recorded()[name].shape == (40, VOCAB) for name in CASES if name not in EMBEDDERS)
    assert {CASES[name]["architectures"][0] for name in CASES} >= set(DECODERS)
    assert RECORDED.stat().st_size < 300_000


def test_windows_are_those_of_transformers():
    windows = {name: ModelConfig.from_hf(CASES[name]).layer_windows for name in CASES}
    assert windows["mistral"] == windows["e5-mistral"] == (9, 9)
    assert windows["mistral-nemo"] == (None, None)
    assert windows["qwen2-window"] == (None, 9, 9)
    assert windows["qwen3-layers"] == (6, None, 6, None)
    off = CASES["qwen2-window"] | {"use_sliding_window": False}
    assert ModelConfig.from_hf(off).layer_windows == (None,) * 3, "Qwen's windows must be switched on"
    assert ModelConfig.from_hf(CASES["llama-3"] | {"sliding_window": 9}).layer_windows == (None, None)


def test_a_program_of_some_layers_repeats_where_their_kinds_do():
    def size(windows: tuple[int | None, ...]) -> int | None:
        config = ModelConfig(len(windows), 64, 4, 2, 16, 96, 100, 512, windows=windows)
        return layers_per_program(config, "cpu")

    assert size((None,) * 30) == 6
    assert size((4, None) * 7) == 2
    assert size((4, 4, None) * 4) == 6
    assert size((None,) * 3 + (8,) * 4) == 7, "half and half is one program"
    assert layers_per_program(ModelConfig(8, 64, 4, 2, 16, 96, 100, 512), "tpu") is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not served; LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' in config.json is not served; 'silu' is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 in config.json is not served"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not served"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not served"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope' is not served"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq.* is not served"),
        ({"num_key_value_heads": 3}, "4 query heads do not share 3 KV heads evenly"),
    ],
)
def test_what_a_config_asks_for_and_is_not_served_is_refused_by_name(changed, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(CASES["llama-3"] | changed)


def test_layer_types_of_another_kind_are_refused():
    asked = CASES["qwen3-layers"] | {"layer_types": ["chunked_attention", "full_attention"] * 2}
    with pytest.raises(ConfigError, match="layer_types chunked_attention is not served"):
        ModelConfig.from_hf(asked)
    with pytest.raises(ConfigError, match="layer_types of 3 layers, not 4"):
        ModelConfig.from_hf(asked | {"layer_types": ["full_attention"] * 3})


def test_a_missing_bias_is_named(tmp_path):
    folder = write_family(tmp_path, "llama-3")
    (tmp_path / "config.json").write_text(json.dumps(CASES["llama-3"] | {"architectures": ["Qwen2ForCausalLM"]}))
    model = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    _, parameters = describe(model, jnp.dtype("float32"), make_mesh(jax.devices("cpu")[:1]), "cpu")
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.0.self_attn.q_proj.bias'"):
        load_params(EngineConfig(folder, str(tmp_path)), model, parameters, quiet)


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "qwen3", "qwen3-biased"])
def test_a_gguf_of_an_architecture_holds_the_same_model(tmp_path, name):
    folder = write_family(tmp_path, name)
    path = str(tmp_path / "tiny.gguf")
    write_tiny_gguf(folder, path)
    source, original = GGUFSource(path), SafetensorsSource(folder)
    assert set(source.tensors) == set(original.tensors)
    for tensor in original.tensors:
        assert np.array_equal(source.read(tensor), original.read(tensor)), tensor
    assert ModelConfig.from_hf(model_config(source.header)) == ModelConfig.from_hf(CASES[name])
