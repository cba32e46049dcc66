"""The fleet's front: reads a request, finds its prefix, passes it to a replica and the reply back as it comes."""

import json
from collections.abc import AsyncGenerator
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deploy.ray.calls import REPLICA_HEADER, Call, Head, passed_on
from deploy.ray.prefix import prefix_of

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
TO_ALL = ("/flush_cache", "/abort_request", "/start_profile", "/stop_profile")
MEBIBYTE = 1 << 20
MAX_FILE = 512 * MEBIBYTE  # OpenAI's for /v1/files
GONE = "The replica that was answering is gone; another takes its place. Send the request again."


class TooLarge(Exception):
    """A body above the limit."""


class Ingress:
    """Made an ASGI application by fleet.build."""

    def __init__(self, replicas: DeploymentHandle, shared_store: bool, max_body: int) -> None:
        """max_body: MiB of one request's body."""
        self.replicas = replicas
        self.streaming = replicas.options(method_name="forward", stream=True)
        self.shared_store, self.max_body = shared_store, max_body

    async def answer(self, request: Request) -> Response:
        path = request.url.path.rstrip("/")
        try:
            body = await _read(request, MAX_FILE if path == "/v1/files" else self.max_body * MEBIBYTE)
        except TooLarge:
            return _error(413, f"The request body is larger than {self.max_body} MiB (--max-body-size).", path)
        parsed = _parse(body) if request.method == "POST" else {}
        if not self.shared_store and _is_stored(path, parsed):
            message = (
                "Files, batches and stored responses need one store for all replicas: flags='--store postgresql://…'."
            )
            return _error(501, message, path, "storage_unavailable")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = passed_on(request.headers.items())
        call = Call(request.method, target, headers, body, prefix_of(parsed))
        try:
            if path == "/metrics":
                return await self._metrics(call)
            if path in TO_ALL:
                return await self._ask_all(call)
            return await self._pass_on(call, path)
        except RayServeException as error:
            return _error(503, f"No replica can take this request now: {error}", path)
        except RayError:
            return _error(503, GONE, path)

    async def _pass_on(self, call: Call, path: str) -> Response:
        reply = self.streaming.remote(call)
        head: Head = await anext(reply)
        response = StreamingResponse(_relay(reply, head, path), status_code=head.status)
        response.raw_headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in head.headers
            if name != "x-request-id"  # Ray's proxy writes it; it gave the server the same one
        ]
        return response

    async def _ask_all(self, call: Call) -> Response:
        """The worst reply of all; what was aborted is counted over all of them."""
        replies = await self.replicas.broadcast("ask", call).results_async()
        head, body = max(replies, key=lambda reply: reply[0].status)
        if head.status == 200 and call.target.startswith("/abort_request"):
            return JSONResponse({"aborted": sum(json.loads(body)["aborted"] for _, body in replies)})
        return Response(body, head.status, dict(head.headers))

    async def _metrics(self, call: Call) -> Response:
        """The metrics of every replica, told apart by the label `replica`."""
        replies = await self.replicas.broadcast("ask", call).results_async()
        families: dict[str, Metric] = {}
        for head, body in replies:
            for family in text_string_to_metric_families(body.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "replica": dict(head.headers)[REPLICA_HEADER]}
                    merged.samples.append(sample._replace(labels=labels))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged(families))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Merged:
    def __init__(self, families: dict[str, Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return list(self.families.values())


async def _relay(reply: Any, head: Head, path: str) -> AsyncGenerator[bytes, None]:
    """The bytes of a reply. A stream of events whose replica dies ends with an error event, as our server's do."""
    is_events = dict(head.headers).get("content-type", "").startswith("text/event-stream")
    try:
        async for chunk in reply:
            yield chunk
    except RayError:
        if not is_events:
            raise  # the client sees that it is not whole
        yield _error_event(path)
    finally:
        reply.cancel()


def _error_event(path: str) -> bytes:
    body = json.dumps(_error_body(GONE, path, "replica_lost"))
    return (
        f"event: error\ndata: {body}\n\n".encode()
        if _is_anthropic(path)
        else f"data: {body}\n\ndata: [DONE]\n\n".encode()
    )


def _is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def _error_body(message: str, path: str, code: str | None) -> dict[str, Any]:
    if _is_anthropic(path):
        return {"type": "error", "error": {"type": "api_error", "message": message}}
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _error(status: int, message: str, path: str, code: str | None = None) -> Response:
    retry = {"Retry-After": "2"} if status == 503 else None
    return JSONResponse(_error_body(message, path, code), status, retry)


async def _read(request: Request, limit: int) -> bytes:
    """Raises TooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)


def _parse(body: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for what is none: the server says what is wrong with it."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _is_stored(path: str, parsed: dict[str, Any]) -> bool:
    """Whether a request is about something that an earlier one left with the server."""
    if path.startswith(("/v1/files", "/v1/batches")):
        return True
    if path == "/v1/responses":
        return parsed.get("previous_response_id") is not None
    return path.startswith("/v1/responses/") and path != "/v1/responses/input_tokens"


async def _answer(request: Request) -> Response:
    return await serve.get_replica_context().servable_object.answer(request)


def application() -> Starlette:
    """Every path is the replicas', their documentation too."""
    return Starlette(routes=[Route("/{path:path}", _answer, methods=METHODS)])
