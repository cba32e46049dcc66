"""The exact bytes of every token. A tokenizer.json says how ids become text by a list of decoders; for the kinds that
language models use, that list amounts to a table id -> bytes and a rule for leading spaces, which is what streaming
needs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

_SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True, slots=True)
class Layout:
    """How vocabulary entries spell bytes.

    Text is the UTF-8 of all bytes in a row, U+FFFD standing for what is no UTF-8.
    """

    byte_level: bool = False  # GPT-2's alphabet: one printable character per byte
    byte_fallback: bool = False  # entries <0x00> to <0xFF> are single bytes
    replace: tuple[tuple[str, str], ...] = ()
    strip_start: int = 0  # spaces taken off the start of the whole text
    first_drops_spaces: bool = False  # the first token loses its visible spaces

    def spell(self, token: str) -> bytes:
        """A vocabulary entry as the bytes it stands for."""
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()  # an added token, kept as it is written
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes((int(token[3:5], 16),))
            except ValueError:
                return token.encode()
        return token.encode()


def layout_of(decoder: dict[str, Any] | None) -> Layout | None:
    """The "decoder" of a tokenizer.json -> its Layout; None for a kind that is no table of bytes (WordPiece, CTC
    ...)."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Layout(byte_level=True)
    replace: list[tuple[str, str]] = []
    strip_start = 0
    for index, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replace.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                replace.append((mark, " "))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if "Fuse" in kinds[:index]:
                strip_start += start
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                return None
    if not replace:
        return None
    drops = any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)
    return Layout(
        byte_fallback="ByteFallback" in kinds,
        replace=tuple(replace),
        strip_start=strip_start,
        first_drops_spaces=drops,
    )


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's bytes_to_unicode, inverted: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return table
