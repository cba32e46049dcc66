"""One running or waiting request, and the words that its sampling parameters become on the device."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxserve.scheduling import plan
from jaxserve.scheduling.radix import Node
from jaxserve.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:  # llguidance takes 0.2 s to import
    from jaxserve.scheduling.grammar import Matcher

Reads = Literal["scores", "last", "mean"] | None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far it got. Mutable, owned by the Scheduler; others read.

    tokens      known ids: the prompt and what was read back from the device
    length      known ids and those sampled in a step that was not read yet (num_in_flight)
    num_computed  positions whose keys and values are written once every planned step has run
    num_read    positions whose hidden states are read once every planned step has run; a preemption keeps them
    """

    request: Request
    order: tuple[int, int]  # (priority, arrival number): smaller is served first, the largest is preempted first
    arrived: float
    tokens: "array[int]"
    num_prompt: int
    max_length: int  # prompt and output
    stop_token_ids: frozenset[int]
    min_length: int  # length below which stop tokens are suppressed; 0 = never
    answers: bool  # False: it ends with its prompt, and samples nothing
    reads: Reads  # what is read from the hidden states of the prompt's tokens
    slot: int = -1  # -1: waiting
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    num_to_prefill: int = 0  # known tokens at the last admission; decoding starts when they are computed
    num_cached: int = 0  # prompt tokens found in the prefix tree at the first admission
    was_admitted: bool = False
    done: bool = False
    matcher: "Matcher | None" = None  # of request.grammar; it has taken in the tokens after the prompt
    node: Node | None = None  # waiting: deepest match so far; running: deepest own page in the tree
    num_read: int = 0
    pooled: np.ndarray | None = None  # [E] float64: the sum of what was read so far

    @classmethod
    def of(
        cls, request: Request, arrival: int, now: float, max_model_len: int, pooling: Literal["last", "mean"]
    ) -> "Sequence":
        params, num_prompt = request.params, len(request.token_ids)
        embeds = request.task == "embed"
        max_tokens = 0 if embeds else params.max_tokens
        reads: Reads = None
        if embeds:
            reads = pooling
        elif params.num_prompt_logprobs is not None:
            reads = "scores"
        return cls(
            request=request,
            order=(request.priority, arrival),
            arrived=now,
            tokens=array("i", request.token_ids),
            num_prompt=num_prompt,
            max_length=min(num_prompt + max_tokens, max_model_len),
            stop_token_ids=frozenset(params.stop_token_ids),
            min_length=num_prompt + params.min_tokens if params.min_tokens and params.stop_token_ids else 0,
            answers=max_tokens > 0,
            reads=reads,
        )

    def append(self, token: int) -> FinishReason | None:
        """Take in a token that was read back -> why it is the last one, where it is. None as well where its grammar is
        over: such a sequence ends without a further token, even where this was the last one allowed."""
        stops = token in self.stop_token_ids and len(self.tokens) >= self.min_length
        self.tokens.append(token)
        if stops:
            return "stop"
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.is_over:
                return None
        return "length" if len(self.tokens) >= self.max_length else None

    def admission(self) -> plan.Admission:
        """What the device must know of it in its slot, before its next step."""
        params = self.request.params
        return plan.Admission(
            slot=self.slot,
            token_ids=tuple(self.tokens),
            num_prompt=self.num_prompt,
            logit_bias=params.logit_bias,
            stop_token_ids=params.stop_token_ids,
        )

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_in_flight

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_to_prefill

    @property
    def max_match(self) -> int:
        """Tokens a prefix match may cover: all but the last, which must pass through a step to be answered, and none
        whose hidden state is still to be read."""
        most = len(self.tokens) - 1
        if self.reads in ("scores", "mean") and self.num_read < self.num_prompt:
            return min(most, self.num_read)
        return most


def order(sequence: Sequence) -> tuple[int, int]:
    """For sorting: smaller is served first."""
    return sequence.order


NUM_SAMPLING_WORDS = len(plan.PlanArrays._fields) - plan.PlanArrays._fields.index("flags")


def sampling_words(params: SamplingParams) -> np.ndarray:
    """params -> [NUM_SAMPLING_WORDS] int32, the row's flags .. choice in PlanArrays' order, for a row that samples.

    SUPPRESS_STOP is left out: it depends on how far the sequence is.
    """
    reals = np.array(
        [
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ],
        np.float32,
    )
    sample = bool(reals[0] > 0)  # a temperature that is 0 in float32 is greedy, not a division by zero
    flags = plan.EMIT
    flags |= plan.SAMPLE if sample else 0
    flags |= plan.TRUNCATE if sample and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0) else 0
    flags |= plan.PENALTIES if params.needs_penalties else 0
    flags |= plan.BIAS if params.logit_bias else 0
    flags |= plan.LOGPROBS if params.num_logprobs is not None else 0
    seed = np.array([params.seed & 0xFFFFFFFF, params.seed >> 32 & 0xFFFFFFFF], np.uint32).view(np.int32)
    bits = reals.view(np.int32)
    words = [flags, bits[0], params.top_k, *bits[1:], seed[0], seed[1], params.choice]
    return np.array(words, np.int32)
