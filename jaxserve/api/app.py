"""The HTTP application: one table of routes, and what stands before all of them."""

import hmac
import secrets
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.api import batches, chat, completions, errors, files, native, responses
from jaxserve.api.batch_worker import BatchWorker
from jaxserve.api.errors import APIError
from jaxserve.api.http import MEBIBYTE
from jaxserve.api.metrics import Metrics
from jaxserve.api.response_request import ResponseRequest
from jaxserve.api.schema import ChatRequest, CompletionRequest
from jaxserve.api.serving import Serving
from jaxserve.client import EngineClient
from jaxserve.config import ServerConfig
from jaxserve.store import Store
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.version import __version__

Endpoint = Callable[[Serving, Request], Awaitable[Response]]

OPEN_PATHS = frozenset({"/health", "/metrics"})  # answered without an API key: load balancers and scrapers have none
FILES_PATH = "/v1/files"
MAX_REQUEST_ID = 128

# paths, methods, endpoint, the model that documents the body
ROUTES: tuple[tuple[tuple[str, ...], tuple[str, ...], Endpoint, type[BaseModel] | None], ...] = (
    (("/v1/chat/completions",), ("POST",), chat.create_chat_completion, ChatRequest),
    (("/v1/completions",), ("POST",), completions.create_completion, CompletionRequest),
    (("/v1/responses",), ("POST",), responses.create_response, ResponseRequest),
    (("/v1/responses/input_tokens",), ("POST",), responses.count_input_tokens, ResponseRequest),
    (("/v1/responses/{response_id}",), ("GET",), responses.get_response, None),
    (("/v1/responses/{response_id}",), ("DELETE",), responses.delete_response, None),
    (("/v1/responses/{response_id}/cancel",), ("POST",), responses.cancel_response, None),
    (("/v1/responses/{response_id}/input_items",), ("GET",), responses.list_input_items, None),
    (("/v1/files",), ("POST",), files.create_file, None),
    (("/v1/files",), ("GET",), files.list_files, None),
    (("/v1/files/{file_id}",), ("GET",), files.get_file, None),
    (("/v1/files/{file_id}",), ("DELETE",), files.delete_file, None),
    (("/v1/files/{file_id}/content",), ("GET",), files.get_file_content, None),
    (("/v1/batches",), ("POST",), batches.create_batch, None),
    (("/v1/batches",), ("GET",), batches.list_batches, None),
    (("/v1/batches/{batch_id}",), ("GET",), batches.get_batch, None),
    (("/v1/batches/{batch_id}/cancel",), ("POST",), batches.cancel_batch, None),
    (("/v1/models",), ("GET",), native.list_models, None),
    (("/v1/models/{model:path}",), ("GET",), native.get_model, None),
    (("/health",), ("GET",), native.health, None),
    (("/health_generate",), ("GET",), native.health_generate, None),
    (("/metrics",), ("GET",), native.metrics, None),
    (("/version",), ("GET",), native.version, None),
    (("/get_model_info", "/model_info"), ("GET",), native.get_model_info, None),
    (("/get_server_info", "/server_info"), ("GET",), native.get_server_info, None),
    (("/tokenize", "/v1/tokenize"), ("POST",), native.tokenize, native.TokenizeRequest),
    (("/detokenize", "/v1/detokenize"), ("POST",), native.detokenize, native.DetokenizeRequest),
    (("/flush_cache",), ("GET", "POST"), native.flush_cache, None),
)


def create_app(
    client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None = None, store: Store | None = None
) -> FastAPI:
    """The application around one engine.

    app.state.serving is the Serving that launch completes while the server starts; its batch_worker, there where
    a store is given, waits for start().
    """
    name = config.served_model_names[0] if config.served_model_names else config.model_path
    serving = Serving(client, config, Metrics(client, name), tokenizer)
    if store is not None:
        serving.store, serving.batch_worker = store, BatchWorker(serving, store, concurrency=config.batch_concurrency)
    app = FastAPI(title="jaxserve", version=__version__, redirect_slashes=False)
    app.state.serving = serving
    for paths, methods, endpoint, model in ROUTES:
        for path in paths:
            for method in methods:
                _add_route(app, serving, path, method, endpoint, model)
    errors.install(app)
    app.add_middleware(Door, config=config)
    return app


def _add_route(
    app: FastAPI, serving: Serving, path: str, method: str, endpoint: Endpoint, model: type[BaseModel] | None
) -> None:
    async def handle(request: Request) -> Response:
        return await endpoint(serving, request)

    name = getattr(endpoint, "__name__", path)
    extra: dict[str, Any] = {}
    if model is not None:  # bodies are parsed by us, so FastAPI must be told what they look like
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.get("properties", {}).pop("stream_options", None)
        schema.pop("$defs", None)
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    app.add_api_route(
        path,
        handle,
        methods=[method],
        name=name,
        description=(endpoint.__doc__ or "").strip(),
        openapi_extra=extra,
        operation_id=f"{name}_{method.lower()}_{path.strip('/').replace('/', '_')}",
        response_model=None,
    )


class Door:
    """Request ids, the API key and the limit of the body's declared size, for every path, before anything is parsed.

    A request id is the client's x-request-id where that is printable ASCII, else a new one; every reply carries it.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.max_body_size = app, config.max_body_size
        self.key = None if config.api_key is None else config.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope["jaxserve.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        await (self.app if refusal is None else refusal.response())(scope, receive, send_with_id)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        if path not in OPEN_PATHS and not self._allowed(headers.get("authorization", "")):
            message = "Incorrect or missing API key. Send it as 'Authorization: Bearer <key>'."
            return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "")
        limit = self.max_body_size * MEBIBYTE if path != FILES_PATH else sys.maxsize  # files have their own limits
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            message = f"The request body is larger than {self.max_body_size} MiB (--max-body-size)."
            return APIError(413, message, code="request_too_large", headers={"Connection": "close"})
        return None

    def _allowed(self, authorization: str) -> bool:
        if self.key is None:
            return True
        scheme, _, token = authorization.partition(" ")
        # Headers are latin-1 on the wire; compare_digest takes the same time whatever the token is.
        same = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self.key)
        return same and scheme.lower() == "bearer"


def _request_id(given: str | None) -> str:
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(16)
