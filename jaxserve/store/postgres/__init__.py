"""A store for a fleet: records and bytes in one PostgreSQL database, any number of processes.

Every call is one transaction. A process claims rows (SKIP LOCKED) under its own name and says every few seconds that it
lives; what one has claimed that has not said so for LEASE_SECONDS is free again. The first result of a row counts,
whoever brings it, so a process that was only slow does no harm. Times of leases are the database's, all others the
caller's clock.

Bytes are `contents`, made of pieces. Result lines are appended to the contents that become the result files, so
publishing copies nothing, and a batch's input is its file's content. Contents that nobody refers to go when they have
not been touched for GRACE_SECONDS: uploads that broke off, and what somebody may still be reading.
"""

import io
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

from jaxserve.store import (
    TAKES_RESULTS,
    Batch,
    BatchError,
    BatchPage,
    BatchStatus,
    FilePage,
    NoSuchFile,
    Row,
    RowResult,
    RowSpan,
    StoredFile,
    StoreError,
    WrongStatus,
    queries,
)
from jaxserve.store.folder import new_id
from jaxserve.store.postgres.database import PostgresDatabase, Session
from jaxserve.store.records import errors_to_text, new_batch
from jaxserve.store.responses import Responses

PIECE_BYTES = 1 << 20
LEASE_SECONDS = 15.0
GRACE_SECONDS = 3600.0
ALIVE = "(SELECT id FROM workers WHERE alive_until > now())"
FREE = f"(worker IS NULL OR worker NOT IN {ALIVE})"
UNUSED = """NOT EXISTS (SELECT 1 FROM files WHERE content = contents.id)
    AND NOT EXISTS (SELECT 1 FROM batches
        WHERE contents.id IN (input_content, output_content, error_content))"""


