"""Llama, Mistral and Qwen in Flax: the modules say names, shapes and equations; engine.step calls them on flat leaves.

L layers, E embed, H query heads, K kv heads, D head dim, F mlp, V vocab, T tokens. H, K, F and V are one device's share
(model.partition): the modules are written for one of tp devices, and add up over the mesh's axis "tp" where they must.
Sources: Touvron et al. 2023
(Llama 2), Grattafiori et al. 2024 (Llama 3; rope scaling as in its reference code), Su et al. 2021 (rotary positions),
Jiang et al. 2023 (Mistral), Yang et al. 2024 and 2025 (Qwen2, Qwen3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxserve.config import ModelConfig, Quantization, RopeScaling
from jaxserve.model import quant
from jaxserve.model.partition import Shares
from kernels_pallas import cpu

# (q [T, H, D], k [T, K, D], v [T, K, D], cache, layer) -> (out [T, H, D], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Layout:
    """What a platform's products are fast with; measured in docs/design.md.

    feature_major (CPU): activations are [features, T], every kernel [out, in] as published, and projections that share
    an input share a kernel. Otherwise activations are [T, features] and kernels [in, out], except that out_in (TPU)
    keeps q, k, v and the head [out, in], which the compiler would copy in every step. few_tokens (CPU): products of up
    to so many tokens are kernels_pallas.cpu's. branches: at one, a device goes on by itself; a GPU's host waits for it.
    """

    feature_major: bool = False
    out_in: bool = False
    few_tokens: int = 0
    branches: bool = True

    @classmethod
    def of(cls, platform: str) -> "Layout":
        few_tokens = cpu.MOST_TOKENS if platform == "cpu" and cpu.why_not() is None else 0
        known = platform in ("cpu", "tpu")
        return cls(feature_major=platform == "cpu", out_in=known, few_tokens=few_tokens, branches=known)


class Linear(nnx.Module):
    """x [T, in] -> [T, out], or [in, T] -> [out, T] where activations are feature-major.

    quantization: the kernel has 8 bits an element, and kernel_scale [out] belongs to it (model.quant).
    adds_up: each device holds a part of the inputs, and the outputs are the sum over all of them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        layout: Layout,
        quantization: Quantization | None = None,
        out_in: bool = False,
        adds_up: bool = False,
    ):
        self.adds_up = adds_up
        self.feature_major, self.few_tokens = layout.feature_major, layout.few_tokens
        self.out_in = layout.feature_major or (layout.out_in and out_in)
        shape = (outputs, inputs) if self.out_in else (inputs, outputs)
        self.kernel = nnx.Param(jnp.zeros(shape, dtype if quantization is None else quant.DTYPES[quantization]))
        self.kernel_scale = None if quantization is None else nnx.Param(jnp.ones(outputs, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array, *, gated: bool = False) -> jax.Array:
        """gated: x has twice the inputs, and silu of the first half times the second is what is multiplied; of
        feature-major activations."""
        kernel = self.kernel[...]
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        bias = None if self.bias is None else self.bias[...]
        if self.feature_major:
            if x.shape[1] <= self.few_tokens:
                out = self._sum(cpu.product(kernel, x, scale, gated=gated))
            else:
                if gated:
                    gate, up = jnp.split(x, 2)
                    x = jax.nn.silu(gate) * up
                out = self._sum(quant.product("oi,it->ot", kernel, x, scale))
            return out if bias is None else out + bias[:, None]
        out = self._sum(quant.product("ti,oi->to" if self.out_in else "ti,io->to", x, kernel, scale))
        return out if bias is None else out + bias

    def _sum(self, out: jax.Array) -> jax.Array:
        return lax.psum(out, "tp") if self.adds_up else out


class Joint(nnx.Module):
    """Projections of one input: x -> one array per entry of outputs; a single kernel where activations are
    feature-major (one pass over x, and a product wide enough for all cores)."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], *, out_in: bool = False, layout: Layout, **options: Any):
        self.outputs = outputs
        widths = (sum(outputs),) if layout.feature_major else outputs
        self.parts = nnx.List([Linear(inputs, width, out_in=out_in, layout=layout, **options) for width in widths])

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        if len(self.parts) == len(self.outputs):
            return [part(x) for part in self.parts]
        borders = np.cumsum(self.outputs)[:-1].tolist()
        return jnp.split(self.whole(x), borders, axis=0)

    def whole(self, x: jax.Array) -> jax.Array:
        """One array, where there is one kernel."""
        (part,) = self.parts
        return part(x)


class RMSNorm(nnx.Module):
    """Over the features of x; computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, layout: Layout):
        self.eps, self.few_tokens = eps, layout.few_tokens
        self.axis = 0 if layout.feature_major else -1
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.axis == 0 and x.shape[1] <= self.few_tokens:
            return cpu.norm(x, self.scale[...], self.eps)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=self.axis, keepdims=True) + self.eps)
        scale = self.scale[...]
        return wide.astype(x.dtype) * (scale[:, None] if self.axis == 0 else scale)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        heads, kv_heads = shares.num_heads * config.head_dim, shares.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.feature_major = layout.feature_major
        options: dict[str, Any] = {"dtype": dtype, "layout": layout, "quantization": config.quantization}
        widths = (heads, kv_heads, kv_heads)
        self.qkv = Joint(config.embed_dim, widths, out_in=True, bias=config.attention_bias, **options)
        norm = (config.head_dim, config.norm_eps, dtype, Layout())
        self.q_norm = RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm) if config.qk_norm else None
        self.o = Linear(heads, config.embed_dim, adds_up=shares.tp > 1, bias=config.output_bias, **options)

    def __call__(self, x: jax.Array, cache: Any, layer: Any, rope: tuple[jax.Array, jax.Array], attend: Attend) -> Any:
        q, k, v = (self._split(part) for part in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(rotate(q, rope), rotate(k, rope), v, cache, layer)
        out = out.reshape(out.shape[0], -1)
        return self.o(_feature_major(out) if self.feature_major else out), cache

    def _split(self, x: jax.Array) -> jax.Array:
        """[T, heads * D], or its transpose -> [T, heads, D]."""
        x = x.T if self.feature_major else x
        return x.reshape(x.shape[0], -1, self.head_dim)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        options: dict[str, Any] = {"bias": config.mlp_bias, "dtype": dtype, "layout": layout}
        options["quantization"] = config.quantization
        self.feature_major = layout.feature_major
        self.gate_up = Joint(config.embed_dim, (shares.mlp_dim, shares.mlp_dim), **options)
        self.down = Linear(shares.mlp_dim, config.embed_dim, adds_up=shares.tp > 1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.feature_major:
            return self.down(self.gate_up.whole(x), gated=True)
        gate, up = self.gate_up(x)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        self.attn_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype, layout)
        self.attn = Attention(config, shares, dtype, layout)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype, layout)
        self.mlp = MLP(config, shares, dtype, layout)

    def __call__(self, x: jax.Array, cache: Any, layer: Any, rope: tuple[jax.Array, jax.Array], attend: Attend) -> Any:
        """x [T, E] or [E, T], cache -> the same."""
        out, cache = self.attn(self.attn_norm(x), cache, layer, rope, attend)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


