"""The SQL that the stores share, over a `Queries` in whose dialect `?` stands for a value.

seq is a record's own number: what refers to it, and the order in which it was made.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from jaxserve.store import (
    ACTIVE,
    STATUS_AFTER,
    Batch,
    BatchPage,
    BatchStatus,
    FilePage,
    NoSuchBatch,
    NoSuchFile,
    Row,
    RowResult,
    RowSpan,
    StoredFile,
    Usage,
    WrongStatus,
)
from jaxserve.store.records import BATCH_COLUMNS, FILE_COLUMNS, batch_from, file_from, usage_values

ACTIVE_SQL = f"status IN ({', '.join(repr(status) for status in sorted(ACTIVE))})"
DELETE_DONE_ROWS = f"DELETE FROM batch_rows WHERE batch NOT IN (SELECT seq FROM batches WHERE {ACTIVE_SQL})"
MOST_VALUES = 1000  # in one statement
_UNEXPIRED = "(expires_at IS NULL OR expires_at > ?)"


class Queries(Protocol):
    """One connection to a database, for one thread at a time. Raises the database's own errors."""

    def one(self, sql: str, *values: Any) -> tuple[Any, ...] | None: ...

    def all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]: ...

    def run(self, sql: str, *values: Any) -> int:
        """The number of rows it changed."""
        ...

    def run_many(self, sql: str, many: Iterable[Sequence[Any]]) -> int:
        """The number of rows all of them changed."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """All statements inside happen, durably, when the block ends (or the one around it); none when it raises."""
        ...


def insert(db: Queries, table: str, columns: Mapping[str, Any]) -> None:
    sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    db.run(sql, *columns.values())


# Files


def get_file(db: Queries, file_id: str, now: int) -> StoredFile:
    """Raises NoSuchFile."""
    row = db.one(f"SELECT {FILE_COLUMNS} FROM files WHERE id = ? AND {_UNEXPIRED}", file_id, now)
    if row is None:
        raise NoSuchFile(file_id)
    return file_from(row)


def list_files(
    db: Queries, now: int, *, after: str | None, limit: int, order: Literal["asc", "desc"], purpose: str | None
) -> FilePage:
    """Raises NoSuchFile when `after` is unknown."""
    where, values = [_UNEXPIRED], [now]
    if purpose is not None:
        where, values = [*where, "purpose = ?"], [*values, purpose]
    if after is not None:
        row = db.one("SELECT seq FROM files WHERE id = ?", after)
        if row is None:
            raise NoSuchFile(after)
        where, values = [*where, f"seq {'>' if order == 'asc' else '<'} ?"], [*values, row[0]]
    sql = f"SELECT {FILE_COLUMNS} FROM files WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"
    rows = db.all(sql, *values, limit + 1)
    return FilePage(tuple(file_from(row) for row in rows[:limit]), len(rows) > limit)


def expired_files(db: Queries, now: int) -> list[str]:
    return [file_id for (file_id,) in db.all("SELECT id FROM files WHERE expires_at <= ?", now)]


def insert_file(db: Queries, file: StoredFile, **columns: Any) -> None:
    values = (file.id, file.filename, file.purpose, file.num_bytes, file.created_at, file.expires_at)
    insert(db, "files", dict(zip(FILE_COLUMNS.split(", "), values, strict=True)) | columns)


# Batches


def get_batch(db: Queries, batch_id: str) -> Batch:
    """Raises NoSuchBatch."""
    row = db.one(f"SELECT {BATCH_COLUMNS} FROM batches WHERE id = ?", batch_id)
    if row is None:
        raise NoSuchBatch(batch_id)
    return batch_from(row)


def active_batch(db: Queries, batch_id: str, wanted: str) -> Batch:
    """Raises NoSuchBatch, WrongStatus in final states."""
    batch = get_batch(db, batch_id)
    if batch.is_final:
        raise WrongStatus(batch, wanted)
    return batch


def seq_of(db: Queries, batch_id: str) -> int:
    """Raises NoSuchBatch."""
    row = db.one("SELECT seq FROM batches WHERE id = ?", batch_id)
    if row is None:
        raise NoSuchBatch(batch_id)
    return row[0]


def list_batches(db: Queries, *, after: str | None, limit: int) -> BatchPage:
    """Raises NoSuchBatch when `after` is unknown."""
    before = seq_of(db, after) if after is not None else 1 << 62
    sql = f"SELECT {BATCH_COLUMNS} FROM batches WHERE seq < ? ORDER BY seq DESC LIMIT ?"
    rows = db.all(sql, before, limit + 1)
    return BatchPage(tuple(batch_from(row) for row in rows[:limit]), len(rows) > limit)


def active_batches(db: Queries, where: str = ACTIVE_SQL, *values: Any) -> tuple[Batch, ...]:
    rows = db.all(f"SELECT {BATCH_COLUMNS} FROM batches WHERE {where} ORDER BY seq", *values)
    return tuple(batch_from(row) for row in rows)


def move(db: Queries, batch: Batch, status: BatchStatus, now: int, **columns: Any) -> None:
    """Compare and swap: the batch as it was read -> status, with its time and these columns. In a transaction."""
    if status not in STATUS_AFTER[batch.status]:
        raise WrongStatus(batch, f"become {status}")
    columns = {"status": status, f"{status}_at": now, **columns}
    assignments = ", ".join(f"{name} = ?" for name in columns)
    sql = f"UPDATE batches SET {assignments} WHERE id = ? AND status = ?"
    if db.run(sql, *columns.values(), batch.id, batch.status) != 1:
        raise WrongStatus(get_batch(db, batch.id), f"become {status}")


def step(db: Queries, batch: Batch, status: BatchStatus, done: tuple[BatchStatus, ...], now: int) -> Batch:
    """The batch moved to status, or as it is where its status is among done. Raises WrongStatus."""
    if batch.status in done:
        return batch
    if status == "finalizing" and batch.num_pending:
        raise WrongStatus(batch, f"be finalizing while {batch.num_pending} rows are pending")
    with db.transaction():
        move(db, batch, status, now)
    return get_batch(db, batch.id)


def check_end(batch: Batch, status: BatchStatus) -> None:
    """Raises WrongStatus unless the batch can come to this end now."""
    if status not in STATUS_AFTER[batch.status]:
        raise WrongStatus(batch, f"become {status}")
    if batch.num_pending:
        raise WrongStatus(batch, f"become {status} while {batch.num_pending} rows are pending")


# Rows


def pending_rows(db: Queries, seq: int, after: int, limit: int) -> tuple[Row, ...]:
    sql = (
        'SELECT position, line, "offset", num_bytes FROM batch_rows '
        "WHERE batch = ? AND position > ? AND outcome IS NULL ORDER BY position LIMIT ?"
    )
    return tuple(Row(position, RowSpan(*span)) for position, *span in db.all(sql, seq, after, limit))


def check_lines(batch_id: str, results: Sequence[RowResult]) -> None:
    """Raises ValueError: a result is one line."""
    for result in results:
        if b"\n" in result.line:
            raise ValueError(f"the result of row {result.position} of batch {batch_id} is not one line")


def first_results(db: Queries, seq: int, results: Sequence[RowResult]) -> list[RowResult]:
    """Those whose row has none yet, each row's first."""
    first: dict[int, RowResult] = {}
    for result in results:
        first.setdefault(result.position, result)
    positions, pending = list(first), set[int]()
    for start in range(0, len(positions), MOST_VALUES):
        some = positions[start : start + MOST_VALUES]
        sql = (
            "SELECT position FROM batch_rows WHERE batch = ? AND outcome IS NULL "
            f"AND position IN ({', '.join('?' * len(some))})"
        )
        pending |= {position for (position,) in db.all(sql, seq, *some)}
    return [result for position, result in first.items() if position in pending]


