"""The AOT matrix: the engine's largest steps, compiled for accelerators that are not there, and what is recorded of it.

A small part runs wherever libtpu is installed; the rest is minutes of compiling: make aot.
"""

import json
import os
from pathlib import Path

import pytest
from targets import has_libtpu

from bench.aot_matrix import MODELS, TOPOLOGIES, compiled, too_large
from jaxserve.planner.plan import make_plan
from jaxserve.planner.slices import parse_slice
from jaxserve.planner.targets import why_no_compiler

RECORDED = Path(__file__).parents[2] / "bench" / "results" / "aot_matrix.json"
whole_matrix = pytest.mark.skipif(not os.environ.get("JAXSERVE_AOT"), reason="compiles for minutes: make aot")
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed: pip install jaxserve[aot]")
pytestmark = pytest.mark.timeout(1200)

ROWS = 64  # decode rows; the default, 256, is what bench.aot_matrix records
MATRIX = [
    (model, topology)
    for model, slices in {
        "SmolLM2-135M": ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1", "h200:1"),
        "Llama-3.2-1B": ("v5e:1x1", "v6e:2x4", "v5p:2x2x1"),
        "Llama-3.1-8B": ("v5e:2x4", "v6e:1x1", "v6e:2x4", "tpu7x:2x2x1", "h200:1"),
        "Qwen3-32B": ("v6e:2x4", "v5p:2x2x1"),
        "Llama-3.3-70B": ("v6e:2x4", "tpu7x:2x2x1", "h200:8"),
    }.items()
    for topology in slices
]


def test_the_recorded_matrix_has_every_model_and_target_and_no_faults():
    steps = json.loads(RECORDED.read_text())["steps"]
    assert {step["model"] for step in steps} >= set(MODELS) and {step["topology"] for step in steps} >= set(TOPOLOGIES)
    assert not [(step["model"], step["topology"], step["faults"]) for step in steps if step["faults"]]


@needs_libtpu
def test_the_default_model_compiles_for_a_chip_and_the_plan_says_what_it_needs():
    where, engine = parse_slice("v5e:1x1"), {"max_running": 16, "chunked_prefill_size": 128}
    plan = make_plan("SmolLM2-135M", where.name, engine=engine)
    assert plan.fits, plan.reason
    assert plan.not_compiled is None and plan.memory is not None and plan.memory.temporaries
    for step in plan.compiled:
        assert step.collectives == {} and step.cache_copies == 0
        held = plan.memory.weights + plan.memory.kv_cache + plan.memory.state
        assert held <= step.arguments < held * 1.02  # the compiler's own count, with the padding of its tiles


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x4", pytest.param("tpu7x:2x2x1", marks=whole_matrix)])
def test_a_step_on_eight_devices_holds_exactly_the_exchanges_it_must(topology):
    where = parse_slice(topology)
    for _, faults in compiled("Llama-3.1-8B", where, engine={"max_running": 8, "chunked_prefill_size": 128}):
        assert not faults


@needs_libtpu
def test_the_70b_is_out_of_memory_on_8_chips_of_v5e_for_the_compiler_too():
    """The arithmetic refuses it before; without memory to compare with, the compiler does."""
    step = too_large("Llama-3.3-70B", parse_slice("v5e:2x4"))
    assert step.out_of_memory and step.error is not None


@whole_matrix
@pytest.mark.parametrize(("model", "topology"), MATRIX)
def test_the_largest_steps_compile_fit_and_break_no_promise(model, topology):
    where = parse_slice(topology)
    if missing := why_no_compiler(where):
        pytest.skip(missing)
    for step, faults in compiled(model, where, engine={"max_running": ROWS}):
        assert not faults, step.bucket
