"""Weights and KV cache in 8 bits: what rounding may cost, which checkpoints load, and that every place of the engine
computes with the very numbers that were stored."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engines import SMALL, Answer, Driver, build_engine, greedy, log_softmax, quiet, shared_folder
from tiny_bert import write_tiny_bert
from tiny_llama import (
    numpy_forward,
    read_safetensors,
    tiny_tokenizer,
    write_safetensors,
    write_tiny_gguf,
    write_tiny_llama,
)

from checkpoints.convert import convert_path
from checkpoints.files import CheckpointError, SafetensorsSource
from checkpoints.load import DummySource
from checkpoints.quant import FORMATS, QuantisedSource, WideSource, quantise, row_scales
from jaxserve.config import ConfigError, EngineConfig, ModelConfig, stored_quantization
from jaxserve.engine.encoder import build_encoder
from jaxserve.engine.sizing import choose_kv_dtype, weight_bytes
from jaxserve.engine.weights import load_params, read_encoder_config, read_model_config
from jaxserve.llm import LLM
from jaxserve.model.sharding import Params, describe, make_mesh
from kernels_pallas import cache as kv_cache

VOCAB = tiny_tokenizer().get_vocab_size()
LLAMA_8B = ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 131072)
WEIGHTS = {  # of quantization_config; the activations' part is what such checkpoints say too
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}


def is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight")


def rounded(weights: Mapping[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
    """The floats that quantised weights stand for."""

    def one(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float32)
        scales = row_scales(wide, FORMATS[method])
        return quantise(wide, scales, FORMATS[method]).astype(np.float32) * scales[:, None]

    return {name: one(values) if is_matrix(name) else values for name, values in weights.items()}


def compressed_tensors(method: str, **changed: Any) -> dict[str, Any]:
    written = {"int8": "int-quantized", "fp8": "float-quantized"}[method]
    group = {"targets": ["Linear"], "weights": WEIGHTS[method] | changed, "input_activations": {"num_bits": 8}}
    found = {"quant_method": "compressed-tensors", "format": written, "config_groups": {"group_0": group}}
    return found | {"ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None}


def write_quantised(
    folder: Path, method: str, scale: str, *, left_out: str = "no matrix", **model: Any
) -> dict[str, np.ndarray]:
    """A tiny Llama whose matrices are stored in 8 bits, but for those of a name. scale: "tensor", "channel" (vectors),
    "column" ([out, 1] in bfloat16) or "block" (DeepSeek's, 32 x 32). Gives the floats that it stands for."""
    write_tiny_llama(folder, **model)
    form, stored, floats = FORMATS[method], {}, {}
    for name, values in read_safetensors(folder).items():
        stored[name] = floats[name] = values
        if not is_matrix(name) or left_out in name:
            continue
        rows, columns = values.shape
        tall, wide = {"tensor": (rows, columns), "block": (32, 32)}.get(scale, (1, columns))
        groups = np.zeros((-(-rows // tall), -(-columns // wide)), np.float32)
        for index in np.ndindex(groups.shape):
            part = values[index[0] * tall : (index[0] + 1) * tall, index[1] * wide : (index[1] + 1) * wide]
            groups[index] = np.abs(part).max() / form.largest
        groups = groups.astype(ml_dtypes.bfloat16 if scale == "column" else np.float32)
        each = np.repeat(np.repeat(groups.astype(np.float32), tall, 0), wide, 1)[:rows, :columns]
        small = np.clip(values / each, -form.largest, form.largest)
        stored[name] = (np.rint(small) if method == "int8" else small).astype(form.dtype)
        floats[name] = stored[name].astype(np.float32) * each
        written = {"tensor": np.array(groups[0, 0]), "channel": groups[:, 0]}.get(scale, groups)
        stored[name + ("_scale_inv" if scale == "block" else "_scale")] = written
        stored[name.replace("weight", "input_scale")] = np.ones((), np.float32)  # of activations: not used
    write_safetensors(folder / "model.safetensors", stored)
    found: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if scale == "column":
        found = compressed_tensors(method)
    elif scale == "block":
        found |= {"weight_block_size": [32, 32]}
    change_config(folder, quantization_config=found)
    return floats


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def loaded(folder: Path | str, platform: str = "cpu", **options: Any) -> dict[str, np.ndarray]:
    """Parameter path -> what the engine multiplies with, in float32 and with the scales applied."""
    config = EngineConfig(str(folder), str(folder), **options)
    model = read_model_config(config)
    _, description = describe(model, jnp.dtype("float32"), make_mesh(jax.devices("cpu")[:1]), platform)
    params: Params = load_params(config, model, description, quiet)
    found = {}
    paths = [leaf.path for leaf in jax.tree.leaves(description)]
    arrays = dict(zip(paths, jax.tree.leaves(params), strict=True))
    for leaf in jax.tree.leaves(description):
        if leaf.path.endswith("_scale"):
            continue
        values = np.asarray(arrays[leaf.path].astype(jnp.float32))
        if (scale := arrays.get(leaf.path + "_scale")) is not None:
            values = values * np.asarray(scale)[(None, slice(None)) if leaf.transpose else (slice(None), None)]
        found[leaf.path] = values
    return found


# What rounding may cost


@pytest.mark.parametrize("method", FORMATS)
def test_every_weight_is_within_a_rounding_of_what_it_was(method, rng):
    values = (rng.standard_normal((60, 50)) * rng.lognormal(0, 4, (60, 1))).astype(np.float32)
    values[7] = 0
    values[8, 3] = 1e4 * np.abs(values[8]).max()
    scales = row_scales(values, FORMATS[method])
    stored = quantise(values, scales, FORMATS[method])
    got = stored.astype(np.float32) * scales[:, None]
    largest = np.abs(values).max(1, keepdims=True)
    allowed = largest / 254 if method == "int8" else np.maximum(np.abs(values) / 16, largest / 458752)
    assert (np.abs(got - values) <= allowed * 1.0001).all() and not got[7].any()
    assert stored.dtype == FORMATS[method].dtype and scales.dtype == np.float32
    np.testing.assert_array_equal(quantise(got, row_scales(got, FORMATS[method]), FORMATS[method]), stored)


@pytest.mark.parametrize("method", FORMATS)
def test_any_slice_of_a_quantised_tensor_is_that_slice_of_the_whole(method, rng, monkeypatch):
    """However a mesh cuts it, and in whatever order it is read."""
    monkeypatch.setattr("checkpoints.quant._BLOCK_ELEMENTS", 100)  # several blocks
    floats = DummySource({"m.weight": (40, 30), "v.weight": (30,)}, 3)
    whole = QuantisedSource(WideSource(floats), FORMATS[method], ["m.weight"])
    values, scales = whole.read("m.weight"), whole.read("m.weight_scale")
    np.testing.assert_array_equal(scales, row_scales(floats.read("m.weight"), FORMATS[method]))
    np.testing.assert_array_equal(whole.read("v.weight"), floats.read("v.weight"))
    for _ in range(5):
        source = QuantisedSource(WideSource(floats), FORMATS[method], ["m.weight"])
        for _ in range(6):
            row, column = (slice(*sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in (40, 30))
            np.testing.assert_array_equal(source.read("m.weight", (row, column)), values[row, column])
            np.testing.assert_array_equal(source.read("m.weight_scale", (row,)), scales[row])


# Which checkpoints load


@pytest.mark.parametrize(
    ("method", "scale"), [("fp8", "tensor"), ("fp8", "channel"), ("fp8", "column"), ("int8", "column")]
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_quantised_checkpoint_is_the_floats_it_stands_for(tmp_path, method, scale, platform):
    """Its own numbers are multiplied with, and --quantization none widens them to the same."""
    floats = write_quantised(tmp_path, method, scale)
    (tmp_path / "floats").mkdir()
    write_tiny_llama(tmp_path / "floats")
    write_safetensors(tmp_path / "floats" / "model.safetensors", floats)
    assert read_model_config(EngineConfig(str(tmp_path), "")).quantization == method
    wanted = loaded(tmp_path / "floats", platform)
    for options in ({}, {"quantization": method}, {"quantization": "none"}):
        found = loaded(tmp_path, platform, **options)
        assert found.keys() == wanted.keys()
        for path, values in wanted.items():
            np.testing.assert_allclose(found[path], values, rtol=1e-6, err_msg=path)


def test_deepseeks_blocks_are_rounded_once_more_and_widen_exactly(tmp_path):
    """64 x 64 and 96 x 64 in blocks of 32 x 32; a row then has one scale instead of several."""
    floats = write_quantised(tmp_path, "fp8", "block")
    exact = loaded(tmp_path, quantization="none")
    np.testing.assert_allclose(exact["layers.1.mlp.down.kernel"], floats["model.layers.1.mlp.down_proj.weight"])
    again = loaded(tmp_path)
    for path, values in exact.items():
        bound = np.maximum(np.abs(values) / 16, np.abs(values).max() / 458752) if ".kernel" in path else 0
        assert (np.abs(again[path] - values) <= bound * 1.001).all(), path


@pytest.mark.parametrize("source", ["gguf", "orbax", "safetensors"])
def test_any_source_is_quantised_while_it_is_read(tmp_path, source):
    folder, options = shared_folder("grouped"), {}
    if source == "gguf":
        write_tiny_gguf(folder, tmp_path / "tiny.gguf")
        options["gguf_path"] = str(tmp_path / "tiny.gguf")
    elif source == "orbax":
        convert_path(folder, str(tmp_path / "converted"), progress=lambda done, total, line: None)
        folder = str(tmp_path / "converted")
    found = loaded(folder, quantization="int8", **options)
    wanted = rounded(read_safetensors(shared_folder("grouped")), "int8")
    np.testing.assert_allclose(
        found["layers.0.attn.qkv.parts.0.kernel"],
        np.concatenate([wanted[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        found["layers.1.mlp.down.kernel"], wanted["model.layers.1.mlp.down_proj.weight"], rtol=1e-6
    )
    np.testing.assert_array_equal(found["embed.kernel"], wanted["model.embed_tokens.weight"])


def test_a_quantised_checkpoint_is_converted_as_it_is(tmp_path):
    write_quantised(tmp_path / "source", "fp8", "column")
    convert_path(str(tmp_path / "source"), str(tmp_path / "converted"), progress=lambda done, total, line: None)
    before, after = loaded(tmp_path / "source"), loaded(tmp_path / "converted")
    assert read_model_config(EngineConfig(str(tmp_path / "converted"), "")).quantization == "fp8"
    for path, values in before.items():
        np.testing.assert_array_equal(after[path], values)


def test_matrices_that_a_quantised_checkpoint_left_out_are_quantised_only_when_asked(tmp_path):
    floats = write_quantised(tmp_path, "fp8", "channel", left_out="down_proj")
    with pytest.raises(
        CheckpointError, match=r"2 of 14 matrices, as 'model.layers.0.mlp.down_proj.weight'.*none widens"
    ):
        loaded(tmp_path)
    found = loaded(tmp_path, quantization="fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(found["layers.0.mlp.down.kernel"], rounded(floats, "fp8")[name], rtol=1e-6)
    np.testing.assert_allclose(loaded(tmp_path, quantization="none")["layers.0.mlp.down.kernel"], floats[name])


def test_a_scale_of_another_shape_is_named(tmp_path):
    write_quantised(tmp_path, "fp8", "block")
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 32]})
    with pytest.raises(CheckpointError, match=r"_proj.weight_scale_inv' is \[\d, \d\] beside .*expected one scale"):
        loaded(tmp_path)


def test_8_bit_tensors_without_a_scale_or_a_word_in_the_config_are_refused(tmp_path):
    write_quantised(tmp_path, "fp8", "tensor")
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"is float8_e4m3fn; expected float32, float16 or bfloat16"):
        loaded(tmp_path)
    assert (
        SafetensorsSource(str(tmp_path)).tensors["model.layers.0.mlp.up_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 8}, "quant_method 'gptq'"),
        (compressed_tensors("int8") | {"format": "pack-quantized"}, "format 'pack-quantized'"),
        (compressed_tensors("int8", num_bits=4), "type 'int', 4 bits"),
        (compressed_tensors("int8", symmetric=False), "symmetric False"),
        (compressed_tensors("int8", strategy="group"), "strategy 'group'"),
        (compressed_tensors("fp8") | {"quantization_status": "frozen"}, "status 'frozen'"),
        (compressed_tensors("fp8") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed_tensors("fp8") | {"config_groups": {}}, "0 schemes"),
    ],
)
def test_other_ways_of_quantising_are_refused_by_name(found, said):
    with pytest.raises(ConfigError, match=said):
        stored_quantization({"quantization_config": found})


def test_blocks_of_compressed_tensors_are_read_in_both_ways_of_writing_them():
    for size in ([128, 64], "128x64"):
        found = stored_quantization(
            {"quantization_config": compressed_tensors("fp8", strategy="block", block_structure=size)}
        )
        assert found is not None and found.block == (128, 64)


def test_another_method_than_the_checkpoints_own_is_refused(tmp_path):
    write_quantised(tmp_path, "int8", "column")
    with pytest.raises(ConfigError, match="--quantization fp8: the checkpoint is int8 already.*none"):
        read_model_config(EngineConfig(str(tmp_path), "", quantization="fp8"))


@pytest.mark.parametrize(
    ("options", "said"), [({"quantization": "int8"}, "--quantization int8"), ({"kv_cache_dtype": "fp8"}, "no KV cache")]
)
def test_an_encoder_takes_neither(tmp_path, options, said):
    write_tiny_bert(tmp_path)
    config = EngineConfig(str(tmp_path), str(tmp_path), **options)
    model = read_encoder_config(config)
    assert model is not None
    with pytest.raises(ConfigError, match=said):
        build_encoder(config, model, quiet)


# What it saves


@pytest.mark.parametrize("method", ["int8", "fp8", None])
@pytest.mark.parametrize("tp", [1, 8])
def test_the_size_of_quantised_weights_is_that_of_their_parameters(method, tp):
    model = replace(LLAMA_8B, quantization=method)
    mesh = jax.sharding.AbstractMesh((1, tp), ("dp", "tp"))
    _, description = describe(model, jnp.dtype("bfloat16"), mesh, "gpu")
    leaves = [(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(description)]
    held = sum(int(np.prod(shape)) * leaf.dtype.itemsize for leaf, shape in leaves)
    assert weight_bytes(model, "bfloat16", tp) == held
    per_matrix = {
        leaf.dtype.itemsize for leaf, shape in leaves if ".kernel" in leaf.path and leaf.path.startswith("layers")
    }
    assert per_matrix == ({2} if method is None else {1, 4})


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 64), (8, 128), (2, 256)])
def test_an_8_bit_cache_takes_half_and_its_scales(num_kv_heads, head_dim):
    for asked in ("auto", "int8", "fp8", "float32"):
        dtype = choose_kv_dtype(EngineConfig("", "", kv_cache_dtype=asked), "bfloat16")
        made = jax.eval_shape(lambda dtype=dtype: kv_cache.empty(3, 5, num_kv_heads, head_dim, 16, jnp.dtype(dtype)))
        held = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
        assert held == 5 * 16 * kv_cache.bytes_per_token(3, num_kv_heads, head_dim, dtype)
        assert (made.scales is not None) == (asked in ("int8", "fp8"))
    small, wide = (kv_cache.bytes_per_token(3, num_kv_heads, head_dim, dtype) for dtype in ("int8", "bfloat16"))
    assert 0.5 < small / wide < 0.54


# Through the engine


@pytest.mark.parametrize("method", FORMATS)
def test_the_engine_computes_with_8_bit_weights_as_with_the_floats_they_stand_for(method, rng):
    engine = build_engine(shared_folder("grouped"), **SMALL, quantization=method)
    weights = rounded(read_safetensors(shared_folder("grouped")), method)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (1, 17, 40)]
    answers = Driver(engine.runner, engine.sizes.scheduler).run([(prompt, greedy(8)) for prompt in prompts])
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        table = log_softmax(numpy_forward(shared_folder("grouped"), prompt + answer.token_ids, weights))
        floats = log_softmax(numpy_forward(shared_folder("grouped"), prompt + answer.token_ids))
        for index, (token, told) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert told is not None
            assert told.logprob == pytest.approx(table[len(prompt) - 1 + index, token], abs=1e-4)
            worst = max(worst, abs(told.logprob - floats[len(prompt) - 1 + index, token]))
    assert worst > 1e-3, "nothing was quantised"


def rounding(dtype: jnp.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """What a cache of a dtype makes of k or v [T, K, D]."""

    def round_kv(x: np.ndarray) -> np.ndarray:
        rows, scales = kv_cache.quantise(*2 * (jnp.asarray(x, jnp.float32),), dtype)
        small, _ = kv_cache.unpack(jnp.swapaxes(kv_cache.numbers(rows), 0, 1), *x.shape[1:])
        return np.swapaxes(np.asarray(small, np.float64), 0, 1) * np.asarray(scales)[:, ::2, None]

    return round_kv


def assert_holds_rounded_kv(
    folder: str, weights: Mapping[str, np.ndarray], dtype: jnp.dtype, prompt: list[int], answer: Answer
) -> None:
    """The answer is near the float64 forward with rounded K and V, and farther from the one without. A number near a
    border may be rounded to its other side, float32 here and float64 there, and others behind it."""
    given = (folder, prompt + answer.token_ids, weights)
    table, floats = (log_softmax(numpy_forward(*given, round_kv=each)) for each in (rounding(dtype), None))
    place = (np.arange(len(answer.token_ids)) + len(prompt) - 1, answer.token_ids)
    told = np.array([item.logprob for item in answer.logprobs if item is not None])
    errors, changes = np.abs(told - table[place]), np.abs(told - floats[place])
    print(dtype, len(prompt), np.median(errors), errors.mean() / changes.mean(), errors.max(), changes.max())
    assert np.median(errors) < 1e-3 and errors.mean() < 0.2 * changes.mean()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_engine_computes_with_an_8_bit_cache_as_with_the_numbers_it_holds(dtype, rng):
    """Prompts in chunks, cached prefixes and decoded tokens, of K and V that were rounded when they were written."""
    engine = build_engine(shared_folder("grouped"), **SMALL, kv_cache_dtype=dtype)
    held = kv_cache.numbers(engine.runner._state.cache.pages[0, 0]).dtype
    assert held == {"int8": "int8", "fp8": "float8_e4m3fn"}[dtype]
    driver = Driver(engine.runner, engine.sizes.scheduler)
    weights = read_safetensors(shared_folder("grouped"))
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (5, 37)]
    for cached in (0, 32):
        answers = driver.run([(prompt, greedy(24)) for prompt in prompts])
        assert answers[1].cached_tokens == cached
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_holds_rounded_kv(shared_folder("grouped"), weights, held, prompt, answer)


def test_llm_takes_both_and_says_so():
    with LLM(shared_folder("grouped"), show_progress=False, **SMALL, quantization="fp8", kv_cache_dtype="fp8") as llm:
        assert (llm.ready.quantization, llm.ready.kv_cache_dtype) == ("fp8", "float8_e4m3fn")
        assert len(llm.generate([5, 6, 7], max_tokens=4, ignore_eos=True).token_ids) == 4
    for wrong, said in (({"quantization": "awq"}, "awq: not served"), ({"kv_cache_dtype": "int4"}, "int4: not served")):
        with pytest.raises(ConfigError, match=said):
            LLM(shared_folder("grouped"), show_progress=False, **SMALL, **wrong)


def test_the_interpreted_kernels_refuse_8_bit_pages():
    with pytest.raises(ConfigError, match="--attention-backend pallas: .*float cache; this is int8; 'xla' runs"):
        build_engine(shared_folder("grouped"), **SMALL, kv_cache_dtype="int8", attention_backend="pallas")


def test_a_quantised_checkpoint_with_a_quantised_cache_is_served(tmp_path, rng):
    """And answers as the floats it stands for do with that cache."""
    floats = write_quantised(tmp_path, "int8", "column")
    engine = build_engine(str(tmp_path), **SMALL, kv_cache_dtype="int8")
    prompt = rng.integers(3, VOCAB, 40).tolist()
    (answer,) = Driver(engine.runner, engine.sizes.scheduler).run([(prompt, greedy(24))])
    assert_holds_rounded_kv(str(tmp_path), floats, jnp.dtype("int8"), prompt, answer)
