"""Paged decode attention for TPU (Mosaic): one new token a row, its K and V written into its page on the way.

The rows' KV is read block by block, a block being some pages of all local heads, through two buffers: while one is
attended to, the next block, be it of this row or of another, is on its way. The order needs no list: from (row, block)
one comes to the row's next block or to block 0 of the next used row (``next_used``). In a row's last block the new
token is put in its place in the buffer, and the tile that holds it goes back to its page; nothing else is written, so
that the cache can be aliased and never copied.

Where K and V share lanes (head_dim <= 64) q is padded with zeros over V's lanes and the upper half of the weighted sum
is the answer: twice the products, which a memory-bound kernel has to spare, and no slicing of lanes. All query heads
of a kv head meet each tile of K and V at once. Online softmax in base 2 (log2(e) is part of the scale).

Where layers have a window the plan cuts each row to the pages that its new token sees, and the kernel masks the rest of
the first of them: it never learns of what lies before.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cache import LANES, shares_lanes
from kernels_pallas.kinds import FULL, LayerKind

Index = int | jax.Array
Interpret = bool | pltpu.InterpretParams
MASKED = -1e30  # finite: exp2 of a difference of two of them is not NaN
LOG2_E = math.log2(math.e)
BLOCK_BYTES = 2 * 2**20  # of one KV buffer; small enough that two and the rows' q fit any generation's VMEM
MAX_BLOCK_TOKENS = 1024
SMEM_TABLE_BYTES = 256 * 2**10  # of the page table; larger ones are served by several calls
_SUBLANES = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWork:
    """What all layers share about s rows: scalars for SMEM, where flat arrays are not padded."""

    kv_lens: jax.Array  # [s + 1] 0 = unused row, and at the end
    next_used: jax.Array  # [s + 2] first used row at or after this one; s: none
    page_table: jax.Array  # [s * M]


def plan(page_table: jax.Array, kv_lens: jax.Array, page_size: int, kind: LayerKind = FULL) -> tuple[DecodeWork, ...]:
    """page_table [S, M], kv_lens [S] -> the work of one call, or of several that share the rows out evenly."""
    page_table, kv_lens = kind.last_pages(page_table, kv_lens, page_size)
    num_rows, max_pages = page_table.shape
    calls = -(-4 * num_rows * max_pages // SMEM_TABLE_BYTES)
    size = -(-num_rows // calls)
    return tuple(
        DecodeWork(
            kv_lens=jnp.pad(kv_lens[start : start + size], (0, 1)),
            next_used=next_used(kv_lens[start : start + size] > 0),
            page_table=page_table[start : start + size].reshape(-1),
        )
        for start in range(0, num_rows, size)
    )


def next_used(used: jax.Array) -> jax.Array:
    """used [n] -> [n + 2]: the first used index at or after each, n where there is none."""
    count = used.shape[0]
    index = jnp.where(used, jnp.arange(count, dtype=jnp.int32), count)
    return jnp.pad(lax.cummin(index, reverse=True), (0, 2), constant_values=count)


def attend(
    q: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: DecodeWork,
    *,
    num_kv_heads: int,
    kind: LayerKind = FULL,
    max_block_tokens: int = MAX_BLOCK_TOKENS,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """q [s, H, D], new [s, R, 128] (packed K and V), pages [L, P, R, page_size, 128] -> out [s, H, D], pages.

    Unused rows give zeros. The pages are aliased: inside jit, donated or used up, they are written in place.
    """
    num_rows, num_heads, head_dim = q.shape
    num_page_rows, page_size = pages.shape[2:4]
    group = num_heads // num_kv_heads
    padded_group = -(-group // _SUBLANES) * _SUBLANES
    shared = shares_lanes(head_dim)
    width = -(-head_dim // LANES) * LANES
    max_pages = work.page_table.shape[0] // num_rows
    block_pages = pages_per_block(num_page_rows, page_size, max_pages, pages.dtype.itemsize, max_block_tokens)
    tile = math.gcd(4 * _SUBLANES // pages.dtype.itemsize, page_size)  # tokens that share a tile of VMEM
    grouped = scaled(q, kind).reshape(num_rows, num_kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padded_group - group), (0, width - head_dim)))

    block_shape = (num_page_rows, block_pages * page_size, LANES)
    state = (num_kv_heads, padded_group)
    vmem = (2 * grouped.size + new.size + 2 * math.prod(block_shape)) * pages.dtype.itemsize
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, pages = pl.pallas_call(
        functools.partial(
            _kernel,
            num_rows=num_rows,
            max_pages=max_pages,
            block_pages=block_pages,
            tile=tile,
            shared=shared,
            kind=kind,
        ),
        out_shape=[jax.ShapeDtypeStruct(grouped.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[whole, whole, anywhere],
            out_specs=[whole, anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, *block_shape), pages.dtype),
                pltpu.VMEM((2, num_page_rows, tile, LANES), pages.dtype),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={6: 1},  # scalars count
        compiler_params=compiler_params(vmem),
        cost_estimate=_cost(q, pages, work),
        interpret=interpret,
        name="paged_decode",
    )(jnp.asarray(layer, jnp.int32).reshape(1), work.kv_lens, work.next_used, work.page_table, grouped, new, pages)
    first = LANES // 2 if shared else 0
    out = out[:, :, :group, first : first + head_dim].reshape(num_rows, num_heads, head_dim)
    return jnp.where(work.kv_lens[:num_rows, None, None] > 0, out, 0), pages


def pages_per_block(num_page_rows: int, page_size: int, max_pages: int, itemsize: int, max_tokens: int) -> int:
    """Pages in a block: BLOCK_BYTES of them, at most max_tokens, at most a whole row, at least one."""
    tokens = min(BLOCK_BYTES // (num_page_rows * LANES * itemsize), max_tokens)
    return min(max(tokens // page_size, 1), max_pages)


def compiler_params(vmem: int) -> pltpu.CompilerParams:
    """For a sequential kernel whose operands and buffers take so many bytes of VMEM; as much again as a block for
    what the compiler keeps there."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",),
        vmem_limit_bytes=max(vmem + 16 * 2**20, 32 * 2**20),
        disable_bounds_checks=True,
    )


