"""A server that is killed at random moments of a batch, and started again, loses nothing and does nothing twice.

JAXSERVE_SLOW=1: at least 30 kills of the launcher with a scripted engine over 500 lines, 10 more around a cancellation,
and 30 with a real engine and a tiny random model. Else about a tenth of that.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import openai
import pytest

from jaxserve.utils import _free_port
from tests.batch_inputs import FINAL, jsonl, lines_of, upload
from tests.fakes import write_byte_level
from tests.stores import fill, small_file_system
from tests.tiny_llama import write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
SLOW = bool(os.environ.get("JAXSERVE_SLOW"))
MODEL = "test-model"
START_SECONDS = 280.0  # a cold start compiles, on two busy cores


class Site:
    """A model, a file storage and a cache, and the server that is started in them again and again."""

    def __init__(
        self, folder: Path, rng: random.Random, real_cache: str | None = None, store: str | None = None
    ) -> None:
        """real_cache: of compiled programs, for a real engine; None: a scripted one. store: an address for --store."""
        folder.mkdir(exist_ok=True)
        self.store = store
        self.folder, self.rng, self.real = folder, rng, real_cache is not None
        self.cache = real_cache or str(folder / "cache")
        self.storage = folder / "storage"
        self.log = folder / "server.log"
        self.num_starts = self.num_kills = self.num_engine_kills = 0
        self.cancel_sent = False
        self.seen: Any = None  # the batch as it was shown last before a kill
        if self.real:
            write_tiny_llama(folder / "model")
        else:
            write_byte_level(folder / "model")
            config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256}
            (folder / "model" / "config.json").write_text(json.dumps(config))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def start(self) -> None:
        self.num_starts += 1
        self.port = _free_port()
        main = [sys.executable, "-m", "jaxserve"]
        if not self.real:
            main = [sys.executable, str(ROOT / "tests" / "scripted_server.py"), "--load-format", "dummy"]
        flags = {
            "--model": self.folder / "model",
            "--served-model-name": MODEL,
            "--port": self.port,
            "--cache-dir": self.cache,
            "--log-level-http": "warning",
            "--max-running-requests": 4,
            "--max-model-len": 256,
        }
        flags |= {"--store": self.store} if self.store else {"--file-storage-path": self.storage}
        command = [*main, *(str(part) for pair in flags.items() for part in pair)]
        environ = os.environ | {"ENGINE_PID_FILE": str(self.folder / "engine.pid"), "JAX_PLATFORMS": "cpu"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="None", max_retries=0, timeout=30
        )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            try:
                self.client.models.list()
                return
            except openai.APIError:
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, one time in four to the engine alone: then the server ends by itself, with an error."""
        self.num_kills += 1
        if self.rng.random() < 0.25 and not self.real:
            self.num_engine_kills += 1
            os.kill(int((self.folder / "engine.pid").read_text()), signal.SIGKILL)
            assert self.process.wait(60) not in (0, -9)
        else:
            self.process.kill()
            self.process.wait()
        self.client.close()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()[-4000:]
        self.client.close()

    def batch(self) -> Any:
        """The newest batch, or None."""
        return next(iter(self.client.batches.list(limit=1)), None)

    def finish(self) -> Any:
        deadline = time.monotonic() + 300
        while (batch := self.batch()).status not in FINAL:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.1)
        return batch


def wanted_tokens(number: int) -> int:
    return 1 + number % 3


def request_line(number: int) -> dict[str, Any]:
    """Asks for 1 to 3 tokens; every tenth asks for something impossible."""
    body = {"model": MODEL, "prompt": f"request {number}", "max_tokens": wanted_tokens(number), "temperature": 0}
    body |= {"ignore_eos": True} | ({"temperature": -1} if number % 10 == 9 else {})
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def check_results(site: Site, batch: Any, num_lines: int) -> None:
    """Every custom_id exactly once, each with an answer to its own request, and counters that say the same."""
    output, error = lines_of(site.client, batch.output_file_id), lines_of(site.client, batch.error_file_id)
    times = Counter(line["custom_id"] for line in output + error)
    assert times == Counter(f"request-{number}" for number in range(num_lines)), times.most_common(3)
    for line in output:
        number = int(line["custom_id"].split("-")[1])
        body = line["response"]["body"]
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert body["usage"]["completion_tokens"] == wanted_tokens(number), line
    failed = [line for line in error if line["response"]]
    assert all(int(line["custom_id"].split("-")[1]) % 10 == 9 for line in failed)
    assert {line["response"]["status_code"] for line in failed} <= {400}
    skipped = [line for line in error if not line["response"]]
    assert {line["error"]["code"] for line in skipped} <= {"batch_cancelled"}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (num_lines, len(output), len(failed))
    assert batch.usage.output_tokens == sum(line["response"]["body"]["usage"]["completion_tokens"] for line in output)
    if batch.status == "completed":
        assert not skipped and len(failed) == num_lines // 10
        assert batch.completed_at >= batch.finalizing_at >= batch.in_progress_at >= batch.created_at


