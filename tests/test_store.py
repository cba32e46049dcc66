"""What a store promises to its callers; that it keeps it through failures is in test_store_crashes."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from jaxserve.store import (
    BatchError,
    NoSuchBatch,
    NoSuchFile,
    RowResult,
    RowSpan,
    StoredFile,
    StoreError,
    StoreLocked,
    Usage,
    WrongStatus,
)
from jaxserve.store.database import MIGRATIONS
from jaxserve.store.sqlite import SQLiteStore
from tests.stores import (
    NOW,
    USAGE,
    Clock,
    answer,
    check_no_strays,
    check_results,
    input_line,
    lines_of,
    make_batch,
    quick_store,
    spans,
    start,
    upload,
)

ROOT = Path(__file__).resolve().parent.parent
DAY = 86_400


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path, clock):
    if request.param == "sqlite":
        store = quick_store(tmp_path / "store", clock=clock)
    else:
        url = request.getfixturevalue("postgres").new_database()
        from jaxserve.store.postgres import PostgresStore

        store = PostgresStore(url, clock=clock)
    store.recover()
    yield store
    check_no_strays(store)
    store.close()


def test_a_file_is_what_was_uploaded(store):
    with store.start_upload("in.jsonl", "batch", expires_after=DAY) as pieces:
        pieces.write(b"ab")
        pieces.write(b"")
        pieces.write(b"\x00\xff\n")
        assert pieces.num_bytes == 5 and store.list_files().items == ()
        file = pieces.commit()
    assert file == StoredFile(file.id, "in.jsonl", "batch", 5, NOW, NOW + DAY)
    assert store.get_file(file.id) == file
    with store.open_file(file.id) as opened:
        assert opened.read() == b"ab\x00\xff\n"


def test_an_upload_that_does_not_end_leaves_nothing(store):
    with pytest.raises(KeyError), store.start_upload("in.jsonl", "batch") as pieces:
        pieces.write(b"ab")
        raise KeyError
    assert store.list_files().items == ()


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "", "a\x00b", "\udcff", "x" * 5000, "日本\n"])
def test_names_are_labels_and_reach_nothing(store, name):
    with store.start_upload(name, "batch") as pieces:
        file = pieces.commit()
    shown = name.replace("\udcff", "?")
    if not isinstance(store, SQLiteStore):
        shown = shown.replace("\0", "\ufffd")
    assert file.filename == shown and store.get_file(file.id).filename == shown
    if isinstance(store, SQLiteStore):
        assert [path.name for path in store.folder.files.iterdir()] == [file.id]


@pytest.mark.parametrize("file_id", ["../store.sqlite3", "file-" + "0" * 32, "", "file-../../lock", "a\x00", "\udcff"])
def test_unknown_ids_are_unknown_wherever_they_point(store, file_id):
    for call in (store.get_file, store.open_file, store.delete_file, lambda id: store.list_files(after=id)):
        with pytest.raises(NoSuchFile):
            call(file_id)
    for call in (
        *(store.get_batch, store.open_input, store.cancel_batch, store.start_finalizing, store.pending_rows),
        lambda id: store.list_batches(after=id),
        lambda id: store.start_batch(id, [], model=None),
        lambda id: store.finish_batch(id, "expired"),
        lambda id: store.fail_batch(id, []),
        lambda id: store.record_results(id, []),
        lambda id: store.read_row(id, RowSpan(1, 0, 1)),
    ):
        with pytest.raises(NoSuchBatch):
            call(file_id)
    with pytest.raises(NoSuchFile):
        store.create_batch(endpoint="/v1/completions", input_file_id=file_id)


def test_files_are_listed_in_pages_of_one_purpose_in_either_order(store):
    ids = [upload(store, [b"x"], purpose) for purpose in ("batch", "user_data", "batch", "batch")]
    page = store.list_files(limit=2)
    assert [file.id for file in page.items] == [ids[3], ids[2]] and page.has_more
    page = store.list_files(limit=2, after=ids[2])
    assert [file.id for file in page.items] == [ids[1], ids[0]] and not page.has_more
    page = store.list_files(purpose="batch", order="asc", limit=3)
    assert [file.id for file in page.items] == [ids[0], ids[2], ids[3]] and not page.has_more
    assert [file.id for file in store.list_files(order="asc", after=ids[1], purpose="batch").items] == ids[2:]


def test_a_deleted_file_is_gone_but_stays_readable_where_it_is_open(store):
    file_id = upload(store, [b"content"])
    with store.open_file(file_id) as opened:
        store.delete_file(file_id)
        assert opened.read() == b"content"
    with pytest.raises(NoSuchFile):
        store.get_file(file_id)


def test_an_expired_file_is_invisible_at_once_and_removed_in_time(store, clock):
    kept, expiring = upload(store, [b"a"]), upload(store, [b"b"], expires_after=DAY)
    clock.now += DAY - 1
    assert store.get_file(expiring).expires_at == NOW + DAY and store.expire_files() == 0
    clock.now += 1
    with pytest.raises(NoSuchFile):
        store.open_file(expiring)
    assert [file.id for file in store.list_files().items] == [kept]
    assert store.expire_files() == 1 and store.expire_files() == 0


def test_a_batch_goes_its_way_with_its_times_counts_and_usage(store, clock):
    batch = make_batch(store, 5, metadata={"a": "ü"}, output_expires_after=3600)
    assert (batch.status, batch.num_total, batch.expires_at) == ("validating", 0, NOW + DAY)
    assert batch.metadata == {"a": "ü"} and batch.completion_window == "24h" and not batch.is_final
    clock.now += 1
    batch = store.start_batch(batch.id, spans(store, batch.id), model="m")
    assert (batch.status, batch.num_total, batch.num_pending, batch.model) == ("in_progress", 5, 5, "m")
    for row in store.pending_rows(batch.id):
        batch = store.record_results(batch.id, [answer(store, batch.id, row)])
    assert (batch.num_completed, batch.num_failed, batch.num_pending) == (4, 1, 0)
    assert batch.usage == Usage(28, 12, 20, 4) and batch.output_file_id is None
    clock.now += 1
    assert store.start_finalizing(batch.id).status == "finalizing"
    clock.now += 1
    batch = store.finish_batch(batch.id, "completed")
    assert (batch.in_progress_at, batch.finalizing_at, batch.completed_at) == (NOW + 1, NOW + 2, NOW + 3)
    assert (batch.cancelling_at, batch.cancelled_at, batch.failed_at, batch.expired_at) == (None,) * 4
    assert store.get_batch(batch.id) == batch and batch.is_final
    check_results(store, batch)
    output = store.get_file(batch.output_file_id)
    assert (output.filename, output.purpose) == (f"{batch.id}_output.jsonl", "batch_output")
    assert (output.created_at, output.expires_at) == (NOW + 3, NOW + 3 + 3600)
    assert store.finish_batch(batch.id, "completed") == batch, "a second call changes nothing"


def test_a_result_file_without_lines_is_not_made(store):
    batch = start(store, 1)
    store.record_results(batch.id, [RowResult(0, "failed", b'{"custom_id": "request-0", "outcome": "failed"}')])
    store.start_finalizing(batch.id)
    batch = store.finish_batch(batch.id, "completed")
    assert batch.output_file_id is None and len(lines_of(store, batch.error_file_id)) == 1


def test_rows_come_in_the_order_given_with_their_bytes(store):
    batch = make_batch(store, 7)
    order = spans(store, batch.id)[::-2]
    store.start_batch(batch.id, iter(order), model=None)
    rows = store.pending_rows(batch.id, limit=3) + store.pending_rows(batch.id, after=2, limit=3)
    assert [row.span for row in rows] == order and [row.position for row in rows] == [0, 1, 2, 3]
    assert [store.read_row(batch.id, row.span) for row in rows] == [input_line(n) for n in (6, 4, 2, 0)]
    store.record_results(batch.id, [answer(store, batch.id, rows[1])])
    assert [row.position for row in store.pending_rows(batch.id)] == [0, 2, 3]
    assert [row.position for row in store.pending_rows(batch.id, after=0, limit=1)] == [2]


def test_rows_that_cannot_be_read_to_the_end_start_nothing(store):
    batch = make_batch(store, 3)

    def broken():
        yield spans(store, batch.id)[0]
        raise KeyError

    with pytest.raises(KeyError):
        store.start_batch(batch.id, broken(), model="m")
    assert store.get_batch(batch.id) == batch and store.pending_rows(batch.id) == ()
    assert store.start_batch(batch.id, spans(store, batch.id), model="m").num_total == 3


def test_the_first_result_of_a_row_counts(store):
    batch = start(store, 3)
    row = store.pending_rows(batch.id)[0]
    first, second = answer(store, batch.id, row, "completed"), answer(store, batch.id, row, "failed")
    assert store.record_results(batch.id, [first, second]).num_failed == 0
    assert store.record_results(batch.id, [second]).num_failed == 0
    with pytest.raises(ValueError, match="not one line"):
        store.record_results(batch.id, [RowResult(1, "completed", b"a\nb")])
    assert store.record_results(batch.id, [RowResult(99, "completed", b"no such row")]).num_completed == 1


def test_a_running_batch_keeps_the_input_that_is_deleted(store):
    batch = make_batch(store, 4)
    store.delete_file(batch.input_file_id)
    batch = store.start_batch(batch.id, spans(store, batch.id), model="m")
    results = [answer(store, batch.id, row) for row in store.pending_rows(batch.id)]
    assert store.record_results(batch.id, results).num_pending == 0
    store.start_finalizing(batch.id)
    check_results(store, store.finish_batch(batch.id, "completed"))


def test_a_batch_may_be_born_failed(store):
    error = BatchError("invalid_request", "Cannot find file file-x", "input_file_id", 3)
    batch = store.create_batch(endpoint="/v1/completions", input_file_id="file-x", errors=[error])
    assert (batch.status, batch.failed_at, batch.errors) == ("failed", NOW, (error,))
    assert store.active_batches() == () and store.list_batches().items == (batch,)


def test_batches_are_listed_newest_first_in_pages(store):
    ids = [make_batch(store, 1).id for _ in range(4)]
    page = store.list_batches(limit=3)
    assert [batch.id for batch in page.items] == ids[:0:-1] and page.has_more
    page = store.list_batches(limit=3, after=ids[1])
    assert [batch.id for batch in page.items] == ids[:1] and not page.has_more
    assert [batch.id for batch in store.active_batches()] == ids


def test_cancel_keeps_what_was_done_and_accounts_for_the_rest(store, clock):
    batch = start(store, 6)
    rows = store.pending_rows(batch.id)
    store.record_results(batch.id, [answer(store, batch.id, row) for row in rows[:3]])
    clock.now += 5
    batch = store.cancel_batch(batch.id)
    assert (batch.status, batch.cancelling_at) == ("cancelling", NOW + 5)
    clock.now += 5
    assert store.cancel_batch(batch.id) == batch, "a second cancel changes nothing"
    with pytest.raises(WrongStatus, match="while 3 rows are pending"):
        store.finish_batch(batch.id, "cancelled")
    store.record_results(batch.id, [answer(store, batch.id, rows[3])])  # was running when the cancel came
    store.record_results(batch.id, [answer(store, batch.id, row, "unexecuted") for row in rows[4:]])
    batch = store.finish_batch(batch.id, "cancelled")
    assert (batch.num_completed, batch.num_failed, batch.num_unexecuted) == (3, 1, 2)
    assert batch.cancelled_at == NOW + 10 and store.cancel_batch(batch.id) == batch
    check_results(store, batch)


def test_cancel_wins_over_validation_and_over_the_last_row(store):
    batch = make_batch(store, 2)
    store.cancel_batch(batch.id)
    with pytest.raises(WrongStatus, match="is cancelling; it cannot start"):
        store.start_batch(batch.id, spans(store, batch.id), model="m")
    assert store.finish_batch(batch.id, "cancelled").num_total == 0
    batch = start(store, 1)
    store.record_results(batch.id, [answer(store, batch.id, store.pending_rows(batch.id)[0])])
    store.start_finalizing(batch.id)
    store.cancel_batch(batch.id)
    with pytest.raises(WrongStatus) as caught:
        store.finish_batch(batch.id, "completed")
    assert caught.value.batch.status == "cancelling"
    batch = store.finish_batch(batch.id, "cancelled")
    assert batch.num_completed == 1 and batch.output_file_id


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_a_final_batch_never_moves(store, status):
    batch = start(store, 1)
    if status == "failed":
        final = store.fail_batch(batch.id, [BatchError("code", "message")])
    else:
        outcome = "completed" if status == "completed" else "unexecuted"
        store.record_results(batch.id, [answer(store, batch.id, store.pending_rows(batch.id)[0], outcome)])
        if status == "completed":
            store.start_finalizing(batch.id)
        if status == "cancelled":
            store.cancel_batch(batch.id)
        final = store.finish_batch(batch.id, status)
    check_results(store, final)
    others = {"completed", "expired", "cancelled"} - {status}
    calls: list[Callable[[], object]] = [
        *(partial(store.finish_batch, batch.id, other) for other in others),
        lambda: store.start_batch(batch.id, [], model="m"),
        lambda: store.start_finalizing(batch.id),
        lambda: store.record_results(batch.id, [RowResult(0, "completed", b"{}")]),
        lambda: store.open_input(batch.id),
        lambda: store.read_row(batch.id, RowSpan(1, 0, 1)),
    ]
    if status != "failed":
        calls.append(lambda: store.fail_batch(batch.id, []))
    if status != "cancelled":
        calls.append(lambda: store.cancel_batch(batch.id))
    for call in calls:
        with pytest.raises(WrongStatus):
            call()
    assert store.get_batch(batch.id) == final


def test_a_failed_batch_publishes_what_it_has(store):
    batch = start(store, 6)
    rows = store.pending_rows(batch.id)
    store.record_results(batch.id, [answer(store, batch.id, row) for row in rows[:3]])
    error = BatchError("storage_full", "No space left.")
    batch = store.fail_batch(batch.id, [error])
    assert (batch.status, batch.errors, batch.num_pending) == ("failed", (error,), 3)
    assert len(lines_of(store, batch.output_file_id)) == 2 and len(lines_of(store, batch.error_file_id)) == 1
    assert store.fail_batch(batch.id, []) == batch, "a second call changes nothing"


def test_finishing_waits_for_every_row(store):
    batch = start(store, 2)
    with pytest.raises(WrongStatus, match="finalizing while 2 rows are pending"):
        store.start_finalizing(batch.id)
    with pytest.raises(WrongStatus):
        store.finish_batch(batch.id, "completed")
    with pytest.raises(WrongStatus, match="expired while 2 rows"):
        store.finish_batch(batch.id, "expired")
    store.record_results(batch.id, [answer(store, batch.id, row, "unexecuted") for row in store.pending_rows(batch.id)])
    assert store.finish_batch(batch.id, "expired").expired_at == NOW


def test_a_reopened_store_knows_everything(tmp_path):
    first = quick_store(tmp_path / "store")
    first.recover()
    done, running = start(first, 3), start(first, 3)
    first.fail_batch(done.id, [BatchError("a", "b", line=1)])
    first.record_results(running.id, [answer(first, running.id, first.pending_rows(running.id)[0])])
    before = first.list_batches(), first.list_files(), first.pending_rows(running.id)
    first.close()
    second = quick_store(tmp_path / "store")
    assert [batch.id for batch in second.recover()] == [running.id]
    assert before == (second.list_batches(), second.list_files(), second.pending_rows(running.id))
    second.close()


def test_one_process_owns_a_store(tmp_path):
    code = (
        "import sys; from jaxserve.store.sqlite import SQLiteStore; SQLiteStore(sys.argv[1]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=f"in use by process {other.pid}; .*--file-storage-path"):
            SQLiteStore(tmp_path / "store")
        other.kill()
        other.wait()
    store = SQLiteStore(tmp_path / "store")
    with pytest.raises(StoreLocked):
        SQLiteStore(tmp_path / "store")
    store.close()
    SQLiteStore(tmp_path / "store").close()


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    store = quick_store(tmp_path / "store")
    assert store._db.one("PRAGMA user_version") == (len(MIGRATIONS),)
    store._db.run("PRAGMA user_version = 1000")
    store.close()
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(StoreError, match="has schema 1000, made by a newer jaxserve"):
            quick_store(tmp_path / "store")


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        SQLiteStore(tmp_path / "file")


def test_recover_touches_nothing_that_is_not_the_stores(tmp_path):
    store = quick_store(tmp_path / "store")
    own = store.folder.files / "notes.txt"
    own.write_text("mine")
    stray = store.folder.of_file("file-" + "a" * 32)
    stray.write_text("left by a crash")
    store.recover()
    assert own.read_text() == "mine" and not stray.exists()
    store.close()


def test_a_batch_whose_bytes_were_lost_fails_and_the_others_go_on(tmp_path):
    store = quick_store(tmp_path / "store")
    store.recover()
    hurt, well = start(store, 3), start(store, 3)
    for batch in (hurt, well):
        store.record_results(batch.id, [answer(store, batch.id, row) for row in store.pending_rows(batch.id)])
    store.folder.of_batch(hurt.id, "error.jsonl").write_bytes(b"")
    store.close()
    store = quick_store(tmp_path / "store")
    assert [batch.id for batch in store.recover()] == [well.id]
    assert store.get_batch(hurt.id).errors[0].code == "storage_error"
    assert len(lines_of(store, store.get_batch(hurt.id).output_file_id)) == 2
    store.start_finalizing(well.id)
    check_results(store, store.finish_batch(well.id, "completed"))
    store.close()


def test_usage_adds_up():
    assert Usage(1, 2, 3, 4) + USAGE == Usage(8, 5, 8, 5)


def test_calls_of_many_threads_do_not_mix(store):
    batch = start(store, 60)
    rows = store.pending_rows(batch.id)

    def work(number: int) -> None:
        for row in rows[number::3]:  # every row from two threads
            store.record_results(batch.id, [answer(store, batch.id, row)])
            assert store.get_batch(batch.id).num_total == 60
            upload(store, [b"%d" % number])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, (0, 1, 2, 0, 1, 2)))
    store.start_finalizing(batch.id)
    batch = store.finish_batch(batch.id, "completed")
    check_results(store, batch)
    assert (batch.num_completed, batch.num_failed) == (40, 20) and len(store.list_files().items) == 123


MEMORY = """
import resource, sys, threading, time
from jaxserve.store import RowResult, RowSpan, Usage
from jaxserve.store.sqlite import SQLiteStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.01)

