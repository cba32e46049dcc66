"""The lines of a batch: what is checked before any of them runs, and what is written about each of them.

OpenAI's Batch API guide; the codes of validation errors are OpenAI's where they are known, else Azure's.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from jaxserve.store import BatchError, RowSpan

MAX_REQUESTS = 50_000  # OpenAI's limit per file
MAX_INPUTS = 50_000  # OpenAI's limit of texts to embed in all requests of a batch
MAX_REPORTED_ERRORS = 1000  # the object that carries them is polled
MAX_CUSTOM_ID = 512  # characters
PREFIX_LENGTHS = (128, 1024, 8192)  # bytes of a prompt's JSON; shorter ones are not worth a page of cache
_BOM = b"\xef\xbb\xbf"
_REQUIRED = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Kind:
    """title: as OpenAI's messages call the endpoint. prompt: the field of the body that every request needs."""

    title: str
    prompt: str


KINDS = {
    "/v1/chat/completions": Kind("Chat Completions", "messages"),
    "/v1/completions": Kind("Completions", "prompt"),
    "/v1/embeddings": Kind("Embeddings", "input"),
    "/v1/responses": Kind("Responses", "input"),
}


@dataclass(frozen=True, slots=True)
class Checked:
    """rows in the order to run them in; where there are errors nothing shall run. model: as the lines name it."""

    rows: tuple[RowSpan, ...]
    model: str | None
    errors: tuple[BatchError, ...]


class Interrupted(Exception):
    """Whoever asked for the check does not want its result any more."""


def same_url(url: str, endpoint: str) -> bool:
    """True when both name one endpoint; a leading /v1 and a trailing / do not matter."""
    return _bare(url) == _bare(endpoint)


def _bare(url: str) -> str:
    return url.rstrip("/").removeprefix("/v1")


def check_input(
    file: BinaryIO,
    endpoint: str,
    *,
    serves: Callable[[str], bool],
    max_line_bytes: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Checked:
    """Reads the input once, line by line; blank lines do not count. All bad lines are reported, up to a limit.

    Memory is about 300 bytes a line, whatever the lines hold. Raises Interrupted.
    """
    check = _Check(endpoint, serves)
    for span, line in _lines(file, max_line_bytes):
        if span.line % 256 == 0 and interrupted():
            raise Interrupted
        check.add(span, line)
        if len(check.errors) >= MAX_REPORTED_ERRORS or check.num_lines > MAX_REQUESTS or check.num_inputs > MAX_INPUTS:
            break
    if not check.num_lines:
        message = "The input file is empty. Please ensure that the batch contains at least one request."
        check.errors.append(BatchError("empty_file", message))
    if check.num_lines > MAX_REQUESTS:
        message = f"The input file has more than {MAX_REQUESTS} requests; split it into several batches."
        check.errors.insert(0, BatchError("too_many_tasks", message))
    if check.num_inputs > MAX_INPUTS:
        message = f"The input file has more than {MAX_INPUTS} inputs to embed; split it into several batches."
        check.errors.insert(0, BatchError("too_many_inputs", message))
    return Checked(check.in_order(), check.model, tuple(check.errors))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[RowSpan, bytes | None]]:
    """(where, bytes without the line end) of every line that is not blank; None for one that is too long."""
    offset, number = 0, 0
    while line := file.readline(max_bytes + 1):
        start, size = offset, len(line)
        number += 1
        while not line.endswith(b"\n") and (rest := file.readline(max_bytes)):
            size += len(rest)  # the rest of a line that is too long is skipped in pieces
            if rest.endswith(b"\n"):
                break
        offset += size
        if size > max_bytes:
            yield RowSpan(number, start, size), None
            continue
        if number == 1 and line.startswith(_BOM):
            line, start = line[len(_BOM) :], start + len(_BOM)
        content = line.rstrip(b"\r\n")
        if content.strip():
            yield RowSpan(number, start, len(content)), content


