"""Files and folders that appear whole or not at all, whoever else works beside us. Imports no jax."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from typing import Any

from checkpoints.files import CheckpointError

CHECKPOINT_FILE = "checkpoint.json"  # what makes a folder a converted checkpoint; written last
CHECKPOINT_FORMAT = "jaxserve-checkpoint"
CHECKPOINT_VERSION = 1
_SPARE_BYTES = 64 << 20  # left free on a disk
_BLOCK = 1 << 20


@contextlib.contextmanager
def locked(path: str, *, waiting: Callable[[], None] = lambda: None) -> Generator[None]:
    """Hold `<path>.lock` against other processes and threads; the kernel drops it when the holder dies.

    waiting() is called once when another holds it.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: str) -> Generator[str]:
    """A scratch folder beside path that takes its name on success and vanishes on failure; under locked(path) only.

    What an interrupted run left behind is removed first.
    """
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    prefix = f".{name}.partial-"
    os.makedirs(parent, exist_ok=True)
    for stale in os.listdir(parent):
        if stale.startswith(prefix):
            shutil.rmtree(os.path.join(parent, stale), ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        os.chmod(scratch, 0o755)
        yield scratch
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_space(path: str, num_bytes: int) -> None:
    """Raise CheckpointError when the disk of path cannot take num_bytes more."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if num_bytes + _SPARE_BYTES > free:
        raise CheckpointError(
            f"writing {path} takes {megabytes(num_bytes)}; {megabytes(free)} are free on that disk: free some or "
            "choose another place (--cache-dir)"
        )


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def sha256_file(path: str, *, progress: Callable[[int], None] = lambda done: None) -> str:
    """Hexadecimal sha256 of a file; progress is told the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(done := done + len(block))
    return digest.hexdigest()


def read_checkpoint_file(folder: str) -> dict[str, Any] | None:
    """The metadata of a converted checkpoint, None when the folder is none.

    Raises CheckpointError when it is damaged or of a format version that is not known.
    """
    path = os.path.join(folder, CHECKPOINT_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            metadata = json.load(file)
        kind, version = metadata["format"], metadata["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a converted checkpoint's metadata: {error!r}") from error
    if kind != CHECKPOINT_FORMAT or version != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} says format {kind!r} version {version!r}; expected {CHECKPOINT_FORMAT!r} version "
            f"{CHECKPOINT_VERSION}: convert the model again"
        )
    return metadata