store = SQLiteStore(sys.argv[1])
store.recover()
num_lines, line = 50_000, b'{"custom_id": "%06d", "body": "' + b"x" * 3960 + b'"}\\n'
start = resident()
threading.Thread(target=watch).start()
with store.start_upload("input.jsonl", "batch") as upload:
    for first in range(0, num_lines, 100):
        upload.write(b"".join(line % number for number in range(first, first + 100)))
    file = upload.commit()
batch = store.create_batch(endpoint="/v1/completions", input_file_id=file.id)
def spans():
    offset = 0
    with store.open_input(batch.id) as lines:
        for number, each in enumerate(lines, 1):
            yield RowSpan(number, offset, len(each))
            offset += len(each)
store.start_batch(batch.id, spans(), model="m")
after = -1
while rows := store.pending_rows(batch.id, after=after):
    after = rows[-1].position
    results = [RowResult(r.position, "completed", store.read_row(batch.id, r.span)[:-1], Usage(1)) for r in rows]
    batch = store.record_results(batch.id, results)
store.start_finalizing(batch.id)
batch = store.finish_batch(batch.id, "completed")
done = True
with store.open_file(file.id) as a, store.open_file(batch.output_file_id) as b:
    while left := a.read(1 << 20):
        assert left == b.read(1 << 20)
print(file.num_bytes, batch.num_completed, peak - start)
"""


@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_file(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_bytes, num_completed, growth = map(int, done.stdout.split())
    print(f"{num_bytes / 1e6:.0f} MB, grew by {growth / 1e6:.1f} MB")
    assert num_completed == 50_000 and num_bytes > 199e6 and growth < 50e6


def test_claimed_rows_are_given_out_once_until_they_are_released(store):
    batch = start(store, 7)
    assert [row.position for row in store.claim_rows(batch.id, limit=3)] == [0, 1, 2]
    rows = store.claim_rows(batch.id, limit=3)
    assert [row.position for row in rows] == [3, 4, 5]
    store.record_results(batch.id, [answer(store, batch.id, row) for row in rows])
    store.release_rows(batch.id)
    assert [row.position for row in store.claim_rows(batch.id, limit=9)] == [0, 1, 2, 6]
    assert store.claim_rows(batch.id, limit=9) == () and len(store.pending_rows(batch.id)) == 4
    with pytest.raises(NoSuchBatch):
        store.claim_rows("batch_none", limit=1)
