"""Compiled programs on disk, found without tracing: a start that finds all of them neither traces nor lowers.

JAX's own persistent cache is keyed by the lowered program, so that even a hit pays for tracing and lowering, which
hold the GIL: 6 of the 8 CPU-seconds that programs took of a second start. Here an index, found by everything that
determines the programs (our sources included), names the file of each; and each file is named by its lowered program,
so that a changed source costs the tracing only where the program stayed the same.

Files are unpickled, so only those are read that belong to this user and that nobody else may write. One that is
missing, damaged or refused means compiling, never an error.
"""

import hashlib
import logging
import os
import pickle
import platform
import re
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from jaxserve.engine.processor import cpu_features
from kernels_pallas import cpu

logger = logging.getLogger(__name__)

MISS_EVENT = "/jax/compilation_cache/cache_misses"  # JAX's own, so that one listener counts its cache's and ours
_HIT_EVENT = "/jax/compilation_cache/cache_hits"
MAX_BYTES = 1 << 30  # beyond that the files not used for longest go
_OUR_CALLS = re.compile(r"custom_call @(jaxserve_\w+)")
_FORMAT = b"jaxserve-program-1\n"
_DIGEST_BYTES = 32
_SOURCES = ("jaxserve/config.py", "jaxserve/types.py", "jaxserve/engine", "jaxserve/model", "jaxserve/scheduling")
_SOURCES += ("kernels_pallas",)
_UNRELATED_OPTIONS = ("cache", "log", "dump", "profil", "traceback", "explain")  # parts of names in jax.config
_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, EOFError)
_DAMAGE += (pickle.UnpicklingError,)


_WRITTEN: dict[str, str] = {}  # programs that this process has serialised, by name -> their first file


class _CacheHits:
    """How many programs JAX's own cache has given, by thread."""

    def __init__(self) -> None:
        self._by_thread: Counter[int] = Counter()
        jax.monitoring.register_event_listener(self._on_event)

    @property
    def here(self) -> int:
        return self._by_thread[threading.get_ident()]

    def _on_event(self, event: str, **_kwargs: Any) -> None:
        if event == _HIT_EVENT:
            self._by_thread[threading.get_ident()] += 1


class Unusable(ValueError):
    """A file that is damaged, or that someone else could have written."""


@dataclass(frozen=True)
class Entry:
    """A program on disk, how its arguments and results are nested, and what machine code of ours it calls."""

    name: str
    in_tree: Any
    out_tree: Any
    calls: frozenset[str] = frozenset()


