"""Does what README and quickstart say, as somebody would who has only them: python -m tools.docs_check [PAGE ...]

Each page starts in an empty folder, and its blocks of sh and python run in their order. A comment above a block says
what is different: <!-- docs-check: server --> stays in the background, <!-- docs-check: skip (why) -->
is not run. The repository is the last commit of this checkout; models and compiled programs are fetched and made
anew, unless --warm is given.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/quickstart.md")
PORT = 30000
REPOSITORY = "<this repository>"
START_SECONDS = 900.0
BLOCK_SECONDS = 900.0
_BLOCK = re.compile(r"^(?:<!-- docs-check: (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SKIP = re.compile(r"skip \((.+)\)")


class DocsError(Exception):
    """A block that did not do what the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: what the comment above says; "" where there is none."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def reason(self) -> str | None:
        """Why it is not run; None: it is."""
        found = _SKIP.fullmatch(self.mark)
        return found[1] if found else None

    @property
    def runnable(self) -> bool:
        return self.language in ("sh", "python")


def blocks(page: str, text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        yield Block(page, line, found[2], found[3], found[1] or "")


class Visitor:
    """A new user in an empty folder: a shell that remembers folder and variables, and a server in the background."""

    def __init__(self, folder: Path, notes: Path, environ: dict[str, str]) -> None:
        """folder: empty, and stays theirs alone; notes: what this class keeps."""
        self.notes, self.environ = notes, environ
        self.state = notes / "state"
        self.state.write_text(f"cd {shlex.quote(str(folder))}\n")
        self.port = PORT if _is_free(PORT) else _free_port()
        self.server: subprocess.Popen[bytes] | None = None

    def follow(self, block: Block) -> None:
        """Raises DocsError."""
        text = self._adapted(block.text)
        if block.mark == "server":
            self._serve(text)
            return
        if block.language == "python":
            script = self.notes / "block.py"
            script.write_text(text)
            text = f"if [ -x .venv/bin/python ]; then .venv/bin/python {script}; else python {script}; fi"
        done = subprocess.run(self._shell(text), env=self.environ, timeout=BLOCK_SECONDS, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise DocsError(f"exit code {done.returncode}")

    def _adapted(self, text: str) -> str:
        text = text.replace(REPOSITORY, shlex.quote(str(ROOT)))
        if self.port == PORT:
            return text
        text = re.sub(r"^make serve$", f'make serve ARGS="--port {PORT}"', text, flags=re.MULTILINE)
        return text.replace(str(PORT), str(self.port))

    def _shell(self, text: str) -> list[str]:
        """What the block leaves, its folder and its variables, is where the next one begins."""
        keep = f'{{ export -p; echo "cd $(printf %q "$PWD")"; }} > {shlex.quote(str(self.state))}'
        return ["bash", "-eo", "pipefail", "-c", f". {shlex.quote(str(self.state))}\n{text}\n{keep}"]

    def _serve(self, text: str) -> None:
        *before, last = text.strip().split("\n")
        if before:
            subprocess.run(self._shell("\n".join(before)), env=self.environ, timeout=BLOCK_SECONDS, check=True)
        command = ["bash", "-ec", f". {shlex.quote(str(self.state))}\n{last}"]
        self.server = subprocess.Popen(command, env=self.environ, start_new_session=True, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.server.poll() is not None:
                raise DocsError(f"the server ended with exit code {self.server.returncode}")
            if time.monotonic() > deadline:
                raise DocsError(f"the server was not ready after {START_SECONDS:.0f} s")
            time.sleep(0.5)
        self.environ["JAXSERVE_URL"] = f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return reply.status == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def leave(self) -> None:
        if self.server is None or self.server.poll() is not None:
            return
        os.killpg(self.server.pid, signal.SIGINT)  # Ctrl-C
        try:
            self.server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)
            raise DocsError("the server did not end after Ctrl-C") from None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check(page: str, *, warm: bool) -> int:
    """Runs one page; the number of blocks that ran. Raises DocsError with the place."""
    num = 0
    with tempfile.TemporaryDirectory(prefix="docs-check-") as folder:
        home = Path(folder) / "home"
        own = {"XDG_STATE_HOME": str(home / "state"), "XDG_DATA_HOME": str(home / "data")}
        if not warm:
            own["JAXSERVE_CACHE_DIR"] = str(home / "cache")
        work, notes = Path(folder) / "work", Path(folder) / "notes"
        work.mkdir()
        notes.mkdir()
        environ = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        visitor = Visitor(work, notes, environ | own)
        try:
            for block in blocks(page, (ROOT / page).read_text(encoding="utf-8")):
                if not block.runnable or block.reason:
                    continue
                print(f"==> {page}:{block.line}\n{block.text}", flush=True)
                started = time.monotonic()
                try:
                    visitor.follow(block)
                except (DocsError, subprocess.SubprocessError) as error:
                    raise DocsError(f"{page}:{block.line}: {error}\n{block.text}") from None
                print(f"==> {page}:{block.line} took {time.monotonic() - started:.1f} s", flush=True)
                num += 1
        finally:
            visitor.leave()
    return num


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs_check", description=__doc__.split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--warm", action="store_true", help="use this user's own cache of models and programs")
    args = parser.parse_args()
    try:
        for page in args.pages:
            print(f"==> {page}: {check(page, warm=args.warm)} blocks ran", flush=True)
    except DocsError as error:
        print(f"docs-check: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