def lines_for(results: Sequence[RowResult]) -> tuple[bytes, bytes]:
    """What the output and the error file grow by."""
    output = b"".join(each.line + b"\n" for each in results if each.outcome == "completed")
    error = b"".join(each.line + b"\n" for each in results if each.outcome != "completed")
    return output, error


def counted_bytes(db: Queries, seq: int) -> tuple[int, int]:
    """How much of the output and of the error file counts."""
    row = db.one("SELECT num_output_bytes, num_error_bytes FROM batches WHERE seq = ?", seq)
    return (row[0], row[1]) if row else (0, 0)


def count_results(db: Queries, seq: int, results: Sequence[RowResult], output: bytes, error: bytes) -> bool:
    """Records what became of rows, and how far their lines make the files count; in a transaction. False when one of
    the rows has a result already: nothing of this may stay then."""
    usage = sum((each.usage for each in results), Usage())
    counts = [sum(each.outcome == kind for each in results) for kind in ("completed", "failed", "unexecuted")]
    sql = "UPDATE batch_rows SET outcome = ? WHERE batch = ? AND position = ? AND outcome IS NULL"
    if db.run_many(sql, [(each.outcome, seq, each.position) for each in results]) != len(results):
        return False
    sql = (
        "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ?, "
        "num_unexecuted = num_unexecuted + ?, num_output_bytes = num_output_bytes + ?, "
        "num_error_bytes = num_error_bytes + ?, input_tokens = input_tokens + ?, "
        "cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?, "
        "reasoning_tokens = reasoning_tokens + ? WHERE seq = ?"
    )
    db.run(sql, *counts, len(output), len(error), *usage_values(usage), seq)
    return True
