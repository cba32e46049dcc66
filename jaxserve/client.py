"""EngineClient: the asyncio door to the engine process. One pipe, one reader thread, one writer thread, one queue per
request.

EngineUnavailable    the engine is starting, failed or gone      (HTTP 503)
EngineOverloaded     too many requests are open already          (HTTP 503 with Retry-After)
"""

import asyncio
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from jaxserve.types import (
    AbortRequests,
    AddRequests,
    Embedded,
    EngineFailed,
    EngineStats,
    FinishReason,
    FlushCache,
    FromEngine,
    ProfileReport,
    Progress,
    PromptLogprobs,
    Ready,
    Request,
    Snapshot,
    StartProfile,
    StepEvents,
    Stop,
    StopProfile,
    TakeSnapshot,
    ToEngine,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)
SNAPSHOT_AGE = 0.2  # seconds for which one snapshot serves everybody who watches


class EngineUnavailable(Exception):
    """The engine is not ready yet, or it has ended."""


class EngineOverloaded(Exception):
    """More requests are open than this server accepts; trying again later may help."""


class TokenEvent(NamedTuple):
    """One sampled token of one request, or the end of a request that sampled none (token_id None)."""

    token_id: int | None
    finish_reason: FinishReason | None
    cached_tokens: int
    logprobs: TokenLogprobs | None


class RequestStream:
    """What the engine answers to one request: an async iterator of the events that arrived since the last read.

    It ends after the event that carries a finish_reason, or after abort(); it raises EngineUnavailable when the engine
    dies. Whoever stops reading early must call abort() (try/finally). prompt_logprobs is complete before the first
    event, vector before the last.
    """

    __slots__ = (
        *("_client", "_ended", "_error", "_events", "_wake"),
        *("first_token_at", "id", "priority", "prompt_logprobs", "submitted_at", "vector"),
        "owner",
    )

    def __init__(self, client: "EngineClient", request_id: int, priority: int = 0) -> None:
        self.id, self.priority = request_id, priority
        self.submitted_at = time.monotonic()
        self.first_token_at: float | None = None  # monotonic seconds, as submitted_at
        self.prompt_logprobs: list[TokenLogprobs | None] = []  # of each token of the prompt, if asked for
        self.vector: bytes | None = None  # [E] float32 of an "embed" request
        self.owner: object = None  # whom it is computed for, as submit() was told
        self._client = client
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._ended = False
        self._error: EngineUnavailable | None = None

    @property
    def done(self) -> bool:
        """True when no event is left to read and none will come."""
        return self._ended and not self._events and self._error is None

    async def wait(self) -> None:
        """Until there is something to read: events, the end or an error. Not beside a merge() that has begun."""
        while not self._events and not self._ended:
            self._wake.clear()
            await self._wake.wait()

    def take(self) -> list[TokenEvent]:
        """The events that arrived since the last read, without waiting.

        Raises EngineUnavailable when the engine died.
        """
        events, self._events = self._events, []
        if self._error is not None:
            if not events:
                raise self._error
            self._wake.set()  # the reader must come back for the error
        return events

    def abort(self) -> None:
        """End this request in the engine; nothing more will be read from it.

        May be called at any time, any number of times.
        """
        self._client._abort(self)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> list[TokenEvent]:
        while True:
            if events := self.take():
                return events
            if self._ended:
                raise StopAsyncIteration
            await self.wait()

    def _push(self, event: TokenEvent, now: float) -> None:
        if self.first_token_at is None and event.token_id is not None:
            self.first_token_at = now
        self._events.append(event)
        self._ended = event.finish_reason is not None
        self._wake.set()

    def _end(self, error: EngineUnavailable | None) -> None:
        if error is None:
            self._events = []
        self._ended = True
        self._error = error
        self._wake.set()


