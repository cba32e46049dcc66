"""Stored replies of /v1/responses in the store's database: each is one row that stands alone, so that deleting one
never breaks a conversation that went on from it."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from jaxserve.store import NoSuchResponse, StoredResponse
from jaxserve.store.queries import Queries

LEVEL = 1  # of zlib: conversations are repeated in every turn's row, and shrink to a quarter


class Responses:
    """Implements `jaxserve.store.ResponseStore`.

    session: a connection for one call, errors in the store's words. despite_full: an action that a full disk shall not
    stop.
    """

    def __init__(
        self,
        session: Callable[[], AbstractContextManager[Queries]],
        despite_full: Callable[[Callable[[], int]], int],
        now: Callable[[], int],
    ) -> None:
        self._session, self._despite_full, self._now = session, despite_full, now

    def put(self, responses: Sequence[StoredResponse]) -> None:
        rows = [
            (each, zlib.compress(each.body, LEVEL), zlib.compress(each.input_items, LEVEL)) for each in responses
        ]  # outside of the lock
        with self._session() as db, db.transaction():
            for each, body, items in rows:
                sql = "INSERT INTO responses (id, created_at, expires_at, body, input_items) VALUES (?, ?, ?, ?, ?)"
                db.run(sql, each.id, each.created_at, each.expires_at, body, items)
                for item_id in each.item_ids:
                    db.run("INSERT INTO response_items (id, response) VALUES (?, ?)", item_id, each.id)

    def get(self, response_id: str) -> StoredResponse:
        return self._one("r.id = ?", response_id)

    def with_item(self, item_id: str) -> StoredResponse:
        return self._one("r.id = (SELECT response FROM response_items WHERE id = ?)", item_id)

    def _one(self, where: str, value: str) -> StoredResponse:
        sql = f"SELECT id, body, input_items, created_at, expires_at FROM responses r WHERE {where} AND expires_at > ?"
        with self._session() as db:
            row = db.one(sql, value, self._now())
        if row is None:
            raise NoSuchResponse(value)
        response_id, body, items, created_at, expires_at = row
        return StoredResponse(response_id, zlib.decompress(body), zlib.decompress(items), created_at, expires_at)

    def delete(self, response_id: str) -> None:
        with self._session() as db:
            if db.one("SELECT 1 FROM responses WHERE id = ? AND expires_at > ?", response_id, self._now()) is None:
                raise NoSuchResponse(response_id)
            self._despite_full(lambda: _remove(db, "id = ?", response_id))

    def expire(self) -> int:
        with self._session() as db:
            now = self._now()
            if db.one("SELECT 1 FROM responses WHERE expires_at <= ? LIMIT 1", now) is None:
                return 0
            return self._despite_full(lambda: _remove(db, "expires_at <= ?", now))


def _remove(db: Queries, where: str, value: str | int) -> int:
    with db.transaction():
        selected = f"response IN (SELECT id FROM responses WHERE {where})"
        db.run(f"DELETE FROM response_items WHERE {selected}", value)
        return db.run(f"DELETE FROM responses WHERE {where}", value)
