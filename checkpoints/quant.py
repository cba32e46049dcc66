"""Matrices of 8 bits an element with float32 scales: stored ones read as floats, and floats quantised while they are
read. Imports no jax.

A quantised matrix is value [out, in] int8 or float8_e4m3fn times scale [out] float32; the largest element of a row has
the largest number of its dtype. Error of an element, where the largest of its row is m: at most m / 254 in int8, and in
fp8 a sixteenth of its own, or m / 458,752 where that is more.
"""

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from checkpoints.files import CheckpointError, Index, TensorInfo, TensorSource, require

SCALE = "_scale"  # "…weight" -> "…weight_scale", compressed-tensors' name
_STORED_SCALES = ("_scale", "_scale_inv")  # the second is DeepSeek's, and is multiplied with all the same
_BLOCK_ELEMENTS = 2 << 20  # turned into floats at a time


@dataclass(frozen=True, slots=True)
class Format:
    dtype: np.dtype
    largest: float


FORMATS: Mapping[str, Format] = {
    "int8": Format(np.dtype(np.int8), 127.0),
    "fp8": Format(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}


def row_scales(values: np.ndarray, format: Format) -> np.ndarray:
    """values [out, in] float32 -> [out] float32; 1 for a row of zeros."""
    largest = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
    return np.where(largest > 0, largest / np.float32(format.largest), 1).astype(np.float32)


def quantise(values: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
    """values [out, in] float32, scales [out] -> [out, in] in the format's dtype, rounded to the nearest."""
    scaled = values / scales[:, None]
    np.clip(scaled, -format.largest, format.largest, out=scaled)
    return (np.rint(scaled, out=scaled) if format.dtype == np.int8 else scaled).astype(format.dtype)


class WideSource:
    """A source whose 8-bit matrices with a scale beside them read as float32.

    A scale is one number, one for each row ([out] or [out, 1]) or, where block says how many rows and columns share
    one, a matrix. Raises CheckpointError for another shape.
    """

    def __init__(self, source: TensorSource, block: tuple[int, int] | None = None):
        self.path = str(getattr(source, "path", type(source).__name__))
        self.files = tuple(getattr(source, "files", ()))
        self.stored = source
        self._block = block
        self._scales: dict[str, np.ndarray] = {}  # [out], or by blocks
        dtypes = {format.dtype for format in FORMATS.values()}
        self.tensors: dict[str, TensorInfo] = dict(source.tensors)
        for name, info in source.tensors.items():
            scale = next((name + end for end in _STORED_SCALES if name + end in source.tensors), None)
            if info.dtype in dtypes and scale is not None:
                self._scales[name] = self._read_scale(name, info, scale)
                self.tensors[name] = TensorInfo(info.shape, np.dtype(np.float32))

    def scales_of_rows(self, name: str) -> np.ndarray | None:
        """[out] float32 of a matrix that is stored in 8 bits with such scales; None for any other."""
        scales = self._scales.get(name)
        return None if scales is None or scales.ndim != 1 else scales

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        values = self.stored.read(name, index)
        if name not in self._scales:
            return values
        rows, columns = (
            np.arange(size)[part] for size, part in zip(self.tensors[name].shape, index or _ALL, strict=True)
        )
        scales = self._scales[name]
        if scales.ndim == 1:
            return values.astype(np.float32) * scales[rows, None]
        assert self._block is not None
        return values.astype(np.float32) * scales[np.ix_(rows // self._block[0], columns // self._block[1])]

    def _read_scale(self, name: str, info: TensorInfo, scale: str) -> np.ndarray:
        found = self.stored.read(scale).astype(np.float32)
        if len(info.shape) == 2 and found.size == 1:
            return np.full(info.shape[0], found.reshape(()))
        if len(info.shape) == 2 and found.shape in (info.shape[:1], (info.shape[0], 1)):
            return found.reshape(-1)
        blocks = (
            None if self._block is None else tuple(-(-n // b) for n, b in zip(info.shape, self._block, strict=True))
        )
        if len(info.shape) == 2 and found.shape == blocks:
            return found
        raise CheckpointError(
            f"{self.path}: tensor {scale!r} is {list(found.shape)} beside {name!r} {list(info.shape)}; expected one "
            f"scale, one for each row{'' if blocks is None else f', or {list(blocks)}'}"
        )


_ALL = (slice(None), slice(None))


class QuantisedSource:
    """A source with the named matrices in a format, and their scales, [out] float32, beside them as <name>_scale.

    Matrices that are stored so already are read as they are; all others are quantised by their own rows, a block at a
    time, however they are sliced: every mesh gets the same numbers. quantised: the names of those others.
    """

    def __init__(self, source: WideSource, format: Format, names: Collection[str]):
        self.path, self.files = source.path, source.files
        self._source, self._format = source, format
        known = [name for name in names if name in source.tensors]
        self.quantised = tuple(
            name
            for name in known
            if source.scales_of_rows(name) is None or source.stored.tensors[name].dtype != format.dtype
        )
        self.tensors: dict[str, TensorInfo] = dict(source.tensors)
        self._scales: dict[str, np.ndarray] = {}  # NaN: not known yet
        self._locks = {name: threading.Lock() for name in self.quantised}
        for name in known:
            shape = source.tensors[name].shape
            self.tensors[name] = TensorInfo(shape, format.dtype)
            self.tensors[name + SCALE] = TensorInfo(shape[:1], np.dtype(np.float32))
            stored = None if name in self._locks else source.scales_of_rows(name)
            self._scales[name] = np.full(shape[:1], np.nan, np.float32) if stored is None else stored

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        require(self, name, self.path)
        base = name.removesuffix(SCALE)
        if base in self._scales and name != base:
            rows = (index or _ALL)[0].indices(self.tensors[name].shape[0])
            return self._scales_between(base, rows[0], rows[1])
        if name not in self._scales:
            return self._source.read(name, index)
        if name not in self._locks:
            return self._source.stored.read(name, index)
        rows, columns = index or _ALL
        start, stop, _ = rows.indices(self.tensors[name].shape[0])
        width = len(range(*columns.indices(self.tensors[name].shape[1])))
        out = np.empty((stop - start, width), self._format.dtype)
        for first, last in _blocks(start, stop, width):
            values = self._source.read(name, (slice(first, last), columns)).astype(np.float32)
            scales = self._scales_between(name, first, last)
            out[first - start : last - start] = quantise(values, scales, self._format)
        return out

    def _scales_between(self, name: str, start: int, stop: int) -> np.ndarray:
        """[stop - start]; each row is read for this once, whole, by whichever device needs it first."""
        scales = self._scales[name]
        if name in self._locks:
            with self._locks[name]:
                missing = start + np.flatnonzero(np.isnan(scales[start:stop]))
                if missing.size:
                    for first, last in _blocks(missing[0], missing[-1] + 1, self.tensors[name].shape[1]):
                        values = self._source.read(name, (slice(first, last), slice(None))).astype(np.float32)
                        scales[first:last] = row_scales(values, self._format)
        return scales[start:stop]


def _blocks(start: int, stop: int, width: int) -> list[tuple[int, int]]:
    """Rows start .. stop of a matrix, some at a time."""
    step = max(_BLOCK_ELEMENTS // max(width, 1), 1)
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]