async def merge(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Yield (index, events) of several streams as they arrive; ends when all have ended.

    The streams belong to this reader.
    """
    wake = asyncio.Event()
    for stream in streams:
        stream._wake = wake
    open_streams = dict(enumerate(streams))
    while open_streams:
        wake.clear()
        for index, stream in list(open_streams.items()):
            if events := stream.take():
                yield index, events
            if stream.done:
                del open_streams[index]
        if open_streams:
            await wake.wait()


class EngineClient:
    """Sends requests to the engine and hands its events to the streams.

    Used from one event loop, the one start() ran in.
    """

    def __init__(self, connection: Connection, *, max_open_requests: int | None = None) -> None:
        self.progress: Progress | None = None
        self.ready: Ready | None = None
        self.stats: EngineStats | None = None
        self.failure: EngineFailed | None = None
        self.observers: list[Callable[[StepEvents], None]] = []
        self.max_open_requests = max_open_requests
        self._connection = connection
        self._streams: dict[int, RequestStream] = {}
        self._last_id = 0
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._profiling: deque[asyncio.Future[ProfileReport]] = deque()  # answered in order
        self._snapshot: asyncio.Future[tuple[Snapshot, float]] | None = None  # and when it came
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()  # ready or failed
        self._failed = asyncio.Event()
        self._disconnected = asyncio.Event()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)

    @property
    def num_open(self) -> int:
        """Requests that were submitted and have neither finished nor been aborted."""
        return len(self._streams)

    def start(self) -> None:
        """Begin to read and write the pipe; call it once, inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._reader.start()
        self._writer.start()

    async def wait_ready(self) -> Ready:
        """Wait until everything is compiled. Raises EngineUnavailable when the engine fails first."""
        await self._settled.wait()
        if self.ready is None or self.failure is not None:
            raise EngineUnavailable(self._why_unavailable())
        return self.ready

    async def wait_failed(self) -> EngineFailed:
        """Wait until the engine has ended without being asked to (a closed pipe counts)."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    def next_id(self) -> int:
        """A request id that this client has not given out before."""
        self._last_id += 1
        return self._last_id

    def check_capacity(self, num_requests: int = 1) -> None:
        """Raise EngineUnavailable or EngineOverloaded if num_requests more could not be submitted now.

        Only interactive requests count and are counted: whoever sends batch work bounds it himself.
        """
        if self.ready is None or self.failure is not None or self._closing:
            raise EngineUnavailable(self._why_unavailable())
        limit = self.max_open_requests
        if limit is None or not num_requests:
            return
        num_open = sum(stream.priority <= 0 for stream in self._streams.values())
        if num_open + num_requests > limit:
            raise EngineOverloaded(
                f"{num_open} requests are open and {num_requests} more were asked for; this server takes {limit} "
                "(--max-queued-requests); try again later"
            )

    def submit(self, requests: Sequence[Request], owner: object = None) -> list[RequestStream]:
        """Send requests (ids from next_id()) as one message; a stream for each. All are taken or none.

        owner: anything that tells end_requests() whose they are.
        Raises EngineUnavailable before ready and after the engine ended, EngineOverloaded above max_open_requests.
        """
        self.check_capacity(sum(request.priority <= 0 for request in requests))
        streams = [RequestStream(self, request.id, request.priority) for request in requests]
        for stream in streams:
            stream.owner = owner
            self._streams[stream.id] = stream
        self._outbox.put(AddRequests(tuple(requests)))
        return streams

    def end_requests(self, chosen: Callable[[object], bool]) -> int:
        """Ask the engine to end the open requests whose owner is chosen; -> how many. Their streams end with "abort"
        after what was sampled until then. Requests without an owner are nobody's to end."""
        ids = [each.id for each in self._streams.values() if each.owner is not None and chosen(each.owner)]
        if ids:
            self._outbox.put(AbortRequests(tuple(ids)))
        return len(ids)

    def flush_cache(self) -> None:
        """Ask the engine to drop every prefix that no running request holds."""
        self._outbox.put(FlushCache())

    async def profile(self, command: StartProfile | StopProfile) -> ProfileReport:
        """Start or stop a profile; returns when the engine has done it. Raises EngineUnavailable."""
        self.check_capacity(0)
        waiting: asyncio.Future[ProfileReport] = asyncio.get_running_loop().create_future()
        self._profiling.append(waiting)
        self._outbox.put(command)
        return await waiting

    async def snapshot(self) -> Snapshot:
        """The engine as of now, or of up to SNAPSHOT_AGE ago. Raises EngineUnavailable."""
        self.check_capacity(0)
        known = self._snapshot
        if known is None or (
            known.done() and (known.exception() or known.result()[1] + SNAPSHOT_AGE < time.monotonic())
        ):
            known = self._snapshot = asyncio.get_running_loop().create_future()
            self._outbox.put(TakeSnapshot())
        return (await asyncio.shield(known))[0]

    async def close(self, timeout: float = 5.0) -> None:
        """Send Stop, wait up to timeout seconds for the engine to hang up, close the pipe.

        Open streams raise EngineUnavailable.
        """
        if self._closing:
            return
        self._closing = True
        self._end_streams()
        self._outbox.put(Stop())
        self._outbox.put(None)
        if self._loop is not None:
            if self.progress is not None or self.ready is not None:  # somebody is there to hang up
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._disconnected.wait(), timeout)
            shut_down(self._connection)
            while (
                self._reader.is_alive() or self._writer.is_alive()
            ):  # joined like this it also works at interpreter exit
                await asyncio.sleep(0.001)
        self._connection.close()

    def _why_unavailable(self) -> str:
        if self.failure is not None:
            return f"the engine has ended: {self.failure.message}"
        if self._closing:
            return "the server is shutting down"
        if self.progress is None:
            return "the engine is starting; try again when /health answers 200"
        progress = self.progress
        at = f"{progress.stage} {progress.done}/{progress.total}"
        return f"the engine is starting ({at}); try again when /health answers 200"

    def _abort(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self._outbox.put(AbortRequests((stream.id,)))
        if not stream.done:
            stream._end(None)

    def _end_streams(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._end(EngineUnavailable(self._why_unavailable()))
        for waiting in (*self._profiling, self._snapshot):
            if waiting is not None and not waiting.done():
                waiting.set_exception(EngineUnavailable(self._why_unavailable()))

    # In the event loop

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepEvents():
                self._deliver(message)
            case PromptLogprobs():
                if (stream := self._streams.get(message.request_id)) is not None:
                    stream.prompt_logprobs.extend(message.logprobs)
            case Embedded(request_id, vector):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.vector = vector
            case Progress():
                self.progress = message
            case ProfileReport():
                if self._profiling and not (waiting := self._profiling.popleft()).done():
                    waiting.set_result(message)
            case Snapshot():
                if self._snapshot is not None and not self._snapshot.done():
                    self._snapshot.set_result((message, time.monotonic()))
            case Ready():
                self.ready = message
                self._settled.set()
            case EngineFailed():
                if self.failure is None and not self._closing:
                    self.failure = message
                    self._end_streams()
                    self._settled.set()
                    self._failed.set()

    def _deliver(self, events: StepEvents) -> None:
        now = time.monotonic()
        self.stats = events.stats
        streams = self._streams
        columns = zip(
            events.request_ids,
            events.token_ids,
            events.finish_reasons,
            events.cached_tokens,
            events.logprobs,
            strict=True,
        )
        for request_id, token_id, finish_reason, cached_tokens, logprobs in columns:
            stream = streams.get(request_id)
            if stream is None:  # aborted here, while these tokens were on their way
                continue
            stream._push(TokenEvent(token_id, finish_reason, cached_tokens, logprobs), now)
            if finish_reason is not None:
                del streams[request_id]
        for observer in self.observers:
            observer(events)

    def _hung_up(self) -> None:
        self._receive(EngineFailed("its process ended without a message"))
        self._disconnected.set()

    # In the threads

    def _read(self) -> None:
        try:
            while True:
                self._call(self._receive, self._connection.recv())
        except (EOFError, OSError):
            self._call(self._hung_up)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop was closed first: nobody is left to tell
            logger.debug("an engine message came after the event loop was closed")

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # the engine hung up; the reader sees it too and tells everybody
                return


def shut_down(connection: Connection) -> None:
    """End a pipe in both directions and wake the threads that wait in recv or send, on both sides; close() would
    not."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("the pipe was closed already")
