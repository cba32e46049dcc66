"""Meshes of several devices: the same answers as on one, and no exchange between devices but the ones that must be."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mesh_runs import RUNS

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.sizing import GIB, DeviceFacts, choose_mesh, resolve
from jaxserve.model.partition import Shares, merged

ROOT = Path(__file__).resolve().parent.parent
FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all
FEW = ("tied 1x1", "tied 1x2", "tied 1x8", "tied 2x2", "tied-int8 1x1", "tied-int8 1x2")
NAMES = tuple(RUNS) if FULL else FEW

SMOLLM2 = ModelConfig(30, 576, 9, 3, 64, 1536, 49152, 8192, tie_embeddings=True)
LLAMA_1B = ModelConfig(16, 2048, 32, 8, 64, 8192, 128256, 131072, tie_embeddings=True)
LLAMA_8B = ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 131072)
LLAMA_70B = ModelConfig(80, 8192, 64, 8, 128, 28672, 128256, 131072)
QWEN2_HALF_B = ModelConfig(24, 896, 14, 2, 64, 4864, 151936, 32768, tie_embeddings=True)


pytestmark = pytest.mark.timeout(1500)  # the first test waits for all runs; in full they are fourteen engines


def runs() -> dict[str, dict[str, Any]]:
    code, output, said = _outcome()
    assert code == 0, said[-3000:]
    return json.loads(output.splitlines()[-1])


@cache  # of a failure too
def _outcome() -> tuple[int, str, str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "mesh_runs.py"), *NAMES]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    except subprocess.TimeoutExpired as error:
        return 1, "", f"not done after {error.timeout} s"
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(" 1x1")])
def test_any_mesh_answers_as_one_device_does(name):
    model, dp, tp = RUNS[name]
    one, many = runs()[f"{model} 1x1"], runs()[name]
    assert many["devices"] == dp * tp
    assert len(one["answers"]) == len(many["answers"]) > 10
    # 8 bits: a number of the cache near a border may be rounded to its other side.
    tolerance = 2e-2 if "-" in model else 1e-4
    for want, got in zip(one["answers"], many["answers"], strict=True):
        assert (got["tokens"], got["reason"]) == (want["tokens"], want["reason"])
        for part in ("logprobs", "prompt", "vector"):
            np.testing.assert_allclose(got[part], want[part], atol=tolerance)
    assert any(answer["vector"] for answer in one["answers"]) and any(answer["prompt"] for answer in one["answers"])


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_adds_up_twice_a_layer_and_gathers_its_logits_once(name):
    """And once for the embedding, of which each device knows its own part of the vocabulary. Between ranks: nothing."""
    tp = RUNS[name][2]
    found = runs()[name]
    layers = {"all-reduce": 2 * found["layers"]}
    expected = {"begin": {"all-reduce": 1}, "layers": layers, "finish": {"all-gather": 1}}
    assert found["collectives"] == (expected if tp > 1 else {"begin": {}, "layers": {}, "finish": {}})


def test_an_encoder_shares_its_texts_out_over_ranks():
    one, two = runs()["encoder 1"], runs()["encoder 2"]
    assert (one["devices"], two["devices"], len(one["vectors"])) == (1, 2, 7)
    np.testing.assert_allclose(two["vectors"], one["vectors"], atol=1e-5)


def test_a_device_holds_its_share_of_the_cache():
    heads = {name: found["pages"][2] for name, found in runs().items() if name in FEW[:4]}
    assert heads == {"tied 1x1": 3, "tied 1x2": 2, "tied 1x8": 1, "tied 2x2": 2}
    assert runs()["tied 2x2"]["pages"][1] < 0.6 * runs()["tied 1x2"]["pages"][1], "each rank has half of the pages"


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("model", [SMOLLM2, LLAMA_8B, LLAMA_70B, QWEN2_HALF_B], ids=str)
def test_every_head_is_somewhere_beside_its_kv_head(model, tp):
    shares = Shares.of(model, tp)
    dim, group = model.head_dim, model.num_heads // model.num_kv_heads
    queries, keys = [], []
    for device in range(tp):
        heads, kv_heads = (shares.segments(axis, device) for axis in ("heads", "kv_heads"))
        assert [count for _, count in heads] == [dim] * shares.num_heads
        assert [count for _, count in kv_heads] == [dim] * shares.num_kv_heads
        for index, (start, _) in enumerate(heads):
            if start is not None:
                kv_start = kv_heads[index * shares.num_kv_heads // shares.num_heads][0]
                assert kv_start is not None and start // dim // group == kv_start // dim
                queries.append(start // dim)
        keys += [start // dim for start, _ in kv_heads if start is not None]
    assert sorted(queries) == list(range(model.num_heads)), "a query head is lost or doubled"
    assert set(keys) == set(range(model.num_kv_heads))
    assert tp > model.num_kv_heads or len(keys) == model.num_kv_heads, "a kv head is held twice without need"


@pytest.mark.parametrize("tp", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("axis", ["mlp", "vocab"])
def test_features_and_vocabulary_are_shared_out_in_order_and_filled_up(axis, tp):
    size = {"mlp": SMOLLM2.mlp_dim, "vocab": SMOLLM2.vocab_size}[axis]
    shares = Shares.of(SMOLLM2, tp)
    each = {"mlp": shares.mlp_dim, "vocab": shares.vocab_size}[axis]
    rows = merged(tuple(segment for device in range(tp) for segment in shares.segments(axis, device)))
    assert rows == ((0, size),) + (((None, each * tp - size),) if each * tp > size else ())
    assert each == -(-size // tp)


@pytest.mark.parametrize(
    ("model", "devices", "memory", "mesh"),
    [
        (LLAMA_8B, 8, 16, (1, 8)),
        (LLAMA_8B, 16, 16, (2, 8)),  # 8 kv heads: no device holds one twice
        (LLAMA_8B, 4, 80, (1, 4)),
        (LLAMA_70B, 16, 16, (1, 16)),  # its weights need all devices
        (LLAMA_70B, 8, 141, (1, 8)),
        (SMOLLM2, 8, 141, (8, 1)),  # 3 kv heads
        (QWEN2_HALF_B, 8, 80, (4, 2)),
        (LLAMA_1B, 1, 16, (1, 1)),
    ],
)
def test_an_accelerator_host_uses_all_its_devices(model, devices, memory, mesh):
    for platform in ("tpu", "gpu"):
        facts = DeviceFacts(platform, devices, memory * GIB)
        assert choose_mesh(model, EngineConfig("model", "cache"), facts) == mesh
        sizes = resolve(model, EngineConfig("model", "cache"), facts)
        assert (sizes.dp, sizes.tp) == mesh


def test_flags_say_how_many_devices_and_the_cpu_takes_one():
    def mesh(platform: str, found: int, **flags: Any) -> tuple[int, int]:
        return choose_mesh(LLAMA_8B, EngineConfig("model", "cache", **flags), DeviceFacts(platform, found, None))

    assert mesh("cpu", 8) == (1, 1)
    assert mesh("cpu", 8, tp_size=4) == (1, 4)
    assert mesh("cpu", 8, dp_size=2) == (2, 1)
    assert mesh("gpu", 8, dp_size=2) == (2, 4)
    assert mesh("gpu", 8, tp_size=2) == (1, 2)
    assert mesh("tpu", 8, tp_size=2, dp_size=3) == (3, 2)
    with pytest.raises(ConfigError, match="--tp-size 4 and --dp-size 3 take 12 devices; 8 of platform gpu are there"):
        mesh("gpu", 8, tp_size=4, dp_size=3)


def test_ranks_share_rows_and_cache_that_are_asked_for():
    config = EngineConfig("model", "cache", dp_size=4, tp_size=2, max_running=64, max_total_tokens=65536)
    sizes = resolve(LLAMA_8B, config, DeviceFacts("gpu", 8, None))
    assert (sizes.dp, sizes.tp, sizes.scheduler.max_running) == (4, 2, 16)
    assert (sizes.scheduler.num_pages - 1) * sizes.scheduler.page_size == 65536 // 4
    note = next(note for note in sizes.notes if "context cut" in note)
    assert "of each of 4 ranks" in note