class ExecutableStore:
    """The programs of one machine in one folder; used by several processes at once, each file appears whole.

    description: what determines the programs besides the software, the machine and jax.config, as a text that is the
    same in every process. devices: where they run.
    """

    def __init__(self, folder: str, devices: Sequence[jax.Device], description: str) -> None:
        self._folder = folder
        self._devices = list(devices)
        environment = environment_of(self._devices[0], len(self._devices))
        self._environment = _digest([environment])
        self._index = os.path.join(folder, "index-" + _digest([environment, sources_digest(), description]))
        self._found: dict[str, Entry] = {}
        self._cache_hits = _CacheHits()

    def open(self) -> None:
        """Makes the folder and reads the index, when there is one. Raises OSError when the folder cannot be made."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        try:
            self._found = pickle.loads(_read(self._index))
        except FileNotFoundError:
            pass  # a first start
        except _DAMAGE as error:
            logger.info("compiled programs are not reused: %s", error)

    def load(self, key: str) -> Any | None:
        """The program of that key, without tracing; None where it must be lowered."""
        entry = self._found.get(key)
        return None if entry is None else self._load(entry)

    def compile(self, key: str, lowered: Any, anew: bool = False) -> tuple[Entry, Any]:
        """-> where a lowered program belongs, and the program: from its file, unless anew, else compiled and kept.
        Thread-safe."""
        in_tree = jax.tree.structure(lowered.args_info)
        text = lowered.as_text()
        told = [self._environment, key, str(in_tree), str(lowered.out_tree), str(lowered.args_info), text]
        calls = frozenset(_OUR_CALLS.findall(text))
        entry = Entry("program-" + _digest(told), in_tree, lowered.out_tree, calls)
        program = None if anew else self._load(entry)
        if program is None:
            hits = self._cache_hits.here
            program = lowered.compile()
            jax.monitoring.record_event(MISS_EVENT)
            # XLA's CPU backend on JAX 0.11 loses functions of a program that it serialises for the second time.
            if self._cache_hits.here == hits:
                self._keep(entry.name, program)
        return entry, program

    def _keep(self, name: str, program: Any) -> None:
        """JAX gives the same program again to whoever lowers the same function in one process: for a second folder its
        file is copied."""
        path = os.path.join(self._folder, name)
        first = _WRITTEN.setdefault(name, path)
        try:
            self._write(path, serialize_executable.serialize(program)[0] if first == path else _read(first))
        except _DAMAGE as error:
            logger.info("a compiled program is not kept in a second folder: %s", error)

    def save(self, entries: dict[str, Entry]) -> None:
        """Write the index for the next start; entries: key -> place, of all that load() did not find."""
        if not entries:
            return
        known = {key: entry for key, entry in self._found.items() if key not in entries}
        self._write(self._index, pickle.dumps(known | entries))
        self._evict()

    def _load(self, entry: Entry) -> Any | None:
        path = os.path.join(self._folder, entry.name)
        try:
            for call in sorted(entry.calls):
                cpu.register(call)
            program = serialize_executable.deserialize_and_load(
                _read(path), entry.in_tree, entry.out_tree, execution_devices=self._devices
            )
            os.utime(path)
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            logger.info("a compiled program is made again: %s", error)
            return None
        return program

    def _write(self, path: str, content: bytes) -> None:
        """Aside, then renamed. A disk that takes nothing costs the next start its time, nothing else."""
        try:
            descriptor, scratch = tempfile.mkstemp(prefix=".new-", dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_FORMAT + hashlib.sha256(content).digest() + content)
                os.replace(scratch, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(scratch)
                raise
        except OSError as error:
            logger.warning("compiled programs are not kept: %s", error)

    def _evict(self) -> None:
        with suppress(OSError):
            files = [(entry.stat(), entry.path) for entry in os.scandir(self._folder) if entry.is_file()]
            total = sum(facts.st_size for facts, _ in files)
            for facts, path in sorted(files, key=lambda file: file[0].st_mtime):
                if total <= MAX_BYTES:
                    return
                os.unlink(path)
                total -= facts.st_size


def _read(path: str) -> bytes:
    """The content of a file that is ours and whole. Raises FileNotFoundError, OSError, Unusable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise Unusable(f"{path} is not a file")
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Unusable(f"{path} belongs to another user or can be written by others; it is not read")
        content = file.read()
    start = len(_FORMAT) + _DIGEST_BYTES
    if not content.startswith(_FORMAT) or hashlib.sha256(content[start:]).digest() != content[len(_FORMAT) : start]:
        raise Unusable(f"{path} is damaged")
    return content[start:]


def environment_of(device: jax.Device, num_devices: int) -> str:
    """What besides the program decides what the compiler makes of it, and where the result runs."""
    options = {
        name: value
        for name, value in jax.config.values.items()
        if not any(part in name for part in _UNRELATED_OPTIONS) and isinstance(value, str | int | float | None)
    }
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return repr(
        (
            (jax.__version__, version("jaxlib"), np.__version__, platform.python_version()),
            (device.platform, device.device_kind, device.client.platform_version, num_devices),
            (jax.process_index(), jax.process_count()),
            (platform.machine(), cpu_features(), os.cpu_count()),
            sorted(options.items()),
            sorted(flags.items()),
        )
    )


def sources_digest() -> str:
    """Hexadecimal sha256 of every source that takes part in tracing."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    digest = hashlib.sha256()
    for path in _source_files(root):
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{os.path.relpath(path, root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _source_files(root: str) -> Iterable[str]:
    for name in _SOURCES:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            yield path
            continue
        for folder, folders, files in os.walk(path):
            folders.sort()
            yield from (os.path.join(folder, file) for file in sorted(files) if file.endswith(".py"))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n{part}".encode())
    return digest.hexdigest()[:40]
