"""jaxserve plan: the arithmetic against sums made by hand, the command on a config.json, and what is predicted against
what an engine really holds."""

import json
import logging
import math
from dataclasses import replace

import jax
import pytest
from engines import FULL, shared_engine, shared_folder

from jaxserve.__main__ import main
from jaxserve.config import ConfigError
from jaxserve.engine.chips import CHIPS, GIB
from jaxserve.planner.models import KNOWN, read_model
from jaxserve.planner.plan import Plan, compare, make_plan
from jaxserve.planner.report import describe, table
from jaxserve.planner.roofline import Work, hops, step_time
from jaxserve.planner.slices import SLICES, Slice, parse_slice, single_hosts

LLAMA_8B_NORMS = 65 * 4096  # two in each of 32 layers, and the last one
LLAMA_8B_MATRICES = 8_030_261_248 - LLAMA_8B_NORMS  # of the published number of parameters


def arithmetic(model: str, topology: str, **asked: object) -> Plan:
    (plan,) = compare(model, [topology], **asked)  # type: ignore[arg-type]
    return plan


@pytest.mark.parametrize(
    ("text", "name", "devices", "hosts"),
    [
        ("v6e:2x4", "v6e:2x4", 8, 1),
        ("v6e-8", "v6e:2x4", 8, 1),
        ("v5litepod-16", "v5e:4x4", 16, 2),
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8, 1),
        ("Ironwood", "tpu7x:1x1x1", 2, 1),
        ("h200x8", "h200:8", 8, 1),
        ("H100", "h100:1", 1, 1),
        ("cpu", "cpu", 1, 1),
    ],
)
def test_slices_have_the_names_that_people_know_them_by(text, name, devices, hosts):
    found = parse_slice(text)
    assert (found.name, found.num_devices, found.num_hosts) == (name, devices, hosts)
    assert parse_slice(found.name) == found


@pytest.mark.parametrize("text", ["v6e:3x3", "h200:3", "b200:8", "", "v6e:"])
def test_a_slice_that_cannot_be_had_is_refused_with_what_there_is(text):
    with pytest.raises(ConfigError, match=r"v6e:2x4|h200:8"):
        parse_slice(text)


def test_one_host_has_the_slices_of_its_chips():
    assert [each.name for each in single_hosts("v6e")] == ["v6e:1x1", "v6e:2x2", "v6e:2x4"]
    assert [each.name for each in single_hosts("v5p")] == ["v5p:2x2x1"]


