"""The mesh, and one table: parameter -> the Hugging Face tensors it is made of, and which axes "tp" shares out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.model.llama import Joint, Layout, Linear, Llama
from jaxserve.model.partition import Shares, merged

P = PartitionSpec


@dataclass(frozen=True, slots=True)
class Tensor:
    """A Hugging Face tensor ("{}" is the layer's number), and its axes by name in the [out, in] orientation."""

    name: str
    axes: tuple[str, ...]


Table = Mapping[str, tuple[Tensor, ...]]

SHARED_OUT = ("heads", "kv_heads", "mlp", "vocab")  # axes that "tp" shares out; every device holds all of the others
_LAYER = "model.layers.{}."


def tensors(prefix: str, suffix: str, parts: Mapping[str, str]) -> tuple[Tensor, ...]:
    """parts: the middle of a name -> its axes, separated by spaces."""
    return tuple(Tensor(prefix + part + suffix, tuple(axes.split())) for part, axes in parts.items())


# Parameter path -> its tensors. Several are the parts of a Joint: one leaf each, or one leaf with all of them along its
# output axis.
_QKV = {"q": "heads embed", "k": "kv_heads embed", "v": "kv_heads embed"}
TABLE: Table = {
    "embed.kernel": tensors("model.embed_tokens", ".weight", {"": "vocab embed"}),
    "layers.{}.attn_norm.scale": tensors(_LAYER, ".weight", {"input_layernorm": "embed"}),
    "layers.{}.attn.qkv.kernel": tensors(_LAYER + "self_attn.", "_proj.weight", _QKV),
    "layers.{}.attn.qkv.kernel_scale": tensors(
        _LAYER + "self_attn.", "_proj.weight_scale", {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
    ),
    "layers.{}.attn.qkv.bias": tensors(
        _LAYER + "self_attn.", "_proj.bias", {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
    ),
    "layers.{}.attn.q_norm.scale": tensors(_LAYER, ".weight", {"self_attn.q_norm": "head_dim"}),
    "layers.{}.attn.k_norm.scale": tensors(_LAYER, ".weight", {"self_attn.k_norm": "head_dim"}),
    "layers.{}.attn.o.kernel": tensors(_LAYER, ".weight", {"self_attn.o_proj": "embed heads"}),
    "layers.{}.attn.o.kernel_scale": tensors(_LAYER, ".weight_scale", {"self_attn.o_proj": "embed"}),
    "layers.{}.attn.o.bias": tensors(_LAYER, ".bias", {"self_attn.o_proj": "embed"}),
    "layers.{}.mlp_norm.scale": tensors(_LAYER, ".weight", {"post_attention_layernorm": "embed"}),
    "layers.{}.mlp.gate_up.kernel": tensors(_LAYER + "mlp.", "_proj.weight", {"gate": "mlp embed", "up": "mlp embed"}),
    "layers.{}.mlp.gate_up.kernel_scale": tensors(_LAYER + "mlp.", "_proj.weight_scale", {"gate": "mlp", "up": "mlp"}),
    "layers.{}.mlp.gate_up.bias": tensors(_LAYER + "mlp.", "_proj.bias", {"gate": "mlp", "up": "mlp"}),
    "layers.{}.mlp.down.kernel": tensors(_LAYER, ".weight", {"mlp.down_proj": "embed mlp"}),
    "layers.{}.mlp.down.kernel_scale": tensors(_LAYER, ".weight_scale", {"mlp.down_proj": "embed"}),
    "layers.{}.mlp.down.bias": tensors(_LAYER, ".bias", {"mlp.down_proj": "embed"}),
    "head.norm.scale": tensors("model.norm", ".weight", {"": "embed"}),
    "head.out.kernel": tensors("lm_head", ".weight", {"": "vocab embed"}),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of a leaf along its shared-out axis: rows of a tensor, or zeros."""

    tensor: str | None
    start: int
    count: int


@dataclass(frozen=True)
class Parameter:
    """One leaf of the model: where it comes from and where it goes. axis and rows: [out, in] orientation."""

    path: str
    tensors: Mapping[str, tuple[int, ...]]  # Hugging Face tensors and their shapes, [out, in]
    axis: int  # along which rows of the tensors are put one after another
    rows: tuple[Rows, ...]
    transpose: bool  # the leaf is [in, out]
    shape: tuple[int, ...]  # of all devices together
    dtype: jnp.dtype
    sharding: NamedSharding

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


def make_mesh(devices: Sequence[jax.Device], dp: int = 1) -> Mesh:
    """Axis "dp": groups of devices that each serve rows of their own; axis "tp": the devices of a group, which share
    out the heads of every layer. Neighbours on the wires are neighbours on "tp"."""
    shape = (dp, len(devices) // dp)
    return jax.make_mesh(shape, ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


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
    config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | AbstractMesh, platform: str
) -> tuple[Structure, Params]:
    """The model for a platform: its structure, which computes one device's share, and Params whose leaves are Parameter
    descriptions. Takes no memory."""
    shares = Shares.of(config, mesh.shape["tp"])
    model = nnx.eval_shape(lambda: Llama(config, shares, dtype, Layout.of(platform)))
    tied = {"head.out.kernel": TABLE["embed.kernel"]} if config.tie_embeddings else {}
    holder = _Describer({**TABLE, **tied}, _sizes(config), mesh, shares)
    embed, embed_leaves = holder.module(model.embed, "embed")
    head, head_leaves = holder.module(model.head, "head")
    layers = [holder.module(layer, f"layers.{index}") for index, layer in enumerate(model.layers)]
    return Structure(embed, layers[0][0], head), Params(embed_leaves, [leaves for _, leaves in layers], head_leaves)


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "embed": config.embed_dim,
        "head_dim": config.head_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }


def describe_module(
    module: nnx.Module, prefix: str, mesh: Mesh | AbstractMesh, table: Table, sizes: Mapping[str, int]
) -> tuple[tuple[nnx.GraphDef, Any], list[Parameter]]:
    """An abstract module whose own path is prefix -> its definition for merge(), and its leaves' descriptions; every
    device holds all of it. sizes: of the axes that the table names."""
    return _Describer(table, sizes, mesh, None).module(module, prefix)


@dataclass(frozen=True)
class _Describer:
    """shares None: nothing is shared out."""

    table: Table
    sizes: Mapping[str, int]
    mesh: Mesh | AbstractMesh
    shares: Shares | None

    def module(self, module: nnx.Module, prefix: str) -> tuple[tuple[nnx.GraphDef, Any], list[Parameter]]:
        graphdef, state = nnx.split(module)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        return (graphdef, treedef), [self._parameter(module, prefix, _path(keys), leaf) for keys, leaf in leaves]

    def _parameter(
        self, module: nnx.Module, prefix: str, path: tuple[str, ...], leaf: jax.ShapeDtypeStruct
    ) -> Parameter:
        """leaf: one device's share, of a module whose own path is prefix."""
        owners = [module]
        for name in path[:-1]:
            owners.append(owners[-1][int(name)] if name.isdigit() else getattr(owners[-1], name))
        joint = next((owner for owner in owners if isinstance(owner, Joint)), None)
        name = prefix + "." + ".".join(path)
        found = self.table[re.sub(r"\.parts\.\d+", "", re.sub(r"(?<=layers\.)\d+", "{}", name))]
        if joint is not None and len(joint.parts) > 1:
            found = (found[int(path[path.index("parts") + 1])],)
        layer = re.search(r"layers\.(\d+)", name)
        number = layer.group(1) if layer else ""
        found = tuple(Tensor(tensor.name.format(number), tensor.axes) for tensor in found)
        axis, rows = self._rows(found)
        transpose = path[-1] == "kernel" and isinstance(owners[-1], Linear) and not owners[-1].out_in
        shared_out = found[0].axes[axis] in SHARED_OUT and self.shares is not None
        spec = [("tp" if shared_out and i == axis else None) for i in range(len(found[0].axes))]
        shape = [self.sizes[each] for each in found[0].axes]
        shape[axis] = sum(part.count for part in rows)
        if transpose:
            spec, shape = spec[::-1], shape[::-1]
        sharding = NamedSharding(self.mesh, P(*spec) if shared_out else P())
        assert sharding.shard_shape(tuple(shape)) == leaf.shape, f"{name} {shape} is no {leaf.shape} on each device"
        return Parameter(
            path=name,
            tensors={tensor.name: tuple(self.sizes[axis] for axis in tensor.axes) for tensor in found},
            axis=axis,
            rows=rows,
            transpose=transpose,
            shape=tuple(shape),
            dtype=leaf.dtype,
            sharding=sharding,
        )

    def _rows(self, found: tuple[Tensor, ...]) -> tuple[int, tuple[Rows, ...]]:
        """-> the axis along which the tensors are joined or shared out, and what lies along it: device by device, and
        on each the tensors' parts."""
        axis = next((i for i, name in enumerate(found[0].axes) if name in SHARED_OUT), 0)
        rows: list[Rows] = []
        for device in range(1 if self.shares is None else self.shares.tp):
            for tensor in found:
                name = tensor.axes[axis]
                if self.shares is None or name not in SHARED_OUT:
                    segments: tuple[tuple[int | None, int], ...] = ((0, self.sizes[name]),)
                else:
                    segments = merged(self.shares.segments(name, device))
                rows += [Rows(None if start is None else tensor.name, start or 0, count) for start, count in segments]
            if found[0].axes[axis] not in SHARED_OUT:
                break
        return axis, tuple(rows)


def _path(keys: tuple) -> tuple[str, ...]:
    names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)
    return names[:-1] if names[-1] == "value" else names
