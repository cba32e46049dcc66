"""Two processes of four virtual CPU devices each, as two machines would serve one model: the answers are those of one
process, and whoever is lost takes the other down at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jaxserve.utils import _free_port
from tests.real_engines import ROOT, RealServer, alive, eventually
from tests.tiny_llama import write_tiny_llama

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc"),
]
TIED: dict[str, Any] = {"seed": 1, "tie": True, "heads": 9, "kv_heads": 3, "head_dim": 24, "embed": 72}
SIZES = (
    "--max-total-tokens",
    "2048",
    "--max-running-requests",
    "4",
    "--chunked-prefill-size",
    "16",
    "--dtype",
    "float32",
)
FOUR_DEVICES = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "NPROC": "16",  # the devices' threads meet in every collective, and two cores would have too few
    "JAX_PLATFORMS": "cpu",
    "JAXSERVE_DIST_SECRET": "correct horse battery staple",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tied", **TIED)


class Machine:
    """`python -m jaxserve` with a rank that is not 0."""

    def __init__(self, *flags: str, log: Path, environ: dict[str, str]):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve", *flags],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environ,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[int]:
        """It, and its children: the engine, and multiprocessing's own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]


@contextmanager
def two_machines(model: str, cache_dir: str, folder: Path, *flags: str) -> Iterator[tuple[RealServer, Machine]]:
    """Not yet ready."""
    folder.mkdir(exist_ok=True)
    address = f"127.0.0.1:{_free_port()}"
    every = ("--model", model, "--cache-dir", cache_dir, "--nnodes", "2", "--dist-init-addr", address, *SIZES, *flags)
    follower = Machine(*every, "--node-rank", "1", log=folder / "rank1.log", environ=FOUR_DEVICES)
    try:
        with RealServer(*every, "--node-rank", "0", log=folder / "rank0.log", environ=FOUR_DEVICES) as server:
            try:
                yield server, follower
            except BaseException:
                print(server.output()[-3000:], follower.output()[-3000:], sep="\n--- rank 1\n")
                raise
    finally:
        for pid in follower.family() if follower.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        follower.process.wait(20)


def answers_of(server: RealServer) -> list[Any]:
    """What every kind of request is told: tokens, log-probabilities, vectors; several at once, more than rows."""
    greedy = {"temperature": 0, "max_tokens": 10, "ignore_eos": True, "logprobs": 2}
    sampled = {"temperature": 1.0, "seed": 5, "top_p": 0.9, "presence_penalty": 0.5, "max_tokens": 10, "logprobs": 1}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/completions",
            greedy | {"prompt": ["Hello world", "the sea", "of the world " * 12, "a", "b c d", "Hello"]},
        ),
        ("/v1/completions", sampled | {"prompt": "Hello world", "n": 2, "logit_bias": {"70": 3.5, "80": -100}}),
        ("/v1/completions", sampled | {"prompt": "the sea", "min_tokens": 4, "repetition_penalty": 1.2}),
        ("/v1/completions", greedy | {"prompt": "Hello world of the sea", "echo": True, "max_tokens": 2}),
        ("/v1/completions", {"prompt": "a number:", "temperature": 0, "max_tokens": 12, "regex": "[0-9]{3}-[0-9]{4}"}),
        ("/v1/embeddings", {"input": ["Hello world", "the sea of the world and more"]}),
    ]
    told = []
    for path, body in bodies:
        reply = server.http.post(path, json={"model": server.model, **body})
        assert reply.status_code == 200, reply.text
        told += [_told(each) for each in reply.json().get("choices") or reply.json()["data"]]
    return told


def _told(entry: dict[str, Any]) -> tuple[Any, list[float]]:
    """-> what must be equal, what must be close."""
    if "embedding" in entry:
        return None, entry["embedding"]
    logprobs = entry["logprobs"] or {"tokens": [], "token_logprobs": []}
    return (entry["text"], entry["finish_reason"], logprobs["tokens"]), [
        each or 0.0 for each in logprobs["token_logprobs"]
    ]


