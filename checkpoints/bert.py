"""The names and shapes of a BERT's tensors, in Hugging Face's words and orientation ([out, in])."""

from collections.abc import Collection, Mapping

PREFIX = "bert."  # of checkpoints that were saved with a head on top
_FIRST = "embeddings.word_embeddings.weight"
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def stored_name(name: str, stored: Collection[str]) -> str:
    """The name of a BertModel's tensor as a checkpoint has it: with the prefix of a model around it, with the names
    that TensorFlow had for norms, or as it is."""
    prefixed = PREFIX + name if PREFIX + _FIRST in stored else name
    if prefixed not in stored:
        for new, old in _OLD_NAMES.items():
            if (renamed := prefixed.replace(new, old)) in stored:
                return renamed
    return prefixed


def tensor_shapes(dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """dims {"L", "E", "F", "V", "positions", "types"} -> every tensor that embeddings need, and its shape."""
    size, mlp = dims["E"], dims["F"]
    shapes: dict[str, tuple[int, ...]] = {
        _FIRST: (dims["V"], size),
        "embeddings.position_embeddings.weight": (dims["positions"], size),
        "embeddings.token_type_embeddings.weight": (dims["types"], size),
    }
    norms, products = ["embeddings.LayerNorm"], {}
    for layer in range(dims["L"]):
        prefix = f"encoder.layer.{layer}."
        products |= {f"{prefix}attention.self.{part}": (size, size) for part in ("query", "key", "value")}
        products |= {
            prefix + "attention.output.dense": (size, size),
            prefix + "intermediate.dense": (mlp, size),
            prefix + "output.dense": (size, mlp),
        }
        norms += [prefix + "attention.output.LayerNorm", prefix + "output.LayerNorm"]
    for name, shape in {**products, **dict.fromkeys(norms, (size,))}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
