"""Files, batches and batch rows that survive anything: the words, and the protocol that every store keeps.

    files     immutable bytes with a record; uploads and the published results of batches
    responses replies of /v1/responses with the conversation that led to them, immutable
    batches   one state machine each (`STATUS_AFTER`), moved by compare-and-swap
    rows      the lines of a batch's input, each pending until exactly one result is recorded for it

A store knows nothing of OpenAI's JSON: a row is a span of bytes in the input, a result one line of bytes for the output
or the error file. What is true at any moment is what a reopened store says: every method either happened wholly and
durably when it returns, or (when it raises, or the process dies inside it) can be called again. Methods block for the
disk, up to tens of milliseconds, so call them from a thread; they may be called from any number of threads.

The default store is `jaxserve.store.sqlite.SQLiteStore`; `jaxserve.store.postgres.PostgresStore` is one for many
processes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Literal, Protocol

BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
ACTIVE: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
TAKES_RESULTS: frozenset[BatchStatus] = frozenset({"in_progress", "finalizing", "cancelling"})

# What may follow what; an active batch may also stay as it is, a final one never moves again.
STATUS_AFTER: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    "validating": frozenset({"in_progress", "failed", "expired", "cancelling"}),
    "in_progress": frozenset({"finalizing", "failed", "expired", "cancelling"}),
    "finalizing": frozenset({"completed", "failed", "expired", "cancelling"}),
    "cancelling": frozenset({"cancelled", "failed"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}

# completed: a line of the output file. failed: of the error file, and counted as failed. unexecuted (expired or
# cancelled before it ran): of the error file, and counted as neither.
Outcome = Literal["completed", "failed", "unexecuted"]


class StoreError(Exception):
    """The store cannot do it: its disk or database fails. The message says which; what was recorded before is safe."""


class StoreFull(StoreError):
    """No space left (disk, quota or file size limit). Nothing of the call remains; `fail_batch` still works."""


class StoreLocked(StoreError):
    """Another process uses this store."""


class NoSuchFile(LookupError):
    """No file has this id (any more): never made, deleted, or expired."""


class NoSuchBatch(LookupError):
    """No batch has this id."""


class NoSuchResponse(LookupError):
    """No response has this id, or an item of this id (any more): never stored, deleted, or expired."""


class WrongStatus(Exception):
    """The batch is in a status that does not allow the call; `batch` is the batch as it is."""

    def __init__(self, batch: "Batch", wanted: str) -> None:
        super().__init__(f"batch {batch.id} is {batch.status}; it cannot {wanted}")
        self.batch = batch


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The record of one file; times in Unix seconds."""

    id: str  # file-…
    filename: str  # a label as the client gave it; never part of a path
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None = None  # None: never


@dataclass(frozen=True, slots=True)
class BatchError:
    """One reason why a batch failed, in OpenAI's words."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None  # 1-based


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, of one result or summed over a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0  # of input_tokens
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as it stands; times in Unix seconds, None until they happen."""

    id: str  # batch_…
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created_at: int
    expires_at: int
    model: str | None = None  # known once validated
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None  # set in final states only, and only where the file has a line
    error_file_id: str | None = None
    num_total: int = 0  # 0 while validating
    num_completed: int = 0
    num_failed: int = 0
    num_unexecuted: int = 0  # lines of the error file that stand for rows that never ran
    usage: Usage = field(default_factory=Usage)
    errors: tuple[BatchError, ...] = ()
    metadata: Mapping[str, str] | None = None
    output_expires_after: int | None = None  # seconds from the creation of the result files; None: they stay

    @property
    def is_final(self) -> bool:
        return self.status not in ACTIVE

    @property
    def num_pending(self) -> int:
        return self.num_total - self.num_completed - self.num_failed - self.num_unexecuted


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where one request stands in the input: bytes [offset, offset + num_bytes), line counted from 1."""

    line: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One pending row. position counts from 0 in the order given to `start_batch`, which is the order to run in."""

    position: int
    span: RowSpan


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of a row: one line (without its line feed) for the output or the error file."""

    position: int
    outcome: Outcome
    line: bytes
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class FilePage:
    """One page of a list. has_more: another page follows its last item."""

    items: tuple[StoredFile, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class BatchPage:
    """One page of a list. has_more: another page follows its last item."""

    items: tuple[Batch, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One reply and what it was asked, as the caller's JSON; times in Unix seconds."""

    id: str  # resp_…
    body: bytes
    input_items: bytes  # of the whole conversation before the reply
    created_at: int
    expires_at: int
    item_ids: tuple[str, ...] = ()  # of `put` only: the items by which it shall be found


