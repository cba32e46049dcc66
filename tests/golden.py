"""The golden answers of the default model (tests/data/golden_smollm2.json says how they were made), and what equals
them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxserve.llm import Choice
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import TokenLogprobs

LOGPROB_TOLERANCE = 1e-3  # natural logarithms, float32 here and there
GOLDEN_FILE = Path(__file__).with_name("data") / "golden_smollm2.json"
NAMES = ("capital", "haiku", "colors", "sum", "gravity", "translate", "long-689", "long-1989", "long-5988")


@dataclass(frozen=True)
class Case:
    """A chat message of the user, the prompt it becomes, and the greedy answer, its end-of-message token included."""

    name: str
    prompt: str
    prompt_ids: list[int]
    greedy_ids: list[int]
    text: str
    logprobs: list[float]  # of greedy_ids
    margins: list[float]  # how far the likeliest token is ahead of the next one, in logits

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    @property
    def max_tokens(self) -> int:
        return 32 if self.name.startswith("long") else 48

    def cacheable(self, page_size: int) -> int:
        """Prompt tokens that a warm prefix cache gives back: whole pages, never the last token."""
        return (len(self.prompt_ids) - 1) // page_size * page_size

    def check(self, choice: Choice) -> None:
        """A Choice sampled with include_stop, skip_special_tokens=False and two log-probabilities."""
        assert list(choice.token_ids) == self.greedy_ids
        assert choice.text == self.text
        assert choice.logprobs is not None
        self.check_logprobs([item.logprob for item in choice.logprobs], [_gap(item) for item in choice.logprobs])

    def check_reply(self, tokenizer: Tokenizer, text: str, tokens: Sequence[str], logprobs: Sequence[float]) -> None:
        """What a reply of the HTTP API holds: the text, and its tokens as text."""
        assert text == self.text
        assert list(tokens) == [tokenizer.token_bytes(token_id).decode() for token_id in self.greedy_ids]
        self.check_logprobs(logprobs, None)

    def check_logprobs(self, logprobs: Sequence[float], gaps: Sequence[float] | None) -> None:
        assert list(logprobs) == pytest.approx(self.logprobs, abs=LOGPROB_TOLERANCE)
        if gaps is not None:
            assert list(gaps) == pytest.approx(self.margins, abs=2 * LOGPROB_TOLERANCE)


def _gap(item: TokenLogprobs) -> float:
    return item.top_logprobs[0] - item.top_logprobs[1]


def load_cases() -> list[Case]:
    cases = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["cases"]
    fields = ("prompt", "prompt_ids", "greedy_ids", "text", "logprobs", "margins")
    return [Case(name, *(case[field] for field in fields)) for name, case in zip(NAMES, cases, strict=True)]
