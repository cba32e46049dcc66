"""The batch cells of the notebook that this API began with, as they are: create, poll and read; watch; cancel."""

import json
import os
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from jaxserve.store.sqlite import SQLiteStore
from tests.api_server import TOKENIZER, ApiServer
from tests.fakes import say
from tests.real_engines import RealServer

CELLS: list[str] = json.loads((Path(__file__).parent / "data" / "seed_batch_cells.json").read_text())
MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"


def run_cells(url: str, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Executes the cells with the address of a server that is not on port 30000; -> what they print."""
    connect = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda base_url, api_key: connect(base_url=url + "/v1", api_key=api_key))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for cell in CELLS:
        exec(cell, names)
    return capsys.readouterr().out


def check(printed: str) -> None:
    assert printed.count("Batch job created with ID: batch_") == 1
    assert "Batch job completed successfully!" in printed and "completed=2, failed=0, total=2" in printed
    assert "Request request-1:" in printed and "Request request-2:" in printed
    assert printed.count("Total: 100") == 5
    assert "Cancellation initiated. Status: cancelling" in printed and "Batch job successfully cancelled" in printed


def test_the_seed_notebooks_batch_cells_run_unmodified(tmp_path: Path, monkeypatch, capsys):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20 if seconds >= 1 else seconds))
    words = say(TOKENIZER, "ab" * 2000)

    def script(request, index):
        sleep(0.001)
        return words(request, index)

    store = SQLiteStore(tmp_path / "store")
    store.recover()
    with ApiServer(script=script, store=store, served_model_names=(MODEL,)) as server:
        check(run_cells(server.url, monkeypatch, tmp_path, capsys))
    store.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("JAXSERVE_SLOW"), reason="takes a minute of real time: JAXSERVE_SLOW=1")
def test_they_run_on_the_default_model_in_their_own_time(live: RealServer, tmp_path: Path, monkeypatch, capsys):
    try:
        check(run_cells(live.url, monkeypatch, tmp_path, capsys))
    finally:  # one cell watches its batch five times and leaves it running
        for batch in live.client.batches.list():
            if batch.status in ("validating", "in_progress"):
                live.client.batches.cancel(batch.id)
