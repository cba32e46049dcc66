"""A device without a device: pages hold token ids, and the next token is a hash of all that a row can read.

A wrong page, position, length, slot, order or sampling word gives a wrong token, so every answer checks the plan.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxserve.scheduling import plan as words
from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.sequence import sampling_words
from jaxserve.types import Request, SamplingParams

VOCAB = 97
POISON = 1_000_003  # in pages nobody may read


def next_token(tokens: list[int], sampling: list[int], suppressed: frozenset[int], history: int | None) -> int:
    """The model and the sampler: any of the arguments changed gives another token, most of the time."""
    value = (17 + hash(tuple(sampling))) % 1_000_003
    for index, token in enumerate(tokens):
        value = (value * 31 + token * (index + 1)) % 1_000_003
    if history is not None:
        value = (value + 7 * history) % 1_000_003
    token = value % VOCAB
    while token in suppressed:
        token = (token + 1) % VOCAB
    return token


def state_of(tokens: list[int]) -> int:
    """The hidden state of the last of tokens, which depends on all of them."""
    value = 5
    for index, token in enumerate(tokens):
        value = (value * 37 + token * (index + 3)) % 1_000_033
    return value


def score_of(tokens: list[int], target: int) -> int:
    """What target's log-probability behind tokens is told by."""
    return (state_of(tokens) + 101 * target) % 4093


def vector_of(tokens: list[int]) -> np.ndarray:
    """[4] the hidden state of the last of tokens as a vector."""
    value = state_of(tokens)
    return np.array([value % 7, value % 11, value % 13, 1], np.float32)


def expected_readings(request: Request, pooling: str) -> tuple[list[int | None], np.ndarray]:
    """What a request's prompt must tell: a score for each token, and the vector, [4] of length 1."""
    tokens = list(request.token_ids)
    scores = [None, *(score_of(tokens[:i], tokens[i]) for i in range(1, len(tokens)))]
    states = [vector_of(tokens[: i + 1]) for i in range(len(tokens))]
    vector = np.sum(states, axis=0, dtype=np.float64) if pooling == "mean" else states[-1].astype(np.float64)
    return scores, vector / np.linalg.norm(vector)


def expected(request: Request, max_model_len: int) -> tuple[list[int], str]:
    """What a request must answer, computed with no scheduler: its tokens and finish reason."""
    params, tokens = request.params, list(request.token_ids)
    if request.task == "embed":
        return [], "stop"
    if params.max_tokens == 0:
        return [], "length"
    sampling = sampling_words(params).tolist()[1:]
    output: list[int] = []
    while True:
        suppressed = frozenset(params.stop_token_ids if len(output) < params.min_tokens else ())
        history = sum(tokens) if params.needs_penalties else None
        token = next_token(tokens, sampling, suppressed, history)
        may_stop = len(output) >= params.min_tokens
        tokens.append(token)
        output.append(token)
        if token in params.stop_token_ids and may_stop:
            return output, "stop"
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output, "length"


