"""The default store: records in SQLite, bytes in files beside it, one process at a time (see folder for the tree).

A result line is appended to the batch's own output or error file and synced; then one transaction counts it and moves
the length that counts. What lies behind that length never happened: the next append overwrites it, publishing cuts it.
Publishing is a hard link and one transaction: it needs neither memory nor room for the results.
"""

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from jaxserve.store import (
    ACTIVE,
    STATUS_AFTER,
    Batch,
    BatchError,
    BatchPage,
    BatchStatus,
    FilePage,
    NoSuchBatch,
    NoSuchFile,
    Row,
    RowResult,
    RowSpan,
    StoredFile,
    StoreError,
    StoreFull,
    Usage,
    WrongStatus,
)
from jaxserve.store.database import Connect, Database, connect, storable
from jaxserve.store.disk import Disk
from jaxserve.store.errors import translating
from jaxserve.store.folder import Folder, new_id
from jaxserve.store.records import (
    BATCH_COLUMNS,
    FILE_COLUMNS,
    batch_from,
    errors_to_text,
    file_from,
    metadata_to_text,
    usage_values,
)
from jaxserve.store.responses import SQLiteResponses
from jaxserve.store.uploads import FileUpload

T = TypeVar("T")
log = logging.getLogger(__name__)

INPUT, OUTPUT, ERROR = "input.jsonl", "output.jsonl", "error.jsonl"
ACTIVE_SQL = f"status IN ({', '.join(repr(status) for status in sorted(ACTIVE))})"


