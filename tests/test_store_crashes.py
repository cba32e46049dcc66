"""A store survives anything: every change failing, power cuts, SIGKILL, full disks, and any order of calls."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from jaxserve.store import BatchError, NoSuchFile, RowResult, StoreError, StoreFull
from jaxserve.store.errors import translating
from jaxserve.store.sqlite import SQLiteStore
from tests.stores import (
    Crash,
    FailingDisk,
    Faults,
    answer,
    check_completed,
    check_no_strays,
    check_results,
    drive,
    fill,
    quick_store,
    small_file_system,
    start,
    upload,
)

ROOT = Path(__file__).resolve().parent.parent
NUM_LINES = 6
ENDINGS = ("completed", "cancelled", "expired", "failed")
SLOW = bool(os.environ.get("JAXSERVE_SLOW"))


def life(path: Path, faults: Faults, disk: FailingDisk, ending: str) -> None:
    """Opens, recovers, brings the batch to its end, deletes its input."""
    store = quick_store(path, faults, disk)
    try:
        store.recover()
        batch = drive(store, NUM_LINES, ending=ending)
        with suppress(NoSuchFile):  # an earlier life deleted it
            store.delete_file(batch.input_file_id)
    finally:
        store._db.connection.close()
        store.folder.close()


def crash(path: Path, at: int, ending: str) -> bool:
    """One life whose power is cut before its at-th change; False when it has fewer."""
    faults = Faults(at, "crash")
    disk = FailingDisk(faults)
    try:
        life(path, faults, disk, ending)
    except Crash:
        disk.cut_power(path)
        return True
    return False


def check_end(path: Path, ending: str) -> None:
    store = quick_store(path)
    assert store.recover() == ()
    (batch,) = store.list_batches().items
    assert batch.status == ending, batch
    check_results(store, batch)
    check_no_strays(store)
    store.close()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_power_cut_before_any_change_loses_and_repeats_nothing(tmp_path, ending):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    at = 0
    crashed = True
    while crashed:
        at += 1
        path = tmp_path / str(at)
        crashed = crash(path, at, ending)
        crash(path, rng.randrange(1, 40), ending)  # and again while it recovers
        faults = Faults()
        life(path, faults, FailingDisk(faults), ending)
        check_end(path, ending)
    assert at > 60, "the life has become too short to prove anything"


@pytest.mark.parametrize("ending", ENDINGS)
def test_any_change_may_fail_and_be_tried_again(tmp_path, ending):
    at, fired = 0, True
    while fired:
        at += 1
        faults = Faults(at, "once")
        path = tmp_path / str(at)
        for attempt in range(3):
            try:
                store = quick_store(path, faults)
                break
            except StoreError:
                assert attempt == 0
        store.recover()
        for attempt in range(3):
            try:
                batch = drive(store, NUM_LINES, ending=ending)
                break
            except StoreFull:
                assert attempt == 0
        assert batch.status == ending
        check_results_while_serving(store, batch)
        fired = faults.fired
        store.close()
        check_end(path, ending)
    assert at > 60


def test_lines_that_were_written_but_not_counted_are_not_published(tmp_path):
    faults = Faults()
    store = quick_store(tmp_path / "store", faults)
    store.recover()
    batch = start(store, 2)
    rows = store.pending_rows(batch.id)
    faults.at, faults.mode = faults.count + 3, "once"  # write, sync, BEGIN
    long = b'{"custom_id": "request-0", "outcome": "completed", "padding": "' + b"x" * 999 + b'"}'
    with pytest.raises(StoreFull):
        store.record_results(batch.id, [RowResult(0, "completed", long)])
    assert faults.fired and store.folder.of_batch(batch.id, "output.jsonl").stat().st_size == len(long) + 1
    store.record_results(batch.id, [answer(store, batch.id, row) for row in rows])
    store.start_finalizing(batch.id)
    check_results(store, store.finish_batch(batch.id, "completed"))
    store.close()


def check_results_while_serving(store: SQLiteStore, batch) -> None:
    """The snapshot of a final batch may outlive a failed clean-up until the next one."""
    store._tidy()
    check_results(store, batch)


def test_a_disk_full_from_any_moment_on_fails_the_batch_and_nothing_else(tmp_path):
    at, fired = 0, True
    while fired:
        at += 1
        faults = Faults(at, "full")
        store = quick_store(tmp_path / str(at), faults)
        store.recover()
        full = False
        try:
            kept = upload(store, [b"kept"])
            drive(store, NUM_LINES)
        except StoreFull:
            full = True
        fired = faults.fired
        assert full <= fired
        for batch in store.active_batches():
            assert full
            failed = store.fail_batch(batch.id, [BatchError("storage_full", "No space left.")])
            assert failed.status == "failed" and failed.num_pending == NUM_LINES * (failed.num_total > 0) - (
                failed.num_completed + failed.num_failed
            )
            check_results_while_serving(store, failed)
        if store.list_files(purpose="batch").items:
            with store.open_file(kept) as file:
                assert file.read() == b"kept"
        faults.at = 0  # somebody made room
        batch = start(store, 1)
        assert store.cancel_batch(batch.id).status == "cancelling"
        store.close()
    assert at > 40


@pytest.fixture
def small_disk(tmp_path):
    with small_file_system(tmp_path / "small") as path:
        yield path


def test_a_disk_that_is_really_full_fails_the_batch_and_leaves_the_store_serving(small_disk):
    store = SQLiteStore(small_disk / "store")
    store.recover()
    batch = start(store, 300)
    store.record_results(batch.id, [answer(store, batch.id, row) for row in store.pending_rows(batch.id, limit=10)])
    fill(small_disk / "other")
    with pytest.raises(StoreFull):
        drive(store, 300, group=2)
    with pytest.raises(StoreFull):
        upload(store, [b"x" * 100_000])
    recorded = store.get_batch(batch.id)
    assert 0 < recorded.num_pending <= 290
    failed = store.fail_batch(batch.id, [BatchError("storage_full", "No space left.")])
    assert failed.status == "failed" and failed.num_pending == recorded.num_pending
    check_results(store, failed)
    store.delete_file(batch.input_file_id)
    store.close()
    fill(small_disk / "another")

    store = SQLiteStore(small_disk / "store")  # a full disk does not keep it from starting and serving
    assert store.recover() == ()
    check_results(store, store.get_batch(batch.id))
    store.delete_file(str(failed.output_file_id))
    (small_disk / "other").unlink()
    assert start(store, 300).status == "in_progress"
    store.close()


def test_an_io_error_of_the_database_is_a_full_disk_where_nothing_more_can_be_written(small_disk):
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE  # what a used-up quota is to SQLite
    fill(small_disk / "other")
    with pytest.raises(StoreFull), translating(small_disk):
        raise error
    (small_disk / "other").unlink()
    with pytest.raises(StoreError) as failure, translating(small_disk):
        raise error
    assert not isinstance(failure.value, StoreFull)


def run_process(path: Path, num_lines: int, kill_after: float | None) -> bool:
    """Drives a batch in a process; True when it was killed before its end."""
    command = [sys.executable, str(ROOT / "tests" / "stores.py"), str(path), str(num_lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        rest = process.stdout.read()
    assert process.returncode in ((0,) if kill_after is None else (0, -9))
    return rest != "completed\n"


@pytest.mark.timeout(600)
def test_a_killed_process_loses_and_repeats_nothing(tmp_path):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    num_kills, num_lines = (30, 500) if SLOW else (4, 100)
    kills = folder = 0
    while kills < num_kills:
        path = tmp_path / str(folder)
        killed = run_process(path, num_lines, rng.uniform(0, 0.3))
        kills += killed
        if not killed or kills == num_kills:
            folder += 1
            run_process(path, num_lines, None)
            store = SQLiteStore(path)
            assert store.recover() == ()
            check_completed(store, num_lines)
            store.close()
