"""The engine's turn: receive, schedule, launch, commit the step before. One thread owns scheduler and runner."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.readings import read_messages
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.types import AbortRequests, AddRequests, FlushCache, FromEngine, StepEvents, Stop, ToEngine

logger = logging.getLogger(__name__)


class Pending(Protocol):
    """A step in flight."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """What the loop needs of ModelRunner."""

    def launch(self, plan: StepPlan) -> Pending: ...


class EngineLoop:
    """Step k + 1 is launched before step k is read (overlap), unless that is switched off."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        inbox: "queue.SimpleQueue[ToEngine]",
        send: Callable[[FromEngine], None],
        *,
        compilations: Callable[[], int],
        overlap: bool = True,
        decode_log_interval: int = 40,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._scheduler = scheduler
        self._runner = runner
        self._inbox = inbox
        self._send = send
        self._compilations = compilations
        self._overlap = overlap
        self._clock = clock
        self._log = StepLog(scheduler, decode_log_interval, clock, compilations)
        self.busy_since: float | None = None  # read by the watchdog's thread

    def run(self) -> None:
        """Until Stop."""
        flight: tuple[StepPlan, Pending] | None = None
        while self._receive(wait=flight is None and not self._scheduler.has_work):
            self.busy_since = self._clock()
            if flight is not None and not self._overlap:
                self._commit(*flight)
                flight = None
            plan = self._scheduler.schedule(self._clock())
            launched = None
            if plan is not None:
                launched = (plan, self._runner.launch(plan))
                self._log.planned(plan)
            if flight is not None:
                self._commit(*flight)
            flight = launched
            self.busy_since = None

    def _receive(self, *, wait: bool) -> bool:
        """Take in everything that has arrived; False to stop."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            match message:
                case AddRequests(requests):
                    for request in requests:
                        self._scheduler.add(request, self._clock())
                case AbortRequests(request_ids):
                    self._emit(self._scheduler.abort(request_ids, self._compilations()))
                case FlushCache():
                    self._scheduler.flush_cache()
                case Stop():
                    return False

    def _commit(self, plan: StepPlan, handle: Pending) -> None:
        result = handle.result()
        for message in read_messages(plan, result):
            self._send(message)
        events = self._scheduler.commit(plan, result, self._compilations())
        self._log.committed(plan)
        self._emit(events)

    def _emit(self, events: StepEvents) -> None:
        self._send(events)


class StepLog:
    """The lines people grep for, in SGLang's shapes."""

    def __init__(
        self, scheduler: Scheduler, interval: int, clock: Callable[[], float], compilations: Callable[[], int]
    ):
        self._scheduler = scheduler
        self._interval = interval
        self._clock = clock
        self._compilations = compilations
        self._decode_steps = 0
        self._tokens = 0
        self._since = clock()

    def planned(self, plan: StepPlan) -> None:
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

    def committed(self, plan: StepPlan) -> None:
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
            int(plan.arrays.kv_lens[: plan.bucket.num_decode].sum()),
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
