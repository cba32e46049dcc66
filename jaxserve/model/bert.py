"""BERT in Flax: text -> one vector. The modules say names, shapes and equations; encode() calls them on flat leaves.

B rows (texts), T tokens of a row, N = B * T, E embed, H heads, D head dim, F mlp. Sources: Devlin et al. 2019 (BERT),
Reimers and Gurevych 2019 (pooling).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxserve.config import EncoderConfig
from jaxserve.model.llama import Joint, Layout, Linear
from jaxserve.model.sharding import Params, Table, Tensor, describe_module, merge, tensors

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

_LAYER = "encoder.layer.{}."


def _pair(module: str, tensor: str, axes: str) -> dict[str, tuple[Tensor, ...]]:
    """A module's kernel (or scale) and bias, from the tensor's weight and bias. axes: of the weight."""
    leaf = "scale" if "norm" in module else "kernel"
    weight, bias = tensors(tensor, ".weight", {"": axes}), tensors(tensor, ".bias", {"": axes.split()[0]})
    return {f"{module}.{leaf}": weight, f"{module}.bias": bias}


_QKV = ("query", "key", "value")
_SELF = _LAYER + "attention.self."
# As model.sharding.TABLE. Every device holds the whole encoder.
TABLE: Table = {
    **{
        f"embed.{part}": tensors("embeddings.", "_embeddings.weight", {part: f"{part} embed"})
        for part in ("word", "position", "token_type")
    },
    **_pair("embed.norm", "embeddings.LayerNorm", "embed"),
    "layers.{}.qkv.kernel": tensors(_SELF, ".weight", dict.fromkeys(_QKV, "embed embed")),
    "layers.{}.qkv.bias": tensors(_SELF, ".bias", dict.fromkeys(_QKV, "embed")),
    **_pair("layers.{}.o", _LAYER + "attention.output.dense", "embed embed"),
    **_pair("layers.{}.attn_norm", _LAYER + "attention.output.LayerNorm", "embed"),
    **_pair("layers.{}.up", _LAYER + "intermediate.dense", "mlp embed"),
    **_pair("layers.{}.down", _LAYER + "output.dense", "embed mlp"),
    **_pair("layers.{}.mlp_norm", _LAYER + "output.LayerNorm", "embed"),
}


class LayerNorm(nnx.Module):
    """Over the features of x [N, E] or [E, N]; computed in float32 (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, layout: Layout):
        self.eps = eps
        self.axis = 0 if layout.feature_major else -1
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=self.axis, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=self.axis, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        if self.axis == 0:
            scale, bias = scale[:, None], bias[:, None]
        return (wide * scale + bias).astype(x.dtype)


