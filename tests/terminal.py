"""Programs run as at a terminal, and a small server for them to talk to."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Script = Callable[[dict[str, Any]], Iterator[dict[str, Any] | str]]


class Terminal:
    """`python -m jaxserve ...` on a pseudo-terminal of 80 columns. What it printed so far is in `screen`."""

    def __init__(self, *argv: str, env: dict[str, str] | None = None) -> None:
        self.screen = ""
        self._seen = 0
        ours, theirs = pty.openpty()
        self._end = ours
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = (
            os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "", "INPUTRC": os.devnull} | (env or {})
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", *argv],
            env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)

    def expect(self, pattern: str, timeout: float = 30.0) -> "re.Match[str]":
        """Waits until the pattern shows up after what was expected last."""
        deadline = time.monotonic() + timeout
        while (found := re.compile(pattern).search(self.screen, self._seen)) is None:
            assert self._read(deadline), f"{pattern!r} did not show up after:\n{self.screen[self._seen :]!r}"
        self._seen = found.end()
        return found

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def say(self, text: str) -> None:
        """A message, once it is asked for: what is typed before belongs to nobody yet."""
        self.expect(">>> ")
        self.type(text + "\n")

    def interrupt(self) -> None:
        self.type("\x03")

    def leave(self) -> int:
        """Ctrl-D at the prompt, and the exit code that comes of it."""
        self.expect(">>> ")
        self.type("\x04")
        return self.wait()

    def wait(self, timeout: float = 30.0) -> int:
        while self._read(time.monotonic() + timeout):
            pass
        return self.process.wait(timeout)

    def _read(self, deadline: float) -> bool:
        """Whether there was more to read."""
        ready, _, _ = select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))
        try:
            piece = os.read(self._end, 65536) if ready else b""
        except OSError:  # Linux says so when the other end is closed
            piece = b""
        self.screen += piece.decode(errors="replace")
        return bool(piece)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._end)


def _own_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def chat_server(script: Script, models: tuple[str, ...] = ("fake",)) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """-> its URL, and the bodies that /v1/chat/completions got. script: body -> events; text is one with content.

    A script that yields {"status": N, ...} first answers with that status and the rest as JSON.
    """
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            started = False
            for event in script(body):
                if isinstance(event, str):
                    event = {"choices": [{"delta": {"content": event}}]}
                if "status" in event:
                    self.reply(event.pop("status"), event)
                    return
                if not started:
                    self.send_response(200)
                    self.end_headers()
                    started = True
                try:
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                except OSError:
                    body["left"] = True
                    return
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def piped(
    *argv: str, given: str = "", env: dict[str, str] | None = None, cwd: Path | None = None
) -> tuple[int, str, str]:
    """-> exit code, standard output, standard error of `python -m jaxserve ...` on pipes."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", *argv],
        input=given, capture_output=True, text=True, timeout=280, env=os.environ | (env or {}), cwd=cwd,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr
