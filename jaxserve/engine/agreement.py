"""What must be the same on every machine that serves a model, as a table of texts: one that differs is named."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version

from checkpoints.storage import read_checkpoint_file
from jaxserve.config import EngineConfig

# Where things lie on one machine, and what one machine says: these may differ.
_OWN = {
    *("model_path", "cache_dir", "tokenizer_path", "gguf_path", "orbax_path", "compilation_cache_dir", "record_plans"),
    *("log_level", "decode_log_interval", "watchdog_timeout", "cluster"),
}
_CONFIGS = ("config.json", "generation_config.json", os.path.join("1_Pooling", "config.json"))
_WEIGHTS = (".safetensors", ".gguf")
_SAMPLE = 1 << 16  # bytes from both ends of a file of weights, and from its middle


def facts_of(config: EngineConfig, sources: str) -> dict[str, str]:
    """sources: a digest of the code that is traced."""
    facts = {"machines (--nnodes)": str(config.cluster.num_nodes if config.cluster else 1)}
    facts |= {f"version of {name}": version(name) for name in ("jax", "jaxlib")}
    facts["version of jaxserve"] = sources[:12]
    for field in fields(EngineConfig):
        if field.name not in _OWN:
            facts[f"engine option {field.name}"] = str(getattr(config, field.name))
    for name in _CONFIGS:
        path = os.path.join(config.model_path, name)
        facts[f"the model's {name}"] = _digest_of(path) if os.path.isfile(path) else "missing"
    facts["weights"] = "random" if config.load_format == "dummy" else _weights(config)
    return facts


def difference(ours: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> str | None:
    """What differs between rank 0, which says ours, and another rank; None: nothing."""
    for name in (*ours, *(name for name in theirs if name not in ours)):
        if ours.get(name) != theirs.get(name):
            here, there = (each.get(name, "not told") for each in (ours, theirs))
            return (
                f"{name} is {here} on rank 0 and {there} on rank {rank}; "
                "every machine takes the same flags, software and model"
            )
    return None


def _weights(config: EngineConfig) -> str:
    """Sizes and samples of the files that hold them, in place of gigabytes; of what was converted, its source."""
    if config.gguf_path:
        return _sampled([config.gguf_path])
    converted = read_checkpoint_file(config.model_path)
    if converted is not None:
        return str(converted.get("source_sha256"))[:12]
    folder = config.model_path
    return _sampled(sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(_WEIGHTS)))


def _sampled(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        digest.update(json.dumps([os.path.basename(path), size]).encode())
        with open(path, "rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return f"{len(paths)} files, {digest.hexdigest()[:12]}"


def _starts(size: int) -> Iterator[int]:
    yield from sorted({0, max(size // 2 - _SAMPLE, 0), max(size - _SAMPLE, 0)})


def _digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
