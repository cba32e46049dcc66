"""The real steps compiled for real TPUs (make aot): what they need, copy and exchange. Nothing is run.

Most are cut to two layers, which are a scan already: what holds for one more turn holds for all.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from targets import (
    LLAMA_8B,
    MIB,
    MODELS,
    SMOLLM2,
    Compiled,
    collectives,
    compile_steps,
    has_libtpu,
    makers_of,
    target_of,
)

from jaxserve.engine.chips import CHIPS

pytestmark = [
    pytest.mark.skipif(not os.environ.get("JAXSERVE_AOT"), reason="compiles for minutes: make aot"),
    pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed: pip install jaxserve[aot]"),
    pytest.mark.timeout(1200),
]

# A tuple, its element or a reinterpretation is no new array; the kernels write the one they are given.
NO_COPY = {"parameter", "tuple", "get-tuple-element", "bitcast", "custom-call", "call", "while", "conditional"}
KINDS = [(64, 0), (0, 512), (64, 512)]


def check(step: Compiled, bound: int = 16 * MIB) -> None:
    """Temporaries within bound, besides gate and up of the prefill tokens; the cache written in place by one call of a
    kernel per layer and kind of row, and by nothing else."""
    config, bucket = step.target.shape.config, step.bucket
    bound += 2 * 2 * 2 * bucket.num_prefill * config.mlp_dim // step.target.spread.mesh.size
    assert step.memory.temp_size_in_bytes < bound, f"{step.memory.temp_size_in_bytes / MIB:.1f} MiB of temporaries"
    assert step.memory.alias_size_in_bytes >= step.cache_bytes
    made = makers_of(step.cache_shape, step.text)
    calls = step.target.shape.period or config.num_layers  # in the text; a scan's are called in every turn
    assert made["custom-call"] == calls * ((bucket.num_decode > 0) + (bucket.num_prefill > 0))
    assert set(made) <= NO_COPY, f"{made} make arrays of the cache's shape"


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_compile_for_one_chip_and_write_the_cache_in_place(name, topology):
    with target_of(topology, 1, MODELS[name], num_layers=2) as (target, buckets):
        wanted = KINDS if topology.startswith("v6e") else KINDS[2:]
        for step in compile_steps(target, [buckets[each] for each in wanted]).values():
            check(step)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_a_layer_on_eight_chips_adds_up_twice_and_exchanges_nothing_else(topology):
    with target_of(topology, 8, LLAMA_8B, num_layers=2) as (target, buckets):
        (step,) = compile_steps(target, [buckets[64, 512]]).values()
    check(step)
    assert collectives(step.text) == {"all-reduce": 2}


def test_a_whole_step_of_the_default_model_compiles_for_one_chip():
    """Sampling works on a few float32 copies of the logits, and steps that sample nothing skip it. The embedding, 576
    wide, is laid out anew for the rows that are taken (docs/kernels.md)."""
    with target_of("v5e:2x2", 1, SMOLLM2, num_layers=SMOLLM2.num_layers, max_running=16) as (target, buckets):
        (step,) = compile_steps(target, [buckets[16, 0]], whole=True).values()
    check(step, 16 * MIB + 8 * 16 * SMOLLM2.vocab_size * 4 + 2 * SMOLLM2.vocab_size * 640)


def test_a_whole_step_compiles_for_eight_chips():
    with target_of("v6e:2x4", 8, LLAMA_8B, num_layers=LLAMA_8B.num_layers, max_running=16) as (target, buckets):
        (step,) = compile_steps(target, [buckets[16, 128]], whole=True).values()
    check(step, 16 * MIB + 8 * 32 * LLAMA_8B.vocab_size * 4)
    assert collectives(step.text) == {"all-reduce": 3, "all-gather": 1}, "two of them are in the scan"


def test_a_context_of_128k_fits_scalar_memory():
    """The page tables of 256 rows are 1 MiB: rows are shared out over calls whose tables fit."""
    config = {"max_model_len": 131072, "max_running": 256, "max_total_tokens": 131072}
    with target_of("v6e:2x4", 8, LLAMA_8B, num_layers=1, **config) as (target, buckets):
        decode, prefill = compile_steps(target, [buckets[256, 0], buckets[0, 128]]).values()
    assert makers_of(decode.cache_shape, decode.text)["custom-call"] == 4
    check(prefill)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_the_memory_of_a_chip_is_what_its_compiler_lets_a_program_have(topology):
    memory = CHIPS[topology.partition(":")[0]].memory
    assert memory is not None
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = NamedSharding(Mesh(np.asarray([device]), ("tp",)), PartitionSpec())

    def compile_with(num_bytes: int) -> None:
        rows = jax.ShapeDtypeStruct((num_bytes // MIB, 256, 1024), jnp.float32, sharding=sharding)
        jax.jit(lambda rows: lax.dynamic_update_slice(rows, jnp.zeros((1, 8, 128)), (0, 0, 0)), donate_argnums=0).lower(
            rows
        ).compile()

    compile_with(memory - 2 * MIB)
    with pytest.raises(JaxRuntimeError, match=rf"(available HBM \(|of ){memory / 2**30:.2f}G"):
        compile_with(memory + MIB)


def test_without_the_kernels_a_step_on_tpu_copies_the_cache():
    """What the kernels are for; should XLA learn not to, its path is worth another look."""
    with target_of("v6e:2x4", 1, LLAMA_8B, num_layers=2, backend="xla") as (target, buckets):
        (step,) = compile_steps(target, [buckets[64, 0]]).values()
    assert step.memory.temp_size_in_bytes > step.cache_bytes / 2
