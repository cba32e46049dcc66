"""Prefill attention for Hopper GPUs (Mosaic GPU): chunks of prompts, behind whatever of them is cached, all of whose K
and V are in the cache already.

A block of threads serves one query head and two tiles of 64 tokens that follow each other in a chunk; blocks with more
to read start first. Of its three warpgroups one only fetches (TMA): the pages of the row in blocks of KV, up to the
tiles' end and no further. The other two have a tile each: q K (wgmma), online softmax in base 2, P V (wgmma); they take
turns at the tensor cores, so that one's softmax runs beside the other's products (Shah et al. 2024, "FlashAttention-3";
the hand-over between them is that of JAX's own Mosaic GPU attention). Blocks in a tile's past need no mask; those that
reach its diagonal have one, and where layers have a window those that reach before it.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.cache import LANES, shares_lanes
from kernels_pallas.gpu_ops import (
    COMPILER_PARAMS,
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    MASKED,
    PART,
    ROWS,
    Interpret,
    add_products,
    await_if,
    base2,
    column_slices,
    head_parts,
    keys_of,
    product,
    tiles,
    values_of,
)
from kernels_pallas.kinds import FULL, LayerKind

SHARED_BYTES = 224 * 2**10  # of shared memory for q and KV, of 227 KiB
MAX_STAGES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillWork:
    """What all layers of a kind share about N tiles of 64 tokens: N entries, the longest first. Positions count from
    the first page that is read."""

    page_table: jax.Array  # [R, M]
    tiles: jax.Array  # [N] number of an entry's first tile
    counts: jax.Array  # [N] its tiles, 1 or 2; 0: a tile of padding, to be zeroed; -1: the second tile of another
    rows: jax.Array  # [N]
    first_pages: jax.Array  # [N] in the row's order, that its first token sees
    starts: jax.Array  # [N] position of its first token
    ends: jax.Array  # [N] position behind its last real token


def plan(
    page_table: jax.Array,
    kv_lens: jax.Array,
    starts: jax.Array,
    positions: jax.Array,
    page_size: int,
    kind: LayerKind = FULL,
) -> PrefillWork:
    """page_table [R, M], kv_lens [R], starts [R + 1], positions [T] as in PrefillChunks; T: a multiple of 64."""
    num_tiles = positions.shape[0] // ROWS
    token = jnp.arange(num_tiles, dtype=jnp.int32) * ROWS
    row = jnp.clip(
        jnp.searchsorted(starts, token, side="right", method="compare_all") - 1, 0, page_table.shape[0] - 1
    ).astype(jnp.int32)
    start = positions[token]
    used = start < kv_lens[row]
    leads = used & ((token - starts[row]) // ROWS % 2 == 0)
    follows = jnp.pad(used & ~leads, (0, 1))[1:]
    first_page = kind.first_page(start, page_size)
    before = first_page * page_size
    end = jnp.minimum(start + jnp.where(follows, 2 * ROWS, ROWS), kv_lens[row]) - before
    order = jnp.argsort(jnp.where(leads, -end, jnp.where(used, 1, 0)), stable=True).astype(jnp.int32)
    return PrefillWork(
        page_table=page_table,
        tiles=order,
        counts=jnp.where(leads, 1 + follows, jnp.where(used, -1, 0)).astype(jnp.int32)[order],
        rows=row[order],
        first_pages=first_page[order],
        starts=(start - before)[order],
        ends=end[order],
    )


def attend(
    q: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: PrefillWork,
    *,
    num_kv_heads: int,
    kind: LayerKind = FULL,
    interpret: Interpret = None,
) -> jax.Array:
    """q [T, H, D], pages [L, P, R, page_size, 128] bfloat16 with the new tokens in them, and nothing that is not finite
    in the last page of a chunk -> [T, H, D].

    Tiles of padding give zeros. page_size: a multiple of 64.
    """
    head_dim = q.shape[2]
    width = LANES // 2 if shares_lanes(head_dim) else -(-head_dim // LANES) * LANES
    padded = jnp.pad(q.astype(pages.dtype), ((0, 0), (0, 0), (0, width - head_dim)))
    out = _tiles(padded, pages, layer, work, num_kv_heads, kind, head_dim, interpret)
    return out[..., :head_dim].astype(q.dtype)


def _tiles(
    q: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: PrefillWork,
    num_kv_heads: int,
    kind: LayerKind,
    head_dim: int,
    interpret: Interpret,
) -> jax.Array:
    """q [T, H, W] -> [T, H, W]."""
    _, num_heads, width = q.shape
    page_size = pages.shape[3]
    shared = width < LANES
    head_rows = head_parts(num_kv_heads, pages.shape[2])
    columns = column_slices(width)
    lanes = min(width, LANES)
    tokens = 2 * PART if width <= LANES else PART  # of a block of KV
    block_bytes = head_rows * tokens * LANES * pages.dtype.itemsize
    stages = min((SHARED_BYTES - 2 * ROWS * width * pages.dtype.itemsize) // block_bytes, MAX_STAGES)
    scale, after = base2(kind, head_dim)

    def body(layer, table, numbers, counts, rows, first_pages, starts, ends, q, pages, out, *scratch):
        q_s, kv_s, q_full, k_full, v_full, k_free, v_free, tensor_cores, *weights_s = scratch
        head, entry, group = lax.axis_index("head"), lax.axis_index("entry"), lax.axis_index("group")
        count, end = counts[entry], ends[entry]
        num_blocks = pl.cdiv(end, jnp.int32(tokens))
        start = starts[entry] + group * ROWS  # of the tile of one of the two that compute
        first_token = pl.multiple_of((numbers[entry] + group) * ROWS, ROWS)
        q_tile = [q_s.at[jnp.minimum(group, 1), each] for each in range(len(columns))]

        def slot_of(block):
            return lax.rem(block, jnp.int32(stages))

        def take_turn():
            plgpu.barrier_arrive(tensor_cores)
            plgpu.barrier_wait(tensor_cores)

        def load_q():
            for lane, target in zip(columns, q_tile, strict=True):
                plgpu.copy_gmem_to_smem(q.at[pl.ds(first_token, ROWS), head, lane], target, q_full.at[group])
            plgpu.barrier_wait(q_full.at[group])

        def store(values):
            for value, target in zip(values, q_tile, strict=True):
                target[...] = value.astype(q.dtype)
            plgpu.commit_smem()
            for lane, source in zip(columns, q_tile, strict=True):
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(first_token, ROWS), head, lane])
            plgpu.wait_smem_to_gmem(0)

        def in_rows(value):
            return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

        def nothing():
            return [plgpu.layout_cast(jnp.zeros((ROWS, lanes), jnp.float32), plgpu.Layout.WGMMA) for _ in columns]

        def attend_block(block, state, mine, masked):
            maximum, total, *sums = state
            slot = slot_of(block)
            first_row = slot * head_rows
            scores = product((ROWS, tokens), zip(q_tile, keys_of(kv_s, first_row, head_rows), strict=True), take_turn)
            if not shared:
                plgpu.barrier_arrive(k_free.at[slot])
            scores = after(scores * scale)
            if masked:
                shape = (ROWS, tokens)
                query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + block * tokens
                visible = key <= query
                if kind.window is not None:
                    visible &= key > query - kind.window
                scores = jnp.where(visible, scores, MASKED)
            higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
            shrink = jnp.exp2(maximum - higher)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
            total = total * shrink + jnp.sum(weights, axis=1)
            sums = [each * lax.broadcast_in_dim(shrink, each.shape, [0]) for each in sums]
            weights = weights.astype(pages.dtype)
            if interpret is None:  # the softmax is done before the tensor cores are asked for
                *sums, weights, total, higher = lax.optimization_barrier((*sums, weights, total, higher))
            plgpu.barrier_arrive(tensor_cores)
            if not shared:
                plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_wait(tensor_cores)

            def meanwhile():
                await_if(block + 1 < mine, k_full.at[slot_of(block + 1)])

            scratch = weights_s[0].at[group] if weights_s else None
            sums = add_products(sums, weights, values_of(kv_s, first_row, head_rows), scratch, meanwhile)
            plgpu.barrier_arrive((k_free if shared else v_free).at[slot])
            return higher, total, *sums

        def skip(block, _):
            """A block that only the other tile reads: let it go, and the other have its turns."""
            for full, free in ((k_full, k_free),) if shared else ((k_full, k_free), (v_full, v_free)):
                plgpu.barrier_wait(full.at[slot_of(block)])
                plgpu.barrier_arrive(free.at[slot_of(block)])
            take_turn()
            take_turn()

        @pl.when((group < 2) & (count > 0))
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            used = group < count
            mine = jnp.where(used, pl.cdiv(jnp.minimum(start + ROWS, end), jnp.int32(tokens)), 0)
            past = jnp.minimum(lax.div(start + 1, jnp.int32(tokens)), mine)

            @pl.when(used)
            def _():
                load_q()
                plgpu.barrier_wait(k_full.at[0])

            @pl.when(group == 1)
            def _():
                take_turn()

            attend_past = functools.partial(attend_block, mine=mine, masked=False)
            attend_border = functools.partial(attend_block, mine=mine, masked=True)
            state = (in_rows(MASKED), in_rows(0.0), *nothing())
            first = jnp.int32(0)
            if kind.window is not None:  # blocks whose first token some query does not see
                first = jnp.clip(pl.cdiv(start + ROWS - kind.window, jnp.int32(tokens)), 0, mine)
                state = lax.fori_loop(jnp.int32(0), first, attend_border, state)
                past = jnp.maximum(past, first)
            state = lax.fori_loop(first, past, attend_past, state)
            _, total, *sums = lax.fori_loop(past, mine, attend_border, state)
            lax.fori_loop(mine, num_blocks, skip, None)

            @pl.when(group == 0)
            def _():
                take_turn()

            @pl.when(used)
            def _():
                store([each / lax.broadcast_in_dim(total, each.shape, [0]) for each in sums])

        @pl.when((group == 0) & (count == 0))
        def _padding():
            store(nothing())

        @pl.when((group == 2) & (count > 0))
        def _fetch():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            row, first_page = rows[entry], first_pages[entry]
            kv_head = lax.div(head, jnp.int32(num_heads // num_kv_heads))
            last = lax.div(end - 1, jnp.int32(PART)) * PART

            @pl.loop(jnp.int32(0), num_blocks)
            def _(block):
                slot = slot_of(block)
                for number in range(head_rows):
                    is_key = shared or number < head_rows // 2
                    full, free = (k_full, k_free) if is_key else (v_full, v_free)
                    if number in (0, head_rows // 2):
                        await_if(block >= stages, free.at[slot])
                    for part in range(tokens // PART):  # behind the last one, that one again: it is finite
                        token = jnp.minimum(block * tokens + part * PART, last)
                        page = table[row, first_page + lax.div(token, jnp.int32(page_size))]
                        inside = pl.ds(pl.multiple_of(lax.rem(token, jnp.int32(page_size)), PART), PART)
                        source = pages.at[layer[0], page, kv_head * head_rows + number, inside]
                        target = kv_s.at[slot * head_rows + number, pl.ds(part * PART, PART)]
                        plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            for slot in range(stages):  # what was let go last is waited for too: nothing is on its way at the end
                for free in (k_free,) if shared else (k_free, v_free):
                    await_if(num_blocks > slot, free.at[slot])

    copies = tokens // PART * (1 if shared else head_rows // 2)
    barrier = plgpu.Barrier
    scratch = [
        plgpu.SMEM((2, len(columns), ROWS, lanes), pages.dtype, transforms=tiles(pages.dtype)),
        plgpu.SMEM((stages * head_rows, tokens, LANES), pages.dtype, transforms=tiles(pages.dtype)),
        barrier(num_arrivals=len(columns), num_barriers=2),
        barrier(num_arrivals=copies, num_barriers=stages),
        barrier(num_arrivals=copies, num_barriers=stages),
        barrier(num_arrivals=2, num_barriers=stages),
        barrier(num_arrivals=2, num_barriers=stages),
        barrier(num_arrivals=2),
    ]
    if interpret is not None:  # the interpreter's products take nothing from registers
        scratch.append(plgpu.SMEM((2, ROWS, tokens), pages.dtype, transforms=tiles(pages.dtype)))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_heads, work.tiles.shape[0]),
        grid_names=("head", "entry"),
        num_threads=3,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="paged_prefill",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        work.page_table,
        work.tiles,
        work.counts,
        work.rows,
        work.first_pages,
        work.starts,
        work.ends,
        q,
        pages,
    )
