"""Bytes in, bytes out: JSON bodies, server-sent events, and what happens when the client leaves.

No words of OpenAI's.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import APIError, invalid_request

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
MEBIBYTE = 1 << 20
BODY_TIMEOUT = 60.0  # seconds between two pieces of a request's body


async def body_chunks(request: Request) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises APIError 415 for one that is packed, 408 when nothing comes for BODY_TIMEOUT."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"A request body with Content-Encoding {encoding[:40]!r} is not supported; send it as it is."
        raise APIError(415, message, code="unsupported_media_type")
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                chunk = await anext(stream, None)
        except TimeoutError:
            message = f"Nothing of the request body came for {BODY_TIMEOUT:g} seconds."
            raise APIError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
        if chunk is None:
            return
        yield chunk


async def read_json(request: Request, max_mebibytes: int, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The body as a JSON object, whatever its content type says; {} for none, where that may be.

    Raises APIError 400, 413, and as body_chunks.
    """
    limit = max_mebibytes * MEBIBYTE
    body = bytearray()
    async for chunk in body_chunks(request):
        body += chunk
        if len(body) > limit:
            message = f"The request body is larger than {max_mebibytes} MiB (--max-body-size)."
            raise APIError(413, message, code="request_too_large")
    if may_be_empty and not body:
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"The request body is not valid JSON: {error}. It must be one JSON object in UTF-8."
        raise invalid_request(message, code="invalid_json") from None
    if not isinstance(value, dict):
        message = f"The request body must be a JSON object, not {_json_type(value)}."
        raise invalid_request(message, code="invalid_json")
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def event(value: Any) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2) with a JSON payload."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def typed_event(value: dict[str, Any]) -> bytes:
    """One server-sent event that is called what its payload's "type" says."""
    return b"event: " + value["type"].encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"


async def typed_events(source: AsyncGenerator[list[dict[str, Any]], None]) -> AsyncGenerator[bytes, None]:
    """Each group of events as one piece; closing it closes the source."""
    try:
        async for events in source:
            yield b"".join(map(typed_event, events))
    finally:
        await source.aclose()


async def _disconnected(receive: Receive) -> None:
    """Returns once the client has left; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel(task)
        await _cancel(gone)


async def _cancel(task: "asyncio.Future[Any]") -> None:
    """Cancels the task and waits until its `finally` blocks have run."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """Sends events as they come; closes their source (which aborts the generation) when the client leaves.

    Unlike Starlette's StreamingResponse it closes the generator also when the client leaves while a chunk is being
    sent.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first, self.events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sender, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:  # the connection broke while a chunk was being sent
            pass
        finally:
            await _cancel(sender)
            await _cancel(gone)
            await self.events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        async for chunk in self.events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begin_stream(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """Waits for the first event, so that an error before it is still an HTTP error, then streams it and the rest."""
    try:
        first = await unless_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)
