"""Table rows <-> the store's words. The tables are in database.MIGRATIONS."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxserve.store import Batch, BatchError, StoredFile, Usage

FILE_COLUMNS = "id, filename, purpose, num_bytes, created_at, expires_at"
PLAIN_BATCH_COLUMNS = (
    *("id", "endpoint", "input_file_id", "completion_window", "status", "created_at", "expires_at", "model"),
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"),
    *("output_file_id", "error_file_id", "num_total", "num_completed", "num_failed", "num_unexecuted"),
    "output_expires_after",
)
USAGE_COLUMNS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
BATCH_COLUMNS = ", ".join((*PLAIN_BATCH_COLUMNS, *USAGE_COLUMNS, "errors", "metadata"))


def file_from(row: tuple[Any, ...]) -> StoredFile:
    """From FILE_COLUMNS."""
    return StoredFile(*row)


def batch_from(row: tuple[Any, ...]) -> Batch:
    """From BATCH_COLUMNS."""
    plain = len(PLAIN_BATCH_COLUMNS)
    *usage, errors, metadata = row[plain:]
    return Batch(
        **dict(zip(PLAIN_BATCH_COLUMNS, row[:plain], strict=True)),
        usage=Usage(*usage),
        errors=tuple(BatchError(**error) for error in json.loads(errors)),
        metadata=None if metadata is None else json.loads(metadata),
    )


def usage_values(usage: Usage) -> tuple[int, ...]:
    """In the order of USAGE_COLUMNS."""
    return usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens


def errors_to_text(errors: Sequence[BatchError]) -> str:
    return json.dumps([asdict(error) for error in errors])


def new_batch(
    batch_id: str,
    now: int,
    expires_after: int,
    metadata: Mapping[str, str] | None,
    errors: Sequence[BatchError],
) -> dict[str, Any]:
    """The columns of a batch at its birth that are not simply what its creator said."""
    return {
        "id": batch_id,
        "status": "failed" if errors else "validating",
        "created_at": now,
        "expires_at": now + expires_after,
        "failed_at": now if errors else None,
        "errors": errors_to_text(errors),
        "metadata": None if metadata is None else json.dumps(dict(metadata)),
    }
