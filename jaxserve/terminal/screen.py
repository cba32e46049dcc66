"""A terminal to type at: lines with editing and history, messages of several lines, and words that stand back."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

HISTORY_LENGTH = 1000
FENCE = '"""'
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Style:
    """Escape codes on a terminal that wants them; nothing elsewhere."""

    def __init__(self, out: TextIO, environ: Mapping[str, str]) -> None:
        self.on = out.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"

    def dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.on else text

    def prompt(self, text: str) -> str:
        """Codes between \\001 and \\002 have no width for readline."""
        return f"\001{BOLD}\002{text}\001{PLAIN}\002" if self.on else text


def read_message(style: Style) -> str:
    """What the user says next. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
    lines = [input(style.prompt(">>> "))]
    if lines[0].startswith(FENCE):
        return _fenced(lines[0].removeprefix(FENCE), style)
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(style.prompt("... ")))
    return "\n".join(lines).strip()


def _fenced(line: str, style: Style) -> str:
    lines: list[str] = []
    while FENCE not in line:
        lines.append(line)
        line = input(style.prompt("... "))
    return "\n".join([*lines, line.partition(FENCE)[0]]).strip()


class LineEditing:
    """readline, where Python has it: history from one run to the next, and the Tab key for /commands."""

    def __init__(self, history: Path | None, commands: Sequence[str]) -> None:
        self.history, self.commands = history, [f"/{name}" for name in commands]

    def __enter__(self) -> "LineEditing":
        try:
            import readline
        except ImportError:
            return self
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(HISTORY_LENGTH)
        if self.history is not None:
            with suppress(OSError):
                readline.read_history_file(self.history)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.history is None or "readline" not in sys.modules:
            return
        import readline

        with suppress(OSError):  # a home that cannot be written to is no reason to end with an error
            self.history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.history, os.O_CREAT | os.O_WRONLY, 0o600))  # nobody else reads what was asked
            readline.write_history_file(self.history)

    def _complete(self, text: str, state: int) -> str | None:
        matches = [f"{name} " for name in self.commands if text.startswith("/") and name.startswith(text)]
        return matches[state] if state < len(matches) else None


def history_path(environ: Mapping[str, str], home: str) -> Path:
    """As the XDG base directory specification has it for what programs remember."""
    return Path(environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")) / "jaxserve" / "chat_history"
