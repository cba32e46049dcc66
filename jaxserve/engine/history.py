"""What the latest steps did and what became of the latest requests, for people who watch.

Short rings that are kept whether anybody watches or not, so that whoever begins to sees what has just happened; about
3 % of the host's time per step (bench.watch). Nothing is sent unless a Snapshot is asked for.
"""

from collections import deque
from collections.abc import Iterable

from jaxserve.scheduling.plan import EMIT, Plan
from jaxserve.types import (
    BucketView,
    EngineStats,
    FinishReason,
    Lifeline,
    RequestState,
    RequestView,
    Snapshot,
    StepEvents,
    StepView,
)

NUM_STEPS = 256
NUM_REQUESTS = 64  # that have ended
MAX_MARKS = 64  # of one request: whoever is preempted more often keeps the latest

Shape = tuple[int, int, int]  # decode rows, prefill tokens, prefill rows


class _Line:
    """The life of one open request."""

    __slots__ = ("id", "marks", "priority")

    def __init__(self, id_: int, priority: int, now: float) -> None:
        self.id, self.priority = id_, priority
        self.marks: deque[tuple[RequestState, float]] = deque([("waiting", now)], MAX_MARKS)

    def ended(self, now: float | None, reason: FinishReason | None) -> Lifeline:
        return Lifeline(self.id, self.priority, tuple(self.marks), now, reason)


class History:
    """Owned by a loop. Every `now` is of one clock, in seconds."""

    def __init__(self) -> None:
        self._open: dict[int, _Line] = {}
        self._ended: deque[Lifeline] = deque(maxlen=NUM_REQUESTS)
        self._steps: deque[StepView] = deque(maxlen=NUM_STEPS)
        self._flight: deque[tuple[float, Shape, int, int]] = deque()
        self._use: dict[Shape, list[int]] = {}  # -> [steps, tokens]
        self._num_steps = 0

    def arrived(self, request_id: int, priority: int, now: float) -> None:
        self._open[request_id] = _Line(request_id, priority, now)

    def entered(self, state: RequestState, request_ids: Iterable[int], now: float) -> None:
        """These requests are in that state from now on, if they were not before."""
        for request_id in request_ids:
            line = self._open.get(request_id)
            if line is not None and line.marks[-1][0] != state:
                line.marks.append((state, now))

    def ended(self, request_ids: Iterable[int], reasons: Iterable[FinishReason | None], now: float) -> None:
        """Those of them that have a reason."""
        for request_id, reason in zip(request_ids, reasons, strict=True):
            if reason is not None and (line := self._open.pop(request_id, None)) is not None:
                self._ended.append(line.ended(now, reason))

    def launched(self, shape: Shape, used_decode: int, used_prefill: int, now: float) -> None:
        """A step, its bucket and how much of it is no padding."""
        self._flight.append((now, shape, used_decode, used_prefill))

    def read(self, now: float) -> None:
        """The oldest step in flight was read."""
        launched, shape, used_decode, used_prefill = self._flight.popleft()
        use = self._use.setdefault(shape, [0, 0])
        use[0] += 1
        use[1] += used_decode + used_prefill
        self._steps.append(StepView(self._num_steps, launched, now, *shape, used_decode, used_prefill))
        self._num_steps += 1

    def planned(self, plan: Plan, now: float) -> None:
        """A step of the paged engine was launched; its shape is that of all ranks together."""
        bucket, ranks = plan.bucket, len(plan.parts)
        shape = (bucket.num_decode * ranks, bucket.num_prefill * ranks, bucket.num_chunks * ranks)
        self.launched(shape, plan.num_decode_rows, plan.num_new_tokens, now)
        for part in plan.parts:
            if part.preempted:
                self.entered("waiting", part.preempted, now)
            if bucket.num_chunks:
                chunks = part.sequences[part.num_decode_rows :]
                self.entered("prefill", (sequence.request.id for _, sequence in chunks), now)

    def committed(self, plan: Plan, events: StepEvents, now: float) -> None:
        """It was read: prompts whose last chunk it held decode from now on."""
        self.read(now)
        for part in plan.parts if plan.bucket.num_chunks else ():
            flags = part.arrays.flags
            chunks = part.sequences[part.num_decode_rows :]
            self.entered("decode", (s.request.id for row, s in chunks if flags[row] & EMIT and s.slot >= 0), now)
        self.told(events, now)

    def told(self, events: StepEvents, now: float) -> None:
        """These events were sent; some may be ends."""
        if any(events.finish_reasons):
            self.ended(events.request_ids, events.finish_reasons, now)

    def snapshot(
        self, requests: tuple[RequestView, ...], page_states: bytes, stats: EngineStats, now: float
    ) -> Snapshot:
        lines = (self._open.get(view.id) for view in requests)
        return Snapshot(
            now=now,
            stats=stats,
            requests=requests,
            page_states=page_states,
            steps=tuple(self._steps),
            buckets=tuple(BucketView(*shape, *use) for shape, use in sorted(self._use.items())),
            lifelines=(*self._ended, *(line.ended(None, None) for line in lines if line is not None)),
        )
