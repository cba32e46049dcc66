"""Log-probabilities in OpenAI's two shapes: a list of entries (chat) and parallel columns (completions)."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.text.generate import PromptLogprobs
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import TokenLogprobs

MIN_LOGPROB = -9999.0  # JSON has no -inf; the same stand-in as OpenAI's and SGLang's


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """token_ids [N], logprobs [N] -> choices[].logprobs of a chat completion."""
    content = []
    for token_id, item in zip(token_ids, logprobs, strict=True):
        top = [_entry(tokenizer, other, value) for other, value in zip(item.top_ids, item.top_logprobs, strict=True)]
        content.append({**_entry(tokenizer, token_id, item.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token_id)
    return {"token": tokenizer.token_text(token_id), "bytes": list(token_bytes), "logprob": finite(logprob)}


def finite(logprob: float) -> float:
    """JSON knows neither infinity nor NaN."""
    return max(MIN_LOGPROB, logprob)  # NaN compares false


def _token_key(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; bytes that are no text as "bytes:\\xe2\\x80", so that keys stay apart."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass
class CompletionLogprobs:
    """Columns of one choice of a completion. text_offset counts characters of the text that the choice returns."""

    tokenizer: Tokenizer
    skip_special_tokens: bool
    offset: int = 0  # characters returned so far, an echoed prompt included
    columns: dict[str, list[Any]] = field(default_factory=lambda: _empty_columns())

    def add(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The columns of one delta (text and the tokens it completes), which also join self.columns."""
        added = _empty_columns()
        for token_id, item, offset in zip(token_ids, logprobs, self._offsets(text, token_ids), strict=True):
            key = _token_key(self.tokenizer, token_id)
            added["tokens"].append(key)
            added["token_logprobs"].append(finite(item.logprob))
            added["top_logprobs"].append(self._top(key, item, len(item.top_ids)))
            added["text_offset"].append(offset)
        for name, column in added.items():
            self.columns[name].extend(column)
        self.offset += len(text)
        return added

    def add_prompt(
        self, text: str, token_ids: Sequence[int], logprobs: PromptLogprobs, num_top: int
    ) -> dict[str, list[Any]]:
        """The columns of an echoed prompt, text being what the choice returns of it; nulls for the first token."""
        added = _empty_columns()
        for token_id, item, offset in zip(
            token_ids, logprobs, prompt_offsets(self.tokenizer, text, token_ids), strict=True
        ):
            key = _token_key(self.tokenizer, token_id)
            added["tokens"].append(key)
            added["text_offset"].append(offset)
            added["token_logprobs"].append(None if item is None else finite(item.logprob))
            added["top_logprobs"].append(None if item is None else self._top(key, item, num_top))
        for name, column in added.items():
            self.columns[name].extend(column)
        return added

    def _top(self, key: str, item: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The alternatives and the token itself, which OpenAI adds where it is not among them."""
        top: dict[str, float] = {}
        for other, value in zip(item.top_ids[:num_top], item.top_logprobs[:num_top], strict=True):
            top.setdefault(_token_key(self.tokenizer, other), finite(value))
        top.setdefault(key, finite(item.logprob))
        return top

    def _offsets(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """Where each token begins. A token inside a character begins where the character ends up to be."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets, length = [], 0
        for token_id in token_ids:
            offsets.append(self.offset + min(length, len(text)))
            if not (self.skip_special_tokens and token_id in self.tokenizer.special_ids):
                length += len(decoder.decode(self.tokenizer.token_bytes(token_id)))
        return offsets


def prompt_offsets(tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> list[int]:
    """Where each token of a prompt begins in its text [N]. A special token that the tokenizer added, and the space that
    SentencePiece puts before the first word, are no part of the text and take no room."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(min(length, len(text)))
        piece = decoder.decode(tokenizer.token_bytes(token_id))
        if token_id in tokenizer.special_ids and not text.startswith(piece, length):
            continue
        if not length and piece.startswith(" ") and not text.startswith(" "):
            piece = piece[1:]
        length += len(piece)
    return offsets


def prompt_logprobs_list(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: PromptLogprobs, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each token {id: {logprob, rank, decoded_token}} of itself and its alternatives."""
    entries: list[dict[str, Any] | None] = []
    for token_id, item in zip(token_ids, logprobs, strict=True):
        if item is None:
            entries.append(None)
            continue
        told = {token_id: (item.logprob, item.rank)}
        for rank, (other, value) in enumerate(zip(item.top_ids[:num_top], item.top_logprobs[:num_top], strict=True), 1):
            told.setdefault(other, (value, rank))
        entries.append(
            {
                str(other): {"logprob": finite(value), "rank": rank, "decoded_token": tokenizer.token_text(other)}
                for other, (value, rank) in told.items()
            }
        )
    return entries


def merged(first: dict[str, list[Any]] | None, second: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """Columns that follow each other, as one."""
    if first is None or second is None:
        return first or second
    return {name: column + second[name] for name, column in first.items()}


def _empty_columns() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
