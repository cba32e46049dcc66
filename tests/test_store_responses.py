"""Stored responses: durable, alone, gone when their time has come."""

import sqlite3
from contextlib import suppress

import pytest

from jaxserve.store import NoSuchResponse, StoredResponse, StoreFull
from jaxserve.store.database import MIGRATIONS
from jaxserve.store.sqlite import SQLiteStore
from tests.stores import NOW, Clock, Crash, FailingDisk, Faults, abandon, quick_store


def stored(number: int, expires_at: int = NOW + 100) -> StoredResponse:
    body, items = f'{{"number":{number}}}'.encode(), b'["\xc3\xa9"]' * 1000
    return StoredResponse(f"resp_{number}", body, items, NOW, expires_at, (f"msg_{number}", f"fc_{number}"))


def test_what_was_put_is_there_after_a_restart(tmp_path):
    store = SQLiteStore(tmp_path / "store", clock=lambda: NOW)
    store.responses.put([stored(1), stored(2)])
    store.close()
    store = SQLiteStore(tmp_path / "store", clock=lambda: NOW)
    store.recover()
    found = store.responses.get("resp_2")
    assert (found.body, found.input_items) == (stored(2).body, stored(2).input_items)
    assert (found.created_at, found.expires_at) == (NOW, NOW + 100)
    assert store.responses.with_item("fc_1").id == store.responses.with_item("msg_1").id == "resp_1"
    store.close()


def test_deleting_takes_the_items_along_and_leaves_the_others(tmp_path):
    store = quick_store(tmp_path / "store")
    store.responses.put([stored(1), stored(2)])
    store.responses.delete("resp_1")
    for missing in (lambda: store.responses.get("resp_1"), lambda: store.responses.with_item("msg_1")):
        with pytest.raises(NoSuchResponse):
            missing()
    with pytest.raises(NoSuchResponse):
        store.responses.delete("resp_1")
    assert store.responses.get("resp_2").id == "resp_2"
    assert store._db.one("SELECT count(*) FROM response_items") == (2,)


def test_expired_ones_are_invisible_then_removed(tmp_path):
    clock = Clock()
    store = quick_store(tmp_path / "store", clock=clock)
    store.responses.put([stored(1, NOW + 10), stored(2, NOW + 20)])
    assert store.responses.expire() == 0
    clock.now += 10
    with pytest.raises(NoSuchResponse):
        store.responses.get("resp_1")
    with pytest.raises(NoSuchResponse):
        store.responses.with_item("msg_1")
    assert store.responses.expire() == 1 and store.responses.get("resp_2").id == "resp_2"
    assert store._db.one("SELECT count(*) FROM responses") == (1,)


def test_a_failure_at_any_change_stores_all_or_nothing(tmp_path):
    for mode in ("once", "crash"):
        for at in range(1, 20):
            path = tmp_path / f"{mode}{at}"
            quick_store(path).close()
            faults = Faults()
            store = quick_store(path, faults, FailingDisk(faults))
            faults.at, faults.mode, faults.count = at, mode, 0
            with suppress(StoreFull, Crash):
                store.responses.put([stored(1), stored(2)])
            fired, faults.at = faults.fired, 0
            abandon(store)
            store = quick_store(path)
            count = store._db.one("SELECT count(*) FROM responses")
            assert count == ((0,) if fired else (2,)), (mode, at)
            store.close()
            if not fired:
                break
        else:
            raise AssertionError("the store makes more changes than this test reaches")


def test_a_store_from_before_responses_is_brought_up_to_date(tmp_path):
    path = tmp_path / "store"
    quick_store(path).close()
    (database,) = path.glob("*.sqlite*")
    with sqlite3.connect(database) as old:
        old.executescript("DROP TABLE responses; DROP TABLE response_items; PRAGMA user_version = 1")
    old.close()
    store = quick_store(path)
    store.responses.put([stored(1)])
    assert store.responses.get("resp_1") and store._db.one("PRAGMA user_version") == (len(MIGRATIONS),)
