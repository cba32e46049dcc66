"""Stores to break: a clock to turn, a disk and a database that fail at the k-th change, and a worker that resumes.

`python stores.py FOLDER NUM_LINES` drives a batch in FOLDER to its end, whatever an earlier run left there.
"""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxserve.store import Batch, BatchError, Row, RowResult, RowSpan, Store, Usage
from jaxserve.store.disk import Disk
from jaxserve.store.folder import RESERVE_BYTES
from jaxserve.store.sqlite import SQLiteStore

NOW = 1_700_000_000
USAGE = Usage(input_tokens=7, cached_tokens=3, output_tokens=5, reasoning_tokens=1)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class Crash(BaseException):
    """The process is dead from here on; nothing may catch it."""


@dataclass
class Faults:
    """Counts changes and lets the k-th fail (from 1; 0: none).

    crash: it and all later ones do not happen. once: it alone raises what a full disk raises. full: so do all from it
    on that need space, while the store has all of its reserve.
    """

    at: int = 0
    mode: str = "once"
    reserve: Path = Path("/nonexistent")
    count: int = 0
    fired: bool = False

    def fails(self, grows: bool) -> bool:
        self.count += 1
        if not self.at or self.count < self.at:
            return False
        if self.mode == "crash":
            self.fired = True
            raise Crash
        fails = self.count == self.at if self.mode == "once" else grows and self.has_reserve()
        self.fired |= fails
        return fails

    def has_reserve(self) -> bool:
        return self.reserve.exists() and self.reserve.stat().st_size == RESERVE_BYTES


def sqlite_full() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


def failing_connect(faults: Faults) -> Callable[[str], sqlite3.Connection]:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values):
            verb = sql.split()[0]
            if verb not in ("SELECT", "PRAGMA", "ROLLBACK") and faults.fails(grows=verb != "BEGIN"):
                raise sqlite_full()
            return super().execute("PRAGMA synchronous = OFF" if sql.startswith("PRAGMA sync") else sql, *values)

        def executemany(self, sql: str, many):
            if faults.fails(grows=True):
                raise sqlite_full()
            return super().executemany(sql, many)

    return lambda path: sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Connection)


@dataclass
class FailingDisk(Disk):
    """Every change may fail, and `cut_power` undoes those that were not synced: bytes of files, names in folders."""

    faults: Faults
    unsynced_bytes: dict[int, int] = field(default_factory=dict)  # inode -> the length that was synced
    unsynced_names: list[tuple[Path, Callable[[], object]]] = field(default_factory=list)

    def check(self, grows: bool = False) -> None:
        if self.faults.fails(grows):
            raise OSError(errno.ENOSPC, "No space left on device")

    def make_folder(self, path: Path) -> None:
        self.check(grows=True)
        if not path.exists():
            self.unsynced_names.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self.check(grows=True)
        self.unsynced_names.append((path.parent, lambda: path.unlink(missing_ok=True)))
        return super().create(path)

    def write(self, descriptor: int, data: bytes) -> None:
        status = os.fstat(descriptor)
        self.unsynced_bytes.setdefault(status.st_ino, status.st_size)
        half = len(data) // 2  # a failed write may have written something
        super().write(descriptor, data[:half])
        self.check(grows=True)
        super().write(descriptor, data[half:])

    def sync(self, descriptor: int) -> None:
        self.check(grows=True)
        self.unsynced_bytes.pop(os.fstat(descriptor).st_ino, None)

    def truncate(self, path: Path, num_bytes: int) -> None:
        self.check()
        super().truncate(path, num_bytes)

    def sync_folder(self, path: Path) -> None:
        self.check()
        self.unsynced_names = [each for each in self.unsynced_names if each[0] != path]

    def rename(self, source: Path, target: Path) -> None:
        self.check()
        super().rename(source, target)
        self.unsynced_names.append((target.parent, lambda: target.exists() and target.rename(source)))

    def link(self, source: Path, target: Path) -> None:
        self.check(grows=True)
        super().link(source, target)
        self.unsynced_names.append((target.parent, lambda: target.unlink(missing_ok=True)))

    def remove(self, path: Path) -> None:
        self.check()
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self.check()
        super().remove_folder(path)

    def cut_power(self, root: Path) -> None:
        for _, undo in reversed(self.unsynced_names):
            undo()
        for path in root.rglob("*"):
            synced = self.unsynced_bytes.get(path.stat().st_ino)
            if synced is not None and path.is_file() and path.stat().st_size > synced:
                os.truncate(path, synced)


def quick_store(
    path: Path, faults: Faults | None = None, disk: FailingDisk | None = None, clock: Callable[[], float] | None = None
) -> SQLiteStore:
    """A store that never waits for the medium."""
    faults = faults or Faults()
    faults.reserve = path / "reserve"
    disk = disk or FailingDisk(faults)
    return SQLiteStore(path, clock=clock or Clock(), connect=failing_connect(faults), disk=disk)


def abandon(store: SQLiteStore) -> None:
    """What becomes of a process that dies: its transaction and its lock are gone."""
    store._db.connection.close()
    store.folder.close()


def upload(store: Store, lines: list[bytes], purpose: str = "batch", **options) -> str:
    with store.start_upload("input.jsonl", purpose, **options) as upload:
        for line in lines:
            upload.write(line)
        return upload.commit().id


