"""One tool call written as a JSON object, read character by character while it arrives."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

_BLANK = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")  # Hermes' word, Llama's word
_IGNORED = ("type", "id")  # that models trained on OpenAI's own format add


@dataclass(frozen=True, slots=True)
class CallBegin:
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Arguments of the call that began last: a fragment of JSON text."""

    text: str


Piece = str | CallBegin | CallArguments


class JsonCall:
    """One {"name": ..., "arguments": {...}} read character by character, its keys in any order.

    done or failed says how it ended; raw is what was read and not given out, for a text that is no call after all.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.done = self.failed = self.begun = False
        self.raw: list[str] = []
        self.pieces: list[Piece] = []
        self._names = names
        self._state: Callable[[str], None] = self._open
        self._key = ""
        self._name: str | None = None
        self._string: list[str] | None = None  # characters of the string that is open, quotes included
        self._escaped = False
        self._fragment: list[str] = []  # of arguments, not given out yet
        self._has_arguments = False
        self._depth = 0

    def feed(self, text: str) -> int:
        """Reads until the call is done, fails or text ends. -> characters read, without the one it failed on."""
        for index, character in enumerate(text):
            self._state(character)
            if self.failed:
                self._flush()
                return index
            if self.done:
                self._flush()
                return index + 1
        self._flush()
        return len(text)

    def take(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def _flush(self) -> None:
        if self.begun and self._fragment:
            self.pieces.append(CallArguments("".join(self._fragment)))
            self._fragment.clear()

    def _begin(self) -> None:
        assert self._name is not None
        self.begun = True
        self.raw.clear()
        self.pieces.append(CallBegin(self._name))

    def _open(self, character: str) -> None:
        self._expect(character, "{", self._before_key)

    def _expect(self, character: str, wanted: str, then: Callable[[str], None]) -> None:
        if character == wanted:
            self._state = then
        elif character not in _BLANK:
            self.failed = True
            return
        self.raw.append(character)

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._start_string(character, self._after_key)
        else:
            self._expect(character, "", self._before_key)

    def _start_string(self, character: str, then: Callable[[str], None]) -> None:
        self.raw.append(character)
        self._string, self._escaped, self._after_string = [character], False, then
        self._state = self._in_string

    def _in_string(self, character: str) -> None:
        assert self._string is not None
        self.raw.append(character)
        self._string.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._state = self._end_string

    def _end_string(self, character: str) -> None:
        """One character late, so that raw never lacks the end of a string that turned out wrong."""
        assert self._string is not None
        try:
            value = json.loads("".join(self._string), strict=False)
            value.encode()
        except ValueError:  # a bad escape, or half of a surrogate pair
            self.failed = True
            return
        self._string = None
        self._value = value
        self._state = self._after_string
        self._state(character)

    def _after_key(self, character: str) -> None:
        self._key = self._value
        known = self._key == "name" or self._key in _IGNORED or (self._key in _ARGUMENTS and not self._has_arguments)
        if not known or (self._key == "name" and self._name is not None):
            self.failed = True
            return
        self._state = self._colon
        self._colon(character)

    def _colon(self, character: str) -> None:
        self._expect(character, ":", self._before_value)

    def _before_value(self, character: str) -> None:
        if character == '"':
            self._start_string(character, self._after_text)
        elif character == "{" and self._key in _ARGUMENTS:
            self._has_arguments, self._depth = True, 0
            if self._name is not None:
                self._begin()
            self._state = self._in_arguments
            self._in_arguments(character)
        elif character == "n" and self._key in _ARGUMENTS:
            self._literal = "null"
            self._state = self._in_null
            self._in_null(character)
        else:
            self._expect(character, "", self._before_value)

    def _after_text(self, character: str) -> None:
        if self._key == "name":
            if self._value not in self._names:
                self.failed = True
                return
            self._name = self._value
            if self._has_arguments:
                self._begin()
        elif self._key in _ARGUMENTS:  # a JSON object written as a string
            if not _is_object(self._value):
                self.failed = True
                return
            self._has_arguments = True
            self._fragment.append(self._value)
            if self._name is not None:
                self._begin()
        self._state = self._after_value
        self._after_value(character)

    def _in_null(self, character: str) -> None:
        if not self._literal.startswith(character):
            self.failed = True
            return
        self.raw.append(character)
        self._literal = self._literal[1:]
        if not self._literal:
            self._has_arguments = True
            self._fragment.append("{}")
            if self._name is not None:
                self._begin()
            self._state = self._after_value

    def _in_arguments(self, character: str) -> None:
        if not self.begun:
            self.raw.append(character)
        self._fragment.append(character)
        if self._string is not None:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._string = None
        elif character == '"':
            self._string = []
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._state = self._after_value

    def _after_value(self, character: str) -> None:
        if character == ",":
            self.raw.append(character)
            self._state = self._before_key
        elif character == "}" and self._name is not None:
            if not self._has_arguments:
                self._begin()
                self._fragment.append("{}")
            self.raw.clear()
            self.done = True
        else:
            self._expect(character, "", self._after_value)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
