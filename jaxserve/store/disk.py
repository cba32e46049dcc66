"""Every change a store makes to the file system, one method each, so that a test can make any of them fail."""

import errno
import os
import shutil
from pathlib import Path

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CAN_NOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
COPY_BYTES = 1 << 20


class Disk:
    """Paths are the caller's own; nothing here checks them. Every method raises OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        """The folder and those above it, readable by their owner only; nothing when it exists."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """A new empty file, open for writing: its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: bytes) -> None:
        """All of the data at the descriptor's place."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        """Returns when what was written (and the length) is on the medium."""
        os.fsync(descriptor)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """The data at this offset of an existing file, on the medium when it returns."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            self.write(descriptor, data)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, num_bytes: int) -> None:
        """Cuts an existing file, on the medium when it returns."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Makes the names in the folder as durable as the files they name."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """target becomes the same file as source, or a synced copy where the file system has no hard links."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in CAN_NOT_LINK:
                raise
            self._copy(source, target)

    def _copy(self, source: Path, target: Path) -> None:
        descriptor = self.create(target)
        try:
            with open(source, "rb") as file:
                while data := file.read(COPY_BYTES):
                    self.write(descriptor, data)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Nothing when it is not there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """With all in it; nothing when it is not there."""
        shutil.rmtree(path, ignore_errors=True)
