"""Connections to PostgreSQL (psycopg 3): a pool of them, numbered migrations, and its errors in the store's words."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psycopg
import psycopg_pool

from jaxserve.store import StoreError, StoreFull

MAX_CONNECTIONS = 8  # two threads of the worker, six of asyncio's on two cores
WAIT_SECONDS = 10.0  # for a connection
MIGRATION_LOCK = 0x6A61_7873_6572_7665  # of pg_advisory_xact_lock: one process migrates at a time

# Migration n brings version n to n + 1. Never change one that was released: add the next.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Bytes that files and batches refer to; those that nobody does are removed some time after they were touched.
        """CREATE TABLE contents (
            id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            touched_at TIMESTAMPTZ NOT NULL DEFAULT now()
        )""",
        """CREATE TABLE pieces (
            content BIGINT NOT NULL REFERENCES contents ON DELETE CASCADE,
            first_byte BIGINT NOT NULL,
            bytes BYTEA NOT NULL,
            PRIMARY KEY (content, first_byte)
        )""",
        # Not compressed, so that a row's bytes are read without the rest of their piece.
        """ALTER TABLE pieces ALTER COLUMN bytes SET STORAGE EXTERNAL""",
        """CREATE TABLE files (
            seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL,
            num_bytes BIGINT NOT NULL,
            created_at BIGINT NOT NULL,
            expires_at BIGINT,
            content BIGINT NOT NULL REFERENCES contents
        )""",
        """CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL""",
        """CREATE INDEX files_of_content ON files (content)""",
        # The processes that share this; one whose time has passed has lost what it claimed.
        """CREATE TABLE workers (id TEXT PRIMARY KEY, alive_until TIMESTAMPTZ NOT NULL)""",
        """CREATE TABLE batches (
            seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            endpoint TEXT NOT NULL,
            input_file_id TEXT NOT NULL,
            completion_window TEXT NOT NULL,
            status TEXT NOT NULL,
            created_at BIGINT NOT NULL,
            expires_at BIGINT NOT NULL,
            model TEXT,
            in_progress_at BIGINT,
            finalizing_at BIGINT,
            completed_at BIGINT,
            failed_at BIGINT,
            expired_at BIGINT,
            cancelling_at BIGINT,
            cancelled_at BIGINT,
            output_file_id TEXT,
            error_file_id TEXT,
            num_total BIGINT NOT NULL DEFAULT 0,
            num_completed BIGINT NOT NULL DEFAULT 0,
            num_failed BIGINT NOT NULL DEFAULT 0,
            num_unexecuted BIGINT NOT NULL DEFAULT 0,
            input_tokens BIGINT NOT NULL DEFAULT 0,
            cached_tokens BIGINT NOT NULL DEFAULT 0,
            output_tokens BIGINT NOT NULL DEFAULT 0,
            reasoning_tokens BIGINT NOT NULL DEFAULT 0,
            errors TEXT NOT NULL DEFAULT '[]',
            metadata TEXT,
            output_expires_after BIGINT,
            num_output_bytes BIGINT NOT NULL DEFAULT 0,
            num_error_bytes BIGINT NOT NULL DEFAULT 0,
            input_content BIGINT REFERENCES contents,
            output_content BIGINT REFERENCES contents,
            error_content BIGINT REFERENCES contents,
            worker TEXT
        )""",
        """CREATE INDEX batches_active ON batches (seq)
            WHERE status IN ('cancelling', 'finalizing', 'in_progress', 'validating')""",
        """CREATE TABLE batch_rows (
            batch BIGINT NOT NULL,
            position BIGINT NOT NULL,
            line BIGINT NOT NULL,
            "offset" BIGINT NOT NULL,
            num_bytes BIGINT NOT NULL,
            outcome TEXT,
            worker TEXT,
            PRIMARY KEY (batch, position)
        )""",
        """CREATE INDEX batch_rows_pending ON batch_rows (batch, position) WHERE outcome IS NULL""",
        """CREATE TABLE responses (
            id TEXT PRIMARY KEY,
            created_at BIGINT NOT NULL,
            expires_at BIGINT NOT NULL,
            body BYTEA NOT NULL,
            input_items BYTEA NOT NULL
        )""",
        """CREATE INDEX responses_expiring ON responses (expires_at)""",
        """CREATE TABLE response_items (id TEXT PRIMARY KEY, response TEXT NOT NULL)""",
        """CREATE INDEX response_items_of ON response_items (response)""",
    ),
)


class Session:
    """Implements `queries.Queries`: one connection inside one transaction, which ends with its `with` block."""

    def __init__(self, connection: "psycopg.Connection[tuple[Any, ...]]") -> None:
        self.connection = connection

    def one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        return self.connection.execute(*_said(sql, values)).fetchone()

    def all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(*_said(sql, values)).fetchall()

    def run(self, sql: str, *values: Any) -> int:
        return self.connection.execute(*_said(sql, values)).rowcount

    def run_many(self, sql: str, many: Iterable[Sequence[Any]]) -> int:
        with self.connection.cursor() as cursor:
            cursor.executemany(*_said(sql, list(many)))
            return cursor.rowcount

    def copy(self, table: str, columns: str, rows: Iterable[Sequence[int]]) -> int:
        """Fills a table; the number of rows."""
        count = 0
        with self.connection.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as copy:
            for row in rows:
                copy.write_row(row)
                count += 1
        return count

    def transaction(self) -> AbstractContextManager[None]:
        return nullcontext()


def _said(sql: str, values: Sequence[Any]) -> tuple[bytes, Sequence[Any]]:
    """psycopg's own placeholders; and PostgreSQL's texts have no NUL."""
    return sql.replace("%", "%%").replace("?", "%s").encode(), [_storable(value) for value in values]


def _storable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_storable(each) for each in value)
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


class PostgresDatabase:
    """Raises StoreError, StoreFull."""

    def __init__(self, url: str) -> None:
        self._pool = psycopg_pool.ConnectionPool(
            url,
            min_size=1,
            max_size=MAX_CONNECTIONS,
            timeout=WAIT_SECONDS,
            open=False,
            check=psycopg_pool.ConnectionPool.check_connection,
            kwargs={"autocommit": True, "prepare_threshold": None, "application_name": "jaxserve"},
        )
        try:
            with translating():
                self._pool.open(wait=True, timeout=WAIT_SECONDS)
            self._migrate()
        except BaseException:
            self._pool.close()
            raise

    @contextmanager
    def session(self) -> Generator[Session, None, None]:
        """All that happens inside is one transaction, durable when the block ends, and undone when it raises."""
        with translating(), self._pool.connection() as connection, connection.transaction():
            yield Session(connection)

    def _migrate(self) -> None:
        with self.session() as db:
            db.one("SELECT pg_advisory_xact_lock(?)", MIGRATION_LOCK)
            db.run("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
            row = db.one("SELECT version FROM schema_version")
            version = row[0] if row else 0
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"the database has schema {version}, made by a newer jaxserve; this one knows up to "
                    f"{len(MIGRATIONS)}. Upgrade jaxserve or choose another --store."
                )
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    db.run(statement)
            if row is None:
                db.run("INSERT INTO schema_version VALUES (?)", len(MIGRATIONS))
            else:
                db.run("UPDATE schema_version SET version = ?", len(MIGRATIONS))

    def close(self) -> None:
        self._pool.close()


@contextmanager
def translating() -> Generator[None, None, None]:
    """psycopg's errors inside become StoreFull or StoreError."""
    try:
        yield
    except psycopg.errors.DiskFull as error:
        raise StoreFull(f"the database server has no space left ({error})") from error
    except psycopg.Error as error:
        raise StoreError(f"the database of --store failed: {error}") from error
