"""Grammars of constrained rows: llguidance's matchers, one per sequence, and the masks of the tokens they allow.

A matcher follows the tokens that were read back, so it is neither rolled back nor built again when its sequence is
preempted. A mask is made once every earlier step was committed (engine.loop).
"""

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from jaxserve.scheduling.plan import num_words
from jaxserve.types import FinishReason


class GrammarError(ValueError):
    """llguidance cannot compile what the front end should have checked."""


class Vocabulary:
    """The model's tokens as llguidance sees them. Making one takes about 0.4 s; compile() may run in any thread."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer_json: the text of tokenizer.json. vocab_size: the width of the logits; ids that the tokenizer does
        not have are never allowed. Raises ValueError."""
        self.vocab_size = vocab_size
        self._tokenizer = _tokenizer(tokenizer_json, vocab_size, [id_ for id_ in eos_token_ids if id_ < vocab_size])
        self.eos_token_ids = frozenset(self._tokenizer.eos_tokens)  # a mask holds them where the text may end
        self._executor = LLExecutor()

    def compile(self, grammar: str) -> "Matcher":
        """Raises GrammarError. Takes about 1 ms for a small schema; the GIL is released.

        The first mask, by far the dearest of a large grammar, is made here; copies have it.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Matcher(self, matcher)

    def fill(self, matchers: Sequence[tuple["Matcher", int]], num_rows: int) -> np.ndarray:
        """(matcher, its row) -> masks [num_rows, words] int32: bit v % 32 of word v // 32 is set where token v may come
        next; every bit of the other rows is set. About 0.1 ms a row, in parallel."""
        masks = allocate_token_bitmask(num_rows, max(self._tokenizer.vocab_size, self.vocab_size))
        if matchers:
            fill_next_token_bitmask_par(self._executor, [(matcher.inner, row) for matcher, row in matchers], masks)
        masks = masks[:, : num_words(self.vocab_size)]
        rest = self.vocab_size % 32
        if rest:
            masks[[row for _, row in matchers], -1] &= (1 << rest) - 1
        return np.ascontiguousarray(masks)

    @staticmethod
    def forbid(mask: np.ndarray, tokens: Iterable[int]) -> bool:
        """Clear the bits of tokens in mask [words]; True where one token at least is left."""
        words = mask.view(np.uint32)
        for token in tokens:
            if token // 32 < len(words):
                words[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        return bool(mask.any())


class Matcher:
    """How far one sequence is in its grammar."""

    def __init__(self, vocabulary: Vocabulary, inner: LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.inner = inner

    def copy(self) -> "Matcher":
        """One that moves by itself; about 0.01 ms."""
        return Matcher(self.vocabulary, self.inner.deep_copy())

    def accept(self, token: int) -> None:
        """Take in a sampled token that ends nothing by itself."""
        self.inner.consume_token(token)

    @property
    def is_over(self) -> bool:
        """Nothing can follow: the text is complete, or llguidance gave up."""
        return self.inner.is_stopped()

    @property
    def failed(self) -> bool:
        """llguidance gave up at one of its limits, which keep a step short."""
        return self.inner.is_error()

    @property
    def ending(self) -> FinishReason:
        """How a row ends that cannot go on: complete, or cut as at max_tokens."""
        return "stop" if not self.failed and self.inner.is_accepting() else "length"


def _tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """A tokenizer with more tokens than the model has logits keeps its own size."""
    eos = eos_token_ids or None
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
    except ValueError:
        return LLTokenizer(tokenizer_json, eos_token=eos)
