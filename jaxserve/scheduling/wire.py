"""A plan as int32 words and back: what rank 0 sends the machines that compute with it. Nothing here is unpickled.

Words: num_decode, num_prefill, num_chunks, number of ranks; the packed vector of each rank; then of each rank its
admissions and its readings, every list behind its length. Real numbers travel as their float32 bits, which is what the
device is given. What only the scheduler needs (sequences, counts, owners of readings) stays at home.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxserve.scheduling.plan import Admission, Bucket, JointPlan, Plan, Readings, StepPlan, packed_size, unpack

_NO_READINGS = -1


def encode(plan: Plan) -> np.ndarray:
    """-> [words] int32."""
    bucket = plan.bucket
    numbers = [bucket.num_decode, bucket.num_prefill, bucket.num_chunks, len(plan.parts)]
    tail: list[int] = []
    for part in plan.parts:
        tail.append(len(part.admissions))
        for admission in part.admissions:
            tail += _admission_words(admission)
        tail += _readings_words(part.readings)
    return np.concatenate([np.asarray(numbers, np.int32), plan.packed, np.asarray(tail, np.int32)])


def decode(words: np.ndarray, max_pages: int) -> Plan:
    """words [n] int32, max_pages M of the plans -> what a runner launches. Raises ValueError for other words."""
    if len(words) < 4:
        raise ValueError("a plan has at least four words")
    num_decode, num_prefill, num_chunks, num_ranks = words[:4].tolist()
    bucket = Bucket(num_decode, num_prefill, num_chunks)
    if min(num_decode, num_prefill, num_chunks) < 0 or num_ranks < 1:
        raise ValueError(f"there is no plan of {num_ranks} ranks in {bucket}")
    size = packed_size(bucket, max_pages)
    end = 4 + num_ranks * size
    if len(words) < end:
        raise ValueError(f"a plan of {num_ranks} ranks in {bucket} has more than {len(words)} words")
    packed, tail = words[4:end], _Words(words[end:])
    parts = []
    for vector in np.split(packed, num_ranks):
        admissions = tuple(_admission(tail) for _ in range(tail.number()))
        readings = _readings(tail)
        parts.append(StepPlan(bucket, vector, unpack(vector, bucket, max_pages), admissions, (), 0, readings))
    tail.end()
    return parts[0] if num_ranks == 1 else JointPlan(tuple(parts), packed)


class _Words:
    """Taken from the front."""

    def __init__(self, words: np.ndarray):
        self._words = words
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        if not 0 <= count <= len(self._words) - self._at:
            raise ValueError(f"a plan ends {count} words too early")
        self._at += count
        return self._words[self._at - count : self._at]

    def number(self) -> int:
        return int(self.take(1)[0])

    def numbers(self) -> tuple[int, ...]:
        """As many as the first of them says."""
        return tuple(self.take(self.number()).tolist())

    def end(self) -> None:
        if self._at != len(self._words):
            raise ValueError(f"{len(self._words) - self._at} words are left of a plan")


def _admission_words(admission: Admission) -> Iterator[int]:
    yield from (admission.slot, admission.num_prompt)
    yield from _counted(admission.token_ids)
    yield from _counted([token for token, _ in admission.logit_bias])
    yield from np.asarray([value for _, value in admission.logit_bias], np.float32).view(np.int32).tolist()
    yield from _counted(admission.stop_token_ids)


def _admission(words: _Words) -> Admission:
    slot, num_prompt = words.number(), words.number()
    token_ids, biased = words.numbers(), words.numbers()
    values = words.take(len(biased)).view(np.float32).tolist()
    return Admission(slot, token_ids, num_prompt, tuple(zip(biased, values, strict=True)), words.numbers())


def _readings_words(readings: Readings | None) -> Iterator[int]:
    if readings is None:
        yield _NO_READINGS
        return
    yield readings.num_top
    yield from _counted(readings.index.tolist())
    yield from readings.targets.tolist()
    yield from _counted([border for span in readings.spans for border in span])


def _readings(words: _Words) -> Readings | None:
    num_top = words.number()
    if num_top == _NO_READINGS:
        return None
    index = words.take(words.number())
    targets = words.take(len(index))
    borders = words.numbers()
    return Readings(index, targets, num_top, tuple(zip(borders[::2], borders[1::2], strict=True)), ())


def _counted(values: Sequence[int]) -> Iterator[int]:
    yield len(values)
    yield from values