@pytest.fixture(scope="module")
def alone(tiny: str, cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The answers of one process with one device."""
    log = tmp_path_factory.mktemp("alone") / "server.log"
    with RealServer(
        "--model", tiny, "--cache-dir", cache_dir, *SIZES, log=log, environ={"JAX_PLATFORMS": "cpu"}
    ) as server:
        return answers_of(server.wait())


def assert_same(told: list[Any], wanted: list[Any], tolerance: float = 1e-4) -> None:
    assert [same for same, _ in told] == [same for same, _ in wanted]
    for (_, ours), (_, theirs) in zip(told, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


def open_stream(server: RealServer) -> Any:
    """A response whose first piece has come, and which goes on for long."""
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    request = server.http.build_request("POST", "/v1/completions", json=body)
    return server.http.send(request, stream=True)


def test_heads_on_two_machines_answer_as_one_and_a_killed_follower_ends_the_server(
    tiny: str, cache_dir: str, tmp_path: Path, alone: list[Any]
):
    with two_machines(tiny, cache_dir, tmp_path, "--tp-size", "8") as (server, follower):
        server.wait()
        assert server.engine["num_devices"] == 8 and "mesh: dp 1 x tp 8" in server.output()
        assert_same(answers_of(server), alone)
        assert server.metrics()["compilations_total:serving"] == 0
        stream = open_stream(server)
        lines = stream.iter_lines()
        next(lines)
        killed = time.monotonic()
        for pid in follower.family():
            os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line]
        assert any('"error"' in line for line in rest) and rest[-1] == "data: [DONE]", rest[-3:]
        assert server.process.wait(20) == 1
        print(f"the server ended {time.monotonic() - killed:.1f} s after its follower")
        assert time.monotonic() - killed < 10
        assert "rank 1 is gone" in server.output()


def test_ranks_on_two_machines_answer_as_one_and_sigterm_ends_both_in_order(
    tiny: str, cache_dir: str, tmp_path: Path, alone: list[Any]
):
    with two_machines(tiny, cache_dir, tmp_path, "--dp-size", "2") as (server, follower):
        server.wait()
        assert "mesh: dp 2 x tp 4" in server.output()
        assert_same(answers_of(server), alone)
        assert "rank 1 is ready" in follower.output()
        stream = open_stream(server)
        lines = stream.iter_lines()
        next(lines)
        follower.process.terminate()  # as where all machines are told to stop: it waits for rank 0
        server.process.terminate()
        rest = [line for line in lines if line]
        assert len(rest) > 300 and rest[-1] == "data: [DONE]", "what was open was not finished"
        assert (server.process.wait(20), follower.process.wait(20)) == (0, 0)
        assert "Traceback" not in server.output() + follower.output()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["killed", "frozen"])
def test_a_lost_rank_0_ends_its_followers(tiny: str, cache_dir: str, tmp_path: Path, loss: str):
    with two_machines(tiny, cache_dir, tmp_path, "--tp-size", "8") as (server, follower):
        server.wait()
        assert loss == "killed" or "#cache_miss: 0" in server.output(), "this start has the programs of the last one"
        open_stream(server)
        pids = [server.process.pid, *server.children()]
        began = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL if loss == "killed" else signal.SIGSTOP)
        try:
            assert follower.process.wait(30) == 1
        finally:
            for pid in pids if loss == "frozen" else ():
                os.kill(pid, signal.SIGKILL)
        print(f"the follower ended {time.monotonic() - began:.1f} s after rank 0 was {loss}")
        assert "rank 0 (127.0.0.1) is gone" in follower.output() and "Traceback" not in follower.output()


@pytest.mark.slow
def test_a_frozen_follower_ends_the_server(tiny: str, cache_dir: str, tmp_path: Path):
    with two_machines(tiny, cache_dir, tmp_path, "--tp-size", "8") as (server, follower):
        server.wait()
        stopped = follower.family()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert server.process.wait(30) == 1
        assert "nothing was heard of it" in server.output()


def test_each_machine_reads_the_bytes_of_its_own_devices(tmp_path: Path):
    """Half of every matrix, and all of the norms."""
    model = write_tiny_llama(tmp_path / "eight", heads=8, kv_heads=8, head_dim=16, embed=128, mlp=256)
    port, script = _free_port(), str(ROOT / "tests" / "two_hosts_load.py")
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    both = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(port), model], env=environ, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    told = [json.loads(each.communicate(timeout=120)[0].splitlines()[-1]) for each in both]
    for each in told:
        assert each["devices"] == [4, 8]
        assert each["read"] == each["owned"]
        assert 0.5 * each["whole"] <= each["read"] < 0.51 * each["whole"]
    assert told[0]["sum"] != told[1]["sum"], "both read the same half"


def test_what_differs_between_machines_is_named_before_anything_is_loaded(tiny: str, cache_dir: str, tmp_path: Path):
    address = f"127.0.0.1:{_free_port()}"
    every = ("--model", tiny, "--cache-dir", cache_dir, "--nnodes", "2", "--dist-init-addr", address)
    follower = Machine(*every, "--node-rank", "1", *SIZES, log=tmp_path / "rank1.log", environ=FOUR_DEVICES)
    flags = (*every, "--node-rank", "0", "--max-running-requests", "3", "--dtype", "float32")
    with RealServer(*flags, log=tmp_path / "rank0.log", environ=FOUR_DEVICES) as server:
        assert (server.process.wait(60), follower.process.wait(60)) == (2, 2)
        for output in (server.output(), follower.output()):
            assert "engine option max_running is 3 on rank 0 and 4 on rank 1" in output
            assert "Traceback" not in output


def test_a_machine_with_another_secret_does_not_join(tiny: str, cache_dir: str, tmp_path: Path):
    address = f"127.0.0.1:{_free_port()}"
    every = ("--model", tiny, "--cache-dir", cache_dir, "--nnodes", "2", "--dist-init-addr", address, *SIZES)
    other = FOUR_DEVICES | {"JAXSERVE_DIST_SECRET": "another secret of sixteen bytes"}
    with RealServer(*every, "--node-rank", "0", log=tmp_path / "rank0.log", environ=FOUR_DEVICES) as server:
        follower = Machine(*every, "--node-rank", "1", log=tmp_path / "rank1.log", environ=other)
        assert eventually(lambda: _stage(server) == ("nodes", "waiting for rank 1"), 60)
        assert follower.process.wait(60) == 2
        assert "another one" in follower.output()
        assert eventually(lambda: "it does not know our secret" in server.output(), 5)
        assert server.process.poll() is None, "a stranger ended the server"
        server.process.terminate()
        assert server.process.wait(30) == 0


def _stage(server: RealServer) -> tuple[str, str] | None:
    try:
        state = server.http.get("/health").json()
    except httpx2.HTTPError:
        return None
    return state["stage"], state["message"]


def test_a_follower_that_waits_leaves_when_it_is_told(tiny: str, cache_dir: str, tmp_path: Path):
    flags = ("--model", tiny, "--cache-dir", cache_dir, "--nnodes", "2", "--node-rank", "1")
    address = f"127.0.0.1:{_free_port()}"
    follower = Machine(*flags, "--dist-init-addr", address, log=tmp_path / "rank1.log", environ=FOUR_DEVICES)
    assert eventually(lambda: len(follower.family()) > 2, 30), "no engine was spawned"
    family = follower.family()
    follower.process.terminate()
    assert follower.process.wait(20) == 0
    assert eventually(lambda: not any(map(alive, family)), 5)
    assert "Traceback" not in follower.output()


@pytest.mark.slow
def test_eight_bits_on_two_machines_answer_as_on_one(tiny: str, cache_dir: str, tmp_path: Path):
    flags = ("--quantization", "int8", "--kv-cache-dtype", "int8")
    every = ("--model", tiny, "--cache-dir", cache_dir, *SIZES, *flags)
    with RealServer(*every, log=tmp_path / "alone.log", environ={"JAX_PLATFORMS": "cpu"}) as server:
        wanted = answers_of(server.wait())
    with two_machines(tiny, cache_dir, tmp_path, "--tp-size", "8", *flags) as (server, _):
        told = answers_of(server.wait())
    assert_same(told, wanted, tolerance=5e-3)  # a sum in another order may fall into another of 255 steps
