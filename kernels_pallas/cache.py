"""The paged KV cache: one array for all layers, head-major pages, the same layout on every backend.

``pages [L, P, R, page_size, W]``: a page of one layer holds page_size tokens of all local kv heads and is contiguous.
head_dim <= 64: K and V of a head share a row of W = 128 lanes (K in the first half, V in the second; R = K heads).
head_dim > 64: K and V have rows of their own, each of head_dim rounded up to 128 lanes, cut into rows of W = 128
(R = 2 * K heads * ceil(head_dim / 128); row 2h holds K of head h when head_dim <= 128).
Page 0 is scratch: padding reads it, nothing that matters is ever written there.

Pages of int8 or float8_e4m3fn have ``scales [L, P, 2 * K, page_size]`` float32 beside them: of each token, K (2h) and V
(2h + 1) of head h have the largest number of the dtype at their largest element. K and V never share a scale, though
they may share lanes: whichever has the smaller numbers would be rounded in the other's steps.

float8_e4m3fn lies there as uint8, its bits: XLA:CPU knows no gather or scatter of 8-bit floats and converts all of the
array that it reads or writes a row of, 1.6 s a layer for 200 MB.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

LANES = 128
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """pages [L, P, R, page_size, 128] and, for 8-bit pages, scales [L, P, 2 * K, page_size] (None otherwise)."""

    pages: jax.Array
    scales: jax.Array | None = None


def shares_lanes(head_dim: int) -> bool:
    """Whether K and V of a head lie in one row."""
    return head_dim <= LANES // 2


def rows_per_page(num_kv_heads: int, head_dim: int) -> int:
    """R: rows of 128 lanes that hold K and V of all heads for one token."""
    return num_kv_heads if shares_lanes(head_dim) else 2 * num_kv_heads * -(-head_dim // LANES)


def numbers(rows: jax.Array) -> jax.Array:
    """Rows of pages -> the same as numbers of their dtype."""
    return lax.bitcast_convert_type(rows, jnp.float8_e4m3fn) if rows.dtype == jnp.uint8 else rows


def is_quantised(dtype: DTypeLike) -> bool:
    """Whether pages of a dtype have scales."""
    return str(jnp.dtype(dtype)) in _LARGEST


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    scales = 2 * num_kv_heads * jnp.dtype(jnp.float32).itemsize if is_quantised(dtype) else 0
    return num_layers * (rows_per_page(num_kv_heads, head_dim) * LANES * jnp.dtype(dtype).itemsize + scales)


def empty(
    num_layers: int, num_pages: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    shape = (num_layers, num_pages, rows_per_page(num_kv_heads, head_dim), page_size, LANES)
    scales = jnp.zeros((num_layers, num_pages, 2 * num_kv_heads, page_size)) if is_quantised(dtype) else None
    return KVCache(jnp.zeros(shape, _held(dtype)), scales)


def _held(dtype: DTypeLike) -> jnp.dtype:
    """What pages of a dtype are an array of."""
    return jnp.dtype(jnp.uint8) if jnp.dtype(dtype) == jnp.float8_e4m3fn else jnp.dtype(dtype)


def quantise(k: jax.Array, v: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """k, v [..., K, D] -> the same in an 8-bit dtype (or that of its pages) as rows [..., R, 128] of a page, and their
    scales [..., 2 * K]."""
    dtype = jnp.dtype(jnp.float8_e4m3fn) if jnp.dtype(dtype) == jnp.uint8 else jnp.dtype(dtype)
    both = jnp.stack([k, v], axis=-2).astype(jnp.float32)  # [..., K, 2, D]
    scales = jnp.max(jnp.abs(both), axis=-1) / _LARGEST[str(dtype)]
    scales = jnp.where(scales > 0, scales, 1)
    scaled = both / scales[..., None]
    small = (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype)
    small = lax.bitcast_convert_type(small, _held(dtype))
    return pack(small[..., 0, :], small[..., 1, :]), scales.reshape(*scales.shape[:-2], -1)


def split_scales(scales: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """scales with 2 * K along axis -> those of K and those of V."""
    of_keys, of_values = (lax.slice_in_dim(scales, start, None, stride=2, axis=axis) for start in (0, 1))
    return of_keys, of_values


def pack(k: jax.Array, v: jax.Array) -> jax.Array:
    """k, v [..., K, D] -> rows [..., R, 128] in the order of a page's rows."""
    head_dim = k.shape[-1]
    width = LANES // 2 if shares_lanes(head_dim) else -(-head_dim // LANES) * LANES
    pad = [(0, 0)] * (k.ndim - 1) + [(0, width - head_dim)]
    rows = jnp.concatenate([jnp.pad(k, pad), jnp.pad(v, pad)], axis=-1)  # [..., K, 2 * width]
    return rows.reshape(*k.shape[:-2], -1, LANES)


def unpack(rows: jax.Array, num_kv_heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """rows [..., R, N, 128] (N tokens) -> k, v [..., K, N, D]: the inverse of pack, tokens behind heads."""
    lead, tokens = rows.shape[:-3], rows.shape[-2]
    if shares_lanes(head_dim):
        return rows[..., :head_dim], rows[..., LANES // 2 : LANES // 2 + head_dim]
    halves = rows.reshape(*lead, num_kv_heads, 2, -1, tokens, LANES)
    halves = jnp.moveaxis(halves, -3, -2).reshape(*lead, num_kv_heads, 2, tokens, -1)
    return halves[..., 0, :, :head_dim], halves[..., 1, :, :head_dim]