class PostgresStore:
    """Implements `jaxserve.store.Store`. url: of libpq, as psycopg takes it. clock gives Unix seconds.

    Raises StoreError (no such server or database, no rights, a schema of a newer version).
    """

    def __init__(
        self, url: str, *, clock: Callable[[], float] = time.time, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.clock, self.lease_seconds = clock, lease_seconds
        self.worker = "worker-" + secrets.token_hex(16)
        self._said_alive = float("-inf")
        self._db = PostgresDatabase(url)
        self.responses = Responses(self._db.session, lambda action: action(), self._now)

    def _now(self) -> int:
        return int(self.clock())

    @contextmanager
    def _locked(self, batch_id: str) -> Generator[tuple[Session, Batch, int], None, None]:
        """-> a session that alone may change this batch, the batch, its seq. Raises NoSuchBatch."""
        with self._db.session() as db:
            db.one("SELECT 1 FROM batches WHERE id = ? FOR UPDATE", batch_id)
            yield db, queries.get_batch(db, batch_id), queries.seq_of(db, batch_id)

    # Life -------------------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[Batch, ...]:
        self.keep_alive()
        self.expire_files()
        return self.active_batches()

    def keep_alive(self) -> None:
        if time.monotonic() - self._said_alive < self.lease_seconds / 4:
            return
        sql = (
            "INSERT INTO workers (id, alive_until) VALUES (?, now() + ? * INTERVAL '1 second') "
            "ON CONFLICT (id) DO UPDATE SET alive_until = EXCLUDED.alive_until"
        )
        with self._db.session() as db:
            db.run(sql, self.worker, self.lease_seconds)
        self._said_alive = time.monotonic()

    def close(self) -> None:
        try:
            with self._db.session() as db:
                db.run("DELETE FROM workers WHERE id = ?", self.worker)
        finally:
            self._db.close()

    # Files ------------------------------------------------------------------------------------------------------------

    def start_upload(self, filename: str, purpose: str, *, expires_after: int | None = None) -> "PostgresUpload":
        return PostgresUpload(self._db, self._now, filename, purpose, expires_after)

    def get_file(self, file_id: str) -> StoredFile:
        with self._db.session() as db:
            return queries.get_file(db, file_id, self._now())

    def list_files(
        self,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        with self._db.session() as db:
            return queries.list_files(db, self._now(), after=after, limit=limit, order=order, purpose=purpose)

    def open_file(self, file_id: str) -> BinaryIO:
        with self._db.session() as db:
            file = queries.get_file(db, file_id, self._now())
            return self._reader(db, "SELECT content FROM files WHERE id = ?", file_id, file.num_bytes)

    def _reader(self, db: Session, sql: str, record_id: str, num_bytes: int | None) -> BinaryIO:
        (content,) = db.one(sql, record_id) or (None,)
        assert content is not None, "a record that is there and active has its content"
        reader = io.BufferedReader(ContentReader(self._db, content, num_bytes), PIECE_BYTES)
        return cast(BinaryIO, reader)

    def delete_file(self, file_id: str) -> None:
        with self._db.session() as db:
            queries.get_file(db, file_id, self._now())
            _remove_files(db, [file_id])

    def expire_files(self) -> int:
        """Removes what nobody needs besides: bytes, and the names of processes that are gone."""
        with self._db.session() as db:
            expired = queries.expired_files(db, self._now())
            removed = _remove_files(db, expired)
            touched = "touched_at < now() - ? * INTERVAL '1 second'"
            db.run(f"DELETE FROM contents WHERE {touched} AND {UNUSED}", GRACE_SECONDS)
            db.run("DELETE FROM workers WHERE alive_until < now() - INTERVAL '1 day'")
            return removed

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
        now, batch_id = self._now(), new_id("batch_")
        columns = {
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "output_expires_after": output_expires_after,
            "worker": self.worker,
            **new_batch(batch_id, now, expires_after, metadata, errors),
        }
        with self._db.session() as db:
            if not errors:
                queries.get_file(db, input_file_id, now)
                row = db.one("SELECT content FROM files WHERE id = ? FOR SHARE", input_file_id)
                if row is None:  # deleted just now
                    raise NoSuchFile(input_file_id)
                columns |= {"input_content": row[0], "output_content": _content(db), "error_content": _content(db)}
            queries.insert(db, "batches", columns)
            return queries.get_batch(db, batch_id)

    def get_batch(self, batch_id: str) -> Batch:
        with self._db.session() as db:
            return queries.get_batch(db, batch_id)

    def list_batches(self, *, after: str | None = None, limit: int = 20) -> BatchPage:
        with self._db.session() as db:
            return queries.list_batches(db, after=after, limit=limit)

    def active_batches(self) -> tuple[Batch, ...]:
        with self._db.session() as db:
            free = f"status = 'validating' AND worker <> ? AND worker NOT IN {ALIVE}"
            sql = f"SELECT seq FROM batches WHERE {free} FOR UPDATE SKIP LOCKED"
            db.run(f"UPDATE batches SET worker = ? WHERE seq IN ({sql})", self.worker, self.worker)
            mine = f"{queries.ACTIVE_SQL} AND (status <> 'validating' OR worker = ?)"
            return queries.active_batches(db, mine, self.worker)

    def open_input(self, batch_id: str) -> BinaryIO:
        with self._db.session() as db:
            queries.active_batch(db, batch_id, "read its input")
            return self._reader(db, "SELECT input_content FROM batches WHERE id = ?", batch_id, None)

    def start_batch(self, batch_id: str, rows: Iterable[RowSpan], *, model: str | None) -> Batch:
        with self._locked(batch_id) as (db, batch, seq):
            if batch.status != "validating":
                raise WrongStatus(batch, "start")
            columns = 'batch, position, line, "offset", num_bytes'
            values = ((seq, place, row.line, row.offset, row.num_bytes) for place, row in enumerate(rows))
            total = db.copy("batch_rows", columns, values)
            queries.move(db, batch, "in_progress", self._now(), num_total=total, model=model)
            return queries.get_batch(db, batch_id)

    def cancel_batch(self, batch_id: str) -> Batch:
        with self._locked(batch_id) as (db, batch, _):
            return queries.step(db, batch, "cancelling", ("cancelling", "cancelled"), self._now())

    def start_finalizing(self, batch_id: str) -> Batch:
        with self._locked(batch_id) as (db, batch, _):
            return queries.step(db, batch, "finalizing", ("finalizing",), self._now())

    def finish_batch(self, batch_id: str, status: Literal["completed", "expired", "cancelled"]) -> Batch:
        with self._locked(batch_id) as (db, batch, seq):
            if batch.status == status:
                return batch
            queries.check_end(batch, status)
            return self._end(db, batch, seq, status)

    def fail_batch(self, batch_id: str, errors: Sequence[BatchError]) -> Batch:
        with self._locked(batch_id) as (db, batch, seq):
            if batch.status == "failed":
                return batch
            queries.active_batch(db, batch_id, "fail")
            return self._end(db, batch, seq, "failed", errors=errors_to_text(errors))

    def _end(self, db: Session, batch: Batch, seq: int, status: BatchStatus, **columns: Any) -> Batch:
        """The contents of the results become files, and the batch lets go of all it held."""
        now = self._now()
        expires_at = None if batch.output_expires_after is None else now + batch.output_expires_after
        contents = db.one("SELECT output_content, error_content FROM batches WHERE seq = ?", seq) or ()
        sizes = queries.counted_bytes(db, seq)
        for kind, content, num_bytes in zip(("output", "error"), contents, sizes, strict=True):
            if num_bytes:
                name = f"{batch.id}_{kind}.jsonl"
                file = StoredFile(new_id("file-"), name, "batch_output", num_bytes, now, expires_at)
                queries.insert_file(db, file, content=content)
                columns[f"{kind}_file_id"] = file.id
        columns |= {"input_content": None, "output_content": None, "error_content": None}
        queries.move(db, batch, status, now, **columns)
        db.run("DELETE FROM batch_rows WHERE batch = ?", seq)
        return queries.get_batch(db, batch.id)

    # Rows -------------------------------------------------------------------------------------------------------------

    def pending_rows(self, batch_id: str, *, after: int = -1, limit: int = 256) -> tuple[Row, ...]:
        with self._db.session() as db:
            return queries.pending_rows(db, queries.seq_of(db, batch_id), after, limit)

    def claim_rows(self, batch_id: str, *, limit: int) -> tuple[Row, ...]:
        # The choice is made once, before the update; a plain subquery may be run again for each row.
        sql = f"""WITH free AS MATERIALIZED (
            SELECT position FROM batch_rows WHERE batch = ? AND outcome IS NULL AND {FREE}
            ORDER BY position LIMIT ? FOR UPDATE SKIP LOCKED
        ) UPDATE batch_rows SET worker = ? WHERE batch = ? AND position IN (SELECT position FROM free)
        RETURNING position, line, "offset", num_bytes"""
        with self._db.session() as db:
            seq = queries.seq_of(db, batch_id)
            rows = db.all(sql, seq, limit, self.worker, seq)
        return tuple(Row(position, RowSpan(*span)) for position, *span in sorted(rows))

    def release_rows(self, batch_id: str) -> None:
        with self._locked(batch_id) as (db, _, seq):
            sql = "UPDATE batch_rows SET worker = NULL WHERE batch = ? AND worker = ? AND outcome IS NULL"
            db.run(sql, seq, self.worker)

    def read_row(self, batch_id: str, span: RowSpan) -> bytes:
        end = span.offset + span.num_bytes
        sql = """SELECT substring(bytes FROM greatest(? - first_byte, 0)::int + 1
                FOR (least(?, first_byte + octet_length(bytes)) - greatest(?, first_byte))::int)
            FROM pieces JOIN batches ON content = input_content
            WHERE batches.id = ? AND first_byte > ? AND first_byte < ? AND first_byte + octet_length(bytes) > ?
            ORDER BY first_byte"""
        values = (span.offset, end, span.offset, batch_id, span.offset - PIECE_BYTES, end, span.offset)
        with self._db.session() as db:
            line = b"".join(bytes(part) for (part,) in db.all(sql, *values))
            if len(line) != span.num_bytes:
                queries.active_batch(db, batch_id, "read its input")
                message = f"the input of batch {batch_id} ends inside line {span.line}: the stored data are damaged"
                raise StoreError(message)
        return line

    def record_results(self, batch_id: str, results: Sequence[RowResult]) -> Batch:
        queries.check_lines(batch_id, results)
        with self._locked(batch_id) as (db, batch, seq):
            if batch.status not in TAKES_RESULTS:
                raise WrongStatus(batch, "take results")
            new = queries.first_results(db, seq, results)
            if not new:
                return batch
            added = queries.lines_for(new)
            contents = db.one("SELECT output_content, error_content FROM batches WHERE seq = ?", seq) or ()
            for content, start, lines in zip(contents, queries.counted_bytes(db, seq), added, strict=True):
                _append(db, content, start, lines)
            if not queries.count_results(db, seq, new, *added):
                raise StoreError(f"a row of batch {batch_id} changed although the batch is locked")
            return queries.get_batch(db, batch_id)


def _content(db: Session) -> int:
    """A new one, empty."""
    row = db.one("INSERT INTO contents DEFAULT VALUES RETURNING id")
    assert row is not None
    return row[0]


def _append(db: Session, content: int, start: int, data: bytes) -> None:
    for first in range(0, len(data), PIECE_BYTES):
        piece = data[first : first + PIECE_BYTES]
        db.run("INSERT INTO pieces (content, first_byte, bytes) VALUES (?, ?, ?)", content, start + first, piece)


def _remove_files(db: Session, file_ids: Sequence[str]) -> int:
    """Their bytes stay for who is reading them."""
    removed = 0
    for file_id in file_ids:
        row = db.one("DELETE FROM files WHERE id = ? RETURNING content", file_id)
        if row is not None:
            db.run("UPDATE contents SET touched_at = now() WHERE id = ?", row[0])
            removed += 1
    return removed


class ContentReader(io.RawIOBase):
    """The bytes of a content, a piece at a time. num_bytes: how many there must be; None: as many as there are."""

    def __init__(self, database: PostgresDatabase, content: int, num_bytes: int | None) -> None:
        self._db, self._content, self._num_bytes = database, content, num_bytes
        self._offset = 0
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = memoryview(self._next())
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def _next(self) -> bytes:
        sql = "SELECT bytes FROM pieces WHERE content = ? AND first_byte = ?"
        with self._db.session() as db:
            row = db.one(sql, self._content, self._offset)
        piece = bytes(row[0]) if row is not None else b""
        if not piece and self._num_bytes is not None and self._offset < self._num_bytes:
            raise StoreError("a file was removed while it was being read")
        self._offset += len(piece)
        return piece


class PostgresUpload:
    """Implements `jaxserve.store.Upload`."""

    def __init__(
        self,
        database: PostgresDatabase,
        now: Callable[[], int],
        filename: str,
        purpose: str,
        expires_after: int | None,
    ) -> None:
        self.filename, self.purpose, self.expires_after = filename, purpose, expires_after
        self.num_bytes = 0
        self._db, self._now = database, now
        self._held = bytearray()
        self._written = 0
        with database.session() as db:
            self._content: int | None = _content(db)

    def write(self, chunk: bytes) -> None:
        self._held += chunk
        self.num_bytes += len(chunk)
        if len(self._held) >= PIECE_BYTES:
            with self._db.session() as db:
                self._flush(db)

    def _flush(self, db: Session) -> None:
        assert self._content is not None, "an upload that ended takes nothing more"
        db.run("UPDATE contents SET touched_at = now() WHERE id = ?", self._content)
        _append(db, self._content, self._written, bytes(self._held))
        self._written += len(self._held)
        self._held.clear()

    def commit(self) -> StoredFile:
        now = self._now()
        expires_at = None if self.expires_after is None else now + self.expires_after
        file = StoredFile(new_id("file-"), self.filename, self.purpose, self.num_bytes, now, expires_at)
        with self._db.session() as db:
            self._flush(db)
            queries.insert_file(db, file, content=self._content)
            stored = queries.get_file(db, file.id, now)
        self._content = None
        return stored

    def abort(self) -> None:
        if self._content is not None:
            with self._db.session() as db:
                db.run("DELETE FROM contents WHERE id = ?", self._content)
            self._content = None

    def __enter__(self) -> "PostgresUpload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
