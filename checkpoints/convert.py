"""Any source -> a converted checkpoint, and back: Orbax's format in one layout for all devices.

    <folder>/checkpoint.json            format version, sha256 of the source, names, shapes and dtypes
    <folder>/orbax/                     an Orbax checkpoint: one flat tree, Hugging Face names and orientation
    <folder>/config.json, tokenizer.json, …   what the model needs beside its weights

`python -m checkpoints.convert SRC DST` writes one.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.files import CheckpointError, Index, SafetensorsSource, TensorInfo, TensorSource, require
from checkpoints.gguf import GGUFSource, write_hf_files
from checkpoints.storage import (
    CHECKPOINT_FILE,
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    locked,
    megabytes,
    new_folder,
    read_checkpoint_file,
    require_space,
    sha256_file,
)

Progress = Callable[[int, int, str], None]

_ORBAX = "orbax"
_BATCH_BYTES = 64 << 20  # tensors that Orbax gets at a time; it holds about three such portions
_CHUNK_BYTES = 16 << 20  # a device that wants a slice reads whole chunks
_EXTRA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def open_source(path: str) -> TensorSource:
    """A .gguf file, a converted checkpoint, a folder of safetensors or one such file -> its source."""
    if path.endswith(".gguf"):
        return GGUFSource(path)
    if os.path.isdir(path) and read_checkpoint_file(path) is not None:
        return OrbaxSource(path)
    return SafetensorsSource(path)


def convert(
    source: TensorSource,
    dst: str,
    *,
    extra_files: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress,
) -> None:
    """Write source as a converted checkpoint in folder dst, with config and tokenizer files from folder extra_files.

    progress(bytes done, bytes in all, line). dst appears whole or not at all; two that convert at once do the work
    once; what an interrupted run left is removed. Some hundred MB, or three of the largest tensor, are in memory.
    Raises CheckpointError when dst exists and holds something else, or the disk is too small.
    """
    total = sum(info.num_bytes for info in source.tensors.values())
    with locked(dst, waiting=lambda: progress(0, total, f"waiting for another process that writes {dst}")):
        digest = _source_sha256(source)
        if _is_done(dst, digest):
            progress(total, total, f"{dst} is there already")
            return
        require_space(dst, total)
        progress(0, total, f"writing {megabytes(total)} to {dst}")
        document = {
            **(metadata or {}),
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "source_sha256": digest,
        }
        with new_folder(dst) as scratch:
            _write_orbax(source, os.path.join(scratch, _ORBAX), document, total, progress)
            if extra_files is not None:
                _copy_extra_files(extra_files, scratch)
            tensors = {name: [str(info.dtype), *info.shape] for name, info in source.tensors.items()}
            with open(os.path.join(scratch, CHECKPOINT_FILE), "w", encoding="utf-8") as file:
                json.dump(document | {"tensors": tensors}, file, indent=1)


def _is_done(dst: str, digest: str) -> bool:
    if not os.path.lexists(dst):
        return False
    found = read_checkpoint_file(dst) if os.path.isdir(dst) else None
    if found is None:
        raise CheckpointError(f"{dst} exists and is no converted checkpoint; remove it or choose another place")
    if found.get("source_sha256") != digest:
        raise CheckpointError(
            f"{dst} was converted from another source (sha256 {found.get('source_sha256')}, this one is {digest}); "
            "remove it or choose another place"
        )
    return True


def _source_sha256(source: TensorSource) -> str:
    """One file: its sha256; several: that of their names and sums. A source without files: of its description."""
    files = tuple(getattr(source, "files", ()))
    if len(files) == 1:
        return sha256_file(files[0])
    lines = [f"{os.path.basename(path)} {sha256_file(path)}" for path in files]
    lines += [] if files else [f"{name} {info}" for name, info in source.tensors.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write_orbax(source: TensorSource, path: str, document: dict[str, Any], total: int, progress: Progress) -> None:
    # inside the function: the import takes seconds, which a server that only reads a checkpoint need not wait for
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # float32 from a quantised file shrinks, but loads 3 times slower
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    done, count = 0, 0
    with context:
        for batch in _batches(source):
            ocp.partial.save(path, batch, custom_metadata=document)
            done, count = done + sum(array.nbytes for array in batch.values()), count + len(batch)
            progress(done, total, f"{count} of {len(source.tensors)} tensors converted")
        ocp.partial.finalize(path)


def _batches(source: TensorSource) -> Iterator[dict[str, np.ndarray]]:
    batch: dict[str, np.ndarray] = {}
    size = 0
    for name, info in source.tensors.items():
        if batch and size + info.num_bytes > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = source.read(name)
        size += info.num_bytes
    if batch:
        yield batch


def _copy_extra_files(folder: str, dst: str) -> None:
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(f"{folder} has no config.json to copy beside the converted weights")
    for name in _EXTRA_FILES:
        if os.path.isfile(path := os.path.join(folder, name)):
            os.makedirs(os.path.dirname(os.path.join(dst, name)), exist_ok=True)
            shutil.copyfile(path, os.path.join(dst, name))


class OrbaxSource:
    """TensorSource over a converted checkpoint. Reads through tensorstore, Orbax's own storage layer.

    Raises CheckpointError when the folder is none, is damaged, or lacks a tensor that its metadata lists.
    """

    def __init__(self, path: str):
        import tensorstore

        self.path = path
        metadata = read_checkpoint_file(path)
        if metadata is None:
            raise CheckpointError(f"{path} is no converted checkpoint: it has no {CHECKPOINT_FILE}")
        self.files = (os.path.join(path, CHECKPOINT_FILE),)
        self.metadata = {name: value for name, value in metadata.items() if name != "tensors"}
        self.tensors = {
            name: TensorInfo(tuple(shape), _dtype(kind)) for name, (kind, *shape) in metadata["tensors"].items()
        }
        self._context = tensorstore.Context({"file_io_concurrency": {"limit": 16}})
        self._root = _tree_folder(os.path.join(path, _ORBAX))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        import tensorstore

        info = require(self, name, self.path)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": f"file://{self._root}/", "path": f"{name}/"},
        }
        try:
            store = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            if store.shape != info.shape or store.dtype.numpy_dtype != info.dtype:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} is {store.dtype.numpy_dtype} {list(store.shape)}; expected "
                    f"{info.dtype} {list(info.shape)}"
                )
            return (store if index is None else store[index]).read().result()
        except (ValueError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} is damaged: tensor {name!r} cannot be read: {error}") from error


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _tree_folder(path: str) -> str:
    """The folder inside an Orbax checkpoint that holds the tree; its name depends on Orbax's version."""
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        folder = os.path.join(path, name)
        if os.path.isfile(os.path.join(folder, "manifest.ocdbt")):
            return os.path.abspath(folder)
    raise CheckpointError(f"{path} is damaged: no folder in it has a manifest.ocdbt; convert the model again")


def convert_path(src: str, dst: str, *, progress: Progress) -> None:
    """convert() of a .gguf file or a Hugging Face folder, its config and tokenizer files included."""
    source = open_source(src)
    if not src.endswith(".gguf"):
        convert(source, dst, extra_files=src if os.path.isdir(src) else os.path.dirname(src) or ".", progress=progress)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_hf_files(src, folder)
        convert(source, dst, extra_files=folder, progress=progress)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints.convert", description="Write a model as a converted (Orbax) checkpoint."
    )
    parser.add_argument("src", help="a .gguf file, a Hugging Face folder or a safetensors file beside its config.json")
    parser.add_argument("dst", help="the folder to write; must not exist")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        convert_path(options.src, options.dst, progress=_print_progress)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.dst} is ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


def _print_progress(done: int, total: int, message: str) -> None:
    print(f"{megabytes(done)} of {megabytes(total)}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
