"""Tool calls in a model's text, found while the text arrives: Hermes, Llama 3 and pythonic.

A parser turns text into pieces: text for people (str), the beginning of a call, more of a call's arguments. What they
add up to is the same however the text is cut (tests/test_tool_calls.py tries every cut). Each character is looked at
once, so the work is linear in the text. Text that only looks like a call is given out as text; a call to a function
that was not offered is such a text. Once a call's name is out, what follows is its arguments, valid or not, as with
OpenAI's models: the name goes out when its arguments begin.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from jaxserve.text.json_call import CallArguments, CallBegin, JsonCall, Piece
from jaxserve.text.python_literals import python_arguments

MAX_BLANK = 64  # characters of white space before a call that are held back, and dropped if a call follows

_BLANK = " \t\r\n"


class CallParser(Protocol):
    def push(self, text: str, final: bool = False) -> list[Piece]:
        """text: what follows; final: nothing will follow."""
        ...


@dataclass(slots=True)
class _Found:
    begin: int  # where the call's first character stands
    end: int  # where what the call's own reader reads begins


class _Scanner:
    """Text outside of calls. A subclass says where a call may begin, and reads it."""

    def __init__(self, names: Collection[str], hidden: str = "") -> None:
        """names: of the functions that were offered. hidden: a marker that is never shown as text."""
        self._names = names
        self._hidden = hidden
        self._state: Callable[[str], str] = self._text
        self._out: list[Piece] = []
        self._held = ""
        self._lead = ""  # what stands before a call that is being read, shown if it is none
        self._line_start = True  # only blanks since the last line break that was given out
        self._called = False

    def push(self, text: str, final: bool = False) -> list[Piece]:
        self._out = []
        while text:
            text = self._state(text)
        if final:
            self._finish()
        return self._out

    def _find(self, text: str) -> _Found | None:
        raise NotImplementedError

    def _num_partial(self, text: str) -> int:
        """How many characters at the end of text may be the beginning of a call's beginning."""
        raise NotImplementedError

    def _head(self, text: str) -> str:
        """The first state of reading a call. -> what it has not read."""
        raise NotImplementedError

    def _finish(self) -> None:
        if self._state == self._head:
            self._emit(self._lead)
        elif self._state == self._text and not (self._called and not self._held.strip(_BLANK)):
            self._emit(self._held)

    def _text(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = self._find(text)
        if found is not None:
            start = _blank_start(text, found.begin)
            self._emit(text[:start])
            self._lead = text[start : found.end]
            self._state = self._head
            return text[found.end :]
        start = _blank_start(text, len(text) - self._num_partial(text))
        self._emit(text[:start])
        self._held = text[start:]
        return ""

    def _emit(self, text: str) -> None:
        if not text:
            return
        line = text.rpartition("\n")[2]
        self._line_start = not line.strip(_BLANK) and (self._line_start or "\n" in text)
        if self._hidden:
            text = text.replace(self._hidden, "")
        if text:
            self._out.append(text)

    def _is_line_start(self, text: str, index: int) -> bool:
        line = text[:index].rpartition("\n")
        return not line[2].strip(_BLANK) and (bool(line[1]) or self._line_start)

    def _back_to_text(self, shown: str) -> None:
        self._emit(shown)
        self._state = self._text

    def _called_one(self) -> None:
        self._called, self._line_start = True, False


def _blank_start(text: str, end: int) -> int:
    """Where the white space before end begins, as far as it is held back."""
    return max(len(text[:end].rstrip(_BLANK)), end - MAX_BLANK)


def _num_overlap(text: str, marker: str) -> int:
    """The length of the longest end of text that is a beginning of marker, and not all of it."""
    for count in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[len(text) - count :]):
            return count
    return 0


class _JsonScanner(_Scanner):
    """Calls that are JSON objects."""

    def _begin_object(self, text: str) -> str:
        self._call = JsonCall(self._names)
        self._state = self._object
        return self._object(text)

    def _head(self, text: str) -> str:
        return self._begin_object(text)

    def _object(self, text: str) -> str:
        call = self._call
        rest = text[call.feed(text) :]
        self._out.extend(call.take())
        if call.begun:
            self._lead = ""
        if call.failed and not call.begun:
            self._back_to_text(self._lead + "".join(call.raw))
        elif call.failed or call.done:
            self._called_one()
            self._held = "".join(call.raw)
            self._state = self._after
        return rest

    def _after(self, text: str) -> str:
        raise NotImplementedError

    def _finish(self) -> None:
        if self._state == self._object:
            raw = "".join(self._call.raw)
            if not self._call.begun or raw.strip(_BLANK):
                self._emit(self._lead + raw)
        super()._finish()


