"""One batch queue for many processes: what they claim, what becomes of it when one dies, two servers that share it."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg_pool", reason="psycopg is not installed (pip install 'jaxserve[postgres]')")

import httpx2
import psycopg

from jaxserve.store import RowResult, StoreError, WrongStatus
from jaxserve.store.postgres import PostgresStore
from jaxserve.store.postgres.database import MIGRATIONS
from tests.batch_inputs import jsonl, upload
from tests.postgres import PostgresServer
from tests.stores import answer, check_results, lines_of, make_batch, spans, start
from tests.test_batches_crash import Site, request_line
from tests.test_batches_crash import check_results as check_served

LEASE = 0.4  # seconds


@pytest.fixture
def fleet(postgres: PostgresServer) -> Iterator[list[PostgresStore]]:
    url = postgres.new_database()
    stores = [PostgresStore(url, lease_seconds=LEASE) for _ in range(2)]
    for store in stores:
        store.recover()
    yield stores
    for store in stores:
        store.close()


def die(store: PostgresStore) -> None:
    """What the others see of a process that is killed: it says nothing any more."""
    store.keep_alive = lambda: None  # ty: ignore[invalid-assignment]
    time.sleep(LEASE * 1.1)


def claim(store: PostgresStore, batch_id: str, limit: int) -> list[int]:
    store.keep_alive()
    return [row.position for row in store.claim_rows(batch_id, limit=limit)]


def test_no_two_processes_run_the_same_row_and_a_dead_ones_rows_are_taken_over(fleet):
    first, second = fleet
    batch = start(first, 6)
    assert claim(first, batch.id, 2) == [0, 1] and claim(second, batch.id, 9) == [2, 3, 4, 5]
    assert claim(first, batch.id, 9) == []
    die(second)
    assert claim(first, batch.id, 9) == [2, 3, 4, 5]


def test_a_process_that_ends_in_order_gives_its_rows_back_at_once(fleet):
    first, second = fleet
    batch = start(first, 3)
    assert claim(first, batch.id, 9) == [0, 1, 2]
    first.keep_alive = lambda: None
    other = PostgresStore(first._db._pool.conninfo)  # a lease of 15 s
    other.recover()
    with first._db.session() as db:
        db.run("UPDATE batch_rows SET worker = ?", other.worker)
    other.close()
    assert claim(second, batch.id, 9) == [0, 1, 2]


def test_the_first_result_of_a_row_counts_whoever_brings_it(fleet):
    first, second = fleet
    batch = start(first, 2)
    (one, two), _ = first.claim_rows(batch.id, limit=2), die(first)
    late = [RowResult(row.position, "failed", b'{"late":1}') for row in (one, two)]
    second.record_results(batch.id, [answer(second, batch.id, one)])
    batch = first.record_results(batch.id, late)
    assert (batch.num_completed, batch.num_failed) == (1, 1)
    second.start_finalizing(batch.id)
    done = second.finish_batch(batch.id, "completed")
    assert first.finish_batch(batch.id, "completed") == done
    assert len(lines_of(first, done.output_file_id)) == len(lines_of(first, done.error_file_id)) == 1
    with pytest.raises(WrongStatus):
        first.record_results(batch.id, late)


def test_a_batch_is_validated_by_one_process_while_it_lives(fleet):
    first, second = fleet
    batch = make_batch(first, 2)
    assert [each.id for each in first.active_batches()] == [batch.id] and second.active_batches() == ()
    die(first)
    second.keep_alive()
    assert [each.id for each in second.active_batches()] == [batch.id] and first.active_batches() == ()
    second.start_batch(batch.id, spans(second, batch.id), model="m")
    assert [store.active_batches()[0].status for store in fleet] == ["in_progress"] * 2


@pytest.mark.timeout(120)
def test_many_processes_that_come_and_go_answer_every_row_once(fleet):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    url, batch = fleet[0]._db._pool.conninfo, start(fleet[0], 120)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(seed + number)
        try:
            while True:
                store = PostgresStore(url, lease_seconds=LEASE)
                deaths = rng.random()
                while True:
                    store.keep_alive()
                    rows = store.claim_rows(batch.id, limit=rng.randint(1, 5))
                    now = store.get_batch(batch.id)
                    if not rows and not now.num_pending:
                        return store.close()
                    time.sleep(rng.uniform(0, 0.02) if rows else 0.05)
                    if rows and rng.random() < 0.15 * deaths:
                        store._db.close()  # killed: it does not even say so
                        break
                    store.record_results(batch.id, [answer(store, batch.id, row) for row in rows])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    fleet[0].start_finalizing(batch.id)
    done = fleet[1].finish_batch(batch.id, "completed")
    assert (done.num_total, done.num_failed) == (120, 40)
    check_results(fleet[0], done)


def test_lost_connections_are_made_again(fleet, postgres):
    first, second = fleet
    batch = start(first, 2)
    with psycopg.connect(first._db._pool.conninfo, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'jaxserve'")
    assert first.get_batch(batch.id) == second.get_batch(batch.id) == batch


def test_bytes_that_nobody_refers_to_go_after_a_while(fleet):
    store = fleet[0]

    def num_contents() -> int:
        store.expire_files()
        with store._db.session() as db:
            return (db.one("SELECT count(*) FROM contents") or (0,))[0]

    batch = start(store, 3)
    assert num_contents() == 3
    store.delete_file(batch.input_file_id)
    store.record_results(batch.id, [answer(store, batch.id, row) for row in store.pending_rows(batch.id)])
    store.start_finalizing(batch.id)
    store.finish_batch(batch.id, "completed")
    broken = store.start_upload("a.jsonl", "batch")
    broken.write(b"x" * 3_000_000)
    assert num_contents() == 4, "somebody may be reading"
    with store._db.session() as db:
        db.run("UPDATE contents SET touched_at = now() - INTERVAL '1 day'")
    assert num_contents() == 2, "the two result files"
    with pytest.raises(StoreError):
        broken.commit()


def test_a_database_of_a_newer_version_or_none_is_refused(fleet, postgres):
    url = fleet[0]._db._pool.conninfo
    with fleet[0]._db.session() as db:
        db.run("UPDATE schema_version SET version = ?", len(MIGRATIONS) + 1)
    with pytest.raises(StoreError, match="made by a newer jaxserve"):
        PostgresStore(url)


@pytest.mark.timeout(300)
def test_two_servers_share_a_batch_and_one_goes_on_when_the_other_is_killed(tmp_path: Path, postgres: PostgresServer):
    url, rng = postgres.new_database(), random.Random(0)
    with Site(tmp_path / "a", rng, store=url) as first, Site(tmp_path / "b", rng, store=url) as second:
        for site in (first, second):
            site.start()
        for site in (first, second):
            site.wait_ready()
        assert "postgresql" not in fetch(first, "/get_server_info"), "an address may hold a password"
        file = upload(first.client, jsonl(request_line(number) for number in range(600)))
        options: Any = {"endpoint": "/v1/completions", "completion_window": "24h"}
        batch = first.client.batches.create(input_file_id=file.id, **options)
        while min(answered(site) for site in (first, second)) < 20:
            assert second.client.batches.retrieve(batch.id).status in ("validating", "in_progress")
            time.sleep(0.02)
        first.process.kill()
        first.process.wait()
        done = second.finish()
        assert done.id == batch.id and done.status == "completed"
        check_served(second, done, 600)

        first.start()
        first.wait_ready()
        batch = first.client.batches.create(input_file_id=file.id, **options)
        while min(answered(site) for site in (first, second)) < 20:
            time.sleep(0.02)
        assert second.client.batches.cancel(batch.id).status == "cancelling"
        cancelled = first.finish()
        assert cancelled.id == batch.id and cancelled.status == "cancelled"
        check_served(first, cancelled, 600)
        for site in (first, second):
            site.stop()


def fetch(site: Site, path: str) -> str:
    return httpx2.get(f"http://127.0.0.1:{site.port}{path}", trust_env=False).raise_for_status().text


def answered(site: Site) -> int:
    """Lines of batches that this server answered since its start."""
    wanted = "jaxserve:batch_requests_total{"
    lines = [line for line in fetch(site, "/metrics").splitlines() if line.startswith(wanted)]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if 'state="completed"' in line)
