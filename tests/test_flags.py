"""The command line: names of both families, files, refusals, and that asking for help is cheap."""

import subprocess
import sys
import time

import pytest

from jaxserve.cluster_flags import CLUSTER_FLAGS
from jaxserve.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from jaxserve.flags import FLAGS, FlagError, parse
from jaxserve.foreign_flags import NO_EFFECT, NOT_YET, NOT_YET_SWITCHES


def test_no_flag_is_mandatory_and_defaults_are_the_configs():
    options = parse([])
    assert options.model == DEFAULT_MODEL and options.server == ServerConfig() and options.engine == {}
    assert options.warnings == ()


def test_every_flag_fills_a_field_that_exists():
    import dataclasses

    known = {
        "launch": {"model", "revision", "cache_dir", *(flag.target.removeprefix("launch.") for flag in CLUSTER_FLAGS)},
        "engine": {field.name for field in dataclasses.fields(EngineConfig)},
        "server": {field.name for field in dataclasses.fields(ServerConfig)},
    }
    for flag in FLAGS:
        holder, name = flag.target.split(".")
        assert name in known[holder], flag.target
    names = [name for flag in FLAGS for name in flag.names] + [*NO_EFFECT, *NOT_YET, *NOT_YET_SWITCHES]
    assert len(names) == len(set(names))


def test_the_seeds_command_line_is_understood():
    line = "--model-path meta-llama/Meta-Llama-3.1-8B-Instruct --port 30000 --host 0.0.0.0 --log-level warning"
    options = parse(line.split())
    assert options.model == "meta-llama/Meta-Llama-3.1-8B-Instruct"
    assert (options.server.host, options.server.port) == ("0.0.0.0", 30000)
    assert options.server.log_level == options.engine["log_level"] == "warning"


def test_sglangs_and_vllms_names_mean_the_same_with_dashes_or_underscores():
    sglang = (
        "--context-length 100 --mem-fraction-static 0.5 --max-running-requests 3 --chunked-prefill-size 64 "
        "--page-size 16"
    )
    vllm = (
        "--max_model_len 100 --gpu_memory_utilization=0.5 --max-num-seqs 3 --max-num-batched-tokens 64 --block_size 16"
    )
    assert parse(sglang.split()).engine == parse(vllm.split()).engine
    assert parse(sglang.split()).engine == {
        "max_model_len": 100,
        "mem_fraction": 0.5,
        "max_running": 3,
        "chunked_prefill_size": 64,
        "page_size": 16,
    }


def test_switches_have_an_opposite():
    assert parse(["--disable-radix-cache"]).engine == {"disable_radix_cache": True}
    assert parse(["--no-enable-prefix-caching"]).engine == {"disable_radix_cache": True}
    assert parse(["--enable-prefix-caching"]).engine == {"disable_radix_cache": False}
    assert parse(["--no-enable-mixed-chunk"]).engine == {"mixed_chunk": False}
    assert parse(["--no-enable-cache-report"]).server.enable_cache_report is False
    with pytest.raises(FlagError, match="contradict"):
        parse(["--enable-prefix-caching", "--disable-radix-cache"])


def test_several_served_names(tmp_path):
    assert parse(["--served-model-name", "a", "b", "--port", "1"]).server.served_model_names == ("a", "b")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: org/name\nport: 4000\nmax_model_len: 128\nserved-model-name: [a, b]\ndisable_radix_cache: true\n"
        "enable-cache-report: false\nlog_requests: true\napi-key:\n"
    )
    options = parse(["--config", str(path), "--port", "5000", "--enable-prefix-caching"])
    assert (options.model, options.server.port) == ("org/name", 5000)
    assert options.engine == {"max_model_len": 128, "disable_radix_cache": False}
    assert options.server.served_model_names == ("a", "b") and options.server.log_requests
    assert options.server.enable_cache_report is False and options.server.api_key is None


