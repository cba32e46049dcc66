"""The HTTP application: one table of routes, and what stands before all of them."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from jaxserve.api import (
    admin,
    anthropic,
    batches,
    chat,
    completions,
    embeddings,
    engine,
    errors,
    files,
    generate,
    native,
    openapi,
    page,
    responses,
)
from jaxserve.api.anthropic_request import CountRequest, MessagesRequest
from jaxserve.api.batch_worker import BatchWorker
from jaxserve.api.door import EXPOSED_HEADERS, Door
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

# paths, methods, endpoint, the model that documents the body
ROUTES: tuple[tuple[tuple[str, ...], tuple[str, ...], Endpoint, type[BaseModel] | None], ...] = (
    (("/v1/chat/completions",), ("POST",), chat.create_chat_completion, ChatRequest),
    (("/v1/completions",), ("POST",), completions.create_completion, CompletionRequest),
    (("/v1/embeddings",), ("POST",), embeddings.create_embeddings, embeddings.EmbeddingRequest),
    (("/encode",), ("POST",), embeddings.encode, embeddings.EncodeRequest),
    (("/v1/responses",), ("POST",), responses.create_response, ResponseRequest),
    (("/v1/responses/input_tokens",), ("POST",), responses.count_input_tokens, ResponseRequest),
    (("/v1/responses/{response_id}",), ("GET",), responses.get_response, None),
    (("/v1/responses/{response_id}",), ("DELETE",), responses.delete_response, None),
    (("/v1/responses/{response_id}/cancel",), ("POST",), responses.cancel_response, None),
    (("/v1/responses/{response_id}/input_items",), ("GET",), responses.list_input_items, None),
    (("/v1/messages",), ("POST",), anthropic.create_message, MessagesRequest),
    (("/v1/messages/count_tokens",), ("POST",), anthropic.count_tokens, CountRequest),
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
    (("/ping",), ("GET", "POST"), native.ping, None),
    (("/health_generate",), ("GET",), native.health_generate, None),
    (("/metrics",), ("GET",), native.metrics, None),
    (("/version",), ("GET",), native.version, None),
    (("/get_model_info", "/model_info"), ("GET",), native.get_model_info, None),
    (("/get_server_info", "/server_info", "/get_server_args"), ("GET",), native.get_server_info, None),
    (("/tokenize", "/v1/tokenize"), ("POST",), native.tokenize, native.TokenizeRequest),
    (("/detokenize", "/v1/detokenize"), ("POST",), native.detokenize, native.DetokenizeRequest),
    (("/generate",), ("POST", "PUT"), generate.generate_native, generate.GenerateRequest),
    (("/flush_cache",), ("GET", "POST"), admin.flush_cache, None),
    (("/abort_request",), ("POST",), admin.abort_request, admin.AbortRequest),
    (("/start_profile",), ("GET", "POST"), admin.start_profile, admin.ProfileRequest),
    (("/stop_profile",), ("GET", "POST"), admin.stop_profile, None),
    (("/get_load",), ("GET",), admin.get_load, None),
    (("/v1/loads",), ("GET",), admin.loads, None),
    (("/v1/engine",), ("GET",), engine.get_engine, None),
)


# What asking for changes something, costs a step or may stream: no HEAD, which monitors send to see whether a page is
# there.
_ACTING: tuple[Endpoint, ...] = (
    *(admin.flush_cache, admin.start_profile, admin.stop_profile, native.health_generate),
    engine.get_engine,
)


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Made when it is first asked for."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.complete(super().openapi(), ROUTES)
        return self.openapi_schema


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
    app = _Application(title="jaxserve", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.serving = serving
    for paths, methods, endpoint, _ in ROUTES:
        for path in paths:
            for method in methods:
                _add_route(app, serving, path, method, endpoint)
    _add_docs(app)
    if not config.disable_ui:
        page.add_page(app)
    errors.install(app)
    app.add_middleware(Door, config=config)
    if config.allowed_origins:  # outside the door: a browser asks for permission without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app


def _add_route(app: FastAPI, serving: Serving, path: str, method: str, endpoint: Endpoint) -> None:
    async def handle(request: Request) -> Response:
        return await endpoint(serving, request)

    name = getattr(endpoint, "__name__", path)
    app.add_api_route(
        path,
        handle,
        methods=[method],
        name=name,
        description=(endpoint.__doc__ or "").strip(),
        operation_id=f"{name}_{method.lower()}_{path.strip('/').replace('/', '_')}",
        response_model=None,
    )
    if method == "GET" and endpoint not in _ACTING:  # the server leaves the body of its reply out
        app.add_api_route(path, handle, methods=["HEAD"], include_in_schema=False, response_model=None)


def _add_docs(app: FastAPI) -> None:
    """/docs without a request to anywhere else: accelerator machines often have no way out."""

    async def docs(_request: Request) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="jaxserve: the API",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon.png",
        )

    app.add_route("/docs", docs, include_in_schema=False)
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]), name="docs")