class Embed(nnx.Module):
    """token ids [B, T] -> [N, E] or [E, N]; positions count from the start of each row, all tokens are of type 0."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, layout: Layout):
        self.feature_major = layout.feature_major
        self.word = nnx.Param(jnp.zeros((config.vocab_size, config.embed_dim), dtype))
        self.position = nnx.Param(jnp.zeros((config.max_position, config.embed_dim), dtype))
        self.token_type = nnx.Param(jnp.zeros((config.num_token_types, config.embed_dim), dtype))
        self.norm = LayerNorm(config.embed_dim, config.norm_eps, dtype, layout)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        num_tokens = token_ids.shape[1]
        x = self.word[...][token_ids] + self.position[...][:num_tokens] + self.token_type[...][0]
        x = x.reshape(-1, x.shape[-1])
        return self.norm(x.T if self.feature_major else x)


class Block(nnx.Module):
    """x [N, E] or [E, N], mask [B, T] -> the same; the norms stand after the sums."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, layout: Layout):
        self.feature_major, self.num_heads = layout.feature_major, config.num_heads
        self.act = ACTIVATIONS[config.activation]
        options: dict[str, Any] = {"bias": True, "dtype": dtype, "layout": layout}
        size, norm = config.embed_dim, (config.embed_dim, config.norm_eps, dtype, layout)
        self.qkv = Joint(size, (size, size, size), out_in=True, **options)
        self.o = Linear(size, size, **options)
        self.attn_norm = LayerNorm(*norm)
        self.up = Linear(size, config.mlp_dim, **options)
        self.down = Linear(config.mlp_dim, size, **options)
        self.mlp_norm = LayerNorm(*norm)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (self._split(part, mask.shape[0]) for part in self.qkv(x))
        out = attend(q, k, v, mask).reshape(-1, self.num_heads * q.shape[-1])
        x = self.attn_norm(x + self.o(out.T if self.feature_major else out))
        return self.mlp_norm(x + self.down(self.act(self.up(x))))

    def _split(self, x: jax.Array, rows: int) -> jax.Array:
        """[N, E], or its transpose -> [B, T, H, D]."""
        x = x.T if self.feature_major else x
        return x.reshape(rows, -1, self.num_heads, x.shape[-1] // self.num_heads)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q, k, v [B, T, H, D], mask [B, T] True where a token is -> [B, T, H, D]; every token sees its whole row."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    # A finite number: a row of padding has no token at all, and must not become NaN.
    scores = jnp.where(mask[:, None, None, :], scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


class Bert(nnx.Module):
    """The whole encoder in a platform's layout, without BERT's own pooler, which embeddings do not use."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, layout: Layout):
        self.embed = Embed(config, dtype, layout)
        self.layers = nnx.List([Block(config, dtype, layout) for _ in range(config.num_layers)])


@dataclass(frozen=True)
class Structure:
    """How leaves become modules again, as model.sharding.Structure."""

    embed: tuple[nnx.GraphDef, Any]
    layer: tuple[nnx.GraphDef, Any]


def describe(config: EncoderConfig, dtype: jnp.dtype, mesh: Mesh, layout: Layout) -> tuple[Structure, Params]:
    """The structure, and Params (no head) whose leaves are Parameter descriptions. Takes no memory."""
    model = nnx.eval_shape(lambda: Bert(config, dtype, layout))
    sizes = {
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "word": config.vocab_size,
        "position": config.max_position,
        "token_type": config.num_token_types,
    }
    embed, embed_leaves = describe_module(model.embed, "embed", mesh, TABLE, sizes)
    layers = [describe_module(layer, f"layers.{index}", mesh, TABLE, sizes) for index, layer in enumerate(model.layers)]
    return Structure(embed, layers[0][0]), Params(embed_leaves, [leaves for _, leaves in layers], [])


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder is compiled for, besides the arrays' shapes."""

    config: EncoderConfig
    layout: Layout
    structure: Structure


def encode(params: Params, batch: jax.Array, *, shape: EncoderShape) -> jax.Array:
    """batch [B, T + 1] int32: token ids, in the last column how many of them count -> [B, E] float32 of length 1."""
    token_ids, lengths = batch[:, :-1], batch[:, -1]
    mask = jnp.arange(token_ids.shape[1])[None, :] < lengths[:, None]
    x = merge(shape.structure.embed, params.embed)(token_ids)
    for leaves in params.layers:
        x = merge(shape.structure.layer, leaves)(x, mask)
    x = (x.T if shape.layout.feature_major else x).reshape(*token_ids.shape, -1).astype(jnp.float32)
    return normalise(pool(x, mask, lengths, shape.config.pooling))


def pool(x: jax.Array, mask: jax.Array, lengths: jax.Array, kind: str) -> jax.Array:
    """x [B, T, E], mask [B, T], lengths [B], kind "mean", "cls" (the first token) or "last" -> [B, E]."""
    if kind == "cls":
        return x[:, 0]
    if kind == "last":
        return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(mask[:, :, None], x, 0).sum(axis=1) / jnp.maximum(lengths, 1)[:, None]


def normalise(x: jax.Array) -> jax.Array:
    """x [B, E] -> the same directions, of length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
