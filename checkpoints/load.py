"""Tensors of a source -> sharded jax arrays; every device's slice is read on its own, cast and turned while copied."""

import functools
import math
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from checkpoints.files import CheckpointError, Index, TensorInfo, TensorSource, require

STAGED = 256 << 20  # bytes on their way to devices
ALIGNMENT = 64  # bytes; the CPU backend takes such a buffer as it is, without a copy
_LARGE_PAGE = 2 << 20
_ROWS = 128  # source rows turned at a time: both sides stay in the cache (2.9 GB/s against 1.4 in one go)
_MUCH = 16 << 20  # bytes of a tensor that several threads copy together
_LOADABLE = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows start .. start + count of a tensor's axis; name None: zeros."""

    name: str | None
    start: int
    count: int


@dataclass(frozen=True)
class Target:
    """One array to be filled.

    tensors: what it is made of, and the shape that each must have in Hugging Face's orientation. Their parts lie one
    after another along axis (no parts: all of each tensor); transpose then turns the matrix. dtype and sharding are
    those of the result.
    """

    tensors: Mapping[str, tuple[int, ...]]
    dtype: DTypeLike
    sharding: jax.sharding.Sharding
    transpose: bool = False
    axis: int = 0
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts and next(iter(self.tensors.values())):
            whole = tuple(Part(name, 0, shape[self.axis]) for name, shape in self.tensors.items())
            object.__setattr__(self, "parts", whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        first = next(iter(self.tensors.values()))
        size = tuple(sum(part.count for part in self.parts) if i == self.axis else n for i, n in enumerate(first))
        return size[::-1] if self.transpose else size


def load(
    source: TensorSource,
    targets: Mapping[str, Target],
    *,
    progress: Progress,
    take: Callable[[str, jax.Array], Any] = lambda key, array: array,
    workers: int | None = None,
) -> dict[str, Any]:
    """Fill every target; progress(bytes done, bytes in all, line for people) is called from this thread, and so is
    take(key, array) for each array that is there, in any order: what it gives is what is returned for the key.

    Reads in `workers` threads (default: the cores, 8 at most). Beside the result one target is in host memory, or
    STAGED bytes of several, four times that where the result is in a device's own.
    Raises CheckpointError before anything is read when a tensor is missing or has another shape or a quantised dtype.
    """
    where = str(getattr(source, "path", type(source).__name__))
    for key, target in targets.items():
        _check(source, key, target, where)
    sizes = {key: math.prod(target.shape) * np.dtype(target.dtype).itemsize for key, target in targets.items()}
    total, done, arrays = sum(sizes.values()), 0, {}
    progress(0, total, f"reading {len(targets)} tensors")
    on_host = all(device.platform == "cpu" for target in targets.values() for device in target.sharding.device_set)
    room = _Room(STAGED if on_host else 4 * STAGED)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), "load") as pool:
        # the largest first: nobody waits for one thread's last big tensor
        order = sorted(targets, key=lambda key: -sizes[key])
        futures = {pool.submit(_array, source, targets[key], room): key for key in order}
        try:
            for future in as_completed(futures) if jax.process_count() == 1 else _in_order(futures):
                key = futures.pop(future)  # which would hold the array
                arrays[key] = take(key, future.result())
                done += sizes[key]
                progress(done, total, f"{len(arrays)} of {len(targets)} tensors read")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: arrays[key] for key in targets}


def _in_order(futures: Mapping[Any, str]) -> Iterator[Any]:
    """For several processes: take() may run programs of all of their devices, which each process must run in one order.
    The caller takes each out of futures."""
    while futures:
        yield next(iter(futures))


def _check(source: TensorSource, key: str, target: Target, where: str) -> None:
    for name, shape in target.tensors.items():
        info = require(source, name, where)
        in_8_bits = np.dtype(target.dtype).itemsize == 1  # checkpoints.quant makes them; a cast would not
        if info.dtype not in ({np.dtype(target.dtype)} if in_8_bits else _LOADABLE):
            raise CheckpointError(
                f"{where}: tensor {name!r} is {info.dtype}; expected "
                f"{np.dtype(target.dtype) if in_8_bits else 'float32, float16 or bfloat16'} "
                "(checkpoints quantised this way cannot be loaded)"
            )
        if info.shape != tuple(shape):
            raise CheckpointError(
                f"{where}: {key!r} expects tensor {name!r} {list(shape)}, found {list(info.shape)}; "
                "is config.json of this model?"
            )


class _Room:
    """Bytes that several threads may hold together; one that wants more than all of it waits until it is alone."""

    def __init__(self, limit: int):
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Generator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _array(source: TensorSource, target: Target, room: _Room) -> jax.Array:
    shards = {str(index): index for index in target.sharding.addressable_devices_indices_map(target.shape).values()}
    shard = math.prod(target.sharding.shard_shape(target.shape)) * np.dtype(target.dtype).itemsize
    with room.taken(len(shards) * shard):
        return _filled(source, target)


