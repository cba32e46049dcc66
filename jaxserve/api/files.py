"""/v1/files (OpenAI API reference, "Files"): uploads and the results of batches."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, BinaryIO, TypeGuard
from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from jaxserve.api.errors import APIError, invalid_request, not_found
from jaxserve.api.http import MEBIBYTE, body_chunks, json_response
from jaxserve.api.multipart import Form
from jaxserve.api.paging import integer_query, page_object
from jaxserve.api.serving import Serving
from jaxserve.store import NoSuchFile, StoredFile, Upload

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")  # what clients may upload
MAX_FILE_SIZE = 512 * MEBIBYTE
MAX_BATCH_FILE_SIZE = 200 * MEBIBYTE
DAY = 86_400
DEFAULT_EXPIRY = 30 * DAY  # of batch inputs and results, as OpenAI's
MIN_EXPIRY, MAX_EXPIRY = 3600, 30 * DAY  # seconds a client may ask for
PIECE = 1 << 20  # bytes handed to a thread at once
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's File."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


async def create_file(serving: Serving, http: Request) -> Response:
    """multipart/form-data with purpose, file and optionally expires_after[anchor], expires_after[seconds], in any
    order; the file goes to disk as it arrives."""
    store = serving.require_store()
    form = Form(_pieces(body_chunks(http)), http.headers.get("content-type", ""))
    fields: dict[str, str] = {}
    upload: Upload | None = None
    filename = ""
    try:
        while (part := await form.next_part()) is not None:
            if part.name in _FIELDS:
                fields[part.name] = await form.text()
            elif part.name == "file":
                if upload is not None:
                    raise invalid_request("Only one file can be uploaded at a time.", "file")
                filename = part.filename or "upload"
                if "purpose" in fields:  # refuse before the bytes where that is possible
                    _check(fields, filename, 0)
                upload = await asyncio.to_thread(store.start_upload, filename, "")
                await _receive(form, upload, fields)
        if upload is None:
            raise invalid_request("Missing required parameter: 'file'.", "file", "missing_required_parameter")
        upload.purpose, upload.expires_after = _check(fields, filename, upload.num_bytes)
        return json_response(file_object(await asyncio.to_thread(upload.commit)))
    finally:
        if upload is not None:
            upload.abort()


async def _receive(form: Form, upload: Upload, fields: dict[str, str]) -> None:
    limit = _max_size(fields.get("purpose"))
    while piece := await form.read():
        _check_size(upload.num_bytes + len(piece), limit)
        await asyncio.to_thread(upload.write, piece)


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of about PIECE: each is one visit to a thread."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= PIECE:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


async def _read(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    while piece := await asyncio.to_thread(file.read, PIECE):
        yield piece


def _max_size(purpose: str | None) -> int:
    return MAX_BATCH_FILE_SIZE if purpose == "batch" else MAX_FILE_SIZE


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        message = f"The file is larger than {limit // MEBIBYTE} MiB, the most that this purpose allows."
        raise APIError(413, message, param="file", code="file_too_large", headers={"Connection": "close"})


def _check(fields: dict[str, str], filename: str, size: int) -> tuple[str, int | None]:
    """-> purpose, seconds until the file expires (None: it stays). Raises APIError 400 or 413."""
    purpose = fields.get("purpose")
    if purpose is None:
        raise invalid_request("Missing required parameter: 'purpose'.", "purpose", "missing_required_parameter")
    if purpose not in PURPOSES:
        allowed = ", ".join(f"'{name}'" for name in PURPOSES)
        message = f"Invalid value: '{purpose[:100]}'. Supported values are: {allowed}."
        raise invalid_request(message, "purpose", "invalid_value")
    if purpose == "batch" and not filename.endswith(".jsonl"):
        message = f"Invalid file format for Batch API. Must be .jsonl, not {filename[-100:]!r}."
        raise invalid_request(message, "file", "invalid_file_format")
    _check_size(size, _max_size(purpose))
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, DEFAULT_EXPIRY if purpose == "batch" else None
    return purpose, check_expiry("expires_after", anchor, int(seconds) if _is_integer(seconds) else seconds)


def _is_integer(text: str | None) -> TypeGuard[str]:
    return text is not None and re.fullmatch(r"[0-9]{1,12}", text) is not None


def check_expiry(name: str, anchor: Any, seconds: Any) -> int:
    """{anchor: "created_at", seconds} -> seconds. Raises APIError 400."""
    if anchor != "created_at":
        message = f"Invalid value for '{name}.anchor': 'created_at' is the only supported value."
        raise invalid_request(message, f"{name}.anchor", "invalid_value")
    if type(seconds) is not int or not MIN_EXPIRY <= seconds <= MAX_EXPIRY:
        message = f"Invalid value for '{name}.seconds': an integer from {MIN_EXPIRY} to {MAX_EXPIRY} is expected."
        raise invalid_request(message, f"{name}.seconds", "invalid_value")
    return seconds


def no_such_file(file_id: str) -> APIError:
    """OpenAI's 404; its code is null."""
    return not_found(f"No such File object: {file_id[:100]}", "id", None)


async def list_files(serving: Serving, http: Request) -> Response:
    """Query: after, limit (1 to 10000), order (asc or desc), purpose."""
    store, query = serving.require_store(), http.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        message = f"Invalid value: '{order[:100]}'. Supported values are: 'asc' and 'desc'."
        raise invalid_request(message, "order", "invalid_value")
    limit, after = integer_query(http, "limit", 10_000, 1, 10_000), query.get("after")
    try:
        page = await asyncio.to_thread(
            store.list_files, after=after, limit=limit, order=order, purpose=query.get("purpose")
        )
    except NoSuchFile:
        raise no_such_file(str(after)) from None
    return json_response(page_object([file_object(file) for file in page.items], page.has_more))


async def get_file(serving: Serving, http: Request) -> Response:
    """The record of one file."""
    return json_response(file_object(await _find(serving, http)))


async def _find(serving: Serving, http: Request) -> StoredFile:
    file_id = http.path_params["file_id"]
    try:
        return await asyncio.to_thread(serving.require_store().get_file, file_id)
    except NoSuchFile:
        raise no_such_file(file_id) from None


async def get_file_content(serving: Serving, http: Request) -> Response:
    """The bytes, streamed from disk; a file that is deleted meanwhile is still sent whole."""
    record = await _find(serving, http)
    try:
        file = await asyncio.to_thread(serving.require_store().open_file, record.id)
    except NoSuchFile:
        raise no_such_file(record.id) from None

    async def pieces() -> AsyncGenerator[bytes, None]:
        with file:
            async for piece in _read(file):
                yield piece

    headers = {
        "content-length": str(record.num_bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(record.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")


async def delete_file(serving: Serving, http: Request) -> Response:
    """Batches that run keep their snapshot of it."""
    file_id = http.path_params["file_id"]
    try:
        await asyncio.to_thread(serving.require_store().delete_file, file_id)
    except NoSuchFile:
        raise no_such_file(file_id) from None
    return json_response({"id": file_id, "object": "file", "deleted": True})