def test_weights_are_those_of_the_sharding_table():
    """2 bytes a parameter; matrices are shared out, norms are not."""
    for topology, devices in (("v6e:1x1", 1), ("v6e:2x4", 8)):
        memory = arithmetic("Llama-3.1-8B", topology).memory
        assert memory is not None
        assert memory.weights == 2 * (LLAMA_8B_MATRICES // devices + LLAMA_8B_NORMS)


def test_8_bits_fit_what_floats_do_not():
    """Llama 3.1 8B on 16 GB: 7 GB of matrices, 2 GB of embedding and head, and a cache of half the bytes a token."""
    assert not arithmetic("Llama-3.1-8B", "v5e:1x1").fits
    few, fewer = {"quantization": "int8"}, {"quantization": "int8", "kv_cache_dtype": "int8"}
    plan = arithmetic("Llama-3.1-8B", "v5e:1x1", engine=few)
    small = arithmetic("Llama-3.1-8B", "v5e:1x1", engine=fewer)
    assert plan.fits and plan.memory is not None and 8.4 < plan.memory.weights / GIB < 8.6
    roomy = [arithmetic("Llama-3.1-8B", "v6e:1x1", engine=options).kv_tokens for options in (few, fewer)]
    assert "Room (bfloat16, weights int8, cache int8, tensor parallel 1)" in describe(small)
    assert roomy[0] and roomy[1] and 1.75 < roomy[1] / roomy[0] < 2  # a small pool is cut to too few blocks of pages
    assert plan.alone is not None and small.alone is not None and small.alone.step_seconds < plan.alone.step_seconds
    with pytest.raises(ConfigError, match="--quantization fp8: the checkpoint is int8 already"):
        read_model("Llama-3.1-8B")[1].quantized("int8").quantized("fp8")


def test_room_for_users_is_the_pool_in_whole_pages():
    """A token of Llama 3.1 8B is 32 layers x 8 heads x (K and V) x 128 x 2 bytes: 128 KiB, 16 KiB on each of 8."""
    plan = arithmetic("Llama-3.1-8B", "v6e:2x4", context=1000)
    assert plan.memory is not None and plan.kv_tokens is not None
    assert plan.memory.kv_cache == (plan.kv_tokens + 128) * 16384  # and page 0
    assert plan.users == min(plan.kv_tokens // 1024, 256)  # 1,000 tokens are 8 pages of 128
    assert plan.users_limited_by == "--max-running-requests"
    assert arithmetic("Llama-3.1-8B", "v6e:1x1", context=8192).users_limited_by == "memory"


def test_a_decode_step_reads_weights_and_context_once():
    """Llama 3.1 8B on one H200, one user of 8,192 tokens: all weights but the embedding, and 1 GiB of KV."""
    speed = arithmetic("Llama-3.1-8B", "h200:1", context=8192).alone
    assert speed is not None
    read = 2 * (8_030_261_248 - 128256 * 4096) + 8192 * 131072
    assert speed.step.memory == pytest.approx(read / 4.8e12, rel=1e-6)
    flops = 2 * (LLAMA_8B_MATRICES - 128256 * 4096) + 4 * 32 * 128 * 32 * 8192
    assert speed.step.compute == pytest.approx(flops / 989e12, rel=1e-6)
    assert speed.step.exchange == 0
    assert speed.tokens_per_second == pytest.approx(1 / speed.step.memory)


def test_exchanges_are_counted_by_bytes_and_by_hops():
    chip = replace(CHIPS["v6e"], bandwidth=1e9, flops=1e12, link=1e6, latency=0.5)
    where = Slice(chip, (2, 4))
    work = Work(10**9, 10**9, 10**12, reduce_bytes=4000, num_reduces=3, gather_bytes=2000)
    time = step_time(work, where, 8)
    assert (time.memory, time.compute) == (2.0, 1.0)
    # An all-reduce of 8: 2 * 7/8 of its bytes, and (2 - 1) + (4 - 1) hops there and as many back.
    assert time.exchange == pytest.approx(3 * (0.007 + 8 * 0.5) + 0.002 + 4 * 0.5)
    assert time.total == time.memory + time.exchange
    assert step_time(work, where, 1).exchange == 0


@pytest.mark.parametrize(
    ("topology", "tp", "count"),
    [
        ("v6e:2x4", 8, 8),
        ("v6e:2x2", 4, 4),
        ("v5e:4x4", 4, 6),
        ("tpu7x:2x2x1", 8, 6),
        ("h200:8", 8, 2),
        ("h200:2", 2, 2),
    ],
)
def test_hops_follow_the_axes(topology, tp, count):
    assert hops(parse_slice(topology), tp) == count


def test_the_70b_does_not_fit_8_chips_of_v5e_and_fits_8_of_v6e():
    plan = arithmetic("Llama-3.3-70B", "v5e:2x4")
    assert not plan.fits and plan.reason is not None and "16.4 GiB" in plan.reason
    assert arithmetic("Llama-3.3-70B", "v6e:2x4").fits


def test_the_smallest_slice_is_the_first_that_fits_the_users_asked_for():
    one = make_plan("Llama-3.1-8B", "v6e:1x1", compile_steps=False)
    many = make_plan("Llama-3.1-8B", "v6e:1x1", users=100, compile_steps=False)
    assert one.fits and one.smallest["v6e"] == "v6e:1x1"
    assert not many.fits and many.reason == f"{many.users} users of 8192 tokens fit, not 100"
    assert many.smallest["v6e"] == "v6e:2x4"
    assert (
        (arithmetic("Llama-3.1-8B", "v6e:2x4").users or 0) >= 100 > (arithmetic("Llama-3.1-8B", "v6e:2x2").users or 0)
    )


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.3-70B"])
def test_known_architectures_have_their_published_number_of_parameters(name):
    _, config = read_model(name)
    layer = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer += 3 * config.embed_dim * config.mlp_dim + 2 * config.embed_dim
    vocab = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    published = {
        "SmolLM2-135M": 134_515_008,
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.3-70B": 70_553_706_496,
    }
    assert config.num_layers * layer + vocab + config.embed_dim == published[name]


def test_known_names_are_found_however_people_write_them():
    for written in ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "llama-3.1-8b"):
        assert read_model(written)[0] == "Llama-3.1-8B"
    with pytest.raises(ConfigError, match="one of SmolLM2-135M"):
        read_model("Llama-9")


@pytest.fixture
def config_json(tmp_path):
    """A folder that holds a config.json and nothing else."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KNOWN["Llama-3.2-1B"]))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    logger = logging.getLogger("jaxserve")
    before = logger.level
    try:
        with pytest.raises(SystemExit) as left:
            main(["plan", *argv])
    finally:
        logger.setLevel(before)  # the command quiets its process
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command_needs_a_config_json_only(config_json, capsys):
    code, out, _ = run(capsys, "--model", str(config_json), "--topology", "v5e:1x1", "--no-compile")
    assert code == 0
    assert out.startswith("mine on v5e:1x1, 1 device: fits (by arithmetic)")
    assert "not measured" in out
    assert max(map(len, out.splitlines())) <= 80
    by_file, again, _ = run(capsys, "--model", str(config_json / "config.json"), "--topology", "v5e", "--no-compile")
    assert (by_file, again) == (0, out)


def test_json_has_the_fields_that_the_docs_name(config_json, capsys):
    code, out, _ = run(capsys, "--model", str(config_json), "--topology", "v6e:2x4", "--no-compile", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["schema"] == 1 and found["fits"] is True and found["reason"] is None
    assert set(found) == {"schema"} | set(Plan.__dataclass_fields__)
    assert set(found["memory"]) == {"available", "weights", "kv_cache", "state", "temporaries", "code"}
    assert found["memory"]["temporaries"] is None and found["compiled"] == [] and found["not_compiled"]
    assert found["memory"]["available"] == 31992 * 2**20 and "v6e" in found["source"]
    assert found["full"]["users"] == found["users"] and found["alone"]["users"] == 1
    for speed in (found["alone"], found["full"]):
        step = speed["step"]
        assert speed["step_seconds"] == max(step["memory"], step["compute"]) + step["exchange"]
        assert math.isclose(speed["tokens_per_second"], speed["users"] / speed["step_seconds"])


def test_without_a_topology_all_of_one_host_are_compared_in_80_columns(config_json, capsys):
    code, out, _ = run(capsys, "--model", str(config_json), "--context", "131072")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    names = [each.name for family in SLICES if family != "cpu" for each in single_hosts(family)]
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(names)]] == names
    code, out, _ = run(capsys, "--model", str(config_json), "--json", "--topology", "v5e:1x1", "--topology", "v5e:2x4")
    assert code == 0 and [each["topology"] for each in json.loads(out)] == ["v5e:1x1", "v5e:2x4"]


def test_exit_codes_say_whether_it_fits(config_json, capsys):
    small = ("--model", "Llama-3.3-70B", "--topology", "v5e:2x4", "--no-compile")
    assert run(capsys, *small)[0] == 1
    assert run(capsys, *small, "--topology", "v6e:2x4")[0] == 0  # one of them fits
    for wrong in (["--topology", "v9:8"], ["--model", "nothing"], ["--context", "0"], ["--contxt", "9"]):
        code, _, err = run(capsys, *wrong)
        assert code == 2 and err.startswith(("jaxserve plan: error:", "usage:")), wrong
    code, _, err = run(capsys, "--model", str(config_json), "--context", "200000", "--topology", "cpu")
    assert code == 2 and "131072 positions" in err


def test_the_servers_flags_change_the_plan(config_json, capsys):
    def planned(*flags: str) -> dict:
        asked = ("--model", str(config_json), "--topology", "v6e:1x1", "--no-compile", "--json")
        return json.loads(run(capsys, *asked, *flags)[1])

    assert planned("--max-running-requests", "32", "--context", "1024")["users"] == 32
    assert planned("--mem-fraction-static", "0.5")["kv_tokens"] < planned()["kv_tokens"] / 1.5
    assert planned("--dtype", "float32")["memory"]["weights"] == 2 * planned()["memory"]["weights"]
    assert planned("--max-total-tokens", "20000", "--max-model-len", "4096", "--context", "4096")["users"] == 4


def test_what_is_planned_for_the_cpu_is_what_an_engine_holds():
    """To the byte: weights, cache and sampling state of a small model; and the steps it compiles are the engine's."""
    engine = shared_engine()
    plan = make_plan(shared_folder("grouped"), "cpu", context=64, engine=FULL)
    assert plan.fits and plan.memory is not None
    held = engine.runner._params, engine.runner._state
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in held]
    cache = engine.runner._state.cache.pages.nbytes
    assert (plan.memory.weights, plan.memory.kv_cache, plan.memory.state) == (sizes[0], cache, sizes[1] - cache)
    assert {step.bucket for step in plan.compiled} <= set(engine.runner.buckets)
    assert all(step.error is None and step.temporaries > 0 for step in plan.compiled)


def test_people_are_told_why_and_what_would_fit():
    plan = make_plan("Llama-3.3-70B", "v5e:2x4", compile_steps=False)
    text = describe(plan)
    assert "does not fit" in text and "Smallest that fit: v5e:4x4, v6e:2x4," in text
    assert max(map(len, text.splitlines())) <= 80
    assert "does not fit" in table([plan])
