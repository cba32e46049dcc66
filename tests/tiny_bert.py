"""A tiny random BERT for tests: its Hugging Face folder, and an independent float64 forward."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_llama import write_safetensors
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.bert import tensor_shapes

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "sea", "is", "blue", "##s", *"abcdefghijklmnopqrstuvwxyz")


def write_tiny_bert(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    layers: int = 2,
    embed: int = 48,
    heads: int = 4,
    mlp: int = 96,
    max_position: int = 64,
    rename: Callable[[str], str] = lambda name: name,
    pooling: str | None = "mean_tokens",
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write config.json, tokenizer.json, safetensors and 1_Pooling/config.json; returns the weights.

    They have BertModel's names. rename: the names that the file has. pooling None: no folder of it.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    vocab = tokenizer.get_vocab_size()
    shapes = tensor_shapes({"L": layers, "E": embed, "F": mlp, "V": vocab, "positions": max_position, "types": 2})
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape) * (1.2 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.2)
        weights[name] = (values + (1.0 if name.endswith("LayerNorm.weight") else 0.0)).astype(np.float32)
    values = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_position,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    tokenizer.save(str(path / "tokenizer.json"))
    _dump(path / "config.json", values | config)
    _dump(path / "tokenizer_config.json", {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"})
    write_safetensors(path / "model.safetensors", {rename(name): values for name, values in weights.items()})
    if pooling is not None:
        (path / "1_Pooling").mkdir(exist_ok=True)
        _dump(path / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True, "pooling_mode_max_tokens": False})
    return weights


def tiny_tokenizer() -> Tokenizer:
    """WordPiece over a few words and letters, as BERT's: lower case, [CLS] before and [SEP] after a text."""
    vocab = {word: index for index, word in enumerate(WORDS)} | {f"##{c}": len(WORDS) + i for i, c in enumerate("xyz")}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(WORDS[:4]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(16)  # as published ones have it; a server must not cut silently
    tokenizer.enable_padding(length=16)
    return tokenizer


def forward(weights: Mapping[str, np.ndarray], ids: list[int], *, heads: int = 4, pooling: str = "mean") -> np.ndarray:
    """ids -> [E] float64 of length 1. Written from the paper, one text at a time, nothing shared with the model."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    embeddings = [w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")]
    x = norm(embeddings[0][ids] + embeddings[1][: len(ids)] + embeddings[2][0], "embeddings.LayerNorm")
    layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("encoder.layer."))
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{prefix}.attention.self.{part}") for part in ("query", "key", "value"))
        mixed = np.empty_like(x)
        for part in np.split(np.arange(x.shape[1]), heads):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
        x = norm(x + linear(mixed, f"{prefix}.attention.output.dense"), f"{prefix}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{prefix}.intermediate.dense"))
        x = norm(x + linear(inner, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
    vector = {"mean": x.mean(0), "cls": x[0], "last": x[-1]}[pooling]
    return vector / np.linalg.norm(vector)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