@pytest.mark.parametrize("text", ["- a\n", "prot: 3\n", "port: x\n", "config: a\n", "a: [\n", "port: {a: 1}\n", "\tx"])
def test_a_wrong_file_is_an_error_that_names_the_flag_or_the_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(FlagError):
        parse(["--config", str(path)])
    with pytest.raises(FlagError, match="No such file"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--prot 3", "did you mean --port"),
        ("--served-modell-name x", "--served-model-name"),
        ("serve", "--model serve"),
        ("--trust-remote-code", "never executes code"),
        ("--pp-size 2", "only 1"),
        ("--tensor_parallel_size=0", "at least 1"),
        ("--quantization awq", "auto, none, int8, fp8 are"),
        ("--kv-cache-dtype fp8_e5m2", "auto, float32, bfloat16, int8, fp8 are"),
        ("--cpu-offload-gb 4", "not supported yet"),
        ("--enable-lora", "not supported yet"),
        ("--port 70000", "70000"),
        ("--port x", "--port"),
        ("--dtype int4", "float32"),
        ("--mem-fraction-static 1.5", "share"),
        ("--max-model-len 0", "at least 1"),
        ("--stream-interval 0", "at least 1"),
        ("--model", "--model"),
        ("--watchdog-timeout nan", "seconds"),
    ],
)
def test_a_wrong_flag_says_what_to_change(line, words):
    with pytest.raises(FlagError, match=words):
        parse(line.split())


def test_features_of_one_device_are_accepted_at_one():
    line = "--pp-size 1 --nnodes 1 --node-rank 0 --cpu-offload-gb 0"
    assert parse(line.split()).engine == {}


def test_dtypes_of_8_bits_have_vllms_and_sglangs_names():
    assert parse(["--quantization", "int8", "--kv-cache-dtype", "fp8_e4m3"]).engine == {
        "quantization": "int8",
        "kv_cache_dtype": "fp8",
    }
    assert parse(["--quantization", "compressed-tensors", "--kv_cache_dtype=BF16"]).engine == {
        "quantization": "auto",
        "kv_cache_dtype": "bfloat16",
    }


def test_flags_without_effect_warn_once_each():
    line = "--attention-backend flashinfer --disable-cuda-graph --enable-torch-compile --cuda-graph-bs 1 2 4"
    warnings = parse(line.split()).warnings
    assert len(warnings) == 4 and all("has no effect" in warning for warning in warnings)


def test_attention_backends_are_ours_or_dropped_with_a_warning_or_refused():
    assert parse(["--attention-backend", "pallas"]).engine == {"attention_backend": "pallas"}
    assert parse(["--attention-backend=XLA"]).engine == {"attention_backend": "xla"}
    foreign = parse(["--attention-backend", "FLASHINFER"])
    assert foreign.engine == {} and "auto" in foreign.warnings[0]
    with pytest.raises(FlagError, match="auto, pallas, numba, xla"):
        parse(["--attention-backend", "palas"])


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['jaxserve', '--help']\n"
        "from jaxserve.__main__ import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'jax', 'fastapi', 'transformers', 'tokenizers', 'uvicorn', 'numpy', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--context-length" in done.stdout and "--trust-remote-code" not in done.stdout
    assert time.monotonic() - started < 5  # 0.2 s on an idle machine; the imports above are the real test


def test_a_user_error_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "--prot", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("jaxserve: error: ") and done.stdout == ""


def test_command_lines_for_tools_and_thinking_of_other_servers_are_read():
    vllm = parse(
        ["--enable-auto-tool-choice", "--tool-call-parser", "llama3_json", "--reasoning-parser", "deepseek_r1"]
    )
    assert (vllm.server.tool_call_parser, vllm.server.reasoning_parser) == ("llama3", "deepseek-r1")
    assert len(vllm.warnings) == 1 and "--enable-auto-tool-choice" in vllm.warnings[0]
    assert parse(["--tool-call-parser", "qwen25"]).server.tool_call_parser == "hermes"
    with pytest.raises(FlagError, match="mistral"):
        parse(["--tool-call-parser", "mistral"])


def test_the_random_seed_is_that_of_requests_too():
    assert parse([]).server.random_seed is None
    options = parse(["--seed", "7"])
    assert options.engine == {"random_seed": 7} and options.server.random_seed == 7
