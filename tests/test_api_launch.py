"""The launcher as a process: readiness, signals, exit codes, and that neither process outlives the other."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import pytest

from jaxserve.launch import LogFormatter, ProbeFilter
from jaxserve.progress import CLEAR_LINE, StageReporter, describe
from jaxserve.types import Progress
from jaxserve.utils import _free_port, launch_server, launch_server_cmd, terminate_process, wait_for_server
from tests.fakes import write_byte_level
from tests.real_engines import alive, eventually

PROC = Path("/proc/self/environ")  # Linux
DRIVER = Path(__file__).with_name("scripted_server.py")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256}


class Launched:
    """The driver with a free port; output() is what it printed, once it has ended."""

    def __init__(self, folder: Path, *flags: str, script: str | None = None, port: int | None = None) -> None:
        model = folder / "model"
        write_byte_level(model)
        (model / "config.json").write_text(json.dumps(CONFIG))
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid_file = folder / "engine.pid"
        environment = os.environ | {"ENGINE_PID_FILE": str(self.pid_file)} | ({"SCRIPT": script} if script else {})
        environment.pop("GLIBC_TUNABLES", None)
        command = [
            sys.executable,
            str(DRIVER),
            "--model",
            str(model),
            "--port",
            str(self.port),
            "--load-format",
            "dummy",
        ]
        storage = ["--file-storage-path", str(folder / f"store{self.port}")]
        command += ["--cache-dir", str(folder / "cache"), *storage, *flags]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def ready(self) -> "Launched":
        wait_for_server(self.url, timeout=60, process=self.process)
        return self

    def end(self, seconds: float = 20) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def engine_environment(self) -> list[str]:
        return Path(f"/proc/{int(self.pid_file.read_text())}/environ").read_text().split("\0")

    def engine_alive(self) -> bool:
        return alive(int(self.pid_file.read_text()))

    def open_stream(self):
        body = {"model": "model", "prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode())
        stream = urllib.request.urlopen(request, timeout=20)
        stream.readline()
        return stream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_processes_with_0(tmp_path, number):
    with Launched(tmp_path) as server:
        server.ready()
        server.process.send_signal(number)
        code, output = server.end()
        assert code == 0, output
        assert "The server is fired up and ready to roll! " + server.url in output
        assert 'GET /v1/models HTTP/1.1" 200 OK' in output and "Traceback" not in output
        assert not server.engine_alive()


def test_open_requests_may_finish_until_the_grace_is_over(tmp_path):
    with Launched(tmp_path, "--shutdown-timeout", "1") as server:
        server.ready()
        stream = server.open_stream()
        started = time.monotonic()
        server.process.terminate()
        code, output = server.end()
        assert code == 0 and "waiting for 1 open requests" in output, output
        assert 0.9 < time.monotonic() - started < 15
        stream.close()


def test_a_second_signal_ends_it_now(tmp_path):
    with Launched(tmp_path, "--shutdown-timeout", "300") as server:
        server.ready()
        stream = server.open_stream()
        server.process.terminate()
        time.sleep(0.8)
        server.process.terminate()
        assert server.end()[0] == 0
        stream.close()


def test_a_signal_during_the_start_ends_it(tmp_path):
    with Launched(tmp_path, script="slow") as server:
        assert eventually(server.pid_file.exists, 60)
        assert not PROC.exists() or "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in server.engine_environment()
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(server.url + "/health", timeout=5)
        assert refusal.value.code == 503
        server.process.terminate()
        assert server.end()[0] == 0
        assert not server.engine_alive()


def test_an_engine_that_cannot_start_gives_its_message_and_exit_code(tmp_path):
    with Launched(tmp_path, script="fail") as server:
        code, output = server.end(60)
        assert code == 2 and "lower --max-model-len" in output and "Traceback" not in output, output


def test_a_killed_engine_ends_the_front_end_with_1_and_frees_the_port(tmp_path):
    with Launched(tmp_path) as server:
        server.ready()
        stream = server.open_stream()
        os.kill(int(server.pid_file.read_text()), signal.SIGKILL)
        rest = stream.read().decode()
        assert rest.rstrip().endswith("data: [DONE]") and '"code":"engine_unavailable"' in rest
        code, output = server.end()
        assert code == 1 and "SIGKILL" in output, output
        with Launched(tmp_path, port=server.port) as again:
            again.ready()


def test_a_killed_front_end_leaves_no_engine(tmp_path):
    with Launched(tmp_path) as server:
        server.ready()
        server.process.kill()
        assert eventually(lambda: not server.engine_alive(), 2)


def test_a_taken_port_is_2_before_anything_heavy(tmp_path):
    with Launched(tmp_path) as server:
        server.ready()
        with Launched(tmp_path, port=server.port) as second:
            code, output = second.end()
            assert code == 2 and "Choose another --host or --port" in output, output


def test_a_model_that_is_not_there_is_2(tmp_path):
    with Launched(tmp_path, "--model", str(tmp_path / "nothing")) as server:
        code, output = server.end(60)
        assert code == 2 and "nothing" in output and "Traceback" not in output, output


def test_the_notebooks_helpers_start_wait_and_end(tmp_path, monkeypatch):
    write_byte_level(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("ENGINE_PID_FILE", str(tmp_path / "pid"))
    process, port = launch_server_cmd(f"""
        python {DRIVER} --model {tmp_path / "model"} \\
        --load-format dummy --cache-dir {tmp_path}
    """)
    wait_for_server(f"http://localhost:{port}", timeout=60, process=process)
    terminate_process(process)
    assert process.returncode == 0
    terminate_process(process)


def test_waiting_for_a_server_that_ends_or_never_comes_is_an_error():
    process = launch_server("python -c 'raise SystemExit(3)'")
    with pytest.raises(RuntimeError, match="exit code 3"):
        wait_for_server("http://127.0.0.1:9", timeout=30, process=process)
    with pytest.raises(TimeoutError, match="not ready"):
        wait_for_server("http://127.0.0.1:9", timeout=0.1)


def test_progress_is_one_line_a_stage_off_a_terminal():
    import io

    out = io.StringIO()
    reporter = StageReporter(out, clock=iter(range(100)).__next__)
    for done in range(4):
        reporter.show("compile", done, 3, "")
    reporter.show("warmup", 3, 3, "")
    reporter.finish()
    assert out.getvalue().splitlines()[0].startswith("compiled 3/3") and out.getvalue().count("\n") == 2
    assert describe("compile", 6, 18, "", 12.0) == "compiled 6/18, 24 s left"
    assert describe("download", 45_200_000, 93_100_000, "wheel", 1.0) == "fetched 45.2/93.1 MB, 1 s left: wheel"


def test_stages_that_take_turns_are_one_line_each_and_counts_are_said_once():
    import io

    out = io.StringIO()
    reporter = StageReporter(out, clock=iter(range(100)).__next__)
    for done in range(1, 9):
        reporter.show("compile", done, 8, f"compiled {done}/8, {8 - done} s left")
        reporter.show("load", done << 21, 9 << 21, f"{done} of 9 tensors read")
    reporter.show("warmup", 1, 2, "ran 1/2")
    reporter.finish(complete=True)
    lines = [line.rpartition(",")[0] for line in out.getvalue().splitlines()]
    assert lines == ["loaded 18.9/18.9 MB", "compiled 8/8", "warmed up 2/2"]
    assert describe("compile", 8, 8, "compiled 8/8, 0 s left", 1.0) == "compiled 8/8, 0 s left"


def test_a_stage_that_nobody_saw_is_said_at_the_end_of_a_start():
    import io

    out = io.StringIO()
    reporter = StageReporter(out)
    reporter.show("compile", 7, 9, "")
    reporter.finish(Progress("warmup", 2, 2, "ran 2/2"), complete=True)
    assert [line.rpartition(",")[0] for line in out.getvalue().splitlines()] == ["compiled 9/9", "warmed up 2/2"]
    reporter.show("compile", 7, 9, "")
    reporter.finish(Progress("warmup", 0, 2, ""))
    assert out.getvalue().splitlines()[2:] == ["compiled 7/9"], "a start that failed has not warmed up"


def test_a_stage_lasts_until_its_own_end_though_another_goes_on():
    import io

    out, now = io.StringIO(), [0.0]
    reporter = StageReporter(out, clock=lambda: now[0])
    for now[0], stage, done in ((1.0, "load", 0), (1.0, "compile", 0), (3.0, "load", 2), (3.5, "load", 2)):
        reporter.show(stage, done, 2, "")
    now[0] = 9.0
    reporter.show("compile", 2, 2, "")
    reporter.finish(complete=True)
    assert out.getvalue().splitlines() == ["loaded 2/2, 2.0 s", "compiled 2/2, 8.0 s"]


def test_probes_are_logged_at_debug_only():
    import logging

    logger = logging.getLogger("uvicorn.access")
    before = logger.level
    try:
        for path, level, shown in (
            ("/health", logging.INFO, False),
            ("/health?a=1", logging.INFO, False),
            ("/health", logging.DEBUG, True),
            ("/health_generate", logging.INFO, True),
            ("/v1/models", logging.INFO, True),
        ):
            logger.setLevel(level)
            args = ("127.0.0.1:1", "GET", path, "1.1", 503)
            record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s %s %s %s %d", args, None)
            assert ProbeFilter().filter(record) == shown, path
    finally:
        logger.setLevel(before)


def test_a_log_line_on_a_terminal_takes_the_place_of_the_progress_line():
    import io
    import logging

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    StageReporter(out).show("compile", 1, 8, "x" * 500)
    handler = logging.StreamHandler(out)
    handler.setFormatter(LogFormatter("%H", CLEAR_LINE))
    handler.emit(logging.LogRecord("jaxserve", logging.INFO, "", 0, "hello", (), None))
    shown, logged = out.getvalue().split(CLEAR_LINE)[1:]
    assert len(shown) < 500 and "\n" not in shown
    assert logged.endswith("hello\n")