class Embed(nnx.Module):
    """token ids [T] -> [T, E] or [E, T]; each device knows its part of the vocabulary."""

    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        self.feature_major, self.shared_out = layout.feature_major, shares.tp > 1
        self.kernel = nnx.Param(jnp.zeros((shares.vocab_size, config.embed_dim), dtype))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if self.shared_out:
            own = token_ids - lax.axis_index("tp") * kernel.shape[0]
            known = (own >= 0) & (own < kernel.shape[0])
            x = lax.psum(jnp.where(known[:, None], kernel[jnp.where(known, own, 0)], 0), "tp")
        else:
            x = kernel[token_ids]
        return x.T if self.feature_major else x


class Head(nnx.Module):
    """x [T, E] -> logits [T, V], or [E, T] -> [V, T]; float32, of the whole vocabulary on every device. out is None
    where the embedding serves as the head."""

    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, dtype, layout)
        self.feature_major, self.shared_out = layout.feature_major, shares.tp > 1
        self.few_tokens, self.vocab_size = layout.few_tokens, config.vocab_size
        tied = config.tie_embeddings and layout.out_in
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "layout": layout, "out_in": True}
        self.out = None if tied else Linear(config.embed_dim, shares.vocab_size, **options)

    def __call__(self, x: jax.Array, embed: Embed) -> jax.Array:
        x = self.norm(x)
        if self.out is not None:
            logits = self.out(x)
        elif x.shape[1] <= self.few_tokens:
            logits = cpu.product(embed.kernel[...], x, dtype=jnp.dtype(jnp.float32))
        elif self.feature_major:
            logits = jnp.einsum("ve,et->vt", embed.kernel[...], x, preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum("te,ve->tv", x, embed.kernel[...])
        if self.shared_out:
            axis = 0 if self.feature_major else 1
            logits = lax.all_gather(logits, "tp", axis=axis, tiled=True)
            logits = lax.slice_in_dim(logits, 0, self.vocab_size, axis=axis)
        return logits.astype(jnp.float32)


class Llama(nnx.Module):
    """The whole decoder in a platform's layout, as one of the devices that share it out has it. A tied head that is not
    [out, in] is a second array, [E, V]."""

    def __init__(self, config: ModelConfig, shares: Shares, dtype: jnp.dtype, layout: Layout):
        self.embed = Embed(config, shares, dtype, layout)
        self.layers = nnx.List([Block(config, shares, dtype, layout) for _ in range(config.num_layers)])
        self.head = Head(config, shares, dtype, layout)


def _feature_major(x: jax.Array) -> jax.Array:
    """[T, features] -> [features, T], in two halves: XLA:CPU folds a plain transpose into the product after it, which
    then has a form that it has no bfloat16 kernel for, and the weights are converted to float32 in every step."""
    half = x.shape[1] // 2
    return jnp.concatenate([x[:, :half].T, x[:, half:].T])


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [T, heads, D], rope = cos, sin [T, D / 2] -> x with the pairs (i, i + D / 2) rotated (Hugging Face's order)."""
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
