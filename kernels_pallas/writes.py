"""Writing new K and V into pages by XLA, for the backends whose kernels only read. It stays in place on CPU and GPU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels_pallas.cache import pack

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

_NOWHERE = 2**30  # a page out of range: dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Writes:
    """Where the new tokens of a step go: what layers of all kinds share."""

    row_pages: jax.Array | None  # [S] page of each decode row's new token; out of range for unused rows
    row_offsets: jax.Array | None  # [S]
    chunk_pages: jax.Array | None  # [T / page_size] page of each page_size prefill tokens; out of range for padding
    chunk_real: jax.Array | None  # [T] False for padding


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int) -> Writes:
    """Where the tokens of a step go."""
    row_pages = row_offsets = chunk_pages = chunk_real = None
    if rows is not None:
        last = jnp.maximum(rows.kv_lens - 1, 0)
        page = jnp.take_along_axis(rows.page_table, (last // page_size)[:, None], axis=1)[:, 0]
        row_pages, row_offsets = jnp.where(rows.kv_lens > 0, page, _NOWHERE), last % page_size
    if chunks is not None:
        num_rows, max_pages = chunks.page_table.shape
        token = jnp.arange(chunks.positions.shape[0])
        row = jnp.clip(jnp.searchsorted(chunks.starts, token, side="right") - 1, 0, num_rows - 1)
        chunk_real = chunks.positions < chunks.kv_lens[row]
        first = slice(None, None, page_size)  # chunks start on page borders, so page_size tokens share a page
        page = chunks.page_table[row[first], jnp.clip(chunks.positions[first] // page_size, 0, max_pages - 1)]
        chunk_pages = jnp.where(chunk_real[first], page, _NOWHERE)
    return Writes(row_pages, row_offsets, chunk_pages, chunk_real)


def write(pages: jax.Array, layer: int | jax.Array, k: jax.Array, v: jax.Array, writes: Writes) -> jax.Array:
    """pages [L, P, R, page_size, 128], k and v [S + T, K, D] -> pages. What is behind a chunk in its last page becomes
    0: who reads it there multiplies it by a weight of 0, and what it was may be NaN."""
    rows = pack(k, v).astype(pages.dtype)
    num_decode = 0 if writes.row_pages is None else writes.row_pages.shape[0]
    if num_decode:
        place = (layer, writes.row_pages, slice(None), writes.row_offsets)
        pages = pages.at[place].set(rows[:num_decode], mode="drop")
    if writes.chunk_pages is not None:
        new = jnp.where(writes.chunk_real[:, None, None], rows[num_decode:], 0)
        new = new.reshape(-1, pages.shape[3], *rows.shape[1:])
        pages = pages.at[layer, writes.chunk_pages].set(jnp.swapaxes(new, 1, 2), mode="drop")
    return pages
