"""The mesh, and one table: parameter -> (Hugging Face tensors it is made of, PartitionSpec, orientation)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.model.llama import Llama

P = PartitionSpec

# Parameter path -> (Hugging Face tensor, spec of the [out, in] orientation). "{}" is the layer's number.
TABLE: dict[str, tuple[str, PartitionSpec]] = {
    "embed.kernel": ("model.embed_tokens.weight", P("tp", None)),
    "layers.{}.attn_norm.scale": ("model.layers.{}.input_layernorm.weight", P()),
    "layers.{}.attn.q.kernel": ("model.layers.{}.self_attn.q_proj.weight", P("tp", None)),
    "layers.{}.attn.k.kernel": ("model.layers.{}.self_attn.k_proj.weight", P("tp", None)),
    "layers.{}.attn.v.kernel": ("model.layers.{}.self_attn.v_proj.weight", P("tp", None)),
    "layers.{}.attn.o.kernel": ("model.layers.{}.self_attn.o_proj.weight", P(None, "tp")),
    "layers.{}.attn.q.bias": ("model.layers.{}.self_attn.q_proj.bias", P("tp")),
    "layers.{}.attn.k.bias": ("model.layers.{}.self_attn.k_proj.bias", P("tp")),
    "layers.{}.attn.v.bias": ("model.layers.{}.self_attn.v_proj.bias", P("tp")),
    "layers.{}.attn.o.bias": ("model.layers.{}.self_attn.o_proj.bias", P()),
    "layers.{}.mlp_norm.scale": ("model.layers.{}.post_attention_layernorm.weight", P()),
    "layers.{}.mlp.gate.kernel": ("model.layers.{}.mlp.gate_proj.weight", P("tp", None)),
    "layers.{}.mlp.up.kernel": ("model.layers.{}.mlp.up_proj.weight", P("tp", None)),
    "layers.{}.mlp.down.kernel": ("model.layers.{}.mlp.down_proj.weight", P(None, "tp")),
    "layers.{}.mlp.gate.bias": ("model.layers.{}.mlp.gate_proj.bias", P("tp")),
    "layers.{}.mlp.up.bias": ("model.layers.{}.mlp.up_proj.bias", P("tp")),
    "layers.{}.mlp.down.bias": ("model.layers.{}.mlp.down_proj.bias", P()),
    "head.norm.scale": ("model.norm.weight", P()),
    "head.out.kernel": ("lm_head.weight", P("tp", None)),
}

# Kept as they come on TPU: the compiler would otherwise copy them into this layout in every step.
OUT_IN_ON_TPU = frozenset(
    {"layers.{}.attn.q.kernel", "layers.{}.attn.k.kernel", "layers.{}.attn.v.kernel", "head.out.kernel"}
)


@dataclass(frozen=True)
class Parameter:
    """One leaf of the model: where it comes from and where it goes."""

    path: str
    source: str  # Hugging Face tensor name, in [out, in] orientation
    transpose: bool  # the leaf is [in, out]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    sharding: NamedSharding

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices on one axis, "tp" (tensor parallel)."""
    return Mesh(np.asarray(devices), ("tp",))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """The model's leaves as flat lists: they cross the jit door 20 times cheaper than nnx's State does."""

    embed: list[Any]
    layers: list[list[Any]]
    head: list[Any]


@dataclass(frozen=True)
class Structure:
    """How leaves become modules again: module = nnx.merge(*definition, ...)."""

    embed: tuple[nnx.GraphDef, Any]  # graph definition, tree definition of the state
    layer: tuple[nnx.GraphDef, Any]  # the same for every layer
    head: tuple[nnx.GraphDef, Any]


def merge(definition: tuple[nnx.GraphDef, Any], leaves: Sequence[Any]) -> Any:
    """Leaves -> the nnx module they are the leaves of."""
    graphdef, treedef = definition
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def describe(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, platform: str) -> tuple[Structure, Params]:
    """The model for a platform: its structure, and Params whose leaves are Parameter descriptions. Takes no memory."""
    model = nnx.eval_shape(lambda: Llama(config, dtype, transposed=platform == "tpu"))

    def split(module: nnx.Module, prefix: str) -> tuple[tuple[nnx.GraphDef, Any], list[Parameter]]:
        graphdef, state = nnx.split(module)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        found = [_parameter(config, f"{prefix}.{_path(keys)}", leaf, mesh, platform) for keys, leaf in leaves]
        return (graphdef, treedef), found

    embed, embed_leaves = split(model.embed, "embed")
    head, head_leaves = split(model.head, "head")
    layers = [split(layer, f"layers.{index}") for index, layer in enumerate(model.layers)]
    return Structure(embed, layers[0][0], head), Params(embed_leaves, [leaves for _, leaves in layers], head_leaves)


def _path(keys: tuple) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in keys]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def _parameter(config: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh, platform: str) -> Parameter:
    generic = re.sub(r"(?<=layers\.)\d+", "{}", path)
    layer = re.search(r"layers\.(\d+)", path)
    source, spec = TABLE[generic]
    if generic == "head.out.kernel" and config.tie_embeddings:
        source, _ = TABLE["embed.kernel"]
    is_product = generic.endswith("kernel") and generic != "embed.kernel"
    transpose = is_product and not (platform == "tpu" and generic in OUT_IN_ON_TPU)
    return Parameter(
        path=path,
        source=source.format(layer.group(1) if layer else ""),
        transpose=transpose,
        shape=tuple(leaf.shape),
        dtype=leaf.dtype,
        sharding=NamedSharding(mesh, P(*reversed(spec)) if transpose else spec),
    )
