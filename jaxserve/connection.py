"""A connection of the HTTP server that gives nobody more time or room for a request's head than it needs.

uvicorn waits without end for the rest of a head and keeps all of it, so that clients that send nothing, or a byte a
second, could take every file descriptor, and one that never ends its headers the memory. (Bodies have their own limits,
in jaxserve.api.)
"""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT = 30.0  # seconds from the connection, or the first byte of a later request, to the end of its head
MAX_HEAD = 64 << 10  # bytes of URL and headers
REFUSAL = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """One client's connection; for uvicorn.Config(http=...)."""

    head_timeout = HEAD_TIMEOUT
    head_size = 0
    head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_size = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grow(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._grow(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._end_head()
        if self.url.startswith(b"//"):  # what follows is a path here too, and not the name of a host
            self.url = b"/" + self.url.lstrip(b"/")
        super().on_headers_complete()

    def _await_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(self.head_timeout, self._refuse, b"408 Request Timeout")

    def _end_head(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _grow(self, size: int) -> None:
        self.head_size += size
        if self.head_size > MAX_HEAD:
            self._refuse(b"431 Request Header Fields Too Large")
            raise ValueError("the head of the request is too large")  # ends the parsing

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # refused already
            super().send_400_response(msg)

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(REFUSAL % status)
            self.transport.close()
        self._end_head()
