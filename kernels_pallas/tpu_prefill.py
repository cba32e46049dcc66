"""Prefill attention for TPU (Mosaic): chunks of prompts, behind whatever of them is cached, written page by page.

A call first copies the chunks' K and V into their pages, whole pages at a time (chunks start on page borders), and then
runs a grid over tiles of q, a page's worth of tokens each and so of one chunk each: all query heads of a tile against
the pages of its row up to the tile's last token (flash attention, Dao 2023), two KV buffers, one of which is filled
while the other is attended to, across tiles too. Blocks in the tile's past need no mask; those that reach its diagonal,
or the end of the row, have one. Where layers have a window a tile begins with the page that its first token sees first,
and blocks that reach before the window of its last token have a mask too. The rows of a tile are ordered (head in
group, token), so that one product per kv head serves the whole group.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cache import LANES, shares_lanes
from kernels_pallas.kinds import FULL, LayerKind
from kernels_pallas.tpu_decode import (
    MASKED,
    Interpret,
    compiler_params,
    head_rows,
    next_used,
    online_softmax,
    pages_per_block,
    scaled,
    scores_of,
)

MAX_BLOCK_TOKENS = 512
MAX_TILE_TOKENS = 128  # of q: a page, or part of one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillWork:
    """What all layers share about N tiles of q: scalars for SMEM, where flat arrays are not padded."""

    tile_rows: jax.Array  # [N]
    tile_starts: jax.Array  # [N] position of the tile's first token
    tile_ends: jax.Array  # [N] position behind its last real token; 0 = unused tile
    tile_pages: jax.Array  # [N] first page of its row that it sees; positions of tiles count from there
    next_used: jax.Array  # [N + 2] first used tile at or after this one; N: none
    page_table: jax.Array  # [R * M]
    write_pages: jax.Array  # [T / page_size] page of each page_size tokens; -1: padding, written nowhere
    max_pages: int = field(metadata={"static": True})  # M


def plan(
    page_table: jax.Array,
    kv_lens: jax.Array,
    starts: jax.Array,
    positions: jax.Array,
    page_size: int,
    kind: LayerKind = FULL,
) -> PrefillWork:
    """page_table [R, M], kv_lens [R], starts [R + 1], positions [T] as in PrefillChunks -> the work of a call."""
    num_rows, max_pages = page_table.shape

    def every(stride: int) -> tuple[jax.Array, jax.Array]:
        """Row and position of every stride-th token."""
        first = jnp.arange(0, positions.shape[0], stride)
        row = jnp.clip(jnp.searchsorted(starts, first, side="right") - 1, 0, num_rows - 1)
        return row.astype(jnp.int32), positions[first]

    tile = tile_tokens(page_size)
    row, start = every(tile)
    used = start < kv_lens[row]
    seen = kind.first_page(start, page_size)
    before = seen * page_size
    page_row, page_start = every(page_size)
    page = page_table[page_row, jnp.clip(page_start // page_size, 0, max_pages - 1)]
    return PrefillWork(
        tile_rows=row,
        tile_starts=start - before,
        tile_ends=jnp.where(used, jnp.minimum(start + tile, kv_lens[row]) - before, 0),
        tile_pages=seen,
        next_used=next_used(used),
        page_table=page_table.reshape(-1),
        write_pages=jnp.where(page_start < kv_lens[page_row], page, -1),
        max_pages=max_pages,
    )


def tile_tokens(page_size: int) -> int:
    """The most tokens of q that divide a page and are not too many at once."""
    return max(size for size in range(1, MAX_TILE_TOKENS + 1) if page_size % size == 0)


def attend(
    q: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: PrefillWork,
    *,
    num_kv_heads: int,
    kind: LayerKind = FULL,
    max_block_tokens: int = MAX_BLOCK_TOKENS,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """q [T, H, D], new [T, R, 128] (packed K and V), pages [L, P, R, page_size, 128] -> out [T, H, D], pages.

    Unused tiles give zeros. The pages are aliased: inside jit, donated or used up, they are written in place.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_page_rows, page_size = pages.shape[2:4]
    group = num_heads // num_kv_heads
    shared = shares_lanes(head_dim)
    width = -(-head_dim // LANES) * LANES
    num_tiles = work.tile_rows.shape[0]
    tile = num_tokens // num_tiles
    most_pages = kind.most_pages(work.max_pages, page_size, tile)
    block_pages = pages_per_block(num_page_rows, page_size, most_pages, pages.dtype.itemsize, max_block_tokens)

    tiles = jnp.moveaxis(
        scaled(q, kind).reshape(num_tiles, tile, num_kv_heads, group, head_dim), 1, 3
    )  # [N, K, G, tile, D]
    tiles = tiles.reshape(num_tiles, num_kv_heads, group * tile, head_dim)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    new_pages = jnp.swapaxes(new.reshape(-1, page_size, num_page_rows, LANES), 1, 2)

    block_shape = (num_page_rows, block_pages * page_size, LANES)
    state = (num_kv_heads, group * tile)
    vmem = (4 * math.prod(tiles.shape[1:]) + 2 * math.prod(block_shape)) * pages.dtype.itemsize
    vmem += 4 * math.prod(state) * (2 * LANES + width)
    tile_spec = pl.BlockSpec((1, *tiles.shape[1:]), lambda index, *scalars: (index, 0, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, pages = pl.pallas_call(
        functools.partial(
            _kernel, max_pages=work.max_pages, block_pages=block_pages, tile=tile, shared=shared, kind=kind
        ),
        out_shape=[jax.ShapeDtypeStruct(tiles.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(num_tiles,),
            in_specs=[tile_spec, anywhere, anywhere],
            out_specs=[tile_spec, anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, *block_shape), pages.dtype),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={10: 1},  # scalars count
        compiler_params=compiler_params(vmem),
        cost_estimate=_cost(q, pages, work),
        interpret=interpret,
        name="paged_prefill",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        work.tile_rows,
        work.tile_starts,
        work.tile_ends,
        work.tile_pages,
        work.next_used,
        work.page_table,
        work.write_pages,
        tiles,
        new_pages,
        pages,
    )
    first = LANES // 2 if shared else 0
    out = jnp.where(work.tile_ends[:, None, None, None] > 0, out[..., first : first + head_dim], 0)
    out = out.reshape(num_tiles, num_kv_heads, group, tile, head_dim)
    return jnp.moveaxis(out, 3, 1).reshape(q.shape), pages


def _cost(q: jax.Array, pages: jax.Array, work: PrefillWork) -> pl.CostEstimate:
    """Of fresh prompts that share the tokens: what XLA orders other work around."""
    context = q.shape[0] // 2
    return pl.CostEstimate(
        flops=4 * context * q.size,
        transcendentals=context * q.shape[0] * q.shape[1],
        bytes_accessed=(work.tile_rows.shape[0] * context * pages.shape[2] * LANES + 2 * q.size) * q.dtype.itemsize,
    )


def _kernel(*refs: Any, max_pages: int, block_pages: int, tile: int, shared: bool, kind: LayerKind) -> None:
    layer, tile_rows, tile_starts, tile_ends, tile_pages, next_used, page_table, write_pages, *rest = refs
    q, new_pages, _, *rest = rest
    out, pages, buffers, maxima, sums, accumulators, first_slot, arrived, written = rest
    page_size, block_tokens = pages.shape[3], buffers.shape[2]
    index, num_tiles = pl.program_id(0), pl.num_programs(0)
    start, end = tile_starts[index], tile_ends[index]

    def write(number: jax.Array) -> Any:
        return pltpu.make_async_copy(new_pages.at[number], pages.at[layer[0], write_pages[number]], written)

    def used_pages(of: jax.Array, block: jax.Array) -> jax.Array:
        return jnp.minimum(pl.cdiv(tile_ends[of] - block * block_tokens, page_size), block_pages)

    def page_copy(of: jax.Array, block: jax.Array, number: int | jax.Array, slot: jax.Array) -> Any:
        page = page_table[tile_rows[of] * max_pages + tile_pages[of] + block * block_pages + number]
        place = buffers.at[slot, :, pl.ds(pl.multiple_of(number * page_size, page_size), page_size), :]
        return pltpu.make_async_copy(pages.at[layer[0], page], place, arrived.at[slot])

    def fetch(of: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        @pl.loop(0, used_pages(of, block))
        def _(number: jax.Array) -> None:
            page_copy(of, block, number, slot).start()

    def wait(block: jax.Array, slot: jax.Array) -> None:
        @pl.loop(0, used_pages(index, block))
        def _(number: jax.Array) -> None:
            page_copy(index, block, number, slot).wait()

    def write_all(act: str) -> None:
        @pl.loop(0, write_pages.shape[0])
        def _(number: jax.Array) -> None:
            @pl.when(write_pages[number] >= 0)
            def _() -> None:
                getattr(write(number), act)()

    @pl.when(index == 0)
    def _() -> None:
        write_all("start")
        write_all("wait")
        first_slot[0] = 0
        first = next_used[0]

        @pl.when(first < num_tiles)
        def _() -> None:
            fetch(first, jnp.int32(0), jnp.int32(0))

    @pl.when(end > 0)
    def _() -> None:
        maxima[...] = jnp.full_like(maxima, MASKED)
        sums[...] = jnp.zeros_like(sums)
        accumulators[...] = jnp.zeros_like(accumulators)
        num_blocks = pl.cdiv(end, block_tokens)
        slot_of_first = first_slot[0]

        @pl.loop(0, num_blocks)
        def _(block: jax.Array) -> None:
            slot = lax.rem(slot_of_first + block, 2)
            last = block + 1 == num_blocks
            following = jnp.where(last, next_used[index + 1], index)

            @pl.when(following < num_tiles)
            def _() -> None:
                fetch(following, jnp.where(last, 0, block + 1), 1 - slot)

            wait(block, slot)
            state = (maxima, sums, accumulators)
            offset = block * block_tokens
            inside = offset + block_tokens <= start + 1
            if kind.window is not None:
                inside &= offset > start + tile - 1 - kind.window

            @pl.when(inside)
            def _() -> None:
                _attend_block(q.at[0], buffers.at[slot], state, shared, kind, None)

            @pl.when(jnp.logical_not(inside))
            def _() -> None:
                _attend_block(q.at[0], buffers.at[slot], state, shared, kind, (start - offset, end - offset, tile))

        first_slot[0] = lax.rem(slot_of_first + num_blocks, 2)
        out[0] = (accumulators[...] / sums[..., :1]).astype(out.dtype)


def _attend_block(
    q: Any,
    block: Any,
    state: tuple[Any, ...],
    shared: bool,
    kind: LayerKind,
    border: tuple[jax.Array, jax.Array, int] | None,
) -> None:
    """q [K, G * tile, W], block [R, n, 128] -> running maxima, sums [K, G * tile, 128] and accumulators of all heads.

    border: where in the block the tile's first token lies, where the row's known tokens end, and tokens in a tile;
    None: all of the tile sees all of the block.
    """
    maxima, sums, accumulators = state
    num_kv_heads, num_queries = q.shape[:2]
    num_tokens = block.shape[1]
    if border is not None:
        start, end, tile = border
        query = start + lax.broadcasted_iota(jnp.int32, (num_queries, num_tokens), 0) % tile
        key = lax.broadcasted_iota(jnp.int32, (num_queries, num_tokens), 1)
        visible = (key <= query) & (key < end)
        if kind.window is not None:
            visible &= key > query - kind.window
        real = lax.broadcasted_iota(jnp.int32, (num_tokens, LANES), 0) < end

    @pl.loop(0, num_kv_heads)  # not unrolled: products of this size need no neighbour, and compile times do
    def _(head: jax.Array) -> None:
        key_rows, value_rows = head_rows(head, num_kv_heads, block.shape[0], shared)
        scores = scores_of(q[head], block, key_rows, kind)
        if border is not None:
            scores = jnp.where(visible, scores, MASKED)
        weights, shrink = online_softmax(scores, maxima, sums, head)
        for part, value_row in enumerate(value_rows):
            lanes = pl.ds(part * LANES, LANES)
            value = block[value_row]
            if border is not None:  # what was never written may be NaN, and NaN times 0 is NaN
                value = jnp.where(real, value, jnp.zeros_like(value))
            product = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            accumulators[head, :, lanes] = accumulators[head, :, lanes] * shrink + product
