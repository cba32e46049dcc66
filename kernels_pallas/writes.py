"""Writing new K and V into pages by XLA, for the backends whose kernels only read. It stays in place on CPU and GPU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels_pallas.cache import KVCache, pack, quantise

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

_NOWHERE = 2**30  # a page out of range: dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowWrites:
    """Where the new tokens of S decode rows go."""

    pages: jax.Array  # [S] out of range for unused rows
    offsets: jax.Array  # [S]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkWrites:
    """Where T prefill tokens go, page by page."""

    pages: jax.Array  # [T / page_size] out of range for padding
    real: jax.Array  # [T] False for padding


Writes = tuple[RowWrites | None, ChunkWrites | None]  # layers of all kinds share it


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int) -> Writes:
    """Where the tokens of a step go."""
    return (
        None if rows is None else _plan_rows(rows, page_size),
        None if chunks is None else _plan_chunks(chunks, page_size),
    )


def _plan_rows(rows: "DecodeRows", page_size: int) -> RowWrites:
    last = jnp.maximum(rows.kv_lens - 1, 0)
    page = jnp.take_along_axis(rows.page_table, (last // page_size)[:, None], axis=1)[:, 0]
    return RowWrites(jnp.where(rows.kv_lens > 0, page, _NOWHERE), last % page_size)


def _plan_chunks(chunks: "PrefillChunks", page_size: int) -> ChunkWrites:
    num_rows, max_pages = chunks.page_table.shape
    token = jnp.arange(chunks.positions.shape[0])
    row = jnp.searchsorted(chunks.starts, token, side="right", method="compare_all") - 1  # no loop: R is small
    row = jnp.clip(row, 0, num_rows - 1)
    real = chunks.positions < chunks.kv_lens[row]
    first = slice(None, None, page_size)  # chunks start on page borders, so page_size tokens share a page
    page = chunks.page_table[row[first], jnp.clip(chunks.positions[first] // page_size, 0, max_pages - 1)]
    return ChunkWrites(jnp.where(real[first], page, _NOWHERE), real)


def write(cache: KVCache, layer: int | jax.Array, k: jax.Array, v: jax.Array, writes: Writes) -> KVCache:
    """k and v [S + T, K, D] of a layer into the cache. What is behind a chunk in its last page becomes 0: who reads it
    there multiplies it by a weight of 0, and what it was may be NaN."""
    if cache.scales is None:
        return KVCache(_put(cache.pages, layer, pack(k, v).astype(cache.pages.dtype), writes))
    rows, scales = quantise(k, v, cache.pages.dtype)
    return KVCache(_put(cache.pages, layer, rows, writes), _put(cache.scales, layer, scales, writes))


def _put(held: jax.Array, layer: int | jax.Array, new: jax.Array, writes: Writes) -> jax.Array:
    """held [L, P, R, page_size, ...], new [S + T, R, ...] -> held."""
    rows, chunks = writes
    if rows is not None:
        num_decode = rows.pages.shape[0]
        held = held.at[layer, rows.pages, :, rows.offsets].set(new[:num_decode], mode="drop")
        new = new[num_decode:]
    if chunks is not None:
        real = chunks.real.reshape(-1, *(1,) * (new.ndim - 1))
        new = jnp.where(real, new, 0).reshape(-1, held.shape[3], *new.shape[1:])
        held = held.at[layer, chunks.pages].set(jnp.swapaxes(new, 1, 2), mode="drop")
    return held
