"""What stands before all routes: request ids, the keys, and the limit of a body's declared size."""

import hmac
import re
import secrets
import sys
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.api import running
from jaxserve.api.errors import ANTHROPIC_PATH, APIError
from jaxserve.api.http import MEBIBYTE
from jaxserve.api.page import is_page
from jaxserve.config import ServerConfig

OPEN_PATHS = frozenset({"/health", "/metrics", "/ping"})  # without a key: load balancers and scrapers have none
ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request", "/start_profile", "/stop_profile"})
FILES_PATH = "/v1/files"
MAX_REQUEST_ID = 128
OPENAI_VERSION = "2020-10-01"  # of the API, the only one there is; OpenAI's clients log it
EXPOSED_HEADERS = ("x-request-id", "retry-after", "openai-processing-ms")  # a script in a browser may read these too
_SLASHES = re.compile("/{2,}")


class Door:
    """For every path, before anything is parsed.

    A request id is the client's x-request-id where that is printable ASCII, else a new one; every reply carries it.
    A path means the same with a slash too many, as base URLs that end in one make them: at its end or in a row.
    The key comes as bearer token or, as Anthropic's clients send it, in x-api-key. ADMIN_PATHS take the admin key
    alone where there is one.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.max_body_size = app, config.max_body_size
        self.shows_page = not config.disable_ui
        self.key = _bytes(config.api_key)
        self.admin_key = _bytes(config.admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        path = scope["path"] = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope["jaxserve.request_id"] = request_id
        running.begin(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply = MutableHeaders(scope=message)
                reply["x-request-id"] = request_id
                if path.startswith(ANTHROPIC_PATH):
                    reply["request-id"] = request_id  # Anthropic's name for it
                elif path.startswith("/v1/"):
                    reply["openai-version"] = OPENAI_VERSION
                    reply["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
            await send(message)

        refusal = self._refusal(path, headers)
        await (self.app if refusal is None else refusal.response(path))(scope, receive, send_with_id)

    def _is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or (self.shows_page and is_page(path))

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        admin = path in ADMIN_PATHS and self.admin_key is not None
        key = self.admin_key if admin else self.key
        if key is not None and not self._is_open(path) and not _holds(headers, key):
            name = "admin API key (--admin-api-key)" if admin else "API key"
            message = f"Incorrect or missing {name}. Send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
            return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "")
        limit = self.max_body_size * MEBIBYTE if path != FILES_PATH else sys.maxsize  # files have their own limits
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            message = f"The request body is larger than {self.max_body_size} MiB (--max-body-size)."
            return APIError(413, message, code="request_too_large", headers={"Connection": "close"})
        return None


def _bytes(key: str | None) -> bytes | None:
    return None if key is None else key.encode()


def _holds(headers: Headers, key: bytes) -> bool:
    """Headers are latin-1 on the wire; compare_digest takes the same time whatever was sent."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = hmac.compare_digest(token.strip().encode("latin-1", "replace"), key) and scheme.lower() == "bearer"
    plain = hmac.compare_digest(headers.get("x-api-key", "").strip().encode("latin-1", "replace"), key)
    return bearer or plain


def _request_id(given: str | None) -> str:
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(16)
