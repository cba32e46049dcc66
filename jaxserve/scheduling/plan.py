"""The value between scheduler and device: a Bucket names a compiled shape, a StepPlan is one int32 vector in that
shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

TAKE_LAST = -1  # token id meaning: read last_token[slot] on the device

# Bits of PlanArrays.flags, one word per row.
EMIT = 1  # this row samples a token of its sequence (a prefill chunk that is not the prompt's last does not)
SAMPLE = 2  # temperature > 0
TRUNCATE = 4  # top_k, top_p or min_p is in force
PENALTIES = 8  # reads and updates the slot's token counts
BIAS = 16  # adds the slot's bias row
SUPPRESS_STOP = 32  # fewer than min_tokens sampled so far: the slot's stop tokens cannot be sampled
LOGPROBS = 64
GRAMMAR = 128  # only tokens of the row's mask can be sampled


def num_words(vocab_size: int) -> int:
    """int32 words of a row's mask, a bit for each token: bit v % 32 of word v // 32."""
    return -(-vocab_size // 32)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A compiled shape. An unknown one is a KeyError in the runner, never a silent compile."""

    num_decode: int  # S: decode rows, exactly one token each; token r belongs to row r
    num_prefill: int  # T: prefill tokens, 0 or a chunk size (a multiple of the page size)
    num_chunks: int  # R: prefill rows they belong to; 0 when T is 0

    @property
    def num_rows(self) -> int:
        return self.num_decode + self.num_chunks

    @property
    def num_tokens(self) -> int:
        return self.num_decode + self.num_prefill


class PlanArrays(NamedTuple):
    """Views of one packed int32 vector (numpy on the host, jax inside the step). S, T, R as in Bucket; M pages per row.

    Padding: unused decode rows and chunks have slot = max_running (a scratch row), kv_len 0, position 0, page 0, flags
    0; prefill tokens past the end of their chunk have token id 0 and a position >= the row's kv_len.
    Page 0 is scratch and never belongs to a sequence.
    """

    token_ids: Any  # [S + T] TAKE_LAST or an id
    positions: Any  # [S + T] position in the sequence, from 0
    slots: Any  # [S + R]
    kv_lens: Any  # [S + R] tokens of the row's sequence after this step; 0 = unused row
    chunk_starts: Any  # [R + 1] where chunk r starts among the T prefill tokens: multiples of the page size, ascending;
    #   unused chunks start at T (chunk_starts[num used] is the aligned end of the last used one .. or T)
    page_table: Any  # [S + R, M] page of each page_size positions; 0 past the end
    flags: Any  # [S + R]
    temperature: Any  # [S + R] float32 bits, as are the other real numbers below
    top_k: Any  # [S + R] 0 = off
    top_p: Any  # [S + R] float32 bits
    min_p: Any  # [S + R] float32 bits
    presence_penalty: Any  # [S + R] float32 bits
    frequency_penalty: Any  # [S + R] float32 bits
    repetition_penalty: Any  # [S + R] float32 bits
    seed_low: Any  # [S + R] low 32 bits of the seed
    seed_high: Any  # [S + R] high 32 bits
    choice: Any  # [S + R]


def shapes(bucket: Bucket, max_pages: int) -> PlanArrays:
    """The shape of every array of a plan in this bucket, max_pages being M."""
    tokens, rows = (bucket.num_tokens,), (bucket.num_rows,)
    named: dict[str, tuple[int, ...]] = dict.fromkeys(PlanArrays._fields, rows)
    named |= {"token_ids": tokens, "positions": tokens}
    named |= {"chunk_starts": (bucket.num_chunks + 1,), "page_table": (bucket.num_rows, max_pages)}
    return PlanArrays(**named)


@cache  # of a few dozen buckets; every step asks
def _layout(bucket: Bucket, max_pages: int) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """(start, stop, shape) of every array in the packed vector."""
    stops = tuple(accumulate(math.prod(shape) for shape in shapes(bucket, max_pages)))
    return tuple(zip((0, *stops), stops, shapes(bucket, max_pages), strict=False))


def packed_size(bucket: Bucket, max_pages: int) -> int:
    """Length of the packed vector."""
    return _layout(bucket, max_pages)[-1][1]


def unpack(vector: Any, bucket: Bucket, max_pages: int) -> PlanArrays:
    """vector [packed_size] -> named views of it; works for numpy and for jax arrays alike."""
    return PlanArrays(*(vector[start:stop].reshape(shape) for start, stop, shape in _layout(bucket, max_pages)))


@dataclass(frozen=True, slots=True)
class Admission:
    """What the device must know about a row that uses per-slot sampling state, before its first step in this slot."""

    slot: int
    token_ids: tuple[int, ...]  # prompt and output so far
    num_prompt: int
    logit_bias: tuple[tuple[int, float], ...]
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Readings:
    """What is read from the hidden states of a step's T prefill tokens besides the next token of each row.

    N tokens of prompts are scored, and K <= R spans of tokens are summed up for vectors.
    """

    index: np.ndarray  # [N] int32: which of the T tokens predicts
    targets: np.ndarray  # [N] int32: the token it is followed by
    num_top: int  # alternatives that any of them wants
    spans: tuple[tuple[int, int], ...]  # [K] start and stop among the T tokens
    owners: tuple[Any, ...]  # host only: whose they are (scheduling.readings)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: packed is sent to the device, the rest stays on the host."""

    bucket: Bucket
    packed: np.ndarray  # [packed_size] int32
    arrays: PlanArrays  # views of packed
    admissions: tuple[Admission, ...]  # to be run before the step, in order
    sequences: tuple[tuple[int, Any], ...]  # (row, scheduling.sequence.Sequence) for every used row
    num_tokens: int  # tokens that are not padding
    readings: Readings | None = None
    num_decode_rows: int = 0  # host only, as is all below: for the log lines and those who watch
    num_new_sequences: int = 0  # admitted in this step, those that return after a preemption included
    num_new_tokens: int = 0  # prefill tokens of this step
    num_cached_tokens: int = 0  # tokens the sequences admitted in this step found in the prefix tree
    preempted: tuple[int, ...] = ()  # ids of requests that lost their pages for it

    @property
    def is_constrained(self) -> bool:
        """True when the step samples only after it was given masks (Scheduler.constrain)."""
        return bool((self.arrays.flags & GRAMMAR).any())

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the decode rows see."""
        return int(self.arrays.kv_lens[: self.bucket.num_decode].sum())

    @property
    def parts(self) -> "tuple[StepPlan, ...]":
        """Of each rank: one."""
        return (self,)


@dataclass(frozen=True, slots=True)
class JointPlan:
    """One step of several ranks (data parallel), which share a bucket and nothing else; see StepPlan."""

    parts: tuple[StepPlan, ...]
    packed: np.ndarray  # [ranks * packed_size] int32

    @property
    def bucket(self) -> Bucket:
        return self.parts[0].bucket

    @property
    def is_constrained(self) -> bool:
        return any(part.is_constrained for part in self.parts)

    @property
    def num_decode_rows(self) -> int:
        return sum(part.num_decode_rows for part in self.parts)

    @property
    def num_new_sequences(self) -> int:
        return sum(part.num_new_sequences for part in self.parts)

    @property
    def num_new_tokens(self) -> int:
        return sum(part.num_new_tokens for part in self.parts)

    @property
    def num_cached_tokens(self) -> int:
        return sum(part.num_cached_tokens for part in self.parts)

    @property
    def num_context_tokens(self) -> int:
        return sum(part.num_context_tokens for part in self.parts)


Plan = StepPlan | JointPlan


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The answer to Readings, as numpy. E is the model's width."""

    logprobs: np.ndarray  # [N] float32: of the targets
    ranks: np.ndarray  # [N] int32: 1 = the likeliest token
    top_ids: np.ndarray  # [N, 20]; meaningless where num_top is 0
    top_logprobs: np.ndarray  # [N, 20]
    sums: np.ndarray  # [K, E] float32: of the spans' hidden states after the final norm


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the device answers, as numpy. N tokens per row at most (1 today)."""

    token_ids: np.ndarray  # [S + R, N]
    num_tokens: np.ndarray  # [S + R] how many of the N count
    logprobs: np.ndarray  # [S + R, N] float32; meaningless unless the row's flags hold LOGPROBS
    top_ids: np.ndarray  # [S + R, N, 20]
    top_logprobs: np.ndarray  # [S + R, N, 20]
    read: ReadResult | None = None  # where the plan has readings
    ranks: "tuple[StepResult, ...]" = ()  # of a JointPlan: what each answers; the arrays above are theirs, joined

    @classmethod
    def of_ranks(cls, arrays: Sequence[np.ndarray], read: Sequence[ReadResult | None]) -> "StepResult":
        """arrays: the first five, of all ranks one after another."""

        def result(own: Sequence[np.ndarray], told: ReadResult | None, ranks: "tuple[StepResult, ...]") -> StepResult:
            token_ids, num_tokens, logprobs, top_ids, top_logprobs = own
            return cls(token_ids, num_tokens, logprobs, top_ids, top_logprobs, told, ranks)

        if len(read) == 1:
            return result(arrays, read[0], ())
        split = zip(*(np.split(array, len(read)) for array in arrays), strict=True)
        return result(arrays, None, tuple(result(own, told, ()) for own, told in zip(split, read, strict=True)))

    @property
    def parts(self) -> "tuple[StepResult, ...]":
        """Of each rank."""
        return self.ranks or (self,)