@dataclass
class FakeRunner:
    """Runs plans at once, in the order of launch, and checks what plan.py promises about padding."""

    num_pages: int
    page_size: int
    max_running: int
    max_pages: int
    seen: set = field(default_factory=set)  # buckets
    counts: dict = field(
        default_factory=lambda: {"take_last": 0, "chunks": 0, "partial_chunks": 0, "admissions": 0, "readings": 0}
    )

    def __post_init__(self) -> None:
        self.kv = np.full((self.num_pages, self.page_size), POISON, np.int64)
        self.last = np.full(self.max_running + 1, POISON, np.int64)
        self.history: dict[int, int] = {}
        self.stops: dict[int, frozenset[int]] = {}

    def poison(self, pages: list[int]) -> None:
        """These pages are free: whoever reads them from now on, without writing first, answers wrongly."""
        self.kv[pages] = POISON

    def launch(self, plan: StepPlan) -> StepResult:
        self.seen.add(plan.bucket)
        for admission in plan.admissions:
            self.counts["admissions"] += 1
            self.history[admission.slot] = sum(admission.token_ids)
            self.stops[admission.slot] = frozenset(admission.stop_token_ids)
        arrays = words.unpack(plan.packed, plan.bucket, self.max_pages)
        assert plan.packed.dtype == np.int32 and plan.packed.size == words.packed_size(plan.bucket, self.max_pages)
        spans = self._spans(plan, arrays)
        self._check_padding(plan, arrays, spans)
        # Attention may read the cache as it was before the step, except for the row's own new tokens.
        before = self.kv.copy()
        fed = {row: self._feed(arrays, row, start, stop) for row, (start, stop) in spans.items()}
        result = self._sample(plan, arrays, before, spans, fed)
        return replace(result, read=self._read(plan.readings, plan, arrays, before, spans, fed))

    def _read(self, readings: words.Readings | None, plan, arrays, before, spans, fed) -> words.ReadResult | None:
        if readings is None:
            return None
        self.counts["readings"] += len(readings.index) + sum(stop - start for start, stop in readings.spans)

        known = {row: self._cached(arrays, before, row, len(tokens)) + tokens for row, tokens in fed.items()}

        def tokens_up_to(at: int) -> list[int]:
            """What prefill token number at has before it in its sequence, itself included."""
            at += plan.bucket.num_decode
            row = next(row for row, (start, stop) in spans.items() if start <= at < stop)
            return known[row][: len(known[row]) - (spans[row][1] - at - 1)]

        scores = [score_of(tokens_up_to(i), t) for i, t in zip(readings.index, readings.targets, strict=True)]
        top = np.arange(20) + np.asarray(scores, np.int64).reshape(-1, 1)
        sums = [sum(vector_of(tokens_up_to(at)) for at in range(*span)) for span in readings.spans]
        return words.ReadResult(
            logprobs=-np.asarray(scores, np.float32),
            ranks=np.asarray(scores, np.int32) + 1,
            top_ids=top.astype(np.int32),
            top_logprobs=-top.astype(np.float32),
            sums=np.asarray(sums, np.float32),
        )

    def _cached(self, arrays: words.PlanArrays, before, row: int, num_new: int) -> list[int]:
        """The tokens that a row reads from pages written by earlier steps."""
        table, old = arrays.page_table[row], int(arrays.kv_lens[row]) - num_new
        return [int(before[table[i // self.page_size], i % self.page_size]) for i in range(old)]

    def _spans(self, plan: StepPlan, arrays: words.PlanArrays) -> dict[int, tuple[int, int]]:
        """Row -> its tokens in token_ids, padding left out."""
        num_decode, spans = plan.bucket.num_decode, {}
        for row in range(num_decode):
            if arrays.kv_lens[row]:
                spans[row] = (row, row + 1)
        for chunk in range(plan.bucket.num_chunks):
            row, start = num_decode + chunk, num_decode + int(arrays.chunk_starts[chunk])
            if arrays.kv_lens[row]:
                count = int(arrays.kv_lens[row] - arrays.positions[start])
                spans[row] = (start, start + count)
        return spans

    def _check_padding(self, plan: StepPlan, arrays: words.PlanArrays, spans: dict[int, tuple[int, int]]) -> None:
        bucket, size = plan.bucket, self.page_size
        assert sorted(spans) == sorted(row for row, _ in plan.sequences), "used rows differ from plan.sequences"
        assert sum(stop - start for start, stop in spans.values()) == plan.num_tokens
        starts = arrays.chunk_starts.tolist()
        assert starts == sorted(starts) and not any(start % size for start in starts)
        used = [row for row in spans if row >= bucket.num_decode]
        assert used == list(range(bucket.num_decode, bucket.num_decode + len(used))), "unused chunks between used ones"
        assert all(start == bucket.num_prefill for start in starts[len(used) :])
        real = np.zeros(bucket.num_tokens, bool)
        for row, (start, stop) in spans.items():
            real[start:stop] = True
            if row >= bucket.num_decode:
                assert arrays.positions[start] % size == 0, "a chunk that starts inside a page"
                end = bucket.num_decode + starts[row - bucket.num_decode + 1]
                assert stop <= end
                assert (arrays.positions[stop:end] >= arrays.kv_lens[row]).all()
                sequence = dict(plan.sequences)[row]
                ends = not sequence.answers and arrays.kv_lens[row] == sequence.num_prompt
                assert arrays.flags[row] & words.EMIT or arrays.kv_lens[row] % size == 0 or ends
                assert sequence.answers or not arrays.flags[row]
                self.counts["chunks"] += 1
                self.counts["partial_chunks"] += not arrays.flags[row] & words.EMIT
            pages = -(-int(arrays.kv_lens[row]) // size)
            assert (arrays.page_table[row, :pages] > 0).all() and not arrays.page_table[row, pages:].any()
        assert not arrays.token_ids[~real].any(), "padding tokens must be 0"
        slots = arrays.slots[sorted(spans)].tolist()
        assert len(set(slots)) == len(slots) and self.max_running not in slots
        for row in set(range(bucket.num_rows)) - set(spans):
            assert arrays.slots[row] == self.max_running and not arrays.page_table[row].any()
            assert not arrays.flags[row] and not arrays.kv_lens[row]
            assert row >= bucket.num_decode or not arrays.positions[row]

    def _feed(self, arrays: words.PlanArrays, row: int, start: int, stop: int) -> list[int]:
        """Write the row's tokens into its pages; returns them."""
        tokens = []
        for at in range(start, stop):
            token, position = int(arrays.token_ids[at]), int(arrays.positions[at])
            if token == words.TAKE_LAST:
                token = int(self.last[arrays.slots[row]])
                self.counts["take_last"] += 1
            assert position == arrays.positions[start] + at - start
            self.kv[arrays.page_table[row, position // self.page_size], position % self.page_size] = token
            tokens.append(token)
        return tokens

    def _sample(self, plan: StepPlan, arrays: words.PlanArrays, before, spans, fed) -> StepResult:
        rows = plan.bucket.num_rows
        result = StepResult(
            token_ids=np.zeros((rows, 1), np.int32),
            num_tokens=np.zeros(rows, np.int32),
            logprobs=np.full((rows, 1), np.nan, np.float32),
            top_ids=np.zeros((rows, 1, 20), np.int32),
            top_logprobs=np.zeros((rows, 1, 20), np.float32),
        )
        tail = np.stack([np.asarray(array) for array in arrays[words.PlanArrays._fields.index("flags") + 1 :]])
        for row, tokens in fed.items():
            flags, slot = int(arrays.flags[row]), int(arrays.slots[row])
            if not flags & words.EMIT:
                assert not flags
                continue
            read = self._cached(arrays, before, row, len(tokens))
            suppressed = self.stops[slot] if flags & words.SUPPRESS_STOP else frozenset()
            history = self.history[slot] if flags & words.PENALTIES else None
            token = next_token(read + tokens, tail[:, row].tolist(), suppressed, history)
            self.last[slot] = token
            if flags & words.PENALTIES:
                self.history[slot] += token
            result.token_ids[row, 0], result.num_tokens[row] = token, 1
            if flags & words.LOGPROBS:
                result.logprobs[row, 0] = -float(token)
                result.top_ids[row, 0] = np.arange(token, token + 20)
                result.top_logprobs[row, 0] = -np.arange(20)
        return result


def params(**changed: Any) -> SamplingParams:
    """Sampling parameters of a test: greedy, 8 tokens, seed 0, unless changed."""
    default: dict[str, Any] = {"max_tokens": 8, "seed": 0, "temperature": 0.0}
    return SamplingParams(**(default | changed))