def _filled(source: TensorSource, target: Target) -> jax.Array:
    filled: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def piece(index: Index | None) -> np.ndarray:
        index = index or tuple(slice(None) for _ in target.shape)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True))
        if bounds not in filled:  # replicas share one buffer
            filled[bounds] = _fill(source, target, bounds)
        return filled[bounds]

    # waiting here bounds the host buffers that transfers to a device keep alive
    return jax.make_array_from_callback(target.shape, target.sharding, piece).block_until_ready()


def _fill(source: TensorSource, target: Target, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The slice of the target between bounds, in memory of its own."""
    out = _empty(tuple(stop - start for start, stop in bounds), np.dtype(target.dtype), target.sharding)
    turned = out.T if target.transpose else out  # Hugging Face's orientation
    if not bounds:
        out[...] = source.read(next(iter(target.tensors)))
        return out
    wanted = [slice(*bound) for bound in (bounds[::-1] if target.transpose else bounds)]
    first, last, offset = wanted[target.axis].start, wanted[target.axis].stop, 0
    for part in target.parts:
        start, stop = max(first, offset), min(last, offset + part.count)
        if start < stop:
            filled = turned[(*[slice(None)] * target.axis, slice(start - first, stop - first))]
            if part.name is None:
                filled[...] = 0
            else:
                index = list(wanted)
                index[target.axis] = slice(start - offset + part.start, stop - offset + part.start)
                _copy(filled, source.read(part.name, tuple(index)))
        offset += part.count
    return out


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """By several threads where it is much."""
    if out.dtype == values.dtype:  # NumPy turns matrices of its own types three times as fast, and lets go of the GIL
        out, values = (array.view(f"u{out.itemsize}") for array in (out, values))

    def copy(row: int) -> None:
        np.copyto(out[row : row + _ROWS], values[row : row + _ROWS], casting="unsafe")

    rows = range(0, values.shape[0], _ROWS)
    if values.nbytes < _MUCH:
        for row in rows:
            copy(row)
    else:
        list(_copiers().map(copy, rows))


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "copy")


def _empty(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> np.ndarray:
    """An uninitialised array on a border of ALIGNMENT bytes; one that the CPU backend keeps lies in _BLOCKS."""
    size = math.prod(shape) * dtype.itemsize
    kept = next(iter(sharding.device_set)).platform == "cpu"
    raw = _BLOCKS.take(size) if kept else _aligned(np.empty(size + ALIGNMENT, np.uint8), ALIGNMENT, size)
    return raw.view(dtype).reshape(shape)


class _Blocks:
    """Memory in large pages, of which arrays get one piece after another: in pages of 4 KiB weights are read a fifth
    slower (docs/design.md). A block lives as long as an array in it; what is larger than one has memory of its own."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._block, self._used = np.empty(0, np.uint8), 0

    def take(self, size: int) -> np.ndarray:
        """That many uninitialised bytes. Thread-safe."""
        if size >= self._size:
            return _in_large_pages(size)
        with self._lock:
            if self._used + size > len(self._block):
                self._block, self._used = _in_large_pages(self._size), 0
            piece = self._block[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
            return piece


def _in_large_pages(size: int) -> np.ndarray:
    """Uninitialised bytes; in pages of any size where the system knows no large ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return _aligned(np.empty(size + ALIGNMENT, np.uint8), ALIGNMENT, size)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(np.frombuffer(memory, np.uint8), _LARGE_PAGE, size)


def _aligned(raw: np.ndarray, border: int, size: int) -> np.ndarray:
    start = -raw.ctypes.data % border
    return raw[start : start + size]


_BLOCKS = _Blocks(32 << 20)


class DummySource:
    """Random weights for load_format "dummy": normal with deviation 0.02, norms one; the same for the same seed.

    All tensors are windows of one pool of normals (a prime number of them, so that no two rows are alike): drawing
    a number for every weight of a 1B model would take 10 s.
    """

    path = "dummy weights"
    _POOL = 4_194_301

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: DTypeLike = np.float32):
        self.tensors = {name: TensorInfo(tuple(shape), np.dtype(dtype)) for name, shape in shapes.items()}
        pool = np.random.default_rng(seed).standard_normal(self._POOL, np.float32) * np.float32(0.02)
        self._pool = pool.astype(dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = require(self, name, self.path)
        index = index or tuple(slice(None) for _ in info.shape)
        start, stop, _ = index[0].indices(info.shape[0])
        if name.lower().endswith("norm.weight"):
            return np.ones(stop - start, info.dtype)
        row = math.prod(info.shape[1:])
        values = np.empty((stop - start) * row, info.dtype)
        position, done = (zlib.crc32(name.encode()) + start * row) % self._POOL, 0
        while done < values.size:
            count = min(values.size - done, self._POOL - position)
            values[done : done + count] = self._pool[position : position + count]
            position, done = 0, done + count
        return values.reshape(stop - start, *info.shape[1:])[(slice(None), *index[1:])]
