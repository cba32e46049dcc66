"""Where a store keeps its bytes, and the lock on it.

    lock                   held while a process uses the store
    store.sqlite3          the records (and -wal beside it)
    reserve                bytes to give up when the disk is full, so that a batch can fail and a file be deleted
    incoming/upload-…      uploads on their way; emptied by recover
    files/file-…           the bytes of the files
    batches/batch_…/       input.jsonl (a hard link to the file's bytes), output.jsonl, error.jsonl

Names in these folders are the store's own random ids: no name that a client gave is part of a path.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxserve.store import StoreLocked
from jaxserve.store.disk import Disk

RESERVE_BYTES = 1 << 20
RELEASE_BYTES = 1 << 18
ID = re.compile(r"(upload-|file-|batch_)[0-9a-f]{32}")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


class Folder:
    """The tree above, locked. Raises StoreLocked when another process has it, OSError when it cannot be made."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path, self.disk = path, disk
        self.incoming, self.files, self.batches = path / "incoming", path / "files", path / "batches"
        self.database, self.reserve = path / "store.sqlite3", path / "reserve"
        if not path.exists():
            disk.make_folder(path)
            disk.sync_folder(path.parent)
        self.lock = self._lock()
        try:
            for folder in (self.incoming, self.files, self.batches):
                disk.make_folder(folder)
            disk.sync_folder(path)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> int:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreLocked(
                f"{self.path} is in use by process {owner or 'unknown'}; one server owns a store. "
                "Stop that one or give this one another --file-storage-path."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        return descriptor

    def close(self) -> None:
        """Releases the lock; nothing the second time."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def of_file(self, file_id: str) -> Path:
        return self.files / _checked(file_id)

    def of_batch(self, batch_id: str, name: str = "") -> Path:
        return self.batches / _checked(batch_id) / name

    def strays(self, folder: Path, known: set[str]) -> Iterator[Path]:
        """What is ours by its name and nobody's by the records."""
        for path in folder.iterdir():
            if ID.fullmatch(path.name) and path.name not in known:
                yield path

    def fill_reserve(self) -> None:
        """Makes the reserve whole again, when there is room for several of it."""
        held = self.reserve.stat().st_size if self.reserve.exists() else -1
        if held >= RESERVE_BYTES or shutil.disk_usage(self.path).free < 4 * RESERVE_BYTES:
            return
        if held < 0:
            os.close(self.disk.create(self.reserve))
        self.disk.write_at(self.reserve, max(held, 0), bytes(RESERVE_BYTES - max(held, 0)))

    def release_reserve(self) -> bool:
        """Gives up a part of the reserve; False when there is none."""
        held = self.reserve.stat().st_size if self.reserve.exists() else 0
        if held:
            self.disk.truncate(self.reserve, max(0, held - RELEASE_BYTES))
        return held > 0


def _checked(name: str) -> str:
    if not ID.fullmatch(name):
        raise ValueError(f"{name!r} is no id of this store")
    return name