def _cost(q: jax.Array, pages: jax.Array, work: DecodeWork) -> pl.CostEstimate:
    """Of rows a quarter full: what XLA orders other work around."""
    tokens = work.page_table.shape[0] * pages.shape[3] // 4
    return pl.CostEstimate(
        flops=4 * tokens * q.shape[1] * LANES,
        transcendentals=tokens * q.shape[1],
        bytes_accessed=tokens * pages.shape[2] * LANES * pages.dtype.itemsize,
    )


def _kernel(
    *refs: Any,
    num_rows: int,
    max_pages: int,
    block_pages: int,
    tile: int,
    shared: bool,
    kind: LayerKind,
) -> None:
    layer, kv_lens, next_used, page_table, q, new, _, out, pages, buffers, stage, maxima, sums, accumulators, *dma = (
        refs
    )
    arrived, written = dma
    page_size, block_tokens = pages.shape[3], buffers.shape[2]

    def used_pages(row: jax.Array, block: jax.Array) -> jax.Array:
        return jnp.minimum(pl.cdiv(kv_lens[row] - block * block_tokens, page_size), block_pages)

    def page_copy(row: jax.Array, block: jax.Array, index: int | jax.Array, slot: jax.Array) -> Any:
        page = page_table[row * max_pages + block * block_pages + index]
        place = buffers.at[slot, :, pl.ds(pl.multiple_of(index * page_size, tile), page_size), :]
        return pltpu.make_async_copy(pages.at[layer[0], page], place, arrived.at[slot])

    def fetch(row: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        count = used_pages(row, block)

        @pl.when(count == block_pages)
        def _() -> None:
            for index in range(block_pages):
                page_copy(row, block, index, slot).start()

        @pl.when(count < block_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: jax.Array) -> None:
                page_copy(row, block, index, slot).start()

    def wait(row: jax.Array, block: jax.Array, slot: jax.Array) -> None:
        count = used_pages(row, block)

        @pl.when(count == block_pages)
        def _() -> None:  # one wait for the bytes of all
            pltpu.make_async_copy(buffers.at[slot], buffers.at[slot], arrived.at[slot]).wait()

        @pl.when(count < block_pages)
        def _() -> None:
            @pl.loop(0, count)
            def _(index: jax.Array) -> None:
                page_copy(row, block, index, slot).wait()

    def write_back(row: jax.Array, parity: jax.Array) -> Any:
        position = kv_lens[row] - 1
        page = page_table[row * max_pages + position // page_size]
        start = pl.multiple_of(position % page_size // tile * tile, tile)
        place = pages.at[layer[0], page, :, pl.ds(start, tile), :]
        return pltpu.make_async_copy(stage.at[parity], place, written.at[parity])

    def insert(row: jax.Array, slot: jax.Array, num_written: jax.Array) -> None:
        """The new token into the buffer, and its tile on its way home."""
        parity = lax.rem(num_written, 2)

        @pl.when(num_written >= 2)
        def _() -> None:
            write_back(row, parity).wait()

        offset = lax.rem(kv_lens[row] - 1, block_tokens)
        place = pl.ds(pl.multiple_of(offset // tile * tile, tile), tile)
        old = buffers[slot, :, place, :]
        token = lax.broadcasted_iota(jnp.int32, old.shape, 1)
        merged = jnp.where(token == offset % tile, new[row][:, None, :], old)
        buffers[slot, :, place, :] = jnp.where(token > offset % tile, jnp.zeros_like(merged), merged)
        stage[parity] = merged
        write_back(row, parity).start()

    def clear_behind(row: jax.Array, slot: jax.Array, turn: jax.Array) -> None:
        """The tiles of a row's last page behind the one that the new token is put into: what was never written may be
        NaN, and NaN times a weight of 0 is NaN. In a buffer's first use also what no page fills; later, that is of an
        earlier row."""
        offset = lax.rem(kv_lens[row] - 1, block_tokens)
        end = jnp.where(turn < 2, block_tokens, pl.cdiv(offset + 1, page_size) * page_size)

        @pl.loop(offset // tile + 1, end // tile)
        def _(index: jax.Array) -> None:
            place = pl.ds(pl.multiple_of(index * tile, tile), tile)
            buffers[slot, :, place, :] = jnp.zeros((buffers.shape[1], tile, LANES), buffers.dtype)

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row, block, slot, num_written, turn = carry
        last = (block + 1) * block_tokens >= kv_lens[row]
        next_row = jnp.where(last, next_used[row + 1], row)
        next_block = jnp.where(last, 0, block + 1)

        @pl.when(next_row < num_rows)
        def _() -> None:
            fetch(next_row, next_block, 1 - slot)

        wait(row, block, slot)

        @pl.when(block == 0)
        def _() -> None:
            maxima[...] = jnp.full_like(maxima, MASKED)
            sums[...] = jnp.zeros_like(sums)
            accumulators[...] = jnp.zeros_like(accumulators)

        def attend(length: jax.Array | None) -> None:
            _attend_block(q.at[row], buffers.at[slot], (maxima, sums, accumulators), shared, kind, length)

        middle = jnp.logical_not(last)
        if kind.window is not None:
            middle &= block > 0

            @pl.when((block == 0) & jnp.logical_not(last))
            def _() -> None:
                attend(kv_lens[row])

        @pl.when(last)
        def _() -> None:
            clear_behind(row, slot, turn)

        @pl.when(last)
        def _() -> None:
            insert(row, slot, num_written)
            attend(kv_lens[row] - block * block_tokens)
            out[row] = (accumulators[...] / sums[..., :1]).astype(out.dtype)

        @pl.when(middle)
        def _() -> None:
            attend(None)

        return next_row, next_block, 1 - slot, num_written + last.astype(jnp.int32), turn + 1

    first = next_used[0]

    @pl.when(first < num_rows)
    def _() -> None:
        fetch(first, jnp.int32(0), jnp.int32(0))

    zero = jnp.int32(0)
    num_written = lax.while_loop(lambda carry: carry[0] < num_rows, body, (first, zero, zero, zero, zero))[-2]
    for parity in range(2):

        @pl.when(num_written > parity)
        def _(parity: int = parity) -> None:
            write_back(jnp.int32(0), jnp.int32(parity)).wait()


def _attend_block(
    q: Any, block: Any, state: tuple[Any, ...], shared: bool, kind: LayerKind, length: jax.Array | None
) -> None:
    """q [K, G, W], finite block [R, n, 128] -> running maxima, sums [K, G, 128], accumulators [K, G, W] of all heads.

    length: tokens from the block's first to the row's last; None: all of the block is seen. The products of one head
    stand beside the softmax of the next.
    """
    maxima, sums, accumulators = state
    num_kv_heads = q.shape[0]
    num_tokens = block.shape[1]
    pending: tuple[Any, ...] = ()
    if length is not None:
        index = lax.broadcasted_iota(jnp.int32, (1, num_tokens), 1)
        visible = index < length
        if kind.window is not None:
            visible &= index >= length - kind.window

    def finish(head: int, weights: jax.Array, shrink: jax.Array) -> None:
        for part, index in enumerate(head_rows(head, num_kv_heads, block.shape[0], shared)[1]):
            value = block[index]
            lanes = pl.ds(part * LANES, LANES)
            product = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            accumulators[head, :, lanes] = accumulators[head, :, lanes] * shrink + product

    for head in range(num_kv_heads):
        scores = scores_of(q[head], block, head_rows(head, num_kv_heads, block.shape[0], shared)[0], kind)
        if length is not None:
            scores = jnp.where(visible, scores, MASKED)
        weights, shrink = online_softmax(scores, maxima, sums, head)
        if pending:
            finish(*pending)
        pending = (head, weights, shrink)
    finish(*pending)


def scaled(q: jax.Array, kind: LayerKind) -> jax.Array:
    """q times what makes its products with K scores in base 2, or where they are capped, what tanh takes."""
    factor = LOG2_E if kind.softcap is None else 1 / kind.softcap
    return (q * (kind.scale_of(q.shape[-1]) * factor)).astype(q.dtype)


def head_rows(head: Index, num_kv_heads: int, num_page_rows: int, shared: bool) -> tuple[list[Index], list[Index]]:
    """The rows of a page that hold K of a head, and those of V; the same one where they share lanes."""
    if shared:
        return [head], [head]
    parts = num_page_rows // (2 * num_kv_heads)
    first = 2 * parts * head
    return [first + part for part in range(parts)], [first + parts + part for part in range(parts)]


def scores_of(q: jax.Array, block: Any, key_rows: list[Index], kind: LayerKind) -> jax.Array:
    """q [m, W] (see scaled), block [R, n, 128] -> [m, n] float32 in base 2, summed over the rows that K is cut into."""
    parts = [
        lax.dot_general(
            q[:, part * LANES : (part + 1) * LANES],
            block[index],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        for part, index in enumerate(key_rows)
    ]
    scores = functools.reduce(jnp.add, parts)
    return scores if kind.softcap is None else jnp.tanh(scores) * (kind.softcap * LOG2_E)


def online_softmax(scores: jax.Array, maxima: Any, sums: Any, head: Index) -> tuple[jax.Array, jax.Array]:
    """scores [m, n] of a head's next block -> weights [m, n] and what the accumulator shrinks by [m, 128]; maxima and
    sums [K, m, 128] (all lanes equal) take the block in."""
    before = maxima[head]
    maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - maximum[:, :1])
    shrink = jnp.exp2(before - maximum)
    sums[head] = sums[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    maxima[head] = maximum
    return weights, shrink
