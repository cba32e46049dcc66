"""The AOT matrix: the engine's largest steps, as `jaxserve plan` compiles them, for TPUs that are not there.

The small part runs wherever libtpu is installed; the rest is minutes of compiling: make aot.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
from targets import MIB, has_libtpu

from jaxserve.engine.build import draw
from jaxserve.engine.sizing import DeviceFacts
from jaxserve.planner.compiled import CompiledStep, compile_step
from jaxserve.planner.plan import ask, largest, make_plan
from jaxserve.planner.slices import parse_slice
from jaxserve.planner.targets import compile_mesh

whole_matrix = pytest.mark.skipif(not os.environ.get("JAXSERVE_AOT"), reason="compiles for minutes: make aot")
pytestmark = [
    pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed: pip install jaxserve[aot]"),
    pytest.mark.timeout(1200),
]

ROWS = 64  # decode rows; the default, 256, compiles longer
MATRIX = [
    (model, topology)
    for model, slices in {
        "SmolLM2-135M": ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"),
        "Llama-3.2-1B": ("v5e:1x1", "v6e:2x4", "v5p:2x2x1"),
        "Llama-3.1-8B": ("v5e:2x4", "v6e:1x1", "v6e:2x4", "tpu7x:2x2x1"),
        "Llama-3.3-70B": ("v6e:2x4", "tpu7x:2x2x1"),
    }.items()
    for topology in slices
]


def steps(model: str, topology: str, *, num_layers: int | None = None, **engine: Any) -> list[CompiledStep]:
    where = parse_slice(topology)
    question = ask(model, context=None, users=None, engine=engine)
    config = question.model if num_layers is None else replace(question.model, num_layers=num_layers)
    facts = DeviceFacts("tpu", where.num_devices, where.chip.memory)
    blueprint = draw(config, question.config(), facts, lambda sizes: compile_mesh(where, sizes))
    return [compile_step(blueprint, bucket, "tpu") for bucket in largest(blueprint)]


def check(step: CompiledStep, model: str, topology: str) -> None:
    """It fits; the cache is written in place; temporaries are some copies of the logits and of activations."""
    where, config = parse_slice(topology), ask(model, context=None, users=None, engine={}).model
    assert step.error is None, step.error
    assert step.needed <= (where.chip.memory or 0)
    assert step.cache_copies == 0
    logits = 4 * step.bucket.num_rows * config.vocab_size
    activations = 2 * step.bucket.num_tokens * (config.embed_dim + config.mlp_dim // where.num_devices)
    bound = 64 * MIB + 8 * logits + 8 * activations
    assert step.temporaries < bound, f"{step.temporaries / MIB:.0f} MiB of temporaries, more than {bound / MIB:.0f}"


def test_the_default_model_compiles_for_a_chip_and_the_plan_says_what_it_needs():
    plan = make_plan("SmolLM2-135M", "v5e:1x1", engine={"max_running": 16, "chunked_prefill_size": 128})
    assert plan.fits, plan.reason
    assert plan.not_compiled is None and plan.memory is not None and plan.memory.temporaries
    for step in plan.compiled:
        check(step, "SmolLM2-135M", "v5e:1x1")
        assert step.collectives == {}
        held = plan.memory.weights + plan.memory.kv_cache + plan.memory.state
        assert held <= step.arguments < held * 1.02  # the compiler's own count, with the padding of its tiles


@whole_matrix
@pytest.mark.parametrize(("model", "topology"), MATRIX)
def test_the_largest_steps_compile_and_fit(model, topology):
    for step in steps(model, topology, max_running=ROWS):
        check(step, model, topology)


@whole_matrix
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_each_layer_adds_two_all_reduces(topology):
    found = [steps("Llama-3.1-8B", topology, num_layers=n, max_running=16, max_total_tokens=2**17) for n in (1, 2)]
    for one, two in zip(*found, strict=True):
        more = {kind: two.collectives[kind] - one.collectives.get(kind, 0) for kind in two.collectives}
        assert {kind: count for kind, count in more.items() if count} == {"all-reduce": 2}


@whole_matrix
def test_the_70b_is_out_of_memory_on_8_chips_of_v5e_for_the_compiler_too():
    """The arithmetic refuses it before; without memory to compare with, the compiler does."""
    where = parse_slice("v5e:2x4")
    question = ask("Llama-3.3-70B", context=None, users=None, engine={"max_total_tokens": 2**17, "max_running": 16})
    facts = DeviceFacts("tpu", where.num_devices, None)
    blueprint = draw(question.model, question.config(), facts, lambda sizes: compile_mesh(where, sizes))
    step = compile_step(blueprint, largest(blueprint)[0], "tpu")
    assert step.out_of_memory and step.error is not None
