"""One SQLite connection: durable transactions, numbered migrations, and its errors in the store's words."""

import sqlite3
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxserve.store import StoreError

Connect = Callable[[str], sqlite3.Connection]

# Migration n brings version n to n + 1. Never change one that was released: add the next.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE files (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL,
            num_bytes INTEGER NOT NULL,
            created_at INTEGER NOT NULL,
            expires_at INTEGER
        )""",
        """CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL""",
        """CREATE TABLE batches (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            endpoint TEXT NOT NULL,
            input_file_id TEXT NOT NULL,
            completion_window TEXT NOT NULL,
            status TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            expires_at INTEGER NOT NULL,
            model TEXT,
            in_progress_at INTEGER,
            finalizing_at INTEGER,
            completed_at INTEGER,
            failed_at INTEGER,
            expired_at INTEGER,
            cancelling_at INTEGER,
            cancelled_at INTEGER,
            output_file_id TEXT,
            error_file_id TEXT,
            num_total INTEGER NOT NULL DEFAULT 0,
            num_completed INTEGER NOT NULL DEFAULT 0,
            num_failed INTEGER NOT NULL DEFAULT 0,
            num_unexecuted INTEGER NOT NULL DEFAULT 0,
            input_tokens INTEGER NOT NULL DEFAULT 0,
            cached_tokens INTEGER NOT NULL DEFAULT 0,
            output_tokens INTEGER NOT NULL DEFAULT 0,
            reasoning_tokens INTEGER NOT NULL DEFAULT 0,
            errors TEXT NOT NULL DEFAULT '[]',
            metadata TEXT,
            output_expires_after INTEGER,
            num_output_bytes INTEGER NOT NULL DEFAULT 0,
            num_error_bytes INTEGER NOT NULL DEFAULT 0
        )""",
        """CREATE INDEX batches_by_status ON batches (status)""",
        """CREATE TABLE batch_rows (
            batch INTEGER NOT NULL,
            position INTEGER NOT NULL,
            line INTEGER NOT NULL,
            offset INTEGER NOT NULL,
            num_bytes INTEGER NOT NULL,
            outcome TEXT,
            PRIMARY KEY (batch, position)
        ) WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE responses (
            id TEXT NOT NULL PRIMARY KEY,
            created_at INTEGER NOT NULL,
            expires_at INTEGER NOT NULL,
            body BLOB NOT NULL,
            input_items BLOB NOT NULL
        )""",
        """CREATE INDEX responses_expiring ON responses (expires_at)""",
        """CREATE TABLE response_items (
            id TEXT NOT NULL PRIMARY KEY,
            response TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE INDEX response_items_of ON response_items (response)""",
    ),
)


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


class Database:
    """Implements `queries.Queries` for SQLite. Raises sqlite3.Error as it comes."""

    def __init__(self, path: Path, connect: Connect = connect) -> None:
        self.connection = connect(str(path))
        try:
            # Alone, the log's index can live in memory: nothing to allocate when a full disk is opened.
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Where the file system cannot do WAL, SQLite keeps its rollback journal, which is as durable and slower.
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except BaseException:
            self.connection.close()
            raise

    def _migrate(self, path: Path) -> None:
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{path} has schema {version}, made by a newer jaxserve; this one knows up to {len(MIGRATIONS)}. "
                "Upgrade jaxserve or choose another --file-storage-path."
            )
        for number in range(version, len(MIGRATIONS)):
            with self.transaction():
                for statement in MIGRATIONS[number]:
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA user_version = {number + 1}")

    @contextmanager
    def transaction(self) -> Generator[None, None, None]:
        """All statements inside happen, durably, when the block ends; none when it raises."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # some errors (disk full) have rolled back by themselves
                self.connection.execute("ROLLBACK")
            raise

    def one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        return self.connection.execute(sql, _storable(values)).fetchone()

    def all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, _storable(values)).fetchall()

    def run(self, sql: str, *values: Any) -> int:
        """The number of rows it changed."""
        return self.connection.execute(sql, _storable(values)).rowcount

    def run_many(self, sql: str, many: Iterable[Sequence[Any]]) -> int:
        """The number of rows that all of them changed."""
        return self.connection.executemany(sql, many).rowcount

    def close(self) -> None:
        self.connection.close()


def storable(text: str) -> str:
    """JSON can carry half of a surrogate pair, UTF-8 cannot: `?` in its place."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _storable(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(storable(value) if isinstance(value, str) else value for value in values)
