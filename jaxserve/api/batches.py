"""/v1/batches (OpenAI API reference, "Batch"): a file of requests, answered when there is time."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.responses import Response

from jaxserve.api.batch_worker import ANSWERS
from jaxserve.api.errors import APIError, invalid_request, not_found
from jaxserve.api.files import DEFAULT_EXPIRY, check_expiry
from jaxserve.api.http import json_response, read_json
from jaxserve.api.metadata import JSON_TYPES, check_metadata
from jaxserve.api.paging import integer_query, page_object
from jaxserve.api.serving import Serving
from jaxserve.store import Batch, BatchError, NoSuchBatch, NoSuchFile, WrongStatus

WINDOW = "24h"  # the only completion window, as OpenAI's
_TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


def batch_object(batch: Batch) -> dict[str, Any]:
    """OpenAI's Batch."""
    errors = [
        {"code": error.code, "message": error.message, "param": error.param, "line": error.line}
        for error in batch.errors
    ]
    usage = batch.usage
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        **{name: getattr(batch, name) for name in _TIMES},
        "request_counts": {"total": batch.num_total, "completed": batch.num_completed, "failed": batch.num_failed},
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        "metadata": None if batch.metadata is None else dict(batch.metadata),
    }


async def create_batch(serving: Serving, http: Request) -> Response:
    """{input_file_id, endpoint, completion_window, metadata?, output_expires_after?} -> a Batch in "validating"."""
    body = await read_json(http, serving.config.max_body_size)
    store, worker = serving.require_store(), serving.batch_worker
    for name in ("input_file_id", "endpoint", "completion_window"):
        _require_string(body, name)
    _require_one_of("endpoint", body["endpoint"], tuple(ANSWERS))
    _require_one_of("completion_window", body["completion_window"], (WINDOW,))
    file_id = body["input_file_id"]
    wanted: dict[str, Any] = {
        "endpoint": body["endpoint"],
        "input_file_id": file_id,
        "completion_window": WINDOW,
        "metadata": check_metadata(body.get("metadata")),
        "output_expires_after": _output_expiry(body.get("output_expires_after")),
    }
    try:
        file = await asyncio.to_thread(store.get_file, file_id)
        if file.purpose != "batch":
            message = f"The file {file_id} has purpose '{file.purpose}'; the input of a batch needs purpose 'batch'."
            raise invalid_request(message, "input_file_id", "invalid_file_purpose")
        batch = await asyncio.to_thread(lambda: store.create_batch(**wanted))
    except NoSuchFile:
        message = f"Cannot find file {file_id[:100]}, or organization does not have access to it."
        errors = (BatchError("invalid_request", message, "file_id"),)
        batch = await asyncio.to_thread(lambda: store.create_batch(**wanted, errors=errors))
    if worker is not None:
        worker.adopt(batch)
    return json_response(batch_object(batch))


def _require_string(body: dict[str, Any], name: str) -> None:
    value = body.get(name)
    if value is None:
        raise invalid_request(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not isinstance(value, str):
        given = JSON_TYPES.get(type(value), "null")
        raise invalid_request(
            f"Invalid type for '{name}': expected a string, but got {given} instead.", name, "invalid_type"
        )


def _require_one_of(name: str, value: str, supported: tuple[str, ...]) -> None:
    if value not in supported:
        allowed = " and ".join(f"'{item}'" for item in supported)
        message = f"Invalid value: '{value[:100]}'. Supported values are: {allowed}."
        raise invalid_request(message, name, "invalid_value")


def _output_expiry(value: Any) -> int:
    if value is None:
        return DEFAULT_EXPIRY
    if not isinstance(value, dict):
        message = "Invalid type for 'output_expires_after': expected an object with anchor and seconds."
        raise invalid_request(message, "output_expires_after", "invalid_type")
    return check_expiry("output_expires_after", value.get("anchor"), value.get("seconds"))


@contextmanager
def _known(batch_id: str) -> Generator[None]:
    """OpenAI's 404 for an id that the store does not know; its code is null."""
    try:
        yield
    except NoSuchBatch:
        raise not_found(f"No batch found with id '{batch_id[:100]}'.", None, None) from None


async def get_batch(serving: Serving, http: Request) -> Response:
    """The batch as it stands; its request_counts are live."""
    batch_id = http.path_params["batch_id"]
    with _known(batch_id):
        batch = await asyncio.to_thread(serving.require_store().get_batch, batch_id)
    return json_response(batch_object(batch))


async def list_batches(serving: Serving, http: Request) -> Response:
    """Query: after, limit (1 to 100). Newest first."""
    after, limit = http.query_params.get("after"), integer_query(http, "limit", 20, 1, 100)
    with _known(str(after)):
        page = await asyncio.to_thread(serving.require_store().list_batches, after=after, limit=limit)
    return json_response(page_object([batch_object(batch) for batch in page.items], page.has_more))


async def cancel_batch(serving: Serving, http: Request) -> Response:
    """-> the batch in "cancelling"; what was answered by then is kept. 409 when it has ended otherwise."""
    batch_id = http.path_params["batch_id"]
    try:
        with _known(batch_id):
            batch = await asyncio.to_thread(serving.require_store().cancel_batch, batch_id)
    except WrongStatus as error:
        message = f"Cannot cancel a batch with status '{error.batch.status}'."
        raise APIError(409, message, code=None) from None
    if serving.batch_worker is not None:
        serving.batch_worker.interrupt(batch_id)
    return json_response(batch_object(batch))
