"""A server as the terminal commands talk to it: JSON and server-sent events over urllib, blocking."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")


class ServerError(Exception):
    """What a server answered instead of a result; status 0: it did not answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Server:
    """url: without /v1. api_key: sent as bearer token where there is one."""

    url: str
    api_key: str | None = None

    def get(self, path: str, timeout: float = 10.0) -> Any:
        """The JSON of a route. Raises ServerError."""
        with closing(self._open(self._request(path), timeout)) as reply:
            return _decoded(_read(reply.read))

    def stream(
        self, path: str, body: Mapping[str, Any], timeout: float = 600.0
    ) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer up to [DONE]; leaving early ends the request. Raises ServerError.

        timeout: seconds between two of them, and to the first.
        """
        request = self._request(path, json.dumps(dict(body) | {"stream": True}).encode())
        with closing(self._open(request, timeout)) as reply:
            while line := _read(reply.readline):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _decoded(data)
                if "error" in event:
                    raise ServerError(_message(event) or str(event["error"]), 200)
                yield event
        raise ServerError("the answer broke off: the server closed the connection")

    def _request(self, path: str, body: bytes | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return urllib.request.Request(self.url + path, data=body, headers=headers)

    def _open(self, request: urllib.request.Request, timeout: float) -> Any:
        # A server on this machine is not behind the proxy.
        proxies = {} if urlsplit(self.url).hostname in LOCAL else None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        try:
            return opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    message = _message(json.loads(error.read()))
                except (ValueError, OSError):
                    message = ""
            raise ServerError(message or f"HTTP status {error.code}", error.code) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{self.url} does not answer: {reason}") from None


def base_url(text: str) -> str:
    """As people give it, with or without /v1 and scheme -> without /v1. Raises ValueError."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text} is no address of a server; give one like http://127.0.0.1:30000")
    return url.rstrip("/").removesuffix("/v1")


def _read(read: Any) -> bytes:
    try:
        return read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"the answer broke off: {error or type(error).__name__}") from None


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ServerError(f"the server answered with something that is no JSON: {data[:80]!r}") from None


def _message(body: Any) -> str:
    """OpenAI's {"error": {"message"}} or FastAPI's {"detail"}."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error", body.get("detail"))
    return str(error.get("message", "")) if isinstance(error, dict) else str(error or "")
