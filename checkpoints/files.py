"""Tensors in foreign files, read lazily: the protocol that all sources share, and safetensors. Imports no jax."""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, the tensor, what was expected and what was found."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: np.dtype  # what read() returns; dequantised where the file is quantised

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors under their Hugging Face names and orientation ([out, in] for products)."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """name, slices of step 1 (None: all of it) -> the array [slice shape]; touches only the bytes of that slice.

        The result may be a read-only view of the file. Safe to call from several threads.
        Raises CheckpointError when there is no such tensor.
        """
        ...


_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

SAFETENSORS_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def map_file(path: str) -> mmap.mmap:
    """path -> the whole file, mapped read-only. Raises CheckpointError when it cannot be opened or is empty."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def require(source: TensorSource, name: str, where: str) -> TensorInfo:
    """The description of a tensor. Raises CheckpointError that names where and the nearest names when it is missing."""
    try:
        return source.tensors[name]
    except KeyError:
        tail = name.rsplit(".", 2)[-2:]
        near = [other for other in source.tensors if other.rsplit(".", 2)[-2:] == tail][:3] or list(source.tensors)[:3]
        raise CheckpointError(
            f"{where} has no tensor {name!r} among its {len(source.tensors)}; it has for example {', '.join(near)}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    start: int  # byte offset in the file


class SafetensorsSource:
    """A folder (one model.safetensors or the shards of its index) or one file. Maps the files; copies nothing.

    Source: https://github.com/huggingface/safetensors#format. Raises CheckpointError for a folder without weights, a
    missing shard, a tensor that is in two shards or in none, a truncated file, a header that contradicts itself.
    """

    def __init__(self, path: str):
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self.files = tuple(_shards(path))
        for file in self.files:
            self._add(file)
        _check_index(path, self._places)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info, place = require(self, name, self.path), self._places.get(name)
        assert place is not None
        flat = np.frombuffer(self._maps[place.path], info.dtype, math.prod(info.shape), place.start)
        array = flat.reshape(info.shape)
        return array if index is None else array[index]

    def _add(self, path: str) -> None:
        data = self._maps[path] = map_file(path)
        header, start = _read_header(path, data)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is in {self._places[name].path} and again in {path}")
            info, offset = _parse_entry(path, name, entry, len(data) - start)
            self.tensors[name] = info
            self._places[name] = _Place(path, start + offset)


def _shards(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} does not exist; expected a safetensors file or a folder that holds some")
    index = os.path.join(path, SAFETENSORS_INDEX)
    if os.path.isfile(index):
        shards = sorted(set(_weight_map(index).values()))
        missing = [shard for shard in shards if not os.path.isfile(os.path.join(path, shard))]
        if missing:
            raise CheckpointError(
                f"{index} names {len(shards)} files but {', '.join(missing)} is missing; fetch the model again"
            )
        return [os.path.join(path, shard) for shard in shards]
    single = os.path.join(path, "model.safetensors")
    files = [single] if os.path.isfile(single) else []
    files = files or [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".safetensors")]
    if not files:
        raise CheckpointError(f"{path} holds no *.safetensors file; it has {_listing(path)}")
    return files


def _listing(path: str) -> str:
    names = sorted(os.listdir(path))
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "nothing"


def _weight_map(index: str) -> dict[str, str]:
    try:
        with open(index, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index with a weight_map: {error!r}") from error
    bad = [name for name in weight_map.values() if os.path.basename(name) != name]
    if bad:
        raise CheckpointError(f"{index} names {bad[0]!r}; expected plain file names beside it")
    return weight_map


def _check_index(path: str, places: Mapping[str, _Place]) -> None:
    """Every tensor must lie in the shard that the index says."""
    index = os.path.join(path, SAFETENSORS_INDEX)
    if not os.path.isfile(index):
        return
    for name, shard in _weight_map(index).items():
        found = os.path.basename(places[name].path) if name in places else "no shard"
        if found != shard:
            raise CheckpointError(f"{index} expects tensor {name!r} in {shard}; found it in {found}")


def _read_header(path: str, data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """-> (header, byte offset where the tensors' data starts)."""
    if len(data) < 8:
        raise CheckpointError(f"{path} has {len(data)} bytes; expected at least the 8 of a safetensors header length")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or length < 2:
        raise CheckpointError(f"{path} is not a safetensors file: its first 8 bytes say a header of {length} bytes")
    if 8 + length > len(data):
        raise CheckpointError(f"{path} is truncated: expected a header of {length} bytes, found {len(data) - 8}")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is a {type(header).__name__}; expected an object")
    return header, 8 + length


def _parse_entry(path: str, name: str, entry: Any, num_data: int) -> tuple[TensorInfo, int]:
    """One header entry -> (description, byte offset in the data); num_data bytes of data are in the file."""
    try:
        kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry {entry!r}") from error
    if kind not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {kind!r}; known are {', '.join(_DTYPES)}")
    info = TensorInfo(shape, _DTYPES[kind])
    if min(shape, default=0) < 0 or start < 0 or end - start != info.num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} {kind}{list(shape)} takes {info.num_bytes} bytes; its header gives it "
            f"{end - start} (offsets {start} to {end})"
        )
    if end > num_data:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, of which {num_data} are there"
        )
    return info, start
