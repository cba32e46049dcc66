"""A file on its way into a store's folder."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from jaxserve.store import StoredFile
from jaxserve.store.disk import Disk
from jaxserve.store.errors import translating


class FileUpload:
    """Implements `jaxserve.store.Upload` over a new file at `path`; adopt names and records the finished bytes."""

    def __init__(
        self,
        path: Path,
        disk: Disk,
        adopt: "Callable[[FileUpload], StoredFile]",
        filename: str,
        purpose: str,
        expires_after: int | None,
    ) -> None:
        self.path, self.filename, self.purpose, self.expires_after = path, filename, purpose, expires_after
        self.num_bytes = 0
        self._disk, self._adopt = disk, adopt
        self._descriptor = disk.create(path)
        self._open = True

    def write(self, chunk: bytes) -> None:
        with translating(self.path.parent):
            self._disk.write(self._descriptor, chunk)
            self.num_bytes += len(chunk)

    def commit(self) -> StoredFile:
        with translating(self.path.parent):
            self._disk.sync(self._descriptor)
            self._close()
        return self._adopt(self)

    def abort(self) -> None:
        self._close()
        with translating(self.path.parent):
            self._disk.remove(self.path)

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._descriptor)

    def __enter__(self) -> "FileUpload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
