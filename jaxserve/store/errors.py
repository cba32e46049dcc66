"""The system's errors in the store's words."""

import os
import sqlite3
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from jaxserve.store import StoreError, StoreFull
from jaxserve.store.disk import FULL_ERRNOS

PRIMARY_CODE = 0xFF  # of SQLite's extended result codes
PROBE_BYTES = 1 << 16  # more than a page of the database or its log


@contextmanager
def translating(path: Path) -> Generator[None, None, None]:
    """OSError and sqlite3.Error inside become StoreFull or StoreError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if _is_full(error, path):
            message = f"no space left for {path} ({error}); free some, or choose another --file-storage-path"
            raise StoreFull(message) from error
        raise StoreError(f"the store in {path} failed: {error}") from error


def _is_full(error: OSError | sqlite3.Error, path: Path) -> bool:
    """SQLite knows ENOSPC only and calls a used-up quota an I/O error: then the folder itself is asked."""
    if isinstance(error, OSError):
        return error.errno in FULL_ERRNOS
    code = getattr(error, "sqlite_errorcode", None) or 0
    return code == sqlite3.SQLITE_FULL or (code & PRIMARY_CODE == sqlite3.SQLITE_IOERR and not _takes_bytes(path))


def _takes_bytes(path: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in FULL_ERRNOS
    return True
