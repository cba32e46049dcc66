"""The cells of the notebook that this API began with, as they are: start a server, chat, complete, stream, end it."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import openai
import pytest

from jaxserve import utils
from tests.fakes import write_byte_level
from tests.real_engines import RealServer
from tests.test_api_launch import CONFIG, DRIVER

CELLS: list[str] = json.loads((Path(__file__).parent / "data" / "seed_chat_cells.json").read_text())
START, CALLS, END = CELLS[0], CELLS[1:5], CELLS[5]
MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"


def run_calls(names: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    """Executes the cells that call, with the address of a server that is not on port 30000; -> what each prints."""
    connect = openai.Client
    monkeypatch.setattr(openai, "Client", lambda base_url, api_key: connect(base_url=url + "/v1", api_key=api_key))
    printed = []
    for cell in CALLS:
        exec(cell, names)
        printed.append(capsys.readouterr().out)
    return printed


def check(printed: list[str]) -> None:
    chat, chat_stream, completion, completion_stream = printed
    assert chat.startswith("ChatCompletion(id='chatcmpl-") and f"model='{MODEL}'" in chat
    assert "service_tier=None, system_fingerprint=None" in chat and "matched_stop=" in chat
    assert chat_stream and "\n\n" not in chat_stream
    assert completion.startswith("Completion(id='cmpl-") and "object='text_completion'" in completion
    assert "\n\n" not in completion_stream and "THE END" not in completion_stream  # a model may stop at once


def test_the_seed_notebooks_cells_run_unmodified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    model = tmp_path / "model"
    write_byte_level(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("ENGINE_PID_FILE", str(tmp_path / "engine.pid"))
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    port = utils._free_port()
    started: list[str] = []

    def launch(command: str) -> Any:
        """Our launcher under the other one's name: the model is a small one, called what the notebook calls it."""
        started.append(command)
        ours = command.replace("-m sglang.launch_server", str(DRIVER)).replace("--port 30000", f"--port {port}")
        ours = ours.replace(f"--model-path {MODEL}", f"--model-path {model} --load-format dummy")
        return utils.launch_server(ours.strip() + f" --served-model-name {MODEL}")

    helpers = types.ModuleType("sglang.utils")
    vars(helpers).update(
        lauch_sglang_server=launch,
        wait_for_server=lambda url: utils.wait_for_server(url.replace("30000", str(port)), timeout=60),
        terminate_process=utils.terminate_process,
    )
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    monkeypatch.setitem(sys.modules, "sglang.utils", helpers)
    names: dict[str, Any] = {}
    exec(START, names)
    process = names["server_process"]
    try:
        assert "Server is ready. Proceeding with the next steps." in capsys.readouterr().out
        assert len(started) == 1 and "--host 0.0.0.0" in started[0]
        printed = run_calls(names, f"http://127.0.0.1:{port}", monkeypatch, capsys)
        check(printed)
        assert printed[3]
    finally:
        exec(END, names)
    assert process.poll() == 0


def test_the_calls_run_on_the_default_model(live: RealServer, monkeypatch: pytest.MonkeyPatch, capsys):
    printed = run_calls({}, live.url, monkeypatch, capsys)
    check(printed)
    assert "capital" in printed[0].lower()