def input_line(number: int) -> bytes:
    return json.dumps({"custom_id": f"request-{number}", "padding": "x" * (number * 37 % 50)}).encode() + b"\n"


def spans(store: Store, batch_id: str) -> list[RowSpan]:
    found, offset = [], 0
    with store.open_input(batch_id) as file:
        for number, line in enumerate(file, 1):
            found.append(RowSpan(number, offset, len(line)))
            offset += len(line)
    return found


def answer(store: Store, batch_id: str, row: Row, outcome: str | None = None) -> RowResult:
    """Lines 3, 6, 9 … fail."""
    request = json.loads(store.read_row(batch_id, row.span))
    outcome = outcome or ("failed" if row.span.line % 3 == 0 else "completed")
    line = json.dumps({"custom_id": request["custom_id"], "outcome": outcome}).encode()
    return RowResult(row.position, outcome, line, USAGE if outcome == "completed" else Usage())  # ty: ignore


def make_batch(store: Store, num_lines: int, **options) -> Batch:
    file_id = upload(store, [input_line(number) for number in range(num_lines)])
    return store.create_batch(endpoint="/v1/completions", input_file_id=file_id, **options)


def start(store: Store, num_lines: int, **options) -> Batch:
    batch = make_batch(store, num_lines, **options)
    return store.start_batch(batch.id, spans(store, batch.id), model="m")


def drive(store: Store, num_lines: int, group: int = 4, ending: str = "completed") -> Batch:
    """A worker: goes on from wherever the store is until its only batch has that ending. Sees nothing but the store."""
    batches = store.list_batches().items
    batch = batches[0] if batches else make_batch(store, num_lines)
    if batch.status == "validating":
        batch = store.start_batch(batch.id, reversed(spans(store, batch.id)), model="m")
    after = -1
    while batch.status in ("in_progress", "cancelling"):
        half = batch.num_pending <= batch.num_total // 2
        if half and ending == "failed":
            return store.fail_batch(batch.id, [BatchError("code", "message")])
        if half and ending == "cancelled":
            batch = store.cancel_batch(batch.id)
        outcome = "unexecuted" if half and ending != "completed" else None
        rows = store.pending_rows(batch.id, after=after, limit=group)
        if not rows:
            break
        batch = store.record_results(batch.id, [answer(store, batch.id, row, outcome) for row in rows])
        after = rows[-1].position
    if batch.status == "in_progress":
        batch = store.start_finalizing(batch.id)
    if batch.is_final:
        return batch
    return store.finish_batch(batch.id, ending)  # ty: ignore[invalid-argument-type]


def lines_of(store: Store, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    with store.open_file(file_id) as file:
        data = file.read()
    assert data and len(data) == store.get_file(file_id).num_bytes and data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def check_results(store: Store, batch: Batch) -> None:
    """A final batch: every custom_id at most once (exactly once unless it failed), counters and files agree."""
    output, error = lines_of(store, batch.output_file_id), lines_of(store, batch.error_file_id)
    times = Counter(line["custom_id"] for line in output + error)
    assert all(count == 1 for count in times.values()), times
    kinds = Counter(line["outcome"] for line in output + error)
    counted = {"completed": batch.num_completed, "failed": batch.num_failed, "unexecuted": batch.num_unexecuted}
    assert kinds == Counter(counted), (kinds, batch)
    assert {line["outcome"] for line in output} <= {"completed"}
    assert "completed" not in {line["outcome"] for line in error}
    assert batch.usage == sum([USAGE] * batch.num_completed, Usage())
    if batch.status != "failed":
        assert batch.num_pending == 0 and len(times) == batch.num_total
    if isinstance(store, SQLiteStore):
        assert not store.folder.of_batch(batch.id).exists(), "a final batch still holds its snapshot"
    assert store.pending_rows(batch.id) == ()


def check_completed(store: Store, num_lines: int) -> None:
    """The only batch completed, over all lines, and nothing is left over."""
    (batch,) = store.list_batches().items
    assert batch.status == "completed", batch
    check_results(store, batch)
    assert batch.num_total == num_lines and batch.num_unexecuted == 0 and batch.num_failed == num_lines // 3
    lines = lines_of(store, batch.output_file_id) + lines_of(store, batch.error_file_id)
    assert {line["custom_id"] for line in lines} == {f"request-{number}" for number in range(num_lines)}
    check_no_strays(store)


def check_no_strays(store: Store) -> None:
    """Bytes and records name the same files; no upload and no snapshot without its owner is left."""
    recorded = {file.id: file.num_bytes for file in store.list_files().items}
    if not isinstance(store, SQLiteStore):
        for file_id, num_bytes in recorded.items():
            with store.open_file(file_id) as file:
                assert len(file.read()) == num_bytes
        return
    assert {path.name: path.stat().st_size for path in store.folder.files.iterdir()} == recorded
    assert not list(store.folder.incoming.iterdir())
    assert {path.name for path in store.folder.batches.iterdir()} == {batch.id for batch in store.active_batches()}


@contextmanager
def small_file_system(path: Path, mebibytes: int = 8) -> Generator[Path, None, None]:
    """A file system of that size at path."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a file system that is small enough")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Takes what room there is with a file."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def main() -> None:
    store = SQLiteStore(sys.argv[1])
    store.recover()
    print("open", flush=True)
    batch = drive(store, int(sys.argv[2]), group=3)
    print(batch.status, flush=True)
    store.close()


if __name__ == "__main__":
    main()
