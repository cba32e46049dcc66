"""A tiny random Llama for tests: its Hugging Face folder, the same as GGUF, and an independent float64 forward."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from checkpoints.llama import tensor_shapes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; the last ends an answer
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WORDS = (" the", " and", " of", " to", " is", " a", " in", " sea", "ing", "er", " hello", " world", "Hello", "system")
_SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "int64": "I64",
    "bool": "BOOL",
}


def write_tiny_llama(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    layers: int = 2,
    embed: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp: int = 96,
    max_position: int = 512,
    tie: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: str = "float32",
    shards: int = 1,
) -> str:
    """Write config.json, generation_config.json, the tokenizer and safetensors into folder; returns the folder.

    The same arguments give the same model. dtype is that of the stored weights; rope_scaling as in config.json
    (LLAMA3_SCALING is one).
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    dims = {"L": layers, "E": embed, "H": heads, "K": kv_heads, "D": head_dim, "F": mlp}
    dims["V"] = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": dims["V"],
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": dict(rope_scaling) if rope_scaling else None,
        "tie_word_embeddings": tie,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    tokenizer.save(str(path / "tokenizer.json"))
    _dump(path / "config.json", config)
    _dump(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _dump(path / "tokenizer_config.json", tokenizer_config(max_position))
    shapes = tensor_shapes(dims, tie=tie, attention_bias=attention_bias, mlp_bias=mlp_bias)
    _write_shards(path, random_weights(shapes, seed, dtype), shards)
    return str(path)


def tokenizer_config(max_position: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "unk_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[2],
        "model_max_length": max_position,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str) -> dict[str, np.ndarray]:
    """Weights at which activations neither vanish nor explode and no logit dominates."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif name.endswith(".bias"):
            values = 0.1 * values
        elif "embed_tokens" in name:
            values = 0.2 * values
        else:
            values = values * 1.5 / math.sqrt(shape[1])
        weights[name] = values.astype(np_dtype(dtype))
    return weights


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE: three special tokens, 256 bytes and the pieces of a few words."""
    tokens, merges = tiny_vocabulary()
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def tiny_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """-> (tokens by id, merges)."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left = ""
        for character in word.replace(" ", "Ġ"):
            if left and left + character not in tokens:
                merges.append((left, character))
                tokens.append(left + character)
            left += character
    return tokens, merges


def np_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in tensors.items():
        entry = {"dtype": _SAFETENSORS_NAMES[str(array.dtype)], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def read_safetensors(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a folder; deliberately not the reader of checkpoints.files."""
    kinds = {kind: np_dtype(name) for name, kind in _SAFETENSORS_NAMES.items()}
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:base]).items():
            if name != "__metadata__":
                start, end = (base + offset for offset in entry["data_offsets"])
                tensors[name] = np.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _write_shards(path: Path, weights: Mapping[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        write_safetensors(path / "model.safetensors", weights)
        return
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        write_safetensors(path / file, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    _dump(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tiny_gguf(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, quantise: str = "F32") -> None:
    """The model of an HF folder (write_tiny_llama's, or a Qwen) as a GGUF file, with llama.cpp's names, order and rope
    factors.

    quantise names a ggml type for the matrices; their rows must be multiples of its block.
    """
    import gguf

    config = json.loads((Path(folder) / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(str(path), architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens, merges = tiny_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        frequencies = inverse_frequencies(config | {"rope_scaling": None}) / inverse_frequencies(config)
        writer.add_tensor("rope_freqs.weight", frequencies.astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for name, values in read_safetensors(folder).items():
        values = values.astype(np.float32)
        paired = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}
        if (count := paired.get(name.split(".")[-2])) is not None:
            halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[quantise if values.ndim == 2 else "F32"]
        writer.add_tensor(
            str(names.get_name(name, (".weight", ".bias"))), gguf.quants.quantize(values, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def inverse_frequencies(config: Mapping[str, Any]) -> np.ndarray:
    """[D/2] radians per position; rope scaling as in Llama 3.1's reference code (apply_scaling)."""
    head_dim = config["head_dim"]
    frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.get("rope_scaling")
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            scaled.append(frequency)
        elif wavelength > context / low:
            scaled.append(frequency / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


def numpy_forward(
    folder: str | os.PathLike[str],
    token_ids: Sequence[int],
    weights: Mapping[str, np.ndarray] | None = None,
    round_kv: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """token_ids [T] -> logits [T, V] in float64, one position after another's keys in plain numpy.

    weights replaces the folder's safetensors (Hugging Face names), say by dequantised ones. round_kv: what a cache
    makes of k and of v [T, K, D].
    """
    hidden, head = numpy_hidden(folder, token_ids, weights, round_kv)
    return hidden @ head.T


def numpy_hidden(
    folder: str | os.PathLike[str],
    token_ids: Sequence[int],
    weights: Mapping[str, np.ndarray] | None = None,
    round_kv: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """token_ids [T] -> hidden states after the final norm [T, E] and the head [V, E], as numpy_forward."""
    config = json.loads((Path(folder) / "config.json").read_text())
    stored = read_safetensors(folder) if weights is None else weights
    params = {name: np.asarray(values).astype(np.float64) for name, values in stored.items()}
    ids = np.asarray(token_ids)
    angles = np.arange(len(ids))[:, None] * inverse_frequencies(config)  # [T, D/2]
    x = params["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        part = {
            name.removeprefix(f"model.layers.{layer}."): values
            for name, values in params.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(_norm(x, part["input_layernorm.weight"], config), part, angles, config, round_kv)
        hidden = _norm(x, part["post_attention_layernorm.weight"], config)
        gate = _linear(hidden, part, "mlp.gate_proj")
        x = x + _linear(gate / (1 + np.exp(-gate)) * _linear(hidden, part, "mlp.up_proj"), part, "mlp.down_proj")
    x = _norm(x, params["model.norm.weight"], config)
    head = params["model.embed_tokens.weight"] if config["tie_word_embeddings"] else params["lm_head.weight"]
    return x, head


def _norm(x: np.ndarray, scale: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale


def _linear(x: np.ndarray, part: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0.0)


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [T, heads, D], angles [T, D/2] -> rotated; the first half of D pairs with the second."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(
    x: np.ndarray,
    part: Mapping[str, np.ndarray],
    angles: np.ndarray,
    config: Mapping[str, Any],
    round_kv: Callable[[np.ndarray], np.ndarray] | None,
) -> np.ndarray:
    num_tokens, head_dim = len(x), config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    q, k, v = (_linear(x, part, f"self_attn.{n}_proj").reshape(num_tokens, -1, head_dim) for n in "qkv")
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (k, v) if round_kv is None else (round_kv(k), round_kv(v))
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(head_dim)
    scores = np.where(np.tril(np.ones((num_tokens, num_tokens), bool)), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
    return _linear(out.reshape(num_tokens, -1), part, "self_attn.o_proj")
