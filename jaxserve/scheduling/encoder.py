"""Which texts an encoder takes together: rows of one padded array. Plain Python, no JAX, no clock."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from jaxserve.types import Request

SHORTEST = 16  # tokens; a shorter array costs hardly less


@dataclass(frozen=True, slots=True)
class EncoderBucket:
    """One compiled shape."""

    num_rows: int  # B
    num_tokens: int  # T, of each row


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """requests[i] is row i; the other rows of the bucket are padding."""

    bucket: EncoderBucket
    requests: tuple[Request, ...]


def encoder_buckets(max_len: int, max_tokens: int, max_rows: int) -> tuple[EncoderBucket, ...]:
    """Lengths by powers of two up to max_len; of each one row, and eightfold fewer rows from max_tokens' worth down.

    Few numbers of rows, since one row of 32 tokens is as fast a token as many are on the CPU.
    """
    lengths, length = [], SHORTEST
    while length < max_len:
        lengths.append(length)
        length *= 2
    found = []
    for length in (*lengths, max_len):
        rows = max(1, min(max_tokens // length, max_rows))
        while rows > 2:
            found.append(EncoderBucket(rows, length))
            rows //= 8
        found.append(EncoderBucket(1, length))
    return tuple(found)


class EncoderQueue:
    """Texts that wait, by priority and length."""

    def __init__(self, buckets: Sequence[EncoderBucket]) -> None:
        self._rows: dict[int, list[int]] = {}  # tokens of a row -> numbers of rows, ascending
        for bucket in sorted(buckets, key=lambda b: (b.num_tokens, b.num_rows)):
            self._rows.setdefault(bucket.num_tokens, []).append(bucket.num_rows)
        self._lines: dict[tuple[int, int], dict[int, tuple[int, Request]]] = {}  # (priority, tokens) -> id -> arrival
        self._line_of: dict[int, tuple[int, int]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._line_of)

    def __iter__(self) -> Iterator[Request]:
        """By priority, then by length."""
        for key in sorted(self._lines):
            for _, request in self._lines[key].values():
                yield request

    def add(self, request: Request) -> None:
        """A text of 1 to max_len tokens."""
        length = next(tokens for tokens in self._rows if tokens >= len(request.token_ids))
        key = (request.priority, length)
        self._lines.setdefault(key, {})[request.id] = (self._arrivals, request)
        self._line_of[request.id] = key
        self._arrivals += 1

    def remove(self, request_ids: Iterable[int]) -> list[int]:
        """Those that were waiting."""
        known = [id_ for id_ in request_ids if id_ in self._line_of]
        for id_ in known:
            self._pop(id_)
        return known

    def take(self) -> EncoderBatch | None:
        """The text that has waited longest among the most urgent, with others of its length; None when none waits.

        Rows that would be padding take shorter texts, less urgent ones too: they cost nothing there.
        """
        if not self._line_of:
            return None
        urgent = min(priority for priority, _ in self._lines)
        lines = [key for key in self._lines if key[0] == urgent]
        first = min(lines, key=lambda key: next(iter(self._lines[key].values()))[0])
        bucket = self._fit(first[1], len(self._lines[first]))
        shorter = sorted(
            (key for key in self._lines if key[1] <= first[1] and key != first), key=lambda k: (k[0], -k[1])
        )
        requests: list[Request] = []
        for key in (first, *shorter):
            for id_ in list(islice(self._lines[key], bucket.num_rows - len(requests))):
                requests.append(self._pop(id_))
        return EncoderBatch(bucket, tuple(requests))

    def _fit(self, length: int, count: int) -> EncoderBucket:
        """The smallest that holds all, unless half of it or more would be padding: then the largest that is full.

        Where there is none (several ranks: no bucket has fewer rows than ranks), padding it is.
        """
        larger = [rows for rows in self._rows[length] if rows >= count]
        full = [rows for rows in self._rows[length] if rows <= count]
        if larger and (count > larger[0] // 2 or not full):
            return EncoderBucket(larger[0], length)
        return EncoderBucket(full[-1], length)

    def _pop(self, request_id: int) -> Request:
        key = self._line_of.pop(request_id)
        line = self._lines[key]
        _, request = line.pop(request_id)
        if not line:
            del self._lines[key]
        return request
