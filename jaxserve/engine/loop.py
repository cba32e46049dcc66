"""The engine's turn: receive, schedule, launch, commit the step before. One thread owns scheduler and runner."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from jaxserve.engine.grammars import Grammars, Prepared
from jaxserve.engine.history import History
from jaxserve.scheduling.plan import Plan, StepResult
from jaxserve.scheduling.ranks import RankedScheduler
from jaxserve.scheduling.readings import read_messages
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.types import (
    AbortRequests,
    AddRequests,
    FlushCache,
    FromEngine,
    Request,
    StepEvents,
    Stop,
    TakeSnapshot,
    ToEngine,
)

if TYPE_CHECKING:
    from jaxserve.scheduling.grammar import Matcher

logger = logging.getLogger(__name__)
M = TypeVar("M")


class Pending(Protocol):
    """A step in flight."""

    def sample(self, masks: np.ndarray) -> None: ...

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """What the loop needs of ModelRunner."""

    def launch(self, plan: Plan) -> Pending: ...


def received(inbox: "queue.SimpleQueue[M]", *, wait: bool) -> Iterator[M]:
    """Everything that has arrived, in order; wait: for the first of it."""
    with suppress(queue.Empty):
        while True:
            yield inbox.get(block=wait)
            wait = False


class EngineLoop:
    """Step k + 1 is launched before step k is read (overlap), unless that is switched off.

    A step with constrained rows is launched as far as it goes without their masks, which follow from the tokens of step
    k: where a step is a chain of programs, its layers run while the host makes the masks.
    """

    def __init__(
        self,
        scheduler: Scheduler | RankedScheduler,
        runner: Runner,
        inbox: "queue.SimpleQueue[ToEngine | Prepared]",
        send: Callable[[FromEngine], None],
        *,
        grammars: Grammars | None = None,
        compilations: Callable[[], int],
        overlap: bool = True,
        decode_log_interval: int = 40,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._scheduler = scheduler
        self._runner = runner
        self._inbox = inbox
        self._send = send
        self._grammars = grammars
        self._preparing: dict[int, Request] = {}  # their grammars are being compiled
        self._compilations = compilations
        self._overlap = overlap
        self._clock = clock
        self._log = StepLog(scheduler, decode_log_interval, clock, compilations)
        self._history = History()
        self.busy_since: float | None = None  # read by the watchdog's thread

    def run(self) -> None:
        """Until Stop."""
        flight: tuple[Plan, Pending] | None = None
        while self._receive(wait=flight is None and not self._scheduler.has_work):
            self.busy_since = self._clock()
            events: list[StepEvents] = []
            if flight is not None and not self._overlap:
                events.append(self._commit(*flight))
                flight = None
            plan = self._scheduler.schedule(self._clock())
            launched = None
            if plan is not None:
                launched = (plan, self._runner.launch(plan))
                self._log.planned(plan)
                self._history.planned(plan, self._clock())
            if flight is not None:
                events.append(self._commit(*flight))
            flight = launched
            if launched is not None and launched[0].is_constrained:
                masks, ended = self._scheduler.constrain(launched[0], self._compilations())
                launched[1].sample(masks)
                if ended.request_ids:
                    self._history.told(ended, self._clock())
                    events.append(ended)
            for each in events:
                self._send(each)
            self.busy_since = None

    def _receive(self, *, wait: bool) -> bool:
        """Take in everything that has arrived; False to stop."""
        for message in received(self._inbox, wait=wait):
            match message:
                case AddRequests(requests):
                    for request in requests:
                        self._add(request)
                case Prepared(request, matcher):
                    self._add_prepared(request, matcher)
                case AbortRequests(request_ids):
                    waiting = [id_ for id_ in request_ids if self._preparing.pop(id_, None) is not None]
                    self._emit(self._scheduler.abort(request_ids, self._compilations(), waiting))
                case FlushCache():
                    self._scheduler.flush_cache()
                case TakeSnapshot():
                    stats = self._scheduler.stats(self._compilations())
                    self._send(self._history.snapshot(*self._scheduler.snapshot(), stats, self._clock()))
                case Stop():
                    return False
        return True

    def _add(self, request: Request) -> None:
        self._history.arrived(request.id, request.priority, self._clock())
        if request.grammar is None:
            self._scheduler.add(request, self._clock())
            return
        assert self._grammars is not None, "a constrained request, and nothing to constrain it with"
        self._preparing[request.id] = request
        matcher = self._grammars.prepare(request)
        if matcher is not None:
            self._add_prepared(request, matcher)

    def _add_prepared(self, request: Request, matcher: "Matcher | None") -> None:
        if self._preparing.pop(request.id, None) is None:
            return  # it was aborted meanwhile
        if matcher is None:
            self._emit(self._scheduler.abort((), self._compilations(), [request.id]))
        else:
            self._scheduler.add(request, self._clock(), matcher)

    def _commit(self, plan: Plan, handle: Pending) -> StepEvents:
        result = handle.result()
        for part, told in zip(plan.parts, result.parts, strict=True):
            for message in read_messages(part, told):
                self._send(message)
        events = self._scheduler.commit(plan, result, self._compilations())
        self._log.committed(plan)
        self._history.committed(plan, events, self._clock())
        return events

    def _emit(self, events: StepEvents) -> None:
        """Ends that belong to no step."""
        self._history.told(events, self._clock())
        self._send(events)


class StepLog:
    """The lines people grep for, in SGLang's shapes."""

    def __init__(
        self,
        scheduler: Scheduler | RankedScheduler,
        interval: int,
        clock: Callable[[], float],
        compilations: Callable[[], int],
    ):
        self._scheduler = scheduler
        self._interval = interval
        self._clock = clock
        self._compilations = compilations
        self._decode_steps = 0
        self._tokens = 0
        self._since = clock()

    def planned(self, plan: Plan) -> None:
        if not plan.num_new_tokens or not logger.isEnabledFor(logging.INFO):
            return
        stats = self._scheduler.stats()
        rate = plan.num_cached_tokens / max(plan.num_cached_tokens + plan.num_new_tokens, 1)
        logger.info(
            "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, cache hit rate: %.2f%%, "
            "token usage: %.2f, #running-req: %d, #queue-req: %d, #cache_miss: %d",
            plan.num_new_sequences,
            plan.num_new_tokens,
            plan.num_cached_tokens,
            100 * rate,
            stats.num_held_pages / stats.num_pages,
            plan.num_decode_rows,
            stats.num_waiting,
            self._compilations(),
        )

    def committed(self, plan: Plan) -> None:
        if not plan.num_decode_rows:
            return
        self._decode_steps += 1
        self._tokens += plan.num_decode_rows
        if self._decode_steps % self._interval:
            return
        now, stats = self._clock(), self._scheduler.stats()
        logger.info(
            "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
            "#queue-req: %d, #cache_miss: %d",
            stats.num_running,
            plan.num_context_tokens,
            stats.num_held_pages / stats.num_pages,
            self._tokens / max(now - self._since, 1e-9),
            stats.num_waiting,
            self._compilations(),
        )
        self._tokens, self._since = 0, now


class Turning(Protocol):
    """A loop that says since when its turn has lasted; None between two turns."""

    busy_since: float | None


def start_watchdog(loop: Turning, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
    """End the process when a turn takes longer than timeout seconds: a hung device never comes back by itself."""

    def watch() -> None:
        while True:
            time.sleep(min(timeout / 4, 5.0))
            since = loop.busy_since
            if since is not None and clock() - since > timeout:
                logger.critical("a step has hung for %.0f s (--watchdog-timeout); the engine ends", timeout)
                os._exit(1)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
