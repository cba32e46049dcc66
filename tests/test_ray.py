"""The fleet of deploy/ray on a real Ray: two CPU replicas of a tiny model. `make ray` makes .venv-ray and runs this."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
import yaml

from jaxserve.utils import _free_port
from tests.real_engines import ROOT, eventually
from tests.tiny_llama import write_tiny_llama

SERVE = ROOT / ".venv-ray" / "bin" / "serve"
ROWS = 2  # of each engine
FLAGS = f"--max-running-requests {ROWS} --max-total-tokens 8192 --chunked-prefill-size 64 --served-model-name tiny"
SYSTEM = "Number {} answers in the manner of a sailor. " * 8

pytestmark = [
    pytest.mark.skipif(not os.environ.get("JAXSERVE_RAY"), reason="make ray runs it, in an environment with Ray"),
    pytest.mark.skipif(not SERVE.exists(), reason=".venv-ray is not there: make ray makes it"),
]


class Fleet:
    """`serve run` in a process group of its own, and clients."""

    def __init__(self, folder: Path, cache_dir: str) -> None:
        self.port, self.log = _free_port(), folder / "fleet.log"
        config = folder / "fleet.yaml"
        config.write_text(yaml.safe_dump(self._config(folder, cache_dir)))
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                [SERVE, "run", config], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    def _config(self, folder: Path, cache_dir: str) -> dict[str, Any]:
        arguments = {
            "model": write_tiny_llama(folder / "model", max_position=2048),
            "python": sys.executable,
            "flags": f"{FLAGS} --cache-dir {cache_dir}",
            "min_replicas": 2,
            "max_replicas": 3,
            "num_cpus": 0.1,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
            "upscale_delay_s": 1,
            "downscale_delay_s": 2,
        }
        application = {"name": "fleet", "import_path": "deploy.ray:app", "args": arguments}
        return {"http_options": {"port": self.port}, "applications": [application]}

    def output(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "ServeReplica" in line or "(" not in line[:8])

    def chat(self, number: int, text: str, **options: Any) -> tuple[str, Any]:
        """-> which replica answered, the answer."""
        messages = [{"role": "system", "content": SYSTEM.format(*[number] * 8)}, {"role": "user", "content": text}]
        create: Any = self.client.chat.completions.with_raw_response.create
        raw = create(**{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 4} | options)
        return raw.headers["x-jaxserve-replica"], raw.parse()

    def replicas(self) -> dict[str, float]:
        """Name of every replica -> requests that it accepted."""
        counts = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith("jaxserve:num_requests_total{"):
                counts[line.partition('replica="')[2].partition('"')[0]] = float(line.split()[-1])
        return counts

    def total(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"jaxserve:{name}{{"))

    def workers(self) -> dict[int, list[psutil.Process]]:
        """Ray's process of each replica -> the processes of its server."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                servers = process.children(recursive=True)
                if servers and any("child.py" in part for part in servers[0].cmdline()):
                    found[process.pid] = servers
        return found

    def stop(self) -> None:
        """As Ctrl-C does."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(40)
        finally:
            _, left = psutil.wait_procs(started, timeout=10)
            for process in left:
                process.kill()
            self.http.close()
        assert not [each for each in left if "jaxserve" in each.name() or "python" in each.name()], left


@pytest.fixture(scope="module")
def fleet(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), cache_dir)
    try:
        ready = eventually(lambda: fleet.process.poll() is not None or _is_up(fleet), 90)
        assert ready and fleet.process.poll() is None, fleet.output()[-3000:]
        yield fleet
    finally:
        if fleet.process.poll() is None:
            fleet.stop()


def _is_up(fleet: Fleet, replicas: int = 2) -> bool:
    try:
        return fleet.http.get("/health").status_code == 200 and len(fleet.replicas()) == replicas
    except httpx2.HTTPError:
        return False


def test_one_prefix_goes_to_one_replica_and_both_answer(fleet: Fleet):
    seen = collections.defaultdict(list)
    for turn in range(3):
        for number in range(8):
            name, reply = fleet.chat(number, f"Question {turn}")
            seen[number].append((name, reply.usage.prompt_tokens_details.cached_tokens, reply.usage.prompt_tokens))
    for number, replies in seen.items():
        assert len({name for name, _, _ in replies}) == 1, (number, replies)
        assert all(cached > 0.8 * prompt for _, cached, prompt in replies[1:]), (number, replies)
    assert {replies[0][0] for replies in seen.values()} == set(fleet.replicas())


def test_a_stream_arrives_as_it_is_made(fleet: Fleet):
    arrivals = []
    create: Any = fleet.client.chat.completions.create
    messages = [{"role": "user", "content": "Tell me"}]
    stream = create(
        model="tiny", messages=messages, max_tokens=400, stream=True, extra_body={"ignore_eos": True}, temperature=0
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        arrivals.append(time.monotonic())
    whole = create(model="tiny", messages=messages, max_tokens=400, extra_body={"ignore_eos": True}, temperature=0)
    assert text == whole.choices[0].message.content
    distinct = {round(arrival, 2) for arrival in arrivals}
    assert len(distinct) >= 10, "it came in few pieces"
    middle = arrivals[len(arrivals) // 2] - arrivals[0]
    assert 0.2 < middle / (arrivals[-1] - arrivals[0]) < 0.8


def test_a_client_that_leaves_ends_its_request(fleet: Fleet):
    before = fleet.total("num_aborted_requests_total")
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with fleet.http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_bytes())
    assert eventually(lambda: fleet.total("num_aborted_requests_total") == before + 1, 5)
    assert fleet.total("num_running_reqs") == 0


def test_what_one_replica_cannot_know_of_another_is_refused(fleet: Fleet):
    reply = fleet.http.get("/v1/files")
    assert reply.status_code == 501 and "--store" in reply.json()["error"]["message"]
    made = fleet.http.post("/v1/responses", json={"model": "tiny", "input": "a", "max_output_tokens": 2})
    assert made.status_code == 200
    more = {"model": "tiny", "input": "b", "previous_response_id": made.json()["id"]}
    assert fleet.http.post("/v1/responses", json=more).status_code == 501
    assert fleet.http.get(f"/v1/responses/{made.json()['id']}").status_code == 501
    assert fleet.http.post("/v1/responses/input_tokens", json={"model": "tiny", "input": "a"}).status_code == 200


def test_errors_and_ids_are_the_servers_own(fleet: Fleet):
    reply = fleet.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": []}, headers={"x-request-id": "i"}
    )
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
    assert reply.headers.get_list("x-request-id") == ["i"]
    assert fleet.http.post("/v1/completions", content=b"{").status_code == 400
    assert fleet.http.get("/docs").status_code == 200
    assert fleet.http.post("/v1/completions", content=b" " * (33 << 20)).status_code == 413
    assert fleet.http.post("/flush_cache").status_code == 200


def test_a_queue_in_the_engines_brings_a_third_replica_which_goes_again(fleet: Fleet):
    body = {"model": "tiny", "max_tokens": 1000, "ignore_eos": True}
    over = threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            fleet.http.post("/v1/completions", json={**body, "prompt": f"{number} asks"})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4 * ROWS)]
    for thread in threads:
        thread.start()
    try:
        assert eventually(lambda: fleet.total("num_queue_reqs") > 0, 10), "this load queues in no engine"
        assert eventually(lambda: len(fleet.replicas()) == 3, 45), fleet.output()[-2000:]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert eventually(lambda: len(fleet.replicas()) == 2 and len(fleet.workers()) == 2, 30), fleet.workers()


@pytest.mark.parametrize("victim", ["replica", "server"])
def test_a_killed_replica_ends_its_streams_loudly_leaves_nothing_and_is_replaced(fleet: Fleet, victim: str):
    before = set(fleet.replicas())
    with fleet.client.completions.with_streaming_response.create(
        model="tiny", prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        lost = reply.headers["x-jaxserve-replica"]
        worker, servers = next(pair for pair in fleet.workers().items() if _is_busy(pair[1][0]))
        assert len(servers) >= 2, "a front end and its engine"
        worker = psutil.Process(worker)
        (worker if victim == "replica" else servers[0]).kill()
        last = [line for line in lines if line][-2:]
    assert "replica_lost" in last[0] and last[1] == "data: [DONE]", last
    _, left = psutil.wait_procs([*servers, worker], timeout=5)
    assert not left, "something of a dead replica lives on"
    assert fleet.chat(3, "Is anybody there?")[0] in before - {lost}
    assert eventually(lambda: len(fleet.replicas()) == 2 and lost not in fleet.replicas(), 40), fleet.output()[-2000:]
    assert {fleet.chat(number, "Hello")[0] for number in range(12)} == set(fleet.replicas())


def _is_busy(server: psutil.Process) -> bool:
    command = server.cmdline()
    port = command[command.index("--port") + 1]
    metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return any(
        line.startswith("jaxserve:num_running_reqs{") and not line.endswith(" 0.0") for line in metrics.splitlines()
    )