def live_and_die(site: Site, num_lines: int, cancel: bool) -> None:
    """One life of the server: goes on with the batch, or makes it, until it is killed."""
    site.start()
    if site.num_starts > 1 and site.rng.random() < 0.15 and not site.real:
        time.sleep(site.rng.uniform(0, 4))  # while it starts and recovers
        site.process.kill()
        site.process.wait()
        site.num_kills += 1
        return
    site.wait_ready()
    batch = site.batch()
    if batch is None or batch.status in FINAL:
        if batch is not None:
            check_results(site, batch, num_lines)
        file = upload(site.client, jsonl(request_line(number) for number in range(num_lines)))
        site.client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        site.cancel_sent = False
    time.sleep(site.rng.uniform(0, 1.5))
    before = site.batch()
    if cancel and not site.cancel_sent and before.status not in FINAL and site.rng.random() < 0.5:
        site.cancel_sent = True
        assert site.client.batches.cancel(before.id).status == "cancelling"
        time.sleep(site.rng.uniform(0, 0.05))
    site.kill()
    site.seen = before


def survive(site: Site, num_kills: int, num_lines: int, cancel: bool = False) -> None:
    while site.num_kills < num_kills:
        live_and_die(site, num_lines, cancel)
    site.start()
    site.wait_ready()
    recovered = site.batch()
    if recovered.id == site.seen.id:
        before, now = site.seen.request_counts, recovered.request_counts
        assert now.completed >= before.completed and now.failed >= before.failed, "a counted result was forgotten"
    batch = site.finish()
    assert batch.status == ("cancelled" if site.cancel_sent else "completed")
    assert len({each.id for each in site.client.batches.list()}) == len(list(site.client.batches.list(limit=100)))
    for each in site.client.batches.list():
        check_results(site, each, num_lines)
        site.client.files.delete(each.input_file_id)
        for file_id in filter(None, (each.output_file_id, each.error_file_id)):
            assert site.client.files.delete(file_id).deleted
    assert not list(site.client.files.list()) and not list((site.storage / "files").iterdir())
    site.stop()
    print(f"{site.num_kills} kills ({site.num_engine_kills} of the engine alone), {site.num_starts} starts")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


@pytest.mark.timeout(1200)
def test_a_batch_survives_kills_of_the_server(tmp_path, rng):
    with Site(tmp_path, rng) as site:
        survive(site, num_kills=30 if SLOW else 3, num_lines=500 if SLOW else 200)


@pytest.mark.timeout(1200)
def test_a_cancelled_batch_survives_kills_of_the_server(tmp_path, rng):
    with Site(tmp_path, rng) as site:
        survive(site, num_kills=10 if SLOW else 1, num_lines=300, cancel=True)


@pytest.mark.timeout(1200)
def test_a_batch_survives_kills_of_a_server_with_a_real_engine(tmp_path, rng, cache_dir):
    with Site(tmp_path, rng, cache_dir) as site:
        survive(site, num_kills=30 if SLOW else 1, num_lines=500 if SLOW else 200)


@pytest.mark.timeout(600)
def test_a_full_disk_fails_the_batch_and_leaves_the_server_serving(tmp_path, rng):
    with small_file_system(tmp_path / "small") as small, Site(tmp_path, rng) as site:
        site.storage = small / "storage"
        site.start()
        site.wait_ready()
        file = upload(site.client, jsonl(request_line(number) for number in range(400)))
        options: Any = {"endpoint": "/v1/completions", "completion_window": "24h"}
        site.client.batches.create(input_file_id=file.id, **options)
        while site.batch().request_counts.completed < 10:
            time.sleep(0.02)
        fill(small / "other")
        batch = site.finish()
        assert batch.status == "failed" and [error.code for error in batch.errors.data] == ["storage_full"]
        output, error = lines_of(site.client, batch.output_file_id), lines_of(site.client, batch.error_file_id)
        assert (len(output), len(error)) == (batch.request_counts.completed, batch.request_counts.failed)
        assert 10 <= len(output) < 360

        fill(small / "another")
        with pytest.raises(openai.APIStatusError) as refusal:
            upload(site.client, b"x" * 100_000)
        assert refusal.value.status_code == 507
        assert site.client.completions.create(model=MODEL, prompt="a", max_tokens=2).choices[0].text
        assert site.client.files.delete(batch.output_file_id).deleted
        (small / "other").unlink()
        (small / "another").unlink()
        site.client.batches.create(input_file_id=file.id, **options)
        check_results(site, site.finish(), 400)
        site.stop()
