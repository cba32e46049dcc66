"""GGUF files: metadata, tensors under their Hugging Face names, and the config files that the metadata implies.

Llama-type models only: architectures llama (Mistral's too), qwen2 and qwen3. Imports no jax; the gguf package (for
dequantisation) only when tensors are opened.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.files import CheckpointError, Index, TensorInfo, map_file, require
from checkpoints.gguf_tokenizer import build_tokenizer, tokenizer_config

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_FILES_DONE = ".gguf-files-v1"  # written last; a new number makes older files be written again

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

_PLAIN_TYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF's architecture -> transformers'. llama.cpp pairs q's and k's rows for the first only.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    name: str  # GGUF's own
    shape: tuple[int, ...]  # numpy's order: GGUF's dimensions reversed
    kind: int  # ggml type number
    start: int  # byte offset in the file


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    path: str
    metadata: Mapping[str, Any]  # arrays as lists
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata key '{self.architecture}.{key}'")
        return value


class _Reader:
    """A cursor over the bytes of the header."""

    def __init__(self, path: str, data: Any):
        self.path, self.data, self.offset = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: its header needs {end} bytes and more, found {len(self.data)}"
            )
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in _SCALARS:
                code = f"<{count}{_SCALARS[item][1]}"
                return list(struct.unpack(code, self.take(struct.calcsize(code))))
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} has a metadata value of unknown type {kind} at byte {self.offset}")
        return self.scalar(_SCALARS[kind])


def read_header(path: str) -> GGUFHeader:
    """path -> metadata and tensor table; about 0.1 s for a vocabulary of 49,152.

    Raises CheckpointError when the file is no GGUF of version 2 or 3, or ends inside its header.
    """
    with map_file(path) as data:
        reader = _Reader(path, data)
        if (magic := reader.take(4)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: expected it to start with {MAGIC!r}, found {magic!r}")
        if (version := reader.scalar("<I")) not in VERSIONS:
            raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_values = reader.scalar("<Q"), reader.scalar("<Q")
        metadata = {}
        for _ in range(num_values):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("<I"))
        table = [_read_tensor(reader) for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"{path} says general.alignment {alignment}; expected a power of two")
        base = -(-reader.offset // alignment) * alignment
    tensors = tuple(GGUFTensor(name, shape, kind, base + start) for name, shape, kind, start in table)
    return GGUFHeader(path, metadata, tensors)


def _read_tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string()
    dims = [reader.scalar("<Q") for _ in range(reader.scalar("<I"))]
    return name, tuple(reversed(dims)), reader.scalar("<I"), reader.scalar("<Q")


def hf_tensor_name(name: str) -> str | None:
    """GGUF's tensor name -> Hugging Face's; None for what is no weight there (rope factors)."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"
    if stem.endswith(("rope_freqs", "attn_rot_embd")):
        return None
    raise CheckpointError(f"GGUF tensor {name!r} belongs to no Llama that can be read here")


@dataclass(frozen=True, slots=True)
class _Stored:
    tensor: GGUFTensor
    num_heads: int  # > 0: rows are permuted within this many heads
    block: int  # elements of a block along the last axis; 1 = not quantised
    num_rows: int  # 1 for a vector
    row_bytes: int


class GGUFSource:
    """TensorSource over one GGUF file of a Llama-type model.

    Quantised tensors are dequantised to float32 slice by slice; F16, BF16 and F32 are given as they are. The rows of
    q and k, which GGUF stores pair-interleaved, come back in Hugging Face's half-split order.
    Raises CheckpointError for another architecture, unknown tensors, types that gguf cannot dequantise, duplicates and
    truncated files.
    """

    def __init__(self, path: str):
        self.path, self.files = path, (path,)
        self.header = read_header(path)
        _check_architecture(self.header)
        self._data = map_file(path)
        self._stored: dict[str, _Stored] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in self.header.tensors:
            if (name := hf_tensor_name(tensor.name)) is None:
                continue
            if name in self.tensors:
                raise CheckpointError(f"{path} holds tensor {tensor.name!r} twice")
            self.tensors[name], self._stored[name] = self._describe(tensor)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info, stored = require(self, name, self.path), self._stored[name]
        index = tuple(slice(None) for _ in info.shape) if index is None else index
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, info.shape, strict=True)]
        rows = _unpermuted(info.shape[0], stored.num_heads) if stored.num_heads else None
        raw = np.frombuffer(self._data, np.uint8, stored.num_rows * stored.row_bytes, stored.tensor.start)
        raw = raw.reshape(stored.num_rows, stored.row_bytes)
        if len(bounds) == 1:
            values = _decode(raw, stored.tensor.kind)[0]
            return values[bounds[0]] if rows is None else values[rows[bounds[0]]]
        columns = bounds[1]
        first, last = columns.start // stored.block, -(-columns.stop // stored.block)
        block_bytes = stored.row_bytes * stored.block // info.shape[1]
        # an array of row numbers copies only the rows asked for, while they are still quantised
        raw = raw[bounds[0] if rows is None else rows[bounds[0]], first * block_bytes : last * block_bytes]
        skip = columns.start - first * stored.block
        return _decode(raw, stored.tensor.kind)[:, skip : skip + columns.stop - columns.start]

    def _describe(self, tensor: GGUFTensor) -> tuple[TensorInfo, _Stored]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(tensor.kind)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has ggml type {tensor.kind}, unknown to gguf"
            ) from None
        if not _can_decode(tensor.kind, size):
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has ggml type {kind.name}, which gguf cannot dequantise; "
                "convert the model to another type, as Q8_0 or Q4_K_M"
            )
        if not 1 <= len(tensor.shape) <= 2 or tensor.shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected one or two dimensions, "
                f"the last a multiple of {block}"
            )
        row_bytes = tensor.shape[-1] // block * size
        end = tensor.start + row_bytes * math.prod(tensor.shape[:-1])
        if end > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end}, found {len(self._data)}"
            )
        dtype = _PLAIN_TYPES.get(tensor.kind, np.dtype(np.float32))
        num_rows = math.prod(tensor.shape[:-1])
        return TensorInfo(tensor.shape, dtype), _Stored(
            tensor, self._permuted_heads(tensor), block, num_rows, row_bytes
        )

    def _permuted_heads(self, tensor: GGUFTensor) -> int:
        if self.header.architecture != "llama":
            return 0
        heads = int(self.header.need("attention.head_count"))
        part = tensor.name.split(".")[-2]
        if part == "attn_q":
            return heads
        return int(self.header.get("attention.head_count_kv") or heads) if part == "attn_k" else 0


def _unpermuted(num_rows: int, num_heads: int) -> np.ndarray:
    """Row of the GGUF file for each Hugging Face row [num_rows].

    The file holds a head's rows as pairs (i, i + D/2); transformers keeps the halves apart. With D = 4 the file's
    rows 0 1 2 3 are transformers' 0 2 1 3.
    """
    pairs = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _decode(raw: np.ndarray, kind: int) -> np.ndarray:
    """raw bytes [rows, bytes] -> values [rows, columns]."""
    if kind in _PLAIN_TYPES:
        return np.ascontiguousarray(raw).view(_PLAIN_TYPES[kind])
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    return quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(kind))


@lru_cache
def _can_decode(kind: int, block_bytes: int) -> bool:
    """gguf knows the sizes of more types than it can dequantise: Q8_1 and Q8_K, which are never stored, and some that
    are new."""
    try:
        _decode(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _check_architecture(header: GGUFHeader) -> None:
    if header.architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{header.path} holds a model of architecture {header.architecture!r}; "
            f"{', '.join(map(repr, _ARCHITECTURES))} can be read from GGUF"
        )
    if header.get("expert_count", 0):
        raise CheckpointError(f"{header.path} holds a mixture of {header.get('expert_count')} experts; not supported")


def _real(value: float) -> float:
    """A float32 from the file -> the decimal number that was meant (9.999999747378752e-06 -> 1e-05)."""
    return float(str(np.float32(value)))


