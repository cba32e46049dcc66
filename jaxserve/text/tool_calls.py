"""Tool calls in a model's text, found while the text arrives: Hermes, Llama 3 and pythonic.

A parser turns text into pieces: text for people (str), the beginning of a call, more of a call's arguments. What they
add up to is the same however the text is cut (tests/test_tool_calls.py tries every cut). Each character is looked at
once, so the work is linear in the text. Text that only looks like a call is given out as text; a call to a function
that was not offered is such a text. Once a call's name is out, what follows is its arguments, valid or not, as with
OpenAI's models: the name goes out when its arguments begin.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_BLANK = 64  # characters of white space before a call that are held back, and dropped if a call follows

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


class CallParser(Protocol):
    def push(self, text: str, final: bool = False) -> list[Piece]:
        """text: what follows; final: nothing will follow."""
        ...


class _JsonCall:
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
        self._call = _JsonCall(self._names)
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


def python_arguments(text: str) -> str | None:
    """The text between a Python call's parentheses -> JSON text of an object; None where it is not made of keywords
    and literals. true, false and null are understood too, and so is **{...}."""
    import ast

    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            value = _literal(keyword.value)
            if keyword.arg is not None:
                values[keyword.arg] = value
            elif isinstance(value, dict):
                values.update(value)
            else:
                return None
        written = json.dumps(values, ensure_ascii=False, allow_nan=False)
        written.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say as an escape
        return json.dumps(values, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return written


def _literal(node: Any) -> Any:
    """A literal's value; tuples and sets become lists. Raises ValueError."""
    import ast

    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("JSON has no such value")
    return value


def _key(node: Any) -> str:
    if node is None or not isinstance(key := _literal(node), str):
        raise ValueError("a key of an object must be a string")
    return key
