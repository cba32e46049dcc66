"""Runs the batches: one task each, fed through the functions that answer online requests, politely.

The store is the truth and this worker only moves it on: a batch's task looks at its status, does what that status asks
for, and looks again. So a restart, a cancellation and the end of the window are no special cases.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import orjson

from jaxserve.api import chat, completions, embeddings, responses
from jaxserve.api.batch_lines import Interrupted, answered, check_input, not_executed
from jaxserve.api.errors import as_api_error, internal_error
from jaxserve.api.http import MEBIBYTE
from jaxserve.api.serving import Serving
from jaxserve.client import EngineUnavailable
from jaxserve.store import (
    Batch,
    BatchError,
    NoSuchBatch,
    Row,
    RowResult,
    Store,
    StoreError,
    StoreFull,
    Usage,
    WrongStatus,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
Answer = Callable[[Serving, dict[str, Any], int], Awaitable[dict[str, Any]]]

ANSWERS: dict[str, Answer] = {
    "/v1/chat/completions": chat.ROUTE.answer,
    "/v1/completions": completions.ROUTE.answer,
    "/v1/embeddings": embeddings.ROUTE.answer,
    "/v1/responses": responses.ROUTE.answer,
}

PRIORITY = 1  # below interactive requests
ROWS_AHEAD = 2  # requests in flight for each row of the engine: one that runs, one that waits for its place
TICK = 0.5  # seconds between two looks at the clock
FILE_EXPIRY_INTERVAL = 60.0  # seconds between two removals of expired files and responses
RETRY_PAUSE = 5.0  # seconds until a store that failed is tried again
MAX_ATTEMPTS = 3  # of a request that the engine gave up
MAX_FAILURES = 5  # of the worker itself at one batch, until that is given up
PAGE = 256  # rows read from the store at a time
CLAIM = 16  # the same, of rows to run: what one server has claimed no other one of its fleet runs


class BatchWorker:
    """Owns the work on a store's batches from start() to stop(). To be used from one event loop.

    concurrency: requests in flight over all batches; None: ROWS_AHEAD times the engine's rows. Batches take turns, one
    request each, so that a short one need not wait for a long one.
    """

    def __init__(
        self,
        serving: Serving,
        store: Store,
        *,
        concurrency: int | None = None,
        clock: Callable[[], float] = time.time,
        tick: float = TICK,
    ) -> None:
        self.serving, self.store, self.clock, self.tick = serving, store, clock, tick
        self.concurrency = concurrency
        self._runs: dict[str, _Run] = {}
        self._slots: asyncio.Semaphore | None = None  # made at start, when the engine's rows are known
        self._validating = asyncio.Lock()  # one file at a time: it is processor work
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="batch")
        self._ticker: asyncio.Task[None] | None = None
        self._adopted = False  # what the store held at start

    def start(self) -> None:
        """Takes up every batch that has not ended; once, when the engine is ready."""
        _, ready = self.serving.require_ready()
        self._slots = asyncio.Semaphore(self.concurrency or ROWS_AHEAD * ready.max_running)
        self._ticker = asyncio.ensure_future(self._watch_clock())

    def adopt(self, batch: Batch) -> None:
        """Begins with a batch; before start() it waits for that."""
        if self._slots is not None and not batch.is_final and batch.id not in self._runs:
            run = self._runs[batch.id] = _Run(self, batch, self._slots)
            run.task = asyncio.ensure_future(self._drive(run))

    def interrupt(self, batch_id: str) -> None:
        """Looks at a batch's status again, because it was cancelled; what runs of it ends now."""
        if (run := self._runs.get(batch_id)) is not None:
            run.interrupted.set()

    @property
    def idle(self) -> bool:
        """True when every batch that was adopted has ended."""
        return self._adopted and not self._runs

    @property
    def batches(self) -> list[Batch]:
        """The batches at work, as they stand."""
        return [run.batch for run in self._runs.values()]

    async def stop(self) -> None:
        """Ends the work; requests in flight stay pending in the store, and the next start runs them again."""
        self._slots = None
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if self._ticker is not None:
            tasks.append(self._ticker)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """The function in one of this worker's threads: the store waits for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _watch_clock(self) -> None:
        """Adopts what there is to do and looks after it; ends windows and files whose time has come."""
        expiry_due = 0.0
        while True:
            try:
                await self._look_around()
                now = self.clock()
                for run in self._runs.values():
                    if now >= run.batch.expires_at:
                        run.interrupted.set()
                if now >= expiry_due:
                    expiry_due = now + FILE_EXPIRY_INTERVAL
                    await self.call(self.store.expire_files)
                    await self.call(self.store.responses.expire)
            except StoreError as error:
                log.error("files and batches: %s", error)
                await asyncio.sleep(RETRY_PAUSE)
            await asyncio.sleep(self.tick)

    async def _look_around(self) -> None:
        """Other processes may share the store: what they made, cancelled or ended is seen here."""
        known = list(self._runs.values())
        await self.call(self.store.keep_alive)
        active = {batch.id: batch for batch in await self.call(self.store.active_batches)}
        for run in known:
            if run.batch.id not in active or (
                active[run.batch.id].status == "cancelling" and run.batch.status != "cancelling"
            ):
                run.interrupted.set()
        if self.serving.stage() is None:
            were_at_work = {run.batch.id for run in known}  # one that has ended since may be among the active ones
            for batch in active.values():
                if batch.id not in were_at_work:
                    self.adopt(batch)
        self._adopted = True
        self.serving.metrics.num_batch_pending.set(sum(batch.num_pending for batch in self.batches))

    async def _drive(self, run: "_Run") -> None:
        try:
            while not run.batch.is_final:
                run.interrupted.clear()
                try:
                    run.batch = await run.advance()
                except WrongStatus as error:
                    run.batch = error.batch
                except StoreError as error:
                    await self._on_store_error(run, error)
                except (EngineUnavailable, NoSuchBatch):
                    raise
                except Exception:
                    log.exception("batch %s: the worker failed", run.batch.id)
                    await self._on_failure(run)
            log.info(
                "batch %s: %s, %d of %d completed, %d failed",
                run.batch.id, run.batch.status, run.batch.num_completed, run.batch.num_total, run.batch.num_failed,
            )  # fmt: skip
        except EngineUnavailable:
            log.warning("batch %s: the engine is gone; it goes on at the next start of the server", run.batch.id)
        except NoSuchBatch:
            log.error("batch %s is not in the store any more", run.batch.id)
        finally:
            self._runs.pop(run.batch.id, None)

    async def _on_failure(self, run: "_Run") -> None:
        """A mistake of ours: tried again a few times, then it fails that batch alone."""
        run.num_failures += 1
        if run.num_failures < MAX_FAILURES:
            await asyncio.sleep(self.tick * 2**run.num_failures)
            return
        problem = BatchError("server_error", "The server failed at this batch; its log says why.")
        with suppress(StoreError, WrongStatus):
            run.batch = await self.call(self.store.fail_batch, run.batch.id, (problem,))

    async def _on_store_error(self, run: "_Run", error: StoreError) -> None:
        """A full disk ends the batch; what cannot even be said to the store is tried again."""
        log.error("batch %s: %s", run.batch.id, error)
        try:
            if isinstance(error, StoreFull):
                message = "The server has no space left for the results of this batch."
                problem = BatchError("storage_full", message)
                run.batch = await self.call(self.store.fail_batch, run.batch.id, (problem,))
                return
        except WrongStatus as wrong:
            run.batch = wrong.batch
            return
        except StoreError as again:
            log.error("batch %s: %s", run.batch.id, again)
        await asyncio.sleep(RETRY_PAUSE)
        with suppress(StoreError):
            run.batch = await self.call(self.store.get_batch, run.batch.id)


class _Run:
    """The work on one batch."""

    def __init__(self, worker: BatchWorker, batch: Batch, slots: asyncio.Semaphore) -> None:
        self.worker, self.store, self.serving, self.batch = worker, worker.store, worker.serving, batch
        self.slots = slots
        self.interrupted = asyncio.Event()
        self.num_failures = 0
        self.task: asyncio.Task[None] | None = None
        self._results: list[tuple[RowResult, asyncio.Future[None]]] = []
        self._recording: asyncio.Task[None] | None = None

    async def advance(self) -> Batch:
        """The batch after what its status asks for, or as it is after an interruption. Reads the status itself, so that
        none is lost that comes before the work has begun."""
        call, store = self.worker.call, self.store
        batch = self.batch = await call(store.get_batch, self.batch.id)
        if batch.status == "finalizing":
            return await call(store.finish_batch, batch.id, "completed")
        if batch.status == "cancelling":
            await self._skip_pending("batch_cancelled")
            return await call(store.finish_batch, batch.id, "cancelled")
        if batch.is_final:
            return batch
        if self.worker.clock() >= batch.expires_at:
            await self._skip_pending("batch_expired")
            return await call(store.finish_batch, batch.id, "expired")
        if batch.status == "validating":
            return await self._unless_interrupted(self._validate())
        return await self._unless_interrupted(self._run_rows())

    async def _unless_interrupted(self, work: Awaitable[Batch]) -> Batch:
        """The result of `work`, or the batch as it is once the work has been cancelled by interrupted."""
        task = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self.interrupted.wait())
        try:
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            waiting.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return await self.worker.call(self.store.get_batch, self.batch.id)

    async def _validate(self) -> Batch:
        stopped = False

        def check() -> Batch:
            config = self.serving.config
            names, any_name = self.serving.model_names, config.allow_any_model
            with self.store.open_input(self.batch.id) as file:
                checked = check_input(
                    file,
                    self.batch.endpoint,
                    serves=lambda name: any_name or name in names,
                    max_line_bytes=config.max_body_size * MEBIBYTE,
                    interrupted=lambda: stopped,
                )
            if checked.errors:
                return self.store.fail_batch(self.batch.id, checked.errors)
            return self.store.start_batch(self.batch.id, checked.rows, model=checked.model)

        async with self.worker._validating:
            try:
                return await asyncio.shield(thread := asyncio.ensure_future(self.worker.call(check)))
            except asyncio.CancelledError:
                stopped = True
                with suppress(Interrupted, WrongStatus, StoreError):
                    await thread
                raise

    async def _run_rows(self) -> Batch:
        """Every row without a result, here or by another process; then finalizing. Raises EngineUnavailable when the
        engine ends first."""
        call, store, batch_id = self.worker.call, self.store, self.batch.id
        await call(store.release_rows, batch_id)  # of an attempt before this one
        while True:
            await self._run_claimed()
            self.batch = await call(store.get_batch, batch_id)
            if not self.batch.num_pending or self.batch.status != "in_progress":
                return await call(store.start_finalizing, batch_id)
            await asyncio.sleep(self.worker.tick)  # others have claimed the rest

    async def _run_claimed(self) -> None:
        """Claims rows and runs them until none is free."""
        answer = ANSWERS[self.batch.endpoint]
        try:
            async with asyncio.TaskGroup() as group:
                while rows := await self._claim():
                    for row in rows:
                        await self.slots.acquire()
                        task = group.create_task(self._run_row(row, answer))
                        task.add_done_callback(lambda _: self.slots.release())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await self._recorded()

    async def _claim(self) -> tuple[Row, ...]:
        return await self.worker.call(lambda: self.store.claim_rows(self.batch.id, limit=CLAIM))

    async def _page(self, after: int) -> tuple[Row, ...]:
        return await self.worker.call(lambda: self.store.pending_rows(self.batch.id, after=after, limit=PAGE))

    async def _run_row(self, row: Row, answer: Answer) -> None:
        request = orjson.loads(await self.worker.call(self.store.read_row, self.batch.id, row.span))
        with self.serving.metrics.batch_request():
            result = await self._result(row, request, answer)
        await self._record(result)

    async def _result(self, row: Row, request: dict[str, Any], answer: Answer) -> RowResult:
        """What the online route would say. Raises EngineUnavailable when it could say nothing of the request itself."""
        custom_id, attempt = request["custom_id"], 0
        while True:
            try:
                body = await answer(self.serving, request["body"], PRIORITY)
                return RowResult(row.position, "completed", answered(custom_id, 200, body), _usage(body))
            except Exception as error:
                known = as_api_error(error)
                if known is None:
                    log.exception("batch %s, line %d: its request failed", self.batch.id, row.span.line)
                    known = internal_error()
            if known.status == 503 and self.serving.stage() is not None:
                raise EngineUnavailable(known.message)
            attempt += 1
            if known.status != 503 or attempt == MAX_ATTEMPTS:
                return RowResult(row.position, "failed", answered(custom_id, known.status, known.body()))
            await asyncio.sleep(attempt)

    async def _record(self, result: RowResult) -> None:
        """Returns when the result is durable. What comes while the disk is busy is recorded together next."""
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._results.append((result, recorded))
        if self._recording is None or self._recording.done():
            self._recording = asyncio.ensure_future(self._record_all())
        await recorded

    async def _record_all(self) -> None:
        while self._results:
            taken, self._results = self._results, []
            results = [result for result, _ in taken]
            error: Exception | None = None
            try:
                self.batch = await self.worker.call(self.store.record_results, self.batch.id, results)
                self._count(results)
            except (StoreError, WrongStatus) as failure:
                error = failure
            for _, recorded in taken:
                if recorded.done():  # its row was cancelled meanwhile
                    continue
                if error is None:
                    recorded.set_result(None)
                else:
                    recorded.set_exception(error)

    async def _recorded(self) -> None:
        if self._recording is not None:
            await asyncio.wait({self._recording})

    def _count(self, results: list[RowResult]) -> None:
        for result in results:
            self.serving.metrics.count_batch_result(result.outcome)

    async def _skip_pending(self, code: str) -> None:
        """A line in the error file for every row that never ran."""
        if self.batch.status == "validating":
            return
        while rows := await self._page(-1):
            results = await self.worker.call(self._not_executed, rows, code)
            self.batch = await self.worker.call(self.store.record_results, self.batch.id, results)
            self._count(results)

    def _not_executed(self, rows: tuple[Row, ...], code: str) -> list[RowResult]:
        lines = [orjson.loads(self.store.read_row(self.batch.id, row.span)) for row in rows]
        return [
            RowResult(row.position, "unexecuted", not_executed(line["custom_id"], code))
            for row, line in zip(rows, lines, strict=True)
        ]


def _usage(body: dict[str, Any]) -> Usage:
    """The tokens of one reply, by the names of chat, completions and embeddings, or by those of responses."""
    usage = body["usage"]
    if "input_tokens" in usage:
        cached = usage["input_tokens_details"]["cached_tokens"]
        reasoning = usage["output_tokens_details"]["reasoning_tokens"]
        return Usage(usage["input_tokens"], cached, usage["output_tokens"], reasoning)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
    return Usage(usage["prompt_tokens"], cached, usage.get("completion_tokens", 0), reasoning)
