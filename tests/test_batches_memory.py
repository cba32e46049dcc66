"""A large input passes through a server whose memory does not grow with it."""

import os
import time
from pathlib import Path

import httpx2
import openai
import pytest

from tests.batch_inputs import chat_line, finish, jsonl
from tests.test_api_launch import Launched

SLOW = bool(os.environ.get("JAXSERVE_SLOW"))
NUM_LINES, LINE_BYTES = (50_000, 4100) if SLOW else (5_000, 4100)
MEBIBYTE = 1 << 20


def resident(pid: int) -> int:
    """Bytes of a process in memory, now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(600)
def test_the_largest_input_costs_little_memory(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    filler = "x" * (LINE_BYTES - 220)
    with open(path, "wb") as file:
        for i in range(NUM_LINES):
            file.write(jsonl([chat_line(str(i), content=f"{i}: {filler}", model="model", max_tokens=1)]))
    with Launched(tmp_path, "--log-level", "warning") as server:  # nobody reads its log before the end
        server.ready()
        http = httpx2.Client(timeout=300, trust_env=False)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="None", max_retries=0, http_client=http)
        small = client.files.create(
            file=("a.jsonl", jsonl([chat_line("a", model="model", max_tokens=1)])), purpose="batch"
        )
        window = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        finish(client, client.batches.create(input_file_id=small.id, **window))
        before = most = resident(server.process.pid)
        with open(path, "rb") as file:
            uploaded = client.files.create(file=file, purpose="batch")
        assert uploaded.bytes == path.stat().st_size
        most = max(most, resident(server.process.pid))
        batch = client.batches.create(input_file_id=uploaded.id, **window)
        deadline = time.monotonic() + 300
        while batch.request_counts.completed < 200:
            assert time.monotonic() < deadline and batch.status in ("validating", "in_progress"), batch
            most = max(most, resident(server.process.pid))
            time.sleep(0.02)
            batch = client.batches.retrieve(batch.id)
        assert batch.request_counts.total == NUM_LINES
        client.batches.cancel(batch.id)
        batch = finish(client, batch, 300)
        most = max(most, resident(server.process.pid))
        assert batch.status == "cancelled"
        grown = (most - before) / MEBIBYTE
        print(f"{path.stat().st_size / MEBIBYTE:.0f} MiB in {NUM_LINES} lines: {grown:.0f} MiB more memory at most")
        assert grown < 100
