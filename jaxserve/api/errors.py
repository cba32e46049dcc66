"""OpenAI's error shape for everything that can go wrong: {"error": {"message", "type", "param", "code"}}.

APIError
├── invalid_request   400 what the client sent is wrong, or is not supported
├── not_found         404
└── unavailable       503 starting, overloaded, stopping or dead
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.client import EngineOverloaded, EngineUnavailable
from jaxserve.store import StoreError, StoreFull
from jaxserve.text.params import ParameterError

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it but the access log
RETRY_AFTER_SECONDS = 1
ANTHROPIC_PATH = "/v1/messages"
OVERLOADED = 529  # Anthropic's status for a server that takes no more for now; its clients wait and try again

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PLACE = re.compile(r"\.\[(\d+)\]")
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


class APIError(Exception):
    """An answer other than 2xx. param is the request field at fault, code a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.extra = headers or {}, extra or {}

    def body(self) -> dict[str, Any]:
        """The reply's JSON; `extra` stands beside "error"."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **self.extra}

    def response(self, path: str = "") -> Response:
        """In the shape that clients of that path know: OpenAI's, or Anthropic's below /v1/messages."""
        if path != ANTHROPIC_PATH and not path.startswith(ANTHROPIC_PATH + "/"):
            return Response(orjson.dumps(self.body()), self.status, self.headers, "application/json")
        status = OVERLOADED if self.code == "server_overloaded" else self.status
        return Response(orjson.dumps(anthropic_error(self)), status, self.headers, "application/json")


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def unsupported(message: str, param: str) -> APIError:
    """400 for a field that is known and that has an effect this server does not have."""
    return APIError(400, message, param=param, code="unsupported_parameter")


def not_found(message: str, param: str | None = None, code: str | None = "not_found") -> APIError:
    return APIError(404, message, param=param, code=code)


def unavailable(message: str, code: str, extra: dict[str, Any] | None = None) -> APIError:
    return APIError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)}, extra=extra)


def internal_error(headers: dict[str, str] | None = None) -> APIError:
    message = "Internal server error. The server's log has the details."
    return APIError(500, message, code="internal_error", headers=headers)


def anthropic_error(error: APIError) -> dict[str, Any]:
    """Anthropic's error object (Anthropic API reference, "Errors"); what stands beside ours stands beside it too."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, **error.extra}


def renamed(
    error: APIError | ParameterError,
    names: Sequence[tuple[str, str]],
    inside: Sequence[tuple[str, str, str]],
    place: str,
) -> APIError:
    """The same error for a route that calls fields otherwise.

    names: (theirs, ours), the first that param is or begins with counts. inside: (beginning of param, theirs, ours) for
    what follows such a beginning. place: how the route writes chat's ".[1]", as a replacement of re.sub.
    """
    known = error if isinstance(error, APIError) else invalid_request(error.message, error.param, error.code)
    message, param = known.message, known.param
    for theirs, ours in names:
        if param is not None and (param == theirs or param.startswith(theirs + ".")):
            message, param = message.replace(theirs, ours), ours + param[len(theirs) :]
            break
    for beginning, theirs, ours in inside:
        if param is not None and param.startswith(beginning):
            message, param = message.replace(theirs, ours), param.replace(theirs, ours)
    message, param = _PLACE.sub(place, message), param and _PLACE.sub(place, param)
    return APIError(known.status, message, param=param, code=known.code, headers=known.headers, extra=known.extra)


def as_api_error(error: Exception) -> APIError | None:
    """What the rooms below raise, in HTTP's words; None for what nobody expected."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ParameterError):
        return invalid_request(error.message, error.param, error.code)
    if isinstance(error, EngineOverloaded):
        return unavailable(str(error), "server_overloaded")
    if isinstance(error, EngineUnavailable):
        return unavailable(str(error), "engine_unavailable")
    if isinstance(error, StoreFull):
        log.error("%s", error)
        return APIError(507, "The server has no space left for files.", code="storage_full")
    if isinstance(error, StoreError):
        log.error("%s", error)
        return APIError(500, "The server's storage failed. The server's log has the details.", code="storage_error")
    return None


async def _on_known_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    assert known is not None
    return known.response(request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path}. See GET /openapi.json for what is served."
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = allowed = _allowed(request) or headers.get("Allow", "another method")
        message = f"{request.method} is not allowed on {request.url.path}; use {allowed}."
    refusal = APIError(error.status_code, message, code=_CODES.get(error.status_code), headers=headers)
    return refusal.response(request.url.path)


def _allowed(request: Request) -> str:
    """The methods of all routes of a path; Starlette names those of the first."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route | APIRoute) and route.path_regex.match(request.scope["path"]):
            found |= route.methods or set()
    return ", ".join(sorted(found))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return invalid_request(f"{where}: {first['msg']}", param=where or None).response(request.url.path)


async def _on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, error: Exception) -> Response:
    """500 without details; the traceback is logged by uvicorn, since Starlette raises the error again after this."""
    headers = {"x-request-id": request.scope.get("jaxserve.request_id", "")}  # this handler stands outside the Door
    return internal_error(headers).response(request.url.path)


def install(app: FastAPI) -> None:
    """Registers the handlers that give every error OpenAI's shape."""
    for known in (APIError, ParameterError, EngineOverloaded, EngineUnavailable, StoreError):
        app.add_exception_handler(known, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_client_disconnect)
    app.add_exception_handler(Exception, _on_bug)
