"""Tells a model's thinking from its answer: <think> ... </think> at the start of a message."""

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
MAX_BLANK = 64  # characters of white space that are held back until it is known whether the thinking ends there

_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Segment:
    """reasoning: thinking, without its tags. answer: what is said. thought_aloud: thinking that is to stay part of the
    text, tags included."""

    kind: Literal["reasoning", "answer", "thought_aloud"]
    text: str


class ThinkSplitter:
    """One per message.

    inside: the prompt has opened <think> already. expected: a message that does not begin with <think> is thinking all
    the same (DeepSeek-R1). separate: False leaves thinking where it is and only marks it. White space next to the tags
    is dropped where they are.
    """

    def __init__(self, *, inside: bool = False, expected: bool = False, separate: bool = True) -> None:
        self.thinking = inside or expected
        self.thought = inside or expected  # there is thinking, or there was
        self._separate = separate
        self._held = ""
        self._state = self._inside if inside else self._start
        self._said = False  # something of the reasoning was given out
        self._out: list[Segment] = []

    @property
    def answering(self) -> bool:
        """The thinking is over, or there is none."""
        return self._state in (self._border, self._answer)

    def push(self, text: str, final: bool = False) -> list[Segment]:
        """text: what follows; final: nothing will follow."""
        self._out = []
        while text:
            text = self._state(text)
        if final and self._held:
            held, self._held = self._held, ""
            if self._state != self._border:
                self._give("reasoning" if self.thinking else "answer", held)
        return self._out

    def _give(self, kind: Literal["reasoning", "answer"], text: str, aloud: str | None = None) -> None:
        """aloud: the same with what is dropped from the reasoning."""
        if kind == "reasoning" and not self._separate:
            self._out.append(Segment("thought_aloud", text if aloud is None else aloud))
        elif text:
            self._out.append(Segment(kind, text))

    def _start(self, text: str) -> str:
        text, self._held = self._held + text, ""
        word = text.lstrip(_BLANK)
        near = len(text) - len(word) <= MAX_BLANK
        if near and word.startswith(OPEN):
            self.thinking = self.thought = True
            self._state = self._inside
            self._give("reasoning", "", aloud=text[: len(text) - len(word) + len(OPEN)])
            return word[len(OPEN) :]
        if near and OPEN.startswith(word):
            self._held = text
            return ""
        self._state = self._inside if self.thinking else self._answer
        return text

    def _inside(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if self._separate and not self._said:
            text = text.lstrip(_BLANK)
        found = text.find(CLOSE)
        if found >= 0:
            start = max(len(text[:found].rstrip(_BLANK)), found - MAX_BLANK)
            self._give("reasoning", text[:start], aloud=text[: found + len(CLOSE)])
            self.thinking, self._state = False, self._border
            return text[found + len(CLOSE) :]
        end = len(text) - _num_overlap(text)
        start = max(len(text[:end].rstrip(_BLANK)), end - MAX_BLANK)
        if start:
            self._said = True
            self._give("reasoning", text[:start])
        self._held = text[start:]
        return ""

    def _border(self, text: str) -> str:
        rest = text.lstrip(_BLANK)
        if not self._separate and len(rest) < len(text):
            self._give("reasoning", "", aloud=text[: len(text) - len(rest)])
        if rest:
            self._state = self._answer
        return rest

    def _answer(self, text: str) -> str:
        self._give("answer", text)
        return ""


def _num_overlap(text: str) -> int:
    for count in range(min(len(text), len(CLOSE) - 1), 0, -1):
        if CLOSE.startswith(text[len(text) - count :]):
            return count
    return 0
