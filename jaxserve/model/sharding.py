"""The mesh, and one table: parameter -> (Hugging Face tensors it is made of, PartitionSpec, orientation)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.model.llama import Joint, Layout, Linear, Llama

P = PartitionSpec

Table = dict[str, tuple[tuple[str, ...], PartitionSpec]]

_LAYER = "model.layers.{}."
# Parameter path -> (Hugging Face tensors, spec of the [out, in] orientation). "{}" is the layer's number. Several
# tensors are the parts of a Joint: one leaf each, or one leaf with all of them along its output axis.
TABLE: Table = {
    "embed.kernel": (("model.embed_tokens.weight",), P("tp", None)),
    "layers.{}.attn_norm.scale": ((_LAYER + "input_layernorm.weight",), P()),
    "layers.{}.attn.qkv.kernel": (tuple(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"), P("tp", None)),
    "layers.{}.attn.qkv.bias": (tuple(f"{_LAYER}self_attn.{x}_proj.bias" for x in "qkv"), P("tp")),
    "layers.{}.attn.o.kernel": ((_LAYER + "self_attn.o_proj.weight",), P(None, "tp")),
    "layers.{}.attn.o.bias": ((_LAYER + "self_attn.o_proj.bias",), P()),
    "layers.{}.mlp_norm.scale": ((_LAYER + "post_attention_layernorm.weight",), P()),
    "layers.{}.mlp.gate_up.kernel": (tuple(f"{_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up")), P("tp", None)),
    "layers.{}.mlp.gate_up.bias": (tuple(f"{_LAYER}mlp.{x}_proj.bias" for x in ("gate", "up")), P("tp")),
    "layers.{}.mlp.down.kernel": ((_LAYER + "mlp.down_proj.weight",), P(None, "tp")),
    "layers.{}.mlp.down.bias": ((_LAYER + "mlp.down_proj.bias",), P()),
    "head.norm.scale": (("model.norm.weight",), P()),
    "head.out.kernel": (("lm_head.weight",), P("tp", None)),
}


@dataclass(frozen=True)
class Parameter:
    """One leaf of the model: where it comes from and where it goes."""

    path: str
    sources: tuple[str, ...]  # Hugging Face tensors, [out, in]; several are joined along their first axis
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


def describe(
    config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | AbstractMesh | AbstractMesh, platform: str
) -> tuple[Structure, Params]:
    """The model for a platform: its structure, and Params whose leaves are Parameter descriptions. Takes no memory."""
    model = nnx.eval_shape(lambda: Llama(config, dtype, Layout.of(platform)))

    tied = {"head.out.kernel": (TABLE["embed.kernel"][0], TABLE["head.out.kernel"][1])}
    table = TABLE | (tied if config.tie_embeddings else {})
    embed, embed_leaves = describe_module(model.embed, "embed", mesh, table)
    head, head_leaves = describe_module(model.head, "head", mesh, table)
    layers = [describe_module(layer, f"layers.{index}", mesh, table) for index, layer in enumerate(model.layers)]
    return Structure(embed, layers[0][0], head), Params(embed_leaves, [leaves for _, leaves in layers], head_leaves)


def describe_module(
    module: nnx.Module, prefix: str, mesh: Mesh | AbstractMesh | AbstractMesh, table: Table
) -> tuple[tuple[nnx.GraphDef, Any], list[Parameter]]:
    """An abstract module whose own path is prefix -> its definition for merge(), and its leaves' descriptions."""
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    found = [_parameter(table, module, prefix, _path(keys), leaf, mesh) for keys, leaf in leaves]
    return (graphdef, treedef), found


def _path(keys: tuple) -> tuple[str, ...]:
    names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)
    return names[:-1] if names[-1] == "value" else names


def _parameter(
    table: Table,
    module: nnx.Module,
    prefix: str,
    path: tuple[str, ...],
    leaf: jax.ShapeDtypeStruct,
    mesh: Mesh | AbstractMesh | AbstractMesh,
) -> Parameter:
    """The description of one leaf of a module whose own path is prefix."""
    owners = [module]
    for name in path[:-1]:
        owners.append(owners[-1][int(name)] if name.isdigit() else getattr(owners[-1], name))
    joint = next((owner for owner in owners if isinstance(owner, Joint)), None)
    name = prefix + "." + ".".join(path)
    generic = re.sub(r"\.parts\.\d+", "", re.sub(r"(?<=layers\.)\d+", "{}", name))
    sources, spec = table[generic]
    if joint is not None and len(joint.parts) > 1:
        sources = (sources[int(path[path.index("parts") + 1])],)
    layer = re.search(r"layers\.(\d+)", name)
    transpose = path[-1] == "kernel" and isinstance(owners[-1], Linear) and not owners[-1].out_in
    return Parameter(
        path=name,
        sources=tuple(source.format(layer.group(1) if layer else "") for source in sources),
        transpose=transpose,
        shape=tuple(leaf.shape),
        dtype=leaf.dtype,
        sharding=NamedSharding(mesh, P(*reversed(spec)) if transpose else spec),
    )