class SQLiteStore:
    """Implements `jaxserve.store.Store`. clock gives Unix seconds; connect and disk are there for tests to fail.

    Raises StoreLocked, StoreFull, StoreError (unwritable folder, database of a newer version).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        connect: Connect = connect,
        disk: Disk | None = None,
    ) -> None:
        self.path = Path(path)
        self.clock = clock
        self.disk = disk or Disk()
        self._mutex = threading.RLock()
        with self._guard():
            self.folder = Folder(self.path, self.disk)
            try:
                self._db = self._despite_full(lambda: self._open_database(connect))
            except BaseException:
                self.folder.close()
                raise
        self.responses = SQLiteResponses(self._db, self._guard, self._despite_full, self._now)

    def _open_database(self, connect: Connect) -> Database:
        database = Database(self.folder.database, connect)
        try:
            self.disk.sync_folder(self.path)
        except BaseException:
            database.close()
            raise
        return database

    def _despite_full(self, action: Callable[[], T]) -> T:
        """What the action returns; on a full disk it is tried again with parts of the reserve."""
        while True:
            try:
                with translating(self.path):
                    return action()
            except StoreFull:
                if not self.folder.release_reserve():
                    raise

    @contextmanager
    def _guard(self) -> Generator[None, None, None]:
        """One call at a time, with the errors of disk and database as StoreError."""
        with self._mutex, translating(self.path):
            yield

    def _now(self) -> int:
        return int(self.clock())

    # Life -------------------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[Batch, ...]:
        with self._guard():
            for path in self.folder.strays(self.folder.incoming, known=set()):
                self.disk.remove(path)
            known = {file_id for (file_id,) in self._db.all("SELECT id FROM files")}
            for path in self.folder.strays(self.folder.files, known):
                self.disk.remove(path)
            self._tidy()
            self.expire_files()
            for batch in self.active_batches():
                self._check_bytes(batch)
            return self.active_batches()

    def _clean_batches(self) -> None:
        """Removes what final batches still hold, and tries to have a reserve."""
        active = {batch_id for (batch_id,) in self._db.all(f"SELECT id FROM batches WHERE {ACTIVE_SQL}")}
        for path in self.folder.strays(self.folder.batches, active):
            self.disk.remove_folder(path)
        with self._db.transaction():
            self._db.run(f"DELETE FROM batch_rows WHERE batch NOT IN (SELECT seq FROM batches WHERE {ACTIVE_SQL})")
        self.folder.fill_reserve()

    def _tidy(self) -> None:
        """Housekeeping after something ended; what fails here is done at the next time or by recover."""
        try:
            self._clean_batches()
        except (OSError, sqlite3.Error) as error:
            log.warning("could not clean up in %s: %s", self.path, error)

    def _check_bytes(self, batch: Batch) -> None:
        """Fails a batch whose counted bytes, or input, are gone."""
        for name, num_bytes in zip((OUTPUT, ERROR), self._counted_bytes(batch.id), strict=True):
            path = self.folder.of_batch(batch.id, name)
            found = path.stat().st_size if path.exists() else -1
            if found < num_bytes or not self.folder.of_batch(batch.id, INPUT).exists():
                log.error("batch %s: %s has %d of %d bytes; it fails", batch.id, path, found, num_bytes)
                lost = BatchError("storage_error", "The stored data of this batch are damaged; create it again.")
                self.fail_batch(batch.id, [lost])
                return

    def close(self) -> None:
        with self._guard():
            self._db.close()
            self.folder.close()

    # Files ------------------------------------------------------------------------------------------------------------

    def start_upload(self, filename: str, purpose: str, *, expires_after: int | None = None) -> FileUpload:
        with self._guard():
            path = self.folder.incoming / new_id("upload-")
            return FileUpload(path, self.disk, self._adopt, storable(filename), purpose, expires_after)

    def _adopt(self, upload: FileUpload) -> StoredFile:
        """The last step of an upload: its synced bytes get their name, then their record."""
        with self._guard():
            now, file_id = self._now(), new_id("file-")
            expires_at = None if upload.expires_after is None else now + upload.expires_after
            file = StoredFile(file_id, upload.filename, upload.purpose, upload.num_bytes, now, expires_at)
            target = self.folder.of_file(file_id)
            try:
                self.disk.rename(upload.path, target)
                self.disk.sync_folder(self.folder.files)
                with self._db.transaction():
                    self._insert_file(file)
            except (OSError, sqlite3.Error):
                self.disk.remove(target)
                raise
            return file

    def _insert_file(self, file: StoredFile) -> None:
        values = (file.id, file.filename, file.purpose, file.num_bytes, file.created_at, file.expires_at)
        self._db.run(f"INSERT INTO files ({FILE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", *values)

    def get_file(self, file_id: str) -> StoredFile:
        with self._guard():
            sql = f"SELECT {FILE_COLUMNS} FROM files WHERE id = ? AND (expires_at IS NULL OR expires_at > ?)"
            row = self._db.one(sql, file_id, self._now())
            if row is None:
                raise NoSuchFile(file_id)
            return file_from(row)

    def list_files(
        self,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        with self._guard():
            where, values = ["(expires_at IS NULL OR expires_at > ?)"], [self._now()]
            if purpose is not None:
                where, values = [*where, "purpose = ?"], [*values, purpose]
            if after is not None:
                row = self._db.one("SELECT seq FROM files WHERE id = ?", after)
                if row is None:
                    raise NoSuchFile(after)
                where, values = [*where, f"seq {'>' if order == 'asc' else '<'} ?"], [*values, row[0]]
            sql = f"SELECT {FILE_COLUMNS} FROM files WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"
            rows = self._db.all(sql, *values, limit + 1)
            return FilePage(tuple(file_from(row) for row in rows[:limit]), len(rows) > limit)

    def open_file(self, file_id: str) -> BinaryIO:
        with self._guard():
            return open(self.folder.of_file(self.get_file(file_id).id), "rb")

    def delete_file(self, file_id: str) -> None:
        with self._guard():
            self.get_file(file_id)
            self._despite_full(lambda: self._remove_files([file_id]))

    def expire_files(self) -> int:
        with self._guard():
            expired = [each for (each,) in self._db.all("SELECT id FROM files WHERE expires_at <= ?", self._now())]
            if expired:
                self._despite_full(lambda: self._remove_files(expired))
            return len(expired)

    def _remove_files(self, file_ids: Sequence[str]) -> None:
        """The record first: bytes without a record are removed by recover, a record without bytes would be a lie."""
        with self._db.transaction():
            for file_id in file_ids:
                self._db.run("DELETE FROM files WHERE id = ?", file_id)
        for file_id in file_ids:
            self.disk.remove(self.folder.of_file(file_id))
        self.folder.fill_reserve()

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
        with self._guard():
            now, batch_id = self._now(), new_id("batch_")
            columns: dict[str, Any] = {
                "id": batch_id,
                "endpoint": endpoint,
                "input_file_id": input_file_id,
                "completion_window": completion_window,
                "status": "failed" if errors else "validating",
                "created_at": now,
                "expires_at": now + expires_after,
                "failed_at": now if errors else None,
                "errors": errors_to_text(errors),
                "metadata": metadata_to_text(metadata),
                "output_expires_after": output_expires_after,
            }
            sql = f"INSERT INTO batches ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            try:
                if not errors:
                    self._snapshot(self.get_file(input_file_id), batch_id)
                with self._db.transaction():
                    self._db.run(sql, *columns.values())
            except (OSError, sqlite3.Error):
                self.disk.remove_folder(self.folder.of_batch(batch_id))
                raise
            return self.get_batch(batch_id)

    def _snapshot(self, file: StoredFile, batch_id: str) -> None:
        folder = self.folder.of_batch(batch_id)
        self.disk.make_folder(folder)
        self.disk.link(self.folder.of_file(file.id), folder / INPUT)
        for name in (OUTPUT, ERROR):
            os.close(self.disk.create(folder / name))
        self.disk.sync_folder(folder)
        self.disk.sync_folder(self.folder.batches)

    def get_batch(self, batch_id: str) -> Batch:
        with self._guard():
            row = self._db.one(f"SELECT {BATCH_COLUMNS} FROM batches WHERE id = ?", batch_id)
            if row is None:
                raise NoSuchBatch(batch_id)
            return batch_from(row)

    def list_batches(self, *, after: str | None = None, limit: int = 20) -> BatchPage:
        with self._guard():
            before = self._seq(after) if after is not None else 1 << 62
            sql = f"SELECT {BATCH_COLUMNS} FROM batches WHERE seq < ? ORDER BY seq DESC LIMIT ?"
            rows = self._db.all(sql, before, limit + 1)
            return BatchPage(tuple(batch_from(row) for row in rows[:limit]), len(rows) > limit)

    def _seq(self, batch_id: str) -> int:
        row = self._db.one("SELECT seq FROM batches WHERE id = ?", batch_id)
        if row is None:
            raise NoSuchBatch(batch_id)
        return row[0]

    def active_batches(self) -> tuple[Batch, ...]:
        with self._guard():
            rows = self._db.all(f"SELECT {BATCH_COLUMNS} FROM batches WHERE {ACTIVE_SQL} ORDER BY seq")
            return tuple(batch_from(row) for row in rows)

    def open_input(self, batch_id: str) -> BinaryIO:
        with self._guard():
            self._active(batch_id, "read its input")
            return open(self.folder.of_batch(batch_id, INPUT), "rb")

    def start_batch(self, batch_id: str, rows: Iterable[RowSpan], *, model: str | None) -> Batch:
        with self._guard():
            batch, seq = self.get_batch(batch_id), self._seq(batch_id)
            if batch.status != "validating":
                raise WrongStatus(batch, "start")
            insert = "INSERT INTO batch_rows (batch, position, line, offset, num_bytes) VALUES (?, ?, ?, ?, ?)"
            values = ((seq, position, row.line, row.offset, row.num_bytes) for position, row in enumerate(rows))
            with self._db.transaction():
                self._db.run_many(insert, values)
                (total,) = self._db.one("SELECT count(*) FROM batch_rows WHERE batch = ?", seq) or (0,)
                self._move(batch, "in_progress", num_total=total, model=model)
            return self.get_batch(batch_id)

    def cancel_batch(self, batch_id: str) -> Batch:
        return self._step(batch_id, "cancelling", done=("cancelling", "cancelled"))

    def start_finalizing(self, batch_id: str) -> Batch:
        return self._step(batch_id, "finalizing", done=("finalizing",))

    def _step(self, batch_id: str, status: BatchStatus, done: tuple[BatchStatus, ...]) -> Batch:
        with self._guard():
            batch = self.get_batch(batch_id)
            if batch.status in done:
                return batch
            if status == "finalizing" and batch.num_pending:
                raise WrongStatus(batch, f"be finalizing while {batch.num_pending} rows are pending")
            with self._db.transaction():
                self._move(batch, status)
            return self.get_batch(batch_id)

    def _move(self, batch: Batch, status: BatchStatus, **columns: Any) -> None:
        """Compare and swap: the batch as it was read -> status, with its time and these columns. In a transaction."""
        if status not in STATUS_AFTER[batch.status]:
            raise WrongStatus(batch, f"become {status}")
        columns = {"status": status, f"{status}_at": self._now(), **columns}
        assignments = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE batches SET {assignments} WHERE id = ? AND status = ?"
        if self._db.run(sql, *columns.values(), batch.id, batch.status) != 1:
            raise WrongStatus(self.get_batch(batch.id), f"become {status}")

    def _active(self, batch_id: str, wanted: str) -> Batch:
        batch = self.get_batch(batch_id)
        if batch.is_final:
            raise WrongStatus(batch, wanted)
        return batch

    def finish_batch(self, batch_id: str, status: Literal["completed", "expired", "cancelled"]) -> Batch:
        with self._guard():
            batch = self.get_batch(batch_id)
            if batch.status == status:
                return batch
            if status not in STATUS_AFTER[batch.status]:
                raise WrongStatus(batch, f"become {status}")
            if batch.num_pending:
                raise WrongStatus(batch, f"become {status} while {batch.num_pending} rows are pending")
            return self._end(batch, status)

    def fail_batch(self, batch_id: str, errors: Sequence[BatchError]) -> Batch:
        with self._guard():
            batch = self.get_batch(batch_id)
            if batch.status == "failed":
                return batch
            if batch.is_final:
                raise WrongStatus(batch, "fail")
            return self._despite_full(lambda: self._end(batch, "failed", errors=errors_to_text(errors)))

    def _end(self, batch: Batch, status: BatchStatus, **columns: Any) -> Batch:
        """Publishes the results under ids that a second try finds again, then records files and status as one."""
        files = self._publish(batch)
        with self._db.transaction():
            for file in files.values():
                self._insert_file(file)
            self._move(batch, status, **{name: file.id for name, file in files.items()}, **columns)
        ended = self.get_batch(batch.id)
        self._tidy()
        return ended

    def _publish(self, batch: Batch) -> dict[str, StoredFile]:
        now = self._now()
        expires_at = None if batch.output_expires_after is None else now + batch.output_expires_after
        files: dict[str, StoredFile] = {}
        for kind, num_bytes in zip(("output", "error"), self._counted_bytes(batch.id), strict=True):
            source = self.folder.of_batch(batch.id, f"{kind}.jsonl")
            num_bytes = min(
                num_bytes, source.stat().st_size if source.exists() else 0
            )  # less: damaged, see _check_bytes
            if num_bytes == 0:
                continue
            self.disk.truncate(source, num_bytes)
            file_id = "file-" + hashlib.sha256(f"{batch.id} {kind}".encode("ascii")).hexdigest()[:32]
            target = self.folder.of_file(file_id)
            self.disk.remove(target)
            self.disk.link(source, target)
            name = f"{batch.id}_{kind}.jsonl"
            files[f"{kind}_file_id"] = StoredFile(file_id, name, "batch_output", num_bytes, now, expires_at)
        self.disk.sync_folder(self.folder.files)
        return files

    def _counted_bytes(self, batch_id: str) -> tuple[int, int]:
        """How much of the output and of the error file counts."""
        row = self._db.one("SELECT num_output_bytes, num_error_bytes FROM batches WHERE id = ?", batch_id)
        return row or (0, 0)

    # Rows -------------------------------------------------------------------------------------------------------------

    def pending_rows(self, batch_id: str, *, after: int = -1, limit: int = 256) -> tuple[Row, ...]:
        with self._guard():
            sql = (
                "SELECT position, line, offset, num_bytes FROM batch_rows "
                "WHERE batch = ? AND position > ? AND outcome IS NULL ORDER BY position LIMIT ?"
            )
            rows = self._db.all(sql, self._seq(batch_id), after, limit)
            return tuple(Row(position, RowSpan(*span)) for position, *span in rows)

    def read_row(self, batch_id: str, span: RowSpan) -> bytes:
        """Reads past the lock: a snapshot never changes, and a row need not wait for another's sync."""
        try:
            with translating(self.path), self.folder.of_batch(batch_id, INPUT).open("rb", buffering=0) as file:
                line = os.pread(file.fileno(), span.num_bytes, span.offset)
        except (StoreError, ValueError):
            self._active(batch_id, "read its input")
            raise
        if len(line) != span.num_bytes:
            raise StoreError(f"the input of batch {batch_id} ends inside line {span.line}: the stored data are damaged")
        return line

    def record_results(self, batch_id: str, results: Sequence[RowResult]) -> Batch:
        for result in results:
            if b"\n" in result.line:
                raise ValueError(f"the result of row {result.position} of batch {batch_id} is not one line")
        with self._guard():
            batch, seq = self.get_batch(batch_id), self._seq(batch_id)
            if batch.status not in ("in_progress", "cancelling", "finalizing"):
                raise WrongStatus(batch, "take results")
            new = self._first_results(seq, results)
            if new:
                self._append(batch, seq, new)
            return self.get_batch(batch_id)

    def _first_results(self, seq: int, results: Sequence[RowResult]) -> list[RowResult]:
        new: dict[int, RowResult] = {}
        sql = "SELECT 1 FROM batch_rows WHERE batch = ? AND position = ? AND outcome IS NULL"
        for result in results:
            if result.position not in new and self._db.one(sql, seq, result.position):
                new[result.position] = result
        return list(new.values())

    def _append(self, batch: Batch, seq: int, results: list[RowResult]) -> None:
        """Lines first, then what makes them count."""
        output = b"".join(each.line + b"\n" for each in results if each.outcome == "completed")
        error = b"".join(each.line + b"\n" for each in results if each.outcome != "completed")
        for name, start, lines in zip((OUTPUT, ERROR), self._counted_bytes(batch.id), (output, error), strict=True):
            if lines:
                self.disk.write_at(self.folder.of_batch(batch.id, name), start, lines)
        usage = sum((each.usage for each in results), Usage())
        counts = [sum(each.outcome == kind for each in results) for kind in ("completed", "failed", "unexecuted")]
        with self._db.transaction():
            for each in results:
                sql = "UPDATE batch_rows SET outcome = ? WHERE batch = ? AND position = ? AND outcome IS NULL"
                if self._db.run(sql, each.outcome, seq, each.position) != 1:
                    raise StoreError(f"row {each.position} of batch {batch.id} was taken by another process")
            sql = (
                "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ?, "
                "num_unexecuted = num_unexecuted + ?, num_output_bytes = num_output_bytes + ?, "
                "num_error_bytes = num_error_bytes + ?, input_tokens = input_tokens + ?, "
                "cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?, "
                "reasoning_tokens = reasoning_tokens + ? WHERE seq = ?"
            )
            self._db.run(sql, *counts, len(output), len(error), *usage_values(usage), seq)