def model_config(header: GGUFHeader) -> dict[str, Any]:
    """The config.json of a model with this metadata, under transformers' names.

    Raises CheckpointError for another architecture and for a rope that config.json cannot say.
    """
    _check_architecture(header)
    shapes = {tensor.name: tensor for tensor in header.tensors}
    heads, embed = int(header.need("attention.head_count")), int(header.need("embedding_length"))
    rotary = header.get("rope.dimension_count")
    head_dim = int(header.get("attention.key_length") or embed // heads)
    if rotary is not None and int(rotary) != head_dim:
        raise CheckpointError(f"{header.path} rotates {rotary} of {head_dim} dimensions; only all of them is supported")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    embedding = shapes.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding else len(tokens) if tokens else int(header.need("vocab_size"))
    theta = _real(header.get("rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[header.architecture]],
        "model_type": header.architecture,
        "hidden_act": "silu",
        "hidden_size": embed,
        "intermediate_size": int(header.need("feed_forward_length")),
        "num_hidden_layers": int(header.need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(header.get("attention.head_count_kv") or heads),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": int(header.need("context_length")),
        "rms_norm_eps": _real(header.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "torch_dtype": _published_dtype(header),
    }
    for name, key in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        config[name] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _published_dtype(header: GGUFHeader) -> str:
    kinds = [_PLAIN_TYPES.get(tensor.kind) for tensor in header.tensors if len(tensor.shape) == 2]
    names = {str(kind) for kind in kinds}
    return names.pop() if len(names) == 1 and names <= {"float16", "bfloat16"} else "float32"


def _rope_scaling(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    factors = next((tensor for tensor in header.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_scaling(header, factors, head_dim, theta)
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    if header.get("rope.scaling.type") is None and factor:
        kind = "linear"
    if kind == "none" or not factor or factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _real(factor)}
    raise CheckpointError(f"{header.path} scales its rope by {kind!r}; 'none', 'linear' and llama3's factors are known")


def _llama3_scaling(header: GGUFHeader, tensor: GGUFTensor, head_dim: int, theta: float) -> dict[str, Any] | None:
    """llama.cpp stores only the factor of each frequency; the rule behind them is recovered from those in between.

    There 1/f = (1 - s)/F + s with s = (context/wavelength - low)/(high - low): a line in 1/wavelength. It fixes the
    three numbers up to a common scale; low_freq_factor 1 is what every published Llama uses.
    """
    if tensor.kind != 0 or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{header.path}: {tensor.name} is type {tensor.kind} {list(tensor.shape)}; expected F32 [{head_dim // 2}]"
        )
    with open(header.path, "rb") as file:
        file.seek(tensor.start)
        raw = file.read(tensor.shape[0] * 4)
    if len(raw) != tensor.shape[0] * 4:
        raise CheckpointError(f"{header.path} is truncated inside {tensor.name}")
    factors = np.frombuffer(raw, np.float32).astype(np.float64)
    factor = float(np.max(factors))
    if np.allclose(factors, 1):
        return None
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # 1 / wavelength
    high, context = _llama3_borders(factors, factor, turns)
    scaling = {
        "rope_type": "llama3",
        "factor": _real(round(factor, 4)),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(round(high, 2)),
        "original_max_position_embeddings": round(context / 64) * 64 or round(context),
    }
    if np.allclose(_llama3_factors(scaling, turns), factors, rtol=2e-3):
        return scaling
    raise CheckpointError(f"{header.path}: {tensor.name} follows no llama3 rope scaling with low_freq_factor 1")


def _llama3_borders(factors: np.ndarray, factor: float, turns: np.ndarray) -> tuple[float, float]:
    """-> (high_freq_factor, original context). Real heads have several frequencies in between; tiny ones may not."""
    between = (factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4))
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    if between.sum() >= 2:
        slope, start = np.polyfit(turns[between], smooth, 1)
        return 1 - 1 / start, -slope / start
    high = 4.0  # Llama's own
    if between.any():
        return high, float((smooth[0] * (high - 1) + 1) / turns[between][0])
    kept, scaled = turns[factors < 1 + 1e-4], turns[factors >= factor * (1 - 1e-4)]
    least = high / kept.min() if kept.size else 1.0
    most = 1 / scaled.max()
    return high, 2.0 ** round(math.log2(math.sqrt(least * most)))


def _llama3_factors(scaling: Mapping[str, Any], turns: np.ndarray) -> np.ndarray:
    """1/wavelength [D/2] -> what each frequency is divided by [D/2]."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] * turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_END_TOKENS = {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}  # Llama 3's three, of which the metadata names one or two


def generation_config(header: GGUFHeader) -> dict[str, Any]:
    """generation_config.json: the ids that end an answer, and the sampling defaults where the file has some."""
    metadata = header.metadata
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3"):
        ends += [i for i, token in enumerate(metadata.get("tokenizer.ggml.tokens", ())) if token in _END_TOKENS]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    config: dict[str, Any] = {"bos_token_id": metadata.get("tokenizer.ggml.bos_token_id")}
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    sampling = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING_KEYS.items()
        if f"general.sampling.{key}" in metadata
    }
    config |= {name: _real(value) if isinstance(value, float) else value for name, value in sampling.items()}
    return {name: value for name, value in config.items() if value is not None}


def write_hf_files(gguf_path: str, folder: str) -> None:
    """Write config.json, generation_config.json, tokenizer.json and tokenizer_config.json from the GGUF's metadata.

    Each file appears whole or not at all; has_hf_files is true when all are there.
    Raises CheckpointError for an architecture or a tokenizer that is not known.
    """
    header = read_header(gguf_path)
    documents = {
        "tokenizer.json": build_tokenizer(header.path, header.metadata).to_str(),
        "tokenizer_config.json": _json(tokenizer_config(header.path, header.metadata)),
        "generation_config.json": _json(generation_config(header)),
        "config.json": _json(model_config(header)),
    }
    documents[_FILES_DONE] = ""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=folder) as scratch:
        for name, text in documents.items():
            path = os.path.join(scratch, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(path, os.path.join(folder, name))


def has_hf_files(folder: str) -> bool:
    """True when write_hf_files has finished in this folder."""
    return os.path.isfile(os.path.join(folder, _FILES_DONE))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