class ResponseStore(Protocol):
    """Replies that stay until they are deleted or expire. Every method may raise StoreError, `put` StoreFull."""

    def put(self, responses: Sequence[StoredResponse]) -> None:
        """All of them, durably, or none."""
        ...

    def get(self, response_id: str) -> StoredResponse:
        """Raises NoSuchResponse."""
        ...

    def with_item(self, item_id: str) -> StoredResponse:
        """The response that was stored with this item id. Raises NoSuchResponse."""
        ...

    def delete(self, response_id: str) -> None:
        """Responses that went on from it keep their copy of the conversation. Raises NoSuchResponse."""
        ...

    def expire(self) -> int:
        """Deletes those whose time has passed and returns their number; expired ones are invisible even before."""
        ...


class Upload(Protocol):
    """A file on its way in: invisible until `commit`; gone when its `with` block, or the process, ends before."""

    num_bytes: int  # written so far; the caller holds the limit
    purpose: str  # this and the next may be changed until `commit`: a client may say them behind the bytes
    expires_after: int | None

    def write(self, chunk: bytes) -> None:
        """Adds bytes. Raises StoreFull or StoreError; the upload is then good for `abort` only."""
        ...

    def commit(self) -> StoredFile:
        """Makes the bytes durable and the file visible, at once. Raises StoreFull, StoreError."""
        ...

    def abort(self) -> None:
        """Removes what was written; nothing after `commit` or a first `abort`."""
        ...

    def __enter__(self) -> "Upload": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """Every method may raise StoreError, and StoreFull where it writes, besides what its docstring names."""

    @property
    def responses(self) -> ResponseStore: ...

    # Life -------------------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[Batch, ...]:
        """Once after opening, before any other call: removes what a crash left half done (aborted uploads,
        unpublished results), drops expired files, fails batches whose bytes are gone, returns `active_batches()`.

        The caller goes on with each by its status: validating: validate again; in_progress: run `pending_rows`;
        finalizing: `finish_batch`; cancelling: record the pending rows as unexecuted, then `finish_batch`.
        """
        ...

    def keep_alive(self) -> None:
        """Says that this process is at work on what it claimed. To be called every few seconds."""
        ...

    def close(self) -> None:
        """Waits for calls in flight and releases the store for another process."""
        ...

    # Files ------------------------------------------------------------------------------------------------------------

    def start_upload(self, filename: str, purpose: str, *, expires_after: int | None = None) -> Upload:
        """A new file, in pieces. expires_after: seconds from its creation; None: it stays."""
        ...

    def get_file(self, file_id: str) -> StoredFile:
        """Raises NoSuchFile."""
        ...

    def list_files(
        self,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        """Files by time of creation, newest first unless asked otherwise, from the one behind `after`.

        Raises NoSuchFile when `after` is unknown.
        """
        ...

    def open_file(self, file_id: str) -> BinaryIO:
        """The file's bytes, for the caller to close; they stay readable when the file is deleted. Raises NoSuchFile."""
        ...

    def delete_file(self, file_id: str) -> None:
        """Running batches keep their snapshot of it. Raises NoSuchFile."""
        ...

    def expire_files(self) -> int:
        """Deletes the files whose time has passed and returns their number; expired ones are invisible even before."""
        ...

    # Batches ----------------------------------------------------------------------------------------------------------

    def create_batch(
        self,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str = "24h",
        expires_after: int = 86_400,
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
        errors: Sequence[BatchError] = (),
    ) -> Batch:
        """A new batch over a snapshot of the file as it is now: validating, or failed at birth when `errors` are given
        (then the file need not exist).

        expires_after: the window in seconds. Raises NoSuchFile.
        """
        ...

    def get_batch(self, batch_id: str) -> Batch:
        """Raises NoSuchBatch."""
        ...

    def list_batches(self, *, after: str | None = None, limit: int = 20) -> BatchPage:
        """Newest first, from the one behind `after`. Raises NoSuchBatch when `after` is unknown."""
        ...

    def active_batches(self) -> tuple[Batch, ...]:
        """The batches that this process is to work on: those not in a final state, oldest first, without those that
        another living process validates."""
        ...

    def open_input(self, batch_id: str) -> BinaryIO:
        """The snapshot of the input, for the caller to close. Raises NoSuchBatch, WrongStatus in final states."""
        ...

    def start_batch(self, batch_id: str, rows: Iterable[RowSpan], *, model: str | None) -> Batch:
        """validating -> in_progress with these rows, in the order in which they shall run; all or nothing.

        Raises NoSuchBatch, WrongStatus (cancelled meanwhile).
        """
        ...

    def cancel_batch(self, batch_id: str) -> Batch:
        """validating, in_progress, finalizing -> cancelling; unchanged when cancelling or cancelled already.

        Raises NoSuchBatch, WrongStatus when completed, failed or expired.
        """
        ...

    def start_finalizing(self, batch_id: str) -> Batch:
        """in_progress -> finalizing, when no row is pending; unchanged when finalizing already.

        Raises NoSuchBatch, WrongStatus.
        """
        ...

    def finish_batch(self, batch_id: str, status: Literal["completed", "expired", "cancelled"]) -> Batch:
        """Publishes the results as files and moves the batch to its end, as one; unchanged when it is there already.

        finalizing -> completed; validating, in_progress, finalizing -> expired; cancelling -> cancelled. No row may be
        pending: record those that never ran as unexecuted first, so that lines(output) + lines(errors) == total.
        Raises NoSuchBatch, WrongStatus.
        """
        ...

    def fail_batch(self, batch_id: str, errors: Sequence[BatchError]) -> Batch:
        """Any active status -> failed, publishing what results there are; unchanged when failed already.

        Works on a full disk, for which the store keeps a reserve; should even that be taken, StoreFull: try later.

        Raises NoSuchBatch, WrongStatus in other final states.
        """
        ...

    # Rows -------------------------------------------------------------------------------------------------------------

    def pending_rows(self, batch_id: str, *, after: int = -1, limit: int = 256) -> tuple[Row, ...]:
        """The next rows without a result, positions above `after`, in order; empty when there are none.

        Raises NoSuchBatch.
        """
        ...

    def claim_rows(self, batch_id: str, *, limit: int) -> tuple[Row, ...]:
        """The next rows, in order, that have no result and that no living process has claimed. They are this process's
        until they have a result, it releases them, or it is gone.

        Raises NoSuchBatch.
        """
        ...

    def release_rows(self, batch_id: str) -> None:
        """Gives back what this process has claimed and not recorded."""
        ...

    def read_row(self, batch_id: str, span: RowSpan) -> bytes:
        """One line of the input snapshot. Raises NoSuchBatch, WrongStatus in final states."""
        ...

    def record_results(self, batch_id: str, results: Sequence[RowResult]) -> Batch:
        """Results and their counters, durably, as one; the first result of a row counts and later ones are dropped.

        One call costs two disk syncs whatever its length: pass all that finished meanwhile. Allowed in in_progress and
        cancelling (and finalizing, where nothing is pending). Raises NoSuchBatch, WrongStatus.
        """
        ...
