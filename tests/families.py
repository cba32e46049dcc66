"""Tiny random models of every architecture that is served, the same here and where transformers' logits were recorded.

tests/record_families.py records them; tests/test_families.py compares. Needs numpy only.
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "data" / "families.npz"
VOCAB = 64
_SMALL: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _case(architecture: str, **changed: Any) -> dict[str, Any]:
    kind = {"Llama": "llama", "Mistr": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}[architecture[:5]]
    return {"architectures": [architecture], "model_type": kind} | _SMALL | changed


# Name -> config.json. What each has that the ones before it have not stands behind it.
CASES: dict[str, dict[str, Any]] = {
    "llama-2": _case("LlamaForCausalLM", num_key_value_heads=4),
    "llama-3": _case("LlamaForCausalLM", rope_theta=500000.0),  # grouped queries
    "llama-3.1": _case("LlamaForCausalLM", rope_theta=500000.0, rope_scaling=_LLAMA31),
    "llama-3.2": _case("LlamaForCausalLM", rope_scaling=_LLAMA31, tie_word_embeddings=True, head_dim=16),
    "llama-biased": _case("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "smollm2": _case("LlamaForCausalLM", num_attention_heads=9, num_key_value_heads=3, hidden_size=72, head_dim=8),
    "mistral": _case("MistralForCausalLM", sliding_window=9),  # windows in all layers
    "mistral-nemo": _case("MistralForCausalLM", sliding_window=None, head_dim=20),  # heads wider than the model
    "qwen2": _case("Qwen2ForCausalLM", rope_theta=1000000.0, tie_word_embeddings=True),  # biases of q, k and v
    "qwen2-window": _case(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=1, num_hidden_layers=3
    ),
    "qwen3": _case("Qwen3ForCausalLM", head_dim=24, rope_theta=1000000.0, tie_word_embeddings=True),  # q and k normed
    "qwen3-biased": _case("Qwen3ForCausalLM", head_dim=16, attention_bias=True),
    "qwen3-layers": _case(
        "Qwen3ForCausalLM",
        head_dim=16,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "e5-mistral": _case("MistralModel", sliding_window=9),  # no head, names without "model."
    "qwen3-embedding": _case("Qwen3ForCausalLM", head_dim=24, tie_word_embeddings=True, num_key_value_heads=4),
}
EMBEDDERS = ("e5-mistral", "qwen3-embedding")


def prompt_of(name: str) -> list[int]:
    """40 tokens, none of them special."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(3, VOCAB, 40).tolist()


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its Hugging Face name without "model."; float32 of a size at which no activation explodes."""
    values = np.random.default_rng(zlib.crc32(f"{case} {name}".encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    elif name.endswith(".bias"):
        values = 0.1 * values
    elif "embed_tokens" in name:
        values = 0.2 * values
    else:
        values = values * 1.5 / math.sqrt(shape[1])
    return values.astype(np.float32)


def weights(case: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """shapes: Hugging Face name -> shape, with or without "model."."""
    return {name: weight(case, name.removeprefix("model."), tuple(shape)) for name, shape in shapes.items()}
