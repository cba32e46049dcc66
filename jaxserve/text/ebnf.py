"""EBNF as llama.cpp's GBNF and xgrammar write it (`root ::= "a" b*`) -> Lark as llguidance reads it.

A rule that no recursion reaches becomes a terminal, which llguidance compiles to one automaton: no lexeme inside it
hides a shorter one. In recursive rules the longest lexeme wins, so a grammar that is ambiguous there may admit less
than it says, and never more. Rules may spread over lines; a name before `::=` begins the next one.
"""

import json
import re
from dataclasses import dataclass, field

MAX_DEPTH = 100  # of parentheses
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)|(?P<define>::=)|(?P<name>[A-Za-z0-9_-]+)|(?P<literal>["'])|(?P<class>\[\^?)"""
    r"""|(?P<repeat>\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<mark>[|()*+?.])"""
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_HEX = {"x": 2, "u": 4, "U": 8}


class EbnfError(ValueError):
    """The text is no grammar; the message says where."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # of _TOKEN's groups, or "end"
    text: str  # the characters of a literal; Lark's notation of a class or a repetition
    start: int


@dataclass(slots=True)
class _Rule:
    lark: str = ""  # its body, with the number of each name it refers to between two NULs
    names: list[str] = field(default_factory=list)
    start: int = 0


def ebnf_to_lark(text: str) -> str:
    """The start rule is called root. Raises EbnfError."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise EbnfError(f"it has no rule named root; its rules are {', '.join(rules) or 'none'}")
    for rule in rules.values():
        for name in rule.names:
            if name not in rules:
                raise EbnfError(f"{_where(text, rule.start)}: rule {name!r} is used and never defined")
    terminals = _terminals(rules)
    lark = {name: f"T{i}" if name in terminals else f"r{i}" for i, name in enumerate(rules)}
    lines = [f"start: {lark['root']}"]
    for name, rule in rules.items():
        body = re.sub("\0([0-9]+)\0", lambda match, rule=rule: lark[rule.names[int(match[1])]], rule.lark)
        lines.append(f"{lark[name]}: {body}")
    return "\n".join(lines) + "\n"


def _terminals(rules: dict[str, _Rule]) -> set[str]:
    """The rules that no recursion is reached from."""
    found: set[str] = set()
    while True:
        more = {name for name, rule in rules.items() if name not in found and found.issuperset(rule.names)}
        if not more:
            return found
        found |= more


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [*_tokenise(text), _Token("end", "", len(text))]
        self._at = 0
        self._depth = 0
        self._rule = _Rule()

    def rules(self) -> dict[str, _Rule]:
        found: dict[str, _Rule] = {}
        while self._peek().kind != "end":
            name = self._take("name", "a rule's name")
            self._take("define", "::=")
            if name.text in found:
                raise EbnfError(f"{_where(self._text, name.start)}: rule {name.text!r} is defined twice")
            self._rule = found[name.text] = _Rule(start=name.start)
            self._rule.lark = self._alternatives()
        return found

    def _alternatives(self) -> str:
        parts = [self._sequence()]
        while self._peek().text == "|" and self._peek().kind == "mark":
            self._at += 1
            parts.append(self._sequence())
        return " | ".join(parts)

    def _sequence(self) -> str:
        items: list[str] = []
        while True:
            token, after = self._peek(), self._tokens[min(self._at + 1, len(self._tokens) - 1)]
            if token.kind == "end" or (token.kind == "mark" and token.text in "|)"):
                break
            if token.kind == "name" and after.kind == "define":
                break
            self._at += 1
            if token.kind == "repeat" or (token.kind == "mark" and token.text in "*+?"):
                if not items:
                    raise EbnfError(f"{_where(self._text, token.start)}: {token.text} has nothing before it to repeat")
                items[-1] = '""' if token.text in ("{0}", "{0,0}") else f"({items[-1]}){token.text}"
            else:
                items.append(self._item(token))
        return " ".join(items) or '""'

    def _item(self, token: _Token) -> str:
        if token.kind == "literal":
            return json.dumps(token.text, ensure_ascii=False)
        if token.kind == "class":
            return token.text
        if token.kind == "name":
            self._rule.names.append(token.text)
            return f"\0{len(self._rule.names) - 1}\0"  # no literal holds one: JSON escapes it
        if token.kind == "define":
            raise EbnfError(f"{_where(self._text, token.start)}: ::= has no rule's name before it")
        if token.text == ".":
            return "/(?s:.)/"
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise EbnfError(f"{_where(self._text, token.start)}: parentheses are nested deeper than {MAX_DEPTH}")
        inside = self._alternatives()
        if not (self._peek().kind == "mark" and self._peek().text == ")"):
            raise EbnfError(f"{_where(self._text, token.start)}: this parenthesis is never closed")
        self._at += 1
        self._depth -= 1
        return f"({inside})"

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, kind: str, expected: str) -> _Token:
        token = self._peek()
        if token.kind != kind:
            raise EbnfError(f"{_where(self._text, token.start)}: {expected} is expected")
        self._at += 1
        return token


def _tokenise(text: str) -> list[_Token]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise EbnfError(f"{_where(text, at)}: {text[at]!r} is not expected here")
        start, at, kind = at, match.end(), str(match.lastgroup)
        if kind == "literal":
            characters, at = _characters(text, at, match[0])
            tokens.append(_Token(kind, "".join(character for character, _ in characters), start))
        elif kind == "class":
            characters, at = _characters(text, at, "]")
            tokens.append(_Token(kind, _class(match[0], characters, _where(text, start)), start))
        elif kind == "repeat":
            tokens.append(_Token(kind, _repeat(match[0], _where(text, start)), start))
        elif kind != "space":
            tokens.append(_Token(kind, match[0], start))
    return tokens


def _characters(text: str, at: int, end: str) -> tuple[list[tuple[str, bool]], int]:
    """-> (characters with whether each was escaped, the position behind the closing one)."""
    start, found = at, []
    while at < len(text) and text[at] != end:
        if text[at] != "\\":
            found.append((text[at], False))
            at += 1
            continue
        kind = text[at + 1 : at + 2]
        size = _HEX.get(kind, 0)
        digits = text[at + 2 : at + 2 + size]
        if size:
            if not re.fullmatch(f"[0-9a-fA-F]{{{size}}}", digits) or not _is_character(int(digits, 16)):
                raise EbnfError(f"{_where(text, at)}: \\{kind}{digits} names no character")
            found.append((chr(int(digits, 16)), True))
        elif kind and not (kind.isalnum() and kind not in _ESCAPES):
            found.append((_ESCAPES.get(kind, kind), True))
        else:
            raise EbnfError(f"{_where(text, at)}: \\{kind} is no escape that is known here")
        at += 2 + size
    if at >= len(text):
        raise EbnfError(f"{_where(text, start - 1)}: {end} is missing, which would close this")
    return found, at + 1


def _is_character(code: int) -> bool:
    return code < 0x110000 and not 0xD800 <= code < 0xE000


def _class(opening: str, characters: list[tuple[str, bool]], where: str) -> str:
    """[a-z] and [^...] in the notation of Lark's regular expressions, every character by its number."""
    parts, at = [], 0
    while at < len(characters):
        first = last = characters[at][0]
        at += 1
        if characters[at : at + 1] == [("-", False)] and at + 1 < len(characters):
            last = characters[at + 1][0]
            at += 2
        if last < first:
            raise EbnfError(f"{where}: the range {first}-{last} runs backwards")
        parts.append(_code(first) if first == last else f"{_code(first)}-{_code(last)}")
    if not parts:
        if opening == "[^":
            return "/(?s:.)/"
        raise EbnfError(f"{where}: [] holds no character")
    return f"/{opening}{''.join(parts)}]/"


def _code(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


def _repeat(text: str, where: str) -> str:
    low, comma, high = "".join(text[1:-1].split()).partition(",")
    if high and int(high) < int(low):
        raise EbnfError(f"{where}: {text} asks for at least {low} and at most {high}")
    return f"{{{low},{high}}}" if comma else f"{{{low}}}"


def _where(text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    return f"line {line}, column {at - text.rfind(chr(10), 0, at)}"
