"""Ids -> text while they arrive: never half a character, and together exactly the text of a full decode."""

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer


class Detokenizer:
    """One per text. after_text: the ids continue a text, so a space at their start stays (SentencePiece marks the first
    word of a text with a space that is not part of it). kept: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        skip_special_tokens: bool,
        *,
        after_text: bool = False,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset()
        if tokenizer.layout is None:
            self._source: _Bytes | _Window = _Window(tokenizer, skipped)
        else:
            self._source = _Bytes(tokenizer, skipped, after_text)

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete; may be empty."""
        return self._source.push(ids)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never completed."""
        return self._source.finish()

    @property
    def half(self) -> bool:
        """True while a character has begun and is not complete."""
        return self._source.half


class _Bytes:
    """Tokens are bytes (tokenizer.layout): an incremental UTF-8 decoder is all it takes."""

    def __init__(self, tokenizer: "Tokenizer", skipped: frozenset[int], after_text: bool) -> None:
        layout = tokenizer.layout
        assert layout is not None
        self._piece = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = 0 if after_text else layout.strip_start
        self._first_drops_spaces = layout.first_drops_spaces and not after_text

    def push(self, ids: Iterable[int]) -> str:
        pieces = [piece for token_id in ids if token_id not in self._skipped and (piece := self._piece(token_id))]
        if pieces and self._first_drops_spaces:
            self._first_drops_spaces = False
            pieces[0] = pieces[0].replace(b" ", b"")
        return self._stripped(self._decoder.decode(b"".join(pieces)))

    def finish(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    @property
    def half(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class _Window:
    """Any other decoder: decode the ids since the last complete character, and give out what grew."""

    def __init__(self, tokenizer: "Tokenizer", skipped: frozenset[int]) -> None:
        self._backend = tokenizer.backend
        self._skipped = skipped
        self._ids: list[int] = []  # those before num_done are context: spacing depends on the word before
        self._num_done = 0

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(id_ for id_ in ids if id_ not in self._skipped)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._num_done :]
        self._num_done = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._texts()
        self._num_done = len(self._ids)
        return now[len(before) :]

    @property
    def half(self) -> bool:
        before, now = self._texts()
        return len(now) > len(before)

    def _texts(self) -> tuple[str, str]:
        before = self._backend.decode(self._ids[: self._num_done], skip_special_tokens=False)
        return before, self._backend.decode(self._ids, skip_special_tokens=False)
