"""multipart/form-data as it arrives (RFC 7578, 2046): a file of any size passes through a little memory."""

import email.message
import email.parser
from collections.abc import AsyncIterator
from dataclasses import dataclass

from jaxserve.api.errors import APIError, invalid_request

MAX_HEADER_BYTES = 16 * 1024  # of one part
_ESCAPES = (("%22", '"'), ("%0D", "\r"), ("%0A", "\n"))  # browsers' and httpx's (WHATWG HTML, multipart/form-data)
MAX_FIELD_BYTES = 64 * 1024  # of one value that is no file


@dataclass(frozen=True, slots=True)
class Part:
    """The head of one part. filename: None for a plain field."""

    name: str
    filename: str | None


class Form:
    """Parts in the order in which the client sent them: next_part(), then read() or text() until the next one.

    Every method raises APIError 400 for a body that is no such form, and when it ends too early.
    """

    def __init__(self, chunks: AsyncIterator[bytes], content_type: str) -> None:
        message = email.message.Message()
        message["content-type"] = content_type
        boundary = message.get_param("boundary")
        if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
            text = "The body must be multipart/form-data with a boundary (curl -F, or the client's files.create)."
            raise invalid_request(text, code="invalid_form")
        self._chunks = chunks
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._buffer = bytearray(b"\r\n")  # so that the first delimiter looks like the others

    async def next_part(self) -> Part | None:
        """None at the end of the form. What is left of the part before is skipped."""
        while await self.read():
            pass
        del self._buffer[: len(self._delimiter)]
        await self._fill(2)
        if self._buffer.startswith(b"--"):
            return None
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise _broken(f"a part's header is longer than {MAX_HEADER_BYTES} bytes")
            await self._fill(len(self._buffer) + 1)
        head = bytes(self._buffer[:end]).lstrip(b" \t\r\n").decode("utf-8", "replace")
        del self._buffer[: end + 4]
        return _parse_head(head)

    async def read(self) -> bytes:
        """The next bytes of this part; empty at its end."""
        while (end := self._buffer.find(self._delimiter)) < 0:
            safe = len(self._buffer) - len(self._delimiter) + 1
            if safe > 0:
                piece = bytes(self._buffer[:safe])
                del self._buffer[:safe]
                return piece
            await self._fill(len(self._buffer) + 1)
        piece = bytes(self._buffer[:end])
        del self._buffer[:end]
        return piece

    async def text(self) -> str:
        """The whole value of a plain field."""
        value = bytearray()
        while piece := await self.read():
            value += piece
            if len(value) > MAX_FIELD_BYTES:
                raise _broken(f"a field is longer than {MAX_FIELD_BYTES} bytes")
        return value.decode("utf-8", "replace")

    async def _fill(self, size: int) -> None:
        """Until the buffer holds `size` bytes."""
        while len(self._buffer) < size:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                raise _broken("it ends too early")
            self._buffer += chunk


def _parse_head(head: str) -> Part:
    message = email.parser.HeaderParser().parsestr(head)
    name = message.get_param("name", header="content-disposition")
    if not isinstance(name, str):
        raise _broken("a part has no name")
    filename = message.get_filename()
    if filename is not None:
        for escape, character in _ESCAPES:
            filename = filename.replace(escape, character)
    return Part(name, filename)


def _broken(why: str) -> APIError:
    return invalid_request(f"The body is no valid multipart/form-data: {why}.", code="invalid_form")
