"""Starts and ends of the real server, and the ways a model's files may lie, with a tiny model: starting is what costs
here."""

import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.convert import convert_path
from jaxserve.config import ConfigError
from jaxserve.llm import LLM
from jaxserve.text.params import ParameterError
from tests.api_server import error_of
from tests.real_engines import RealServer, alive, eventually
from tests.tiny_llama import numpy_forward, write_tiny_gguf, write_tiny_llama

FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
SMALL = (
    "--max-total-tokens",
    "1024",
    "--max-running-requests",
    "2",
    "--chunked-prefill-size",
    "16",
    "--dtype",
    "float32",
)
SMALL_ENGINE: dict[str, Any] = {
    "max_total_tokens": 1024,
    "max_running": 2,
    "chunked_prefill_size": 16,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model"))


def _state(server: RealServer) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(server.url + "/health", timeout=5) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


def _stages_until_ready(server: RealServer) -> dict[str, list[int]]:
    """Stage -> what was done of it, as /health told while it answered 503; the other routes answer 503 then too."""
    stages: dict[str, list[int]] = {}
    while True:
        code, state = _state(server)
        if code == 200:
            return stages
        assert server.process.poll() is None, server.output()
        if code:
            assert code == 503 and state["status"] == "starting" and state["done"] >= 0 <= state["total"], state
            if not stages:
                early = server.http.post("/v1/completions", json={"model": "any", "prompt": "too early"})
                assert error_of(early, 503)["code"] == "server_starting" and early.json()["stage"]
            stages.setdefault(state["stage"], []).append(state["done"])
        time.sleep(0.05)


@linux
@pytest.mark.timeout(600)
def test_two_starts_in_a_row_and_both_ways_to_be_killed(tiny: Path, tmp_path: Path):
    """Not ready is 503 with a stage; the second start compiles nothing; no process outlives the other."""
    flags = ("--model", str(tiny), "--cache-dir", str(tmp_path / "cache"), *SMALL)
    with RealServer(*flags, log=tmp_path / "first.log") as first:
        stages = _stages_until_ready(first)
        assert "compile" in stages and all(counts == sorted(counts) for counts in stages.values()), stages
        first.wait()
        assert first.engine["cache_misses"] > 0
        reply = first.complete("Hello world", max_tokens=8, extra_body={"ignore_eos": True})
        children = first.children()
        assert children
        first.kill()
        assert eventually(lambda: not any(map(alive, children)), 2), "a child outlived the killed server by 2 s"

    started = time.monotonic()
    with RealServer(*flags, log=tmp_path / "second.log", port=first.port) as second:
        second.wait()
        print(f"ready for the second time after {time.monotonic() - started:.1f} s")
        assert second.engine["cache_misses"] == 0 and "#cache_miss: 0" in second.output()
        again = second.complete("Hello world", max_tokens=8, extra_body={"ignore_eos": True})
        assert again.choices[0].text == reply.choices[0].text
        children = second.children()
        os.kill(second.engine_pid(), signal.SIGKILL)
        assert second.process.wait(20) != 0
        assert "SIGKILL" in second.output()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", second.port))
        assert eventually(lambda: not any(map(alive, children)), 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_starts_from_nothing_and_again(tmp_path: Path):
    """Fetched, converted and compiled into an empty cache (this one needs pip's index), then only loaded."""
    seconds = []
    for start in range(2):
        began = time.monotonic()
        flags = ("--cache-dir", str(tmp_path / "cache"))
        with RealServer(*flags, log=tmp_path / f"{start}.log") as server:
            stages = _stages_until_ready(server)
            seconds.append(time.monotonic() - began)
            server.wait()
            assert (server.engine["cache_misses"] == 0) == bool(start)
            assert {"download", "convert", "compile"} <= set(stages) or start
            assert "Paris" in server.chat("What is the capital of France?", max_tokens=16).choices[0].message.content
    print(f"ready after {seconds[0]:.1f} s from nothing, then after {seconds[1]:.1f} s")


def _forms(tiny: Path, folder: Path) -> dict[str, str]:
    """The same float32 weights as Hugging Face files, as GGUF, and converted from either."""
    gguf = folder / "tiny.gguf"
    write_tiny_gguf(tiny, gguf)
    paths = {"safetensors": str(tiny), "gguf": str(gguf)}
    for form, source in list(paths.items()):
        paths[f"converted-{form}"] = str(folder / f"converted-{form}")
        convert_path(source, paths[f"converted-{form}"], progress=lambda done, total, message: None)
    return paths


def _tokens(model: str, cache_dir: str, **options) -> tuple[tuple[int, ...], str]:
    with LLM(model, cache_dir=cache_dir, show_progress=False, **SMALL_ENGINE, **options) as llm:
        prompt = llm.tokenizer.encode("Hello world of the sea", add_special_tokens=False)
        done = llm.generate(prompt, max_tokens=24, temperature=0.0, ignore_eos=True, include_stop=True)
        assert llm.stats is not None and llm.stats.compilations_total == 0
        pieces = llm.stream("Hello", max_tokens=4, temperature=0.0, ignore_eos=True)
        return tuple(prompt) + done.token_ids, "".join(pieces)


def test_every_form_of_a_model_serves_the_same_tokens(tiny: Path, tmp_path: Path, cache_dir: str):
    """And they are those of an independent float64 forward."""
    paths = _forms(tiny, tmp_path)
    if not FULL:
        del paths["converted-safetensors"]
    told = {form: _tokens(path, cache_dir) for form, path in paths.items()}
    ids, _ = told["safetensors"]
    assert all(each == told["safetensors"] for each in told.values()), told
    logits = numpy_forward(tiny, ids)
    assert ids[-24:] == tuple(int(np.argmax(row)) for row in logits[len(ids) - 25 : -1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_form_of_a_model_is_served_over_http(tiny: Path, tmp_path: Path, cache_dir: str):
    texts = {}
    for form, path in _forms(tiny, tmp_path).items():
        with RealServer("--model", path, "--cache-dir", cache_dir, *SMALL, log=tmp_path / f"{form}.log") as server:
            reply = server.wait().complete("Hello world", max_tokens=24, extra_body={"ignore_eos": True})
            texts[form] = (reply.choices[0].text, server.chat("Hello", max_tokens=8).choices[0].message.content)
    assert len(set(texts.values())) == 1, texts


def _without_weights(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def test_dummy_weights_need_a_config_only(tiny: Path, tmp_path: Path, cache_dir: str):
    bare = str(_without_weights(tiny, tmp_path / "bare"))
    one, again = (_tokens(bare, cache_dir, load_format="dummy", random_seed=3) for _ in range(2))
    assert one == again and len(one[0]) > 24
    with pytest.raises((ConfigError, ValueError)):
        LLM(bare, cache_dir=cache_dir, show_progress=False, **SMALL_ENGINE)


@pytest.mark.slow
def test_dummy_weights_are_served_over_http(tiny: Path, tmp_path: Path, cache_dir: str):
    bare = str(_without_weights(tiny, tmp_path / "bare"))
    flags = ("--model", bare, "--load-format", "dummy", "--cache-dir", cache_dir, *SMALL)
    with RealServer(*flags, log=tmp_path / "dummy.log") as server:
        reply = server.wait().chat("Hello", max_tokens=8, extra_body={"ignore_eos": True})
        assert reply.usage.completion_tokens == 8


def test_generate_chat_and_stream_in_process(tiny: Path, cache_dir: str):
    greedy = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    with LLM(str(tiny), cache_dir=cache_dir, show_progress=False, **SMALL_ENGINE) as llm:
        one = llm.generate("Hello world", **greedy)
        several = llm.generate(["Hello world", "the sea", "a"] * 3, **greedy)  # more than rows
        assert [each.text for each in several] == [each.text for each in several[:3]] * 3
        assert several[0].text == one.text and len(one.token_ids) == 12
        assert "".join(llm.stream("Hello world", **greedy)) == one.text
        said = llm.chat([{"role": "user", "content": "Hello"}], n=2, seed=5, max_tokens=12)
        assert said.choices[0] != said.choices[1]
        assert said.choices == llm.chat("Hello", n=2, seed=5, max_tokens=12).choices
        for piece in llm.stream("Hello world", max_tokens=400, ignore_eos=True):
            assert piece
            break  # leaving early aborts it
        assert eventually(lambda: llm.stats is not None and llm.stats.num_held_pages == 0, 10)
        with pytest.raises(ParameterError, match="temperature"):
            llm.generate("Hello", temperature=9.0)
        with pytest.raises(ParameterError, match="context length"):
            llm.generate("Hello world " * 600)
        assert llm.generate("Hello world", **greedy).text == one.text
        assert llm.stats is not None and llm.stats.compilations_total == 0


def test_what_cannot_be_served_is_said_with_exit_code_2(tiny: Path, tmp_path: Path, cache_dir: str):
    flags = ("--model", str(tiny), "--cache-dir", cache_dir, "--max-model-len", "100000")
    with RealServer(*flags, log=tmp_path / "long.log") as server:
        assert server.process.wait(120) == 2
        assert "--max-model-len 100000" in server.output() and "Traceback" not in server.output()
