"""Llama in Flax: the modules say names, shapes and equations; the step (engine.step) calls them on flat leaves.

L layers, E embed, H query heads, K kv heads, D head dim, F mlp, V vocab, T tokens. Sources: Touvron et al. 2023
(Llama 2), Grattafiori et al. 2024 (Llama 3; rope scaling as in its reference code), Su et al. 2021 (rotary positions).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import ModelConfig, RopeScaling

# (q [T, H, D], k [T, K, D], v [T, K, D], cache, layer) -> (out [T, H, D], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]


class Linear(nnx.Module):
    """x [T, in] -> [T, out]. The kernel is [in, out], or [out, in] where the target's compiler wants no relayout copy."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, transposed: bool = False):
        self.transposed = transposed
        self.kernel = nnx.Param(jnp.zeros((outputs, inputs) if transposed else (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = jnp.einsum("ti,oi->to" if self.transposed else "ti,io->to", x, self.kernel[...])
        return out if self.bias is None else out + self.bias[...]


class RMSNorm(nnx.Module):
    """x [T, E] -> [T, E]; computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, transposed: bool):
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        options: dict[str, Any] = {"bias": config.attention_bias, "dtype": dtype}
        self.q = Linear(config.embed_dim, heads, transposed=transposed, **options)
        self.k = Linear(config.embed_dim, kv_heads, transposed=transposed, **options)
        self.v = Linear(config.embed_dim, kv_heads, transposed=transposed, **options)
        self.o = Linear(heads, config.embed_dim, **options)

    def __call__(self, x: jax.Array, cache: Any, layer: Any, rope: tuple[jax.Array, jax.Array], attend: Attend) -> Any:
        split = (x.shape[0], -1, self.head_dim)
        q, k, v = (proj(x).reshape(split) for proj in (self.q, self.k, self.v))
        out, cache = attend(rotate(q, rope), rotate(k, rope), v, cache, layer)
        return self.o(out.reshape(x.shape[0], -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        options: dict[str, Any] = {"bias": config.mlp_bias, "dtype": dtype}
        self.gate = Linear(config.embed_dim, config.mlp_dim, **options)
        self.up = Linear(config.embed_dim, config.mlp_dim, **options)
        self.down = Linear(config.mlp_dim, config.embed_dim, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, transposed: bool):
        self.attn_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attn = Attention(config, dtype, transposed=transposed)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, cache: Any, layer: Any, rope: tuple[jax.Array, jax.Array], attend: Attend) -> Any:
        """x [T, E], cache -> x [T, E], cache."""
        out, cache = self.attn(self.attn_norm(x), cache, layer, rope, attend)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


class Embed(nnx.Module):
    """token ids [T] -> [T, E]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((config.vocab_size, config.embed_dim), dtype))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        return self.kernel[...][token_ids]


class Head(nnx.Module):
    """x [T, E] -> logits [T, V] float32. out is None where the embedding serves as the head."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, transposed: bool, tied: bool):
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "transposed": transposed}
        self.out = None if tied else Linear(config.embed_dim, config.vocab_size, **options)

    def __call__(self, x: jax.Array, embed: Embed) -> jax.Array:
        x = self.norm(x)
        out = jnp.einsum("te,ve->tv", x, embed.kernel[...]) if self.out is None else self.out(x)
        return out.astype(jnp.float32)


class Llama(nnx.Module):
    """The whole decoder. transposed: q, k, v and head are kept [out, in] (see Linear). A tied head that is not
    transposed is a second array, [E, V]: a product with the embedding's transpose is several times slower on the CPU."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, transposed: bool = False):
        self.embed = Embed(config, dtype)
        self.layers = nnx.List([Block(config, dtype, transposed=transposed) for _ in range(config.num_layers)])
        self.head = Head(config, dtype, transposed=transposed, tied=config.tie_embeddings and transposed)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [T, heads, D], rope = cos, sin [T, D / 2] -> x with the pairs (i, i + D / 2) rotated, as Hugging Face orders them."""
    cos, sin = (part[:, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions [T] -> cos, sin [T, D / 2] float32."""
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))
    return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """[D / 2] float32 radians per position, with the model's rope scaling applied."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponent).astype(np.float32)
    if config.rope_scaling is None:
        return frequencies
    if config.rope_scaling.kind == "linear":
        return frequencies / np.float32(config.rope_scaling.factor)
    return _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are divided by factor, short ones kept, those between blended (Llama 3.1's reference code)."""
    wavelengths = 2 * np.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    middle = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), middle, scaled).astype(np.float32)
