"""The system's errors in the store's words."""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from jaxserve.store import StoreError, StoreFull
from jaxserve.store.disk import FULL_ERRNOS


@contextmanager
def translating(path: Path) -> Generator[None, None, None]:
    """OSError and sqlite3.Error inside become StoreFull or StoreError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if _is_full(error):
            message = f"no space left for {path} ({error}); free some, or choose another --file-storage-path"
            raise StoreFull(message) from error
        raise StoreError(f"the store in {path} failed: {error}") from error


def _is_full(error: OSError | sqlite3.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_ERRNOS
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
