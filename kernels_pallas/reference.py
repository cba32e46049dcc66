"""Attention as the definition reads: gather every position of every row, softmax, sum.

Slow, and the oracle of all others.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.cache import KVCache, numbers, pack, quantise, split_scales, unpack
from kernels_pallas.kinds import FULL, LayerKind


def write(
    cache: KVCache, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, offsets: jax.Array
) -> KVCache:
    """Put k, v [N, K, D] of N tokens at (pages [N], offsets [N]); a page number >= P writes nothing."""
    if cache.scales is None:
        rows, scales = pack(k, v).astype(cache.pages.dtype), None
    else:
        rows, new = quantise(k, v, cache.pages.dtype)
        scales = cache.scales.at[layer, pages, :, offsets].set(new, mode="drop")
    return KVCache(cache.pages.at[layer, pages, :, offsets].set(rows, mode="drop"), scales)


def attend(
    q: jax.Array,
    cache: KVCache,
    layer: int | jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    num_kv_heads: int,
    kind: LayerKind = FULL,
) -> jax.Array:
    """q [N, H, D], page_table [N, M], positions [N] -> [N, H, D]: token n sees positions 0 .. positions[n] of its own
    pages, the last kind.window of them where there is a window.

    A position below 0 marks padding and gives zeros. Scores and sums are float32.
    """
    num_tokens, num_heads, head_dim = q.shape
    gathered = cache.pages[layer, page_table]  # [N, M, R, page_size, W]
    rows = jnp.moveaxis(gathered, 1, 2).reshape(num_tokens, gathered.shape[2], -1, gathered.shape[-1])
    k, v = unpack(rows, num_kv_heads, head_dim)  # [N, K, M * page_size, D]
    if cache.scales is not None:
        scales = jnp.moveaxis(cache.scales[layer, page_table], 1, 2).reshape(num_tokens, 2 * num_kv_heads, -1, 1)
        of_k, of_v = split_scales(scales, axis=1)
        k, v = numbers(k).astype(jnp.float32) * of_k, numbers(v).astype(jnp.float32) * of_v
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("nkgd,nktd->nkgt", grouped, k, preferred_element_type=jnp.float32)
    scores = kind.capped(scores * kind.scale_of(head_dim))
    behind = positions[:, None] - jnp.arange(k.shape[2])[None]
    visible = behind >= 0 if kind.window is None else (behind >= 0) & (behind < kind.window)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
    v = jnp.where(visible[:, None, :, None], v, 0)  # a page that was never written may hold NaN
    out = jnp.einsum("nkgt,nktd->nkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