class HermesCalls(_JsonScanner):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them, text around them."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def _find(self, text: str) -> _Found | None:
        begin = text.find(self.OPEN)
        return None if begin < 0 else _Found(begin, begin + len(self.OPEN))

    def _num_partial(self, text: str) -> int:
        return _num_overlap(text, self.OPEN)

    def _after(self, text: str) -> str:
        """White space and the closing tag; a tag that is missing is forgiven, other text is text."""
        text, self._held = self._held + text, ""
        tag = text.lstrip(_BLANK)
        if tag.startswith(self.CLOSE):
            self._state = self._text
            return tag[len(self.CLOSE) :]
        if self.CLOSE.startswith(tag):
            self._held = text
            return ""
        self._state = self._text
        return text


class LlamaCalls(_JsonScanner):
    """{"name": ..., "parameters": {...}} at the start of a line or after <|python_tag|>; several with ; between."""

    MARKER = "<|python_tag|>"

    def _find(self, text: str) -> _Found | None:
        marker = text.find(self.MARKER)
        brace = text.find("{", 0, marker if marker >= 0 else len(text))
        while brace >= 0 and not self._is_line_start(text, brace):
            line = text.find("\n", brace)
            brace = -1 if line < 0 else text.find("{", line, marker if marker >= 0 else len(text))
        if brace >= 0:
            return _Found(brace, brace)
        return None if marker < 0 else _Found(marker, marker + len(self.MARKER))

    def _num_partial(self, text: str) -> int:
        return _num_overlap(text, self.MARKER)

    def _after(self, text: str) -> str:
        text, self._held = self._held + text, ""
        match = _SEPARATOR.match(text)
        assert match is not None, "the separator may be empty"
        rest = text[match.end() :]
        if not rest:
            self._held = text
        elif rest[0] == "{":
            self._lead, self._state = match.group(), self._head
        else:
            self._state = self._text
            return text
        return rest


_SEPARATOR = re.compile(r"[ \t\r\n]*[;,]?[ \t\r\n]*")


@dataclass(slots=True)
class _PythonCall:
    """One f(a=1) that is being read."""

    name: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    depth: int = 0
    quote: str = ""
    escaped: bool = False


class PythonicCalls(_Scanner):
    """[f(a=1, b="x"), g()] at the start of a line. A call comes whole, since only then it is known to be one."""

    def _find(self, text: str) -> _Found | None:
        bracket = text.find("[")
        while bracket >= 0 and not self._is_line_start(text, bracket):
            line = text.find("\n", bracket)
            bracket = -1 if line < 0 else text.find("[", line)
        return None if bracket < 0 else _Found(bracket, bracket + 1)

    def _num_partial(self, text: str) -> int:
        return 0

    def _head(self, text: str) -> str:
        self._call, self._read = _PythonCall(), self._read_name
        self._raw: list[str] = []
        self._state = self._list
        return self._list(text)

    def _list(self, text: str) -> str:
        for index, character in enumerate(text):
            raw = self._raw
            if not self._read(character):
                self._back_to_text(self._lead + "".join(raw))
                self._lead = ""
                return text[index:]
            raw.append(character)
            if self._read == self._read_end:
                self._lead, self._state = "", self._text
                return text[index + 1 :]
        return ""

    def _read_name(self, character: str) -> bool:
        name = self._call.name
        if character == "(":
            self._read = self._read_arguments
            return "".join(name) in self._names
        if character in _BLANK:
            return not name
        name.append(character)
        return character.isascii() and (character.isalnum() or character in "_-")

    def _read_arguments(self, character: str) -> bool:
        call = self._call
        if call.escaped:
            call.escaped = False
        elif call.quote:
            call.escaped = character == "\\"
            if character == call.quote:
                call.quote = ""
        elif character in "\"'":
            call.quote = character
        elif character in "([{":
            call.depth += 1
        elif character in ")]}":
            call.depth -= 1
            if call.depth < 0:
                return character == ")" and self._give_out()
        call.arguments.append(character)
        return True

    def _give_out(self) -> bool:
        arguments = python_arguments("".join(self._call.arguments))
        if arguments is None:
            return False
        self._out += [CallBegin("".join(self._call.name)), CallArguments(arguments)]
        self._called_one()
        self._call, self._read = _PythonCall(), self._read_separator
        self._raw, self._lead = [], ""
        return True

    def _read_separator(self, character: str) -> bool:
        if character == ",":
            self._read = self._read_name
        elif character == "]":
            self._read = self._read_end
        return character in _BLANK or character in ",]"

    def _read_end(self, character: str) -> bool:
        raise AssertionError("nothing is read after the list")

    def _finish(self) -> None:
        if self._state == self._list:
            raw = self._lead + "".join(self._raw)
            if not self._called or raw.strip(_BLANK + ","):
                self._emit(raw)
        super()._finish()
