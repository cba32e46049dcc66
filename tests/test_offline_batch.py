"""`jaxserve batch` as a process, with a scripted engine: results, errors, pipes, and going on after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve import offline
from jaxserve.batch_flags import parse
from jaxserve.store.sqlite import SQLiteStore
from tests.batch_inputs import chat_line, jsonl
from tests.fakes import write_byte_level

DRIVER = Path(__file__).with_name("scripted_batch.py")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_byte_level(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def command(folder: Path, source: str, target: str, *flags: str) -> list[str]:
    head = [sys.executable, str(DRIVER), "-i", source, "-o", target, "--model", str(folder / "model")]
    names = ["--served-model-name", "test-model", "--load-format", "dummy", "--cache-dir", str(folder / "cache")]
    return [*head, *names, *flags]


def begin(folder: Path, source: str, target: str, *flags: str, **options: Any) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"ENGINE_PID_FILE": str(folder / "engine.pid")}
    return subprocess.Popen(
        command(folder, source, target, *flags),
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(process: "subprocess.Popen[bytes]", content: bytes | None = None) -> tuple[int, bytes, str]:
    out, err = process.communicate(content, timeout=60)
    return process.returncode, out, err.decode()


def requests(count: int) -> bytes:
    return jsonl(chat_line(str(i), max_tokens=1 + i % 4, ignore_eos=True) for i in range(count))


def ids(content: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


def wait_for_results(journal: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    """Until `count` results are on disk; the process holds the store, so its files are looked at.

    A line is written before its transaction: the last of them may not count yet.
    """
    deadline = time.monotonic() + 40
    while sum(path.read_bytes().count(b"\n") for path in journal.glob("batches/*/output.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_request_has_one_line_in_the_output(folder: Path):
    lines = [chat_line(str(i), max_tokens=3, ignore_eos=True) for i in range(20)]
    lines.append(chat_line("bad", temperature=-1))
    (folder / "in.jsonl").write_bytes(jsonl(lines))
    code, out, err = finish(begin(folder, "in.jsonl", "out.jsonl"))
    assert (code, out) == (0, b""), err
    results = {line["custom_id"]: line for line in map(json.loads, (folder / "out.jsonl").read_bytes().splitlines())}
    assert set(results) == {*map(str, range(20)), "bad"}
    assert results["3"]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert results["bad"]["response"]["status_code"] == 400
    assert "20 requests completed, 1 failed" in err and "\r" not in err
    assert "batch batch_" not in err, "a log of level info"
    assert not (folder / "out.jsonl.journal").exists()


def test_pipes_and_an_error_file(folder: Path):
    content = requests(5) + jsonl([chat_line("bad", top_p=3)])
    code, out, err = finish(
        begin(folder, "-", "-", "--error-file", "errors.jsonl", stdin=subprocess.PIPE), content
    )  # fmt: skip
    assert code == 0, err
    assert sorted(ids(out)) == list("01234") and ids((folder / "errors.jsonl").read_bytes()) == ["bad"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_after_an_interruption(folder: Path, number: int):
    (folder / "in.jsonl").write_bytes(requests(300))
    process = begin(folder, "in.jsonl", "out.jsonl", "--batch-concurrency", "4")
    wait_for_results(folder / "out.jsonl.journal", 20, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == (130 if number == signal.SIGINT else -9), err
    assert not (folder / "out.jsonl").exists()
    store = SQLiteStore(folder / "out.jsonl.journal")
    (batch,) = store.recover()
    store.close()
    assert 20 - 4 <= batch.num_completed < 300
    if number == signal.SIGINT:
        assert "the same command goes on" in err
    code, _, err = finish(begin(folder, "in.jsonl", "out.jsonl"))
    assert code == 0, err
    assert sorted(ids((folder / "out.jsonl").read_bytes()), key=int) == [str(i) for i in range(300)]


def test_a_journal_of_another_input_is_not_mixed_in(folder: Path):
    (folder / "in.jsonl").write_bytes(requests(300))
    process = begin(folder, "in.jsonl", "out.jsonl", "--batch-concurrency", "2")
    wait_for_results(folder / "out.jsonl.journal", 1, process)
    process.kill()
    finish(process)
    (folder / "in.jsonl").write_bytes(requests(3))
    code, _, err = finish(begin(folder, "in.jsonl", "out.jsonl"))
    assert code == 2 and "out.jsonl.journal is of another input; delete it" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl([chat_line("a"), chat_line("a")]), "line 2: The custom_id for this request is a duplicate"),
        (jsonl([chat_line("a", model="gpt")]), "--allow-any-model"),
        (b"", "names no supported endpoint"),
        (jsonl([chat_line("a", url="/v1/audio/speech")]), "supported are /v1/chat/completions, /v1/completions"),
    ],
)
def test_a_wrong_input_is_refused_with_its_line(folder: Path, content: bytes, message: str):
    (folder / "in.jsonl").write_bytes(content)
    code, _, err = finish(begin(folder, "in.jsonl", "out.jsonl"))
    assert code == 2 and message in err, err
    assert not (folder / "out.jsonl.journal").exists() and not (folder / "out.jsonl").exists()


def test_wrong_paths_are_named(folder: Path):
    code, _, err = finish(begin(folder, "none.jsonl", "out.jsonl"))
    assert code == 2 and "none.jsonl" in err
    (folder / "in.jsonl").write_bytes(requests(1))
    code, _, err = finish(begin(folder, "in.jsonl", "nowhere/out.jsonl"))
    assert code == 2 and "nowhere/out.jsonl does not exist" in err


def test_no_output_overwrites_another_file_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(requests(1))
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "folder").mkdir()

    def check(*flags: str) -> None:
        offline._check_paths(parse(["-i", "in.jsonl", *flags]))

    check("-o", "out.jsonl", "--error-file", "err.jsonl")
    check("-o", "-")
    for target in ("in.jsonl", "link.jsonl", "folder/../in.jsonl"):
        with pytest.raises(offline.JobError, match="the input itself"):
            check("-o", target)
    for first, second in (("out.jsonl", "./out.jsonl"), ("-", "-")):
        with pytest.raises(offline.JobError, match="both go there"):
            check("-o", first, "--error-file", second)
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        check("-o", "out.jsonl", "--error-file", "folder")
