"""The paged KV cache: one array for all layers, head-major pages, the same layout on every backend.

``pages [L, P, R, page_size, W]``: a page of one layer holds page_size tokens of all local kv heads and is contiguous.
head_dim <= 64: K and V of a head share a row of W = 128 lanes (K in the first half, V in the second; R = K heads).
head_dim > 64: K and V have rows of their own, each of head_dim rounded up to 128 lanes, cut into rows of W = 128
(R = 2 * K heads * ceil(head_dim / 128); row 2h holds K of head h when head_dim <= 128).
Page 0 is scratch: padding reads it, nothing that matters is ever written there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """pages [L, P, R, page_size, 128] and, for 8-bit pages, scales [L, P, R, page_size] (None otherwise)."""

    pages: jax.Array
    scales: jax.Array | None = None


def shares_lanes(head_dim: int) -> bool:
    """Whether K and V of a head lie in one row."""
    return head_dim <= LANES // 2


def rows_per_page(num_kv_heads: int, head_dim: int) -> int:
    """R: rows of 128 lanes that hold K and V of all heads for one token."""
    return num_kv_heads if shares_lanes(head_dim) else 2 * num_kv_heads * -(-head_dim // LANES)


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    return num_layers * rows_per_page(num_kv_heads, head_dim) * LANES * itemsize


def empty(
    num_layers: int, num_pages: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    shape = (num_layers, num_pages, rows_per_page(num_kv_heads, head_dim), page_size, LANES)
    return KVCache(jnp.zeros(shape, dtype))


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
