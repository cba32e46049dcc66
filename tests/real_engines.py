"""The real thing for tests: a server as a process of its own, and LLM with one set of engine options at a time."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2
import openai

from jaxserve.llm import LLM
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.utils import _free_port, wait_for_server

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 280.0  # cold, on two busy cores


class RealServer:
    """`python -m jaxserve FLAGS` on a free port, with clients; a context manager that kills what is left of it."""

    def __init__(self, *flags: str, log: Path, port: int | None = None, environ: Mapping[str, str] | None = None):
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "jaxserve", "--port", str(self.port), *flags]
        if "--file-storage-path" not in flags:
            command += ["--file-storage-path", str(log.with_suffix(".store"))]
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                text=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
            )
        self.http = httpx2.Client(base_url=self.url, timeout=280, trust_env=False)
        self.client = openai.OpenAI(
            base_url=self.url + "/v1",
            api_key="None",
            max_retries=0,
            http_client=httpx2.Client(timeout=280, trust_env=False),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait(self) -> Self:
        try:
            wait_for_server(self.url, timeout=START_SECONDS, process=self.process)
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(f"{error}; its log ends with:\n{self.output()[-3000:]}") from None
        info = self.http.get("/get_server_info").json()
        self.engine: dict[str, Any] = info["engine"]
        self.model: str = info["server"]["served_model_names"][0]
        self.tokenizer = Tokenizer.from_folder(info["server"]["model_path"])
        return self

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> list[int]:
        """Process ids of the server's children. Linux."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in listed.read_text().split()]

    def engine_pid(self) -> int:
        """The child that computes; the other one is multiprocessing's own."""
        return max(self.children(), key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """Name without "jaxserve:" (and ":phase" where there is one) -> value."""
        values = {}
        for line in self.http.get("/metrics").text.splitlines():
            if (match := re.match(r"jaxserve:(\w+)(?:\{([^}]*)\})? (\S+)$", line)) is not None:
                phase = re.search(r'phase="(\w+)"', match[2] or "")
                values[match[1] + (f":{phase[1]}" if phase else "")] = float(match[3])
        return values

    def flush(self) -> None:
        assert self.http.post("/flush_cache").status_code == 200

    def wait_idle(self, seconds: float = 30.0) -> dict[str, float]:
        """Until nothing runs or waits and no page is held; asserts that it comes to that. -> the metrics."""
        values: dict[str, float] = {}
        busy = ("num_open_requests", "num_running_reqs", "num_queue_reqs", "num_held_pages", "token_usage")

        def idle() -> bool:
            values.update(self.metrics())
            return not any(values[name] for name in busy)

        assert eventually(idle, seconds), {name: values[name] for name in busy}
        return values

    def chat(self, content: str, **options: Any) -> Any:
        """One message of the user; fields that OpenAI's client does not know go into extra_body."""
        create: Any = self.client.chat.completions.create
        return create(
            **{"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0.0} | options
        )

    def complete(self, prompt: Any, **options: Any) -> Any:
        create: Any = self.client.completions.create
        return create(**{"model": self.model, "prompt": prompt, "temperature": 0.0} | options)


class Engines:
    """get(**options) -> LLM of the default model with these engine options; the one before is closed for it."""

    def __init__(self, cache_dir: str) -> None:
        self._cache_dir = cache_dir
        self._options: dict[str, Any] | None = None
        self._llm: LLM | None = None

    def get(self, **options: Any) -> LLM:
        if self._llm is None or options != self._options:
            self.close()
            self._llm = LLM(cache_dir=self._cache_dir, dtype="float32", show_progress=False, **options)
            self._options = options
        return self._llm

    def close(self) -> None:
        if self._llm is not None:
            stats = self._llm.stats
            self._llm.close()
            self._llm = None
            assert stats is None or stats.compilations_total == 0, "something was compiled after ready"
            assert stats is None or (stats.num_held_pages == 0 and stats.num_running == 0), stats


def alive(pid: int) -> bool:
    """False for a zombie too: its parent is gone or has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