class _Check:
    """What has been seen of one input so far."""

    def __init__(self, endpoint: str, serves: Callable[[str], bool]) -> None:
        self.endpoint, self.serves = endpoint, serves
        self.num_lines = 0
        self.num_inputs = 0  # to embed
        self.model: str | None = None
        self.errors: list[BatchError] = []
        self.custom_ids: set[int] = set()  # hashes: 64 bits, so that two of 50,000 differ but collide is 1 in 10^10
        self.rows: list[tuple[tuple[int, ...], RowSpan]] = []
        self.first_with_prefix: dict[tuple[int, int], int] = {}  # (length, hash of that much of a prompt) -> line

    def add(self, span: RowSpan, line: bytes | None) -> None:
        self.num_lines += 1
        if line is None:
            message = "This line is longer than a request may be (--max-body-size)."
            self.errors.append(BatchError("invalid_request", message, None, span.line))
            return
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            message = "This line is not parseable as valid JSON."
            self.errors.append(BatchError("invalid_json_line", message, None, span.line))
            return
        problem = self._problem(value)
        if problem is not None:
            code, message, param = problem
            self.errors.append(BatchError(code, message, param, span.line))
            return
        if self.endpoint == "/v1/embeddings":
            self.num_inputs += _num_inputs(value["body"]["input"])
        if not self.errors:
            self.rows.append((self._place(span.line, value["body"]), span))

    def in_order(self) -> tuple[RowSpan, ...]:
        """Lines that begin alike stand together, where the first of them stood: the prefix cache then holds one prefix
        at a time. Where no lines do, this is the order of the file."""
        return () if self.errors else tuple(span for _, span in sorted(self.rows, key=lambda row: row[0]))

    def _place(self, line: int, body: dict[str, Any]) -> tuple[int, ...]:
        text = orjson.dumps(body.get(KINDS[self.endpoint].prompt))[: PREFIX_LENGTHS[-1]]
        first = self.first_with_prefix
        place = [first.setdefault((size, hash(text[:size])), line) for size in PREFIX_LENGTHS if len(text) >= size]
        return (*place, line)

    def _problem(self, value: dict[str, Any]) -> tuple[str, str, str] | None:
        """(code, message, param) of the first thing that is wrong with a line."""
        for name in _REQUIRED:
            if value.get(name) is None:
                return "missing_required_parameter", f"Missing required parameter: '{name}'.", name
        custom_id, url, body = value["custom_id"], value["url"], value["body"]
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
            return "invalid_type", f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters.", "custom_id"
        if (key := hash(custom_id)) in self.custom_ids:
            message = "The custom_id for this request is a duplicate of another request."
            return "duplicate_custom_id", message, "custom_id"
        self.custom_ids.add(key)
        if value["method"] != "POST":
            return "invalid_method", "The method of every request must be 'POST'.", "method"
        if not isinstance(url, str) or not same_url(url, self.endpoint):
            message = "The URL provided for this request does not match the batch endpoint."
            return "invalid_url", message, "url"
        if not isinstance(body, dict):
            return "invalid_type", "Invalid type for 'body': expected an object.", "body"
        return self._body_problem(body)

    def _body_problem(self, body: dict[str, Any]) -> tuple[str, str, str] | None:
        kind, model = KINDS[self.endpoint], body.get("model")
        if not isinstance(model, str) or not model:
            return "invalid_request", "Model parameter is required.", "body.model"
        if not self.serves(model):
            message = f"The provided model '{model[:200]}' is not supported by the Batch API."
            return "model_not_found", message, "body.model"
        if self.model is None:
            self.model = model
        if model != self.model:
            message = f"All requests of a batch must name one model; this one names '{model[:200]}'."
            return "mismatched_model", message, "body.model"
        if body.get(kind.prompt) is None:
            return "invalid_request", f"{kind.prompt.title()} parameter is required.", f"body.{kind.prompt}"
        if body.get("stream"):
            message = f"{kind.title}: Streaming is not supported in the Batch API."
            return "streaming_unsupported", message, "body.stream"
        return None


def _num_inputs(given: Any) -> int:
    """1 for a text or a row of token ids, else how many there are of them."""
    return 1 if not isinstance(given, list) or (given and isinstance(given[0], int)) else len(given)


def answered(custom_id: str, status: int, body: dict[str, Any]) -> bytes:
    """The line about a request that was answered, whatever the status: of the output file for 2xx, else of the error
    file."""
    response = {"status_code": status, "request_id": secrets.token_hex(16), "body": body}
    return _line(custom_id, response, None)


def not_executed(custom_id: str, code: str) -> bytes:
    """The line of the error file about a request that never ran. code: a key of NOT_EXECUTED."""
    return _line(custom_id, None, {"code": code, "message": NOT_EXECUTED[code]})


NOT_EXECUTED = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    request_id = "batch_req_" + secrets.token_hex(16)
    return orjson.dumps({"id": request_id, "custom_id": custom_id, "response": response, "error": error})
