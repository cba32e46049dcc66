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
    TAKES_RESULTS,
    Batch,
    BatchError,
    BatchPage,
    BatchStatus,
    FilePage,
    Row,
    RowResult,
    RowSpan,
    StoredFile,
    StoreError,
    StoreFull,
    WrongStatus,
    queries,
)
from jaxserve.store.database import Connect, Database, connect, storable
from jaxserve.store.disk import Disk
from jaxserve.store.errors import translating
from jaxserve.store.folder import Folder, new_id
from jaxserve.store.records import errors_to_text, new_batch
from jaxserve.store.responses import Responses
from jaxserve.store.uploads import FileUpload

T = TypeVar("T")
log = logging.getLogger(__name__)

INPUT, OUTPUT, ERROR = "input.jsonl", "output.jsonl", "error.jsonl"


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
        self._claimed: dict[str, int] = {}  # batch -> the last position that claim_rows gave out
        with self._guard():
            self.folder = Folder(self.path, self.disk)
            try:
                self._db = self._despite_full(lambda: self._open_database(connect))
            except BaseException:
                self.folder.close()
                raise
        self.responses = Responses(self._session, self._despite_full, self._now)

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

    @contextmanager
    def _session(self) -> Generator[Database, None, None]:
        with self._guard():
            yield self._db

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
        active = {batch_id for (batch_id,) in self._db.all(f"SELECT id FROM batches WHERE {queries.ACTIVE_SQL}")}
        for path in self.folder.strays(self.folder.batches, active):
            self.disk.remove_folder(path)
        with self._db.transaction():
            self._db.run(queries.DELETE_DONE_ROWS)
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

    def keep_alive(self) -> None:
        """Whoever holds the lock is alive."""

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
                    queries.insert_file(self._db, file)
            except (OSError, sqlite3.Error):
                self.disk.remove(target)
                raise
            return file

    def get_file(self, file_id: str) -> StoredFile:
        with self._guard():
            return queries.get_file(self._db, file_id, self._now())

    def list_files(
        self,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FilePage:
        with self._guard():
            return queries.list_files(self._db, self._now(), after=after, limit=limit, order=order, purpose=purpose)

    def open_file(self, file_id: str) -> BinaryIO:
        with self._guard():
            return open(self.folder.of_file(self.get_file(file_id).id), "rb")

    def delete_file(self, file_id: str) -> None:
        with self._guard():
            self.get_file(file_id)
            self._despite_full(lambda: self._remove_files([file_id]))

    def expire_files(self) -> int:
        with self._guard():
            expired = queries.expired_files(self._db, self._now())
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
                "endpoint": endpoint,
                "input_file_id": input_file_id,
                "completion_window": completion_window,
                "output_expires_after": output_expires_after,
                **new_batch(batch_id, now, expires_after, metadata, errors),
            }
            try:
                if not errors:
                    self._snapshot(self.get_file(input_file_id), batch_id)
                with self._db.transaction():
                    queries.insert(self._db, "batches", columns)
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
            return queries.get_batch(self._db, batch_id)

    def list_batches(self, *, after: str | None = None, limit: int = 20) -> BatchPage:
        with self._guard():
            return queries.list_batches(self._db, after=after, limit=limit)

    def active_batches(self) -> tuple[Batch, ...]:
        with self._guard():
            return queries.active_batches(self._db)

    def open_input(self, batch_id: str) -> BinaryIO:
        with self._guard():
            queries.active_batch(self._db, batch_id, "read its input")
            return open(self.folder.of_batch(batch_id, INPUT), "rb")

    def start_batch(self, batch_id: str, rows: Iterable[RowSpan], *, model: str | None) -> Batch:
        with self._guard():
            batch, seq = queries.get_batch(self._db, batch_id), queries.seq_of(self._db, batch_id)
            if batch.status != "validating":
                raise WrongStatus(batch, "start")
            insert = "INSERT INTO batch_rows (batch, position, line, offset, num_bytes) VALUES (?, ?, ?, ?, ?)"
            values = ((seq, position, row.line, row.offset, row.num_bytes) for position, row in enumerate(rows))
            with self._db.transaction():
                self._db.run_many(insert, values)
                (total,) = self._db.one("SELECT count(*) FROM batch_rows WHERE batch = ?", seq) or (0,)
                queries.move(self._db, batch, "in_progress", self._now(), num_total=total, model=model)
            return self.get_batch(batch_id)

    def cancel_batch(self, batch_id: str) -> Batch:
        return self._step(batch_id, "cancelling", done=("cancelling", "cancelled"))

    def start_finalizing(self, batch_id: str) -> Batch:
        return self._step(batch_id, "finalizing", done=("finalizing",))

    def _step(self, batch_id: str, status: BatchStatus, done: tuple[BatchStatus, ...]) -> Batch:
        with self._guard():
            return queries.step(self._db, queries.get_batch(self._db, batch_id), status, done, self._now())

    def finish_batch(self, batch_id: str, status: Literal["completed", "expired", "cancelled"]) -> Batch:
        with self._guard():
            batch = self.get_batch(batch_id)
            if batch.status == status:
                return batch
            queries.check_end(batch, status)
            return self._end(batch, status)

    def fail_batch(self, batch_id: str, errors: Sequence[BatchError]) -> Batch:
        with self._guard():
            batch = self.get_batch(batch_id)
            if batch.status == "failed":
                return batch
            queries.active_batch(self._db, batch_id, "fail")
            return self._despite_full(lambda: self._end(batch, "failed", errors=errors_to_text(errors)))

    def _end(self, batch: Batch, status: BatchStatus, **columns: Any) -> Batch:
        """Publishes the results under ids that a second try finds again, then records files and status as one."""
        files = self._publish(batch)
        with self._db.transaction():
            for file in files.values():
                queries.insert_file(self._db, file)
            ids = {name: file.id for name, file in files.items()}
            queries.move(self._db, batch, status, self._now(), **ids, **columns)
        ended = self.get_batch(batch.id)
        self.release_rows(batch.id)
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
        return queries.counted_bytes(self._db, queries.seq_of(self._db, batch_id))

    # Rows -------------------------------------------------------------------------------------------------------------

    def pending_rows(self, batch_id: str, *, after: int = -1, limit: int = 256) -> tuple[Row, ...]:
        with self._guard():
            return queries.pending_rows(self._db, queries.seq_of(self._db, batch_id), after, limit)

    def claim_rows(self, batch_id: str, *, limit: int) -> tuple[Row, ...]:
        with self._guard():
            rows = self.pending_rows(batch_id, after=self._claimed.get(batch_id, -1), limit=limit)
            if rows:
                self._claimed[batch_id] = rows[-1].position
            return rows

    def release_rows(self, batch_id: str) -> None:
        self._claimed.pop(batch_id, None)

    def read_row(self, batch_id: str, span: RowSpan) -> bytes:
        """Reads past the lock: a snapshot never changes, and a row need not wait for another's sync."""
        try:
            with translating(self.path), self.folder.of_batch(batch_id, INPUT).open("rb", buffering=0) as file:
                line = os.pread(file.fileno(), span.num_bytes, span.offset)
        except (StoreError, ValueError):
            with self._guard():
                queries.active_batch(self._db, batch_id, "read its input")
            raise
        if len(line) != span.num_bytes:
            raise StoreError(f"the input of batch {batch_id} ends inside line {span.line}: the stored data are damaged")
        return line

    def record_results(self, batch_id: str, results: Sequence[RowResult]) -> Batch:
        queries.check_lines(batch_id, results)
        with self._guard():
            batch, seq = queries.get_batch(self._db, batch_id), queries.seq_of(self._db, batch_id)
            if batch.status not in TAKES_RESULTS:
                raise WrongStatus(batch, "take results")
            if new := queries.first_results(self._db, seq, results):
                self._append(batch, seq, new)
            return self.get_batch(batch_id)

    def _append(self, batch: Batch, seq: int, results: list[RowResult]) -> None:
        """Lines first, then what makes them count."""
        added = queries.lines_for(results)
        for name, start, lines in zip((OUTPUT, ERROR), queries.counted_bytes(self._db, seq), added, strict=True):
            if lines:
                self.disk.write_at(self.folder.of_batch(batch.id, name), start, lines)
        with self._db.transaction():
            if not queries.count_results(self._db, seq, results, *added):
                raise StoreError(f"a row of batch {batch.id} was taken by another process")
