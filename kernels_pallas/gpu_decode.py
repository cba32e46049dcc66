"""Paged decode attention for Hopper GPUs (Mosaic GPU): one new token a row, whose K and V are in the cache already.

The rows' contexts are cut into items of equally many parts, a part being 64 tokens of a page, so that every
multiprocessor gets the same share whatever the lengths (split-K; Dao et al. 2023, "Flash-Decoding"). One block of
threads a multiprocessor stays for the whole call and takes one (item, kv head) after another. Of its three warpgroups
one only fetches (TMA): q of the next item and its parts, as far ahead as there is room, past the ends of items too. The
other two take turns at the parts: q K (wgmma), online softmax in base 2, P V (wgmma); at an item's end the second hands
its sums to the first, which writes the item's output and the logarithm of its sum of exponentials. Where a head has 256
lanes, whose sums would not leave registers for anything else, both take all parts, and each has the sums of one half of
the lanes. A second kernel adds up the items of each row.

All query heads of a kv head are rows of one 64-row product, most of which are empty: the tensor cores have that to
spare, since reading K and V takes longer. What empty rows hold is never looked at.
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
    LOG2_E,
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

NUM_BLOCKS = 132  # of threads: the multiprocessors of an H100 or H200
TURNS = 4  # items that a block takes at least, where there is that much to do: what evens out the last ones
MIN_PARTS = 4  # of an item: fewer are not worth a block's beginning and end
SHARED_BYTES = 224 * 2**10  # of shared memory for q, KV and sums, of 227 KiB
_GROUP = 8  # rows of a tile of shared memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWork:
    """What all layers of a kind share about S rows and at most I items."""

    kv_lens: jax.Array  # [S] from the first page that is read; 0 = unused row
    page_table: jax.Array  # [S, M]
    item_rows: jax.Array  # [I]
    item_parts: jax.Array  # [I] number, in its row, of an item's first part
    first_items: jax.Array  # [S + 1] of each row, and their number
    parts_per_item: jax.Array  # [1]


def plan(
    page_table: jax.Array,
    kv_lens: jax.Array,
    page_size: int,
    kind: LayerKind = FULL,
    *,
    num_kv_heads: int,
    num_blocks: int = NUM_BLOCKS,
) -> DecodeWork:
    """page_table [S, M], kv_lens [S] -> items for so many kv heads on a device."""
    page_table, kv_lens = kind.last_pages(page_table, kv_lens, page_size)
    num_rows = kv_lens.shape[0]
    wanted = -(-TURNS * num_blocks // num_kv_heads)
    parts = -(-kv_lens // PART)
    per_item = jnp.maximum(-(-jnp.sum(parts) // wanted), MIN_PARTS)
    ends = jnp.cumsum(-(-parts // per_item))
    first_items = jnp.pad(ends, (1, 0)).astype(jnp.int32)
    item = jnp.arange(num_rows + wanted, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right", method="compare_all"), num_rows - 1).astype(jnp.int32)
    return DecodeWork(
        kv_lens=kv_lens,
        page_table=page_table,
        item_rows=row,
        item_parts=((item - first_items[row]) * per_item).astype(jnp.int32),
        first_items=first_items,
        parts_per_item=per_item.reshape(1).astype(jnp.int32),
    )


def attend(
    q: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: DecodeWork,
    *,
    num_kv_heads: int,
    kind: LayerKind = FULL,
    num_blocks: int = NUM_BLOCKS,
    interpret: Interpret = None,
) -> jax.Array:
    """q [S, H, D], pages [L, P, R, page_size, 128] bfloat16 with the new tokens in them -> [S, H, D].

    Unused rows give zeros. page_size: a multiple of 64.
    """
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    tiles_per_head = -(-group // ROWS)
    padded = min(-(-group // _GROUP) * _GROUP, ROWS) * tiles_per_head
    width = LANES // 2 if shares_lanes(head_dim) else -(-head_dim // LANES) * LANES
    grouped = q.reshape(num_rows, num_kv_heads, group, head_dim).astype(pages.dtype)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padded - group), (0, width - head_dim)))
    grouped = grouped.reshape(num_rows, num_kv_heads * tiles_per_head, -1, width)
    sums, logs = _items(grouped, pages, layer, work, num_kv_heads, kind, head_dim, num_blocks, interpret)
    out = _add_items(sums, logs, work.first_items, min(group, ROWS), q.dtype, interpret)
    return out.reshape(num_rows, num_kv_heads, -1, width)[:, :, :group, :head_dim].reshape(q.shape)


def _items(
    q: jax.Array,
    pages: jax.Array,
    layer: int | jax.Array,
    work: DecodeWork,
    num_kv_heads: int,
    kind: LayerKind,
    head_dim: int,
    num_blocks: int,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    """q [S, N, g, W] of N tiles of query heads -> out [I, N, g, W] and log2 of the sums of exponentials [I, N, g], both
    float32, of each item."""
    _, num_tiles, rows, width = q.shape
    num_items, page_size = work.item_rows.shape[0], pages.shape[3]
    head_rows = head_parts(num_kv_heads, pages.shape[2])  # of a page, for one head: K's, then V's
    columns = column_slices(width)
    scale, after = base2(kind, head_dim)
    places = 2 if width <= LANES else 1  # for q: of the next item too, where there is room
    free_bytes = SHARED_BYTES - ROWS * width * (places * pages.dtype.itemsize + 4)
    stages = free_bytes // (2 * head_rows * PART * LANES * pages.dtype.itemsize)  # for each of the two that compute
    halved = len(columns) > 1  # each has its columns of all parts, not all columns of every other part
    if halved:
        rings, stages, num_own = 1, 2 * stages, len(columns) // 2
    else:
        rings, num_own = 2, 1

    def body(layer, kv_lens, table, item_rows, item_parts, first_items, per_item, q, pages, out, logs, *scratch):
        q_s, kv_s, out_s, lines_s, q_full, q_free, full, free, handed, taken, *weights_s = scratch
        block, group = lax.axis_index("block"), lax.axis_index("group")
        num_units = first_items[kv_lens.shape[0]] * num_tiles
        num_turns = pl.cdiv(jnp.maximum(num_units - block, 0), jnp.int32(num_blocks))

        def unit_of(turn):
            """The item, its row and tile of query heads, its first part, and how many parts it has."""
            unit = block + turn * num_blocks
            item = lax.div(unit, jnp.int32(num_tiles))
            row, first = item_rows[item], item_parts[item]
            count = jnp.minimum(pl.cdiv(kv_lens[row], jnp.int32(PART)) - first, per_item[0])
            return item, row, lax.rem(unit, jnp.int32(num_tiles)), first, count

        def own_rows():
            """Of a part, those of V that this warpgroup multiplies by."""
            return [head_rows // 2 + (group * num_own if halved else 0) + each for each in range(num_own)]

        def clear_behind(slot, length):
            """V behind the row's last token: what was never written may be NaN, and NaN times 0 is NaN."""
            shape = (PART, LANES // 2)  # half a row of lanes at a time: registers are full of sums
            for row in own_rows():
                for lane in range(0 if head_rows > 1 else LANES // 2, LANES, LANES // 2):
                    value = kv_s.at[slot * head_rows + row, :, pl.ds(lane, LANES // 2)]
                    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    held = plgpu.load(value, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                    value[...] = jnp.where(token < length, held, 0.0).astype(pages.dtype)
            plgpu.commit_smem()

        def hand_over(index, maximum, total, *sums):
            await_if(index > 0, taken)
            lines_s[0], lines_s[1] = maximum, total
            for each, value in enumerate(sums):
                out_s[each] = value
            plgpu.commit_smem()
            plgpu.barrier_arrive(handed)

        def finish(item, tile, maximum, total, *sums):
            plgpu.barrier_wait(handed)
            in_rows = plgpu.Layout.WGMMA.reduce(1)
            other = plgpu.load(lines_s.at[0], layout=in_rows, optimized=False)
            higher = jnp.maximum(maximum, other)
            mine, others = jnp.exp2(maximum - higher), jnp.exp2(other - higher)
            total = total * mine + plgpu.load(lines_s.at[1], layout=in_rows, optimized=False) * others
            mine, others = mine / total, others / total
            for each, value in enumerate(sums):
                theirs = plgpu.load(out_s.at[each], layout=plgpu.Layout.WGMMA)
                out_s[each] = value * lax.broadcast_in_dim(mine, value.shape, [0]) + theirs * lax.broadcast_in_dim(
                    others, value.shape, [0]
                )
            lines_s[2] = higher + jnp.log(total) * LOG2_E
            write(item, tile, range(len(columns)), True)
            plgpu.barrier_arrive(taken)

        def finish_half(item, tile, half, maximum, total, *sums):
            own = range(half * num_own, (half + 1) * num_own)
            for each, value in zip(own, sums, strict=True):
                out_s[each] = value / lax.broadcast_in_dim(total, value.shape, [0])
            if half == 0:
                lines_s[2] = maximum + jnp.log(total) * LOG2_E
            write(item, tile, own, half == 0)

        def write(item, tile, own, with_logs):
            plgpu.commit_smem()
            for each in own:
                plgpu.copy_smem_to_gmem(out_s.at[each, pl.ds(0, rows)], out.at[item, tile, :, columns[each]])
            if with_logs:
                plgpu.copy_smem_to_gmem(lines_s.at[2, pl.ds(0, rows)], logs.at[item, tile])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(group == 2)
        def _fetch():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

            def turn(index, fetched):
                _, row, tile, first, count = unit_of(index)
                head = lax.div(tile, jnp.int32(num_tiles // num_kv_heads))
                place = lax.rem(index, jnp.int32(places))

                await_if(index >= places, q_free.at[place])
                for part, lanes in enumerate(columns):
                    target = q_s.at[place, part, pl.ds(0, rows)]
                    plgpu.copy_gmem_to_smem(q.at[row, tile, :, lanes], target, q_full.at[place])

                def part(number, fetched):
                    taker = jnp.int32(0) if halved else lax.rem(number + index, jnp.int32(2))
                    mine = jnp.where(taker == 0, fetched[0], fetched[1])
                    slot = taker * stages + lax.rem(mine, jnp.int32(stages))
                    token = (first + number) * PART
                    page = table[row, lax.div(token, jnp.int32(page_size))]
                    tokens = pl.ds(lax.rem(token, jnp.int32(page_size)), PART)

                    await_if(mine >= stages, free.at[slot])
                    for number_of_row in range(head_rows):
                        source = pages.at[layer[0], page, head * head_rows + number_of_row, tokens]
                        plgpu.copy_gmem_to_smem(source, kv_s.at[slot * head_rows + number_of_row], full.at[slot])
                    return fetched[0] + (1 - taker), fetched[1] + taker

                return lax.fori_loop(jnp.int32(0), count, part, fetched)

            fetched = lax.fori_loop(jnp.int32(0), num_turns, turn, (jnp.int32(0), jnp.int32(0)))
            for place in range(places):  # what was let go last is waited for too: nothing is on its way at the end
                await_if(num_turns > place, q_free.at[place])
            for slot in range(rings * stages):
                await_if(fetched[slot // stages] > slot % stages, free.at[slot])

        @pl.when(group < 2)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

            def turn(index, taken_before):
                item, row, tile, first, count = unit_of(index)
                place = lax.rem(index, jnp.int32(places))
                begin = 0 if halved else lax.rem(group + index, jnp.int32(2))
                turns = count if halved else lax.div(jnp.maximum(count - begin, 0) + 1, jnp.int32(2))
                left = kv_lens[row] - (first + begin) * PART  # tokens, from this warpgroup's first part on
                plgpu.barrier_wait(q_full.at[place])

                def part(number, state):
                    maximum, total, *sums = state
                    slot = (0 if halved else group * stages) + lax.rem(taken_before + number, jnp.int32(stages))
                    length = left - number * (rings * PART)
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when(length < PART)
                    def _():
                        clear_behind(slot, length)

                    queries = [q_s.at[place, each] for each in range(len(columns))]
                    scores = product(
                        (ROWS, PART), zip(queries, keys_of(kv_s, slot * head_rows, head_rows), strict=True)
                    )
                    behind = length - plgpu.broadcasted_iota(jnp.int32, (ROWS, PART), 1, layout=plgpu.Layout.WGMMA)
                    visible = behind > 0  # 1: the row's last token
                    if kind.window is not None:
                        visible &= behind <= kind.window
                    scores = jnp.where(visible, after(scores * scale), MASKED)
                    higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
                    weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
                    shrink = jnp.exp2(maximum - higher)
                    total = total * shrink + jnp.sum(weights, axis=1)
                    scratch = weights_s[0].at[group] if weights_s else None
                    sums = [each * lax.broadcast_in_dim(shrink, each.shape, [0]) for each in sums]
                    if halved:
                        values = [kv_s.at[slot * head_rows + each] for each in own_rows()]
                    else:
                        values = values_of(kv_s, slot * head_rows, head_rows)
                    sums = add_products(sums, weights.astype(pages.dtype), values, scratch)
                    plgpu.barrier_arrive(free.at[slot])
                    return higher, total, *sums

                line = functools.partial(jnp.full, (ROWS,), dtype=jnp.float32)
                in_rows = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA.reduce(1))
                start = (in_rows(line(MASKED)), in_rows(line(0.0)))
                empty = jnp.zeros((ROWS, min(width, LANES)), jnp.float32)
                start += tuple(plgpu.layout_cast(empty, plgpu.Layout.WGMMA) for _ in range(num_own))
                state = lax.fori_loop(jnp.int32(0), turns, part, start)
                plgpu.barrier_arrive(q_free.at[place])

                ends = [functools.partial(finish, item, tile), functools.partial(hand_over, index)]
                if halved:
                    ends = [functools.partial(finish_half, item, tile, half) for half in range(2)]
                for number, end in enumerate(ends):
                    pl.when(group == number)(functools.partial(end, *state))

                return taken_before + turns

            lax.fori_loop(jnp.int32(0), num_turns, turn, jnp.int32(0))
            if not halved:
                await_if((group == 1) & (num_turns > 0), taken)

    lanes = min(width, LANES)
    barrier = plgpu.Barrier
    scratch = [
        plgpu.SMEM((places, len(columns), ROWS, lanes), pages.dtype, transforms=tiles(pages.dtype)),
        plgpu.SMEM((rings * stages * head_rows, PART, LANES), pages.dtype, transforms=tiles(pages.dtype)),
        plgpu.SMEM((len(columns), ROWS, lanes), jnp.float32, transforms=tiles(jnp.float32)),
        plgpu.SMEM((3, ROWS), jnp.float32),
        barrier(num_arrivals=len(columns), num_barriers=places),
        barrier(num_arrivals=2, num_barriers=places),
        barrier(num_arrivals=head_rows, num_barriers=rings * stages),
        barrier(num_arrivals=2 // rings, num_barriers=rings * stages),
        barrier(),
        barrier(),
    ]
    if interpret is not None:  # the interpreter's products take nothing from registers
        scratch.append(plgpu.SMEM((2, ROWS, PART), pages.dtype, transforms=tiles(pages.dtype)))
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_items, num_tiles, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((num_items, num_tiles, rows), jnp.float32),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="paged_decode",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        work.kv_lens,
        work.page_table,
        work.item_rows,
        work.item_parts,
        work.first_items,
        work.parts_per_item,
        q,
        pages,
    )


def _add_items(
    sums: jax.Array, logs: jax.Array, first_items: jax.Array, used: int, dtype: jnp.dtype, interpret: Interpret
) -> jax.Array:
    """sums [I, N, g, W] and logs [I, N, g] of items -> [S, N, used, W] of rows, for the first of the g query heads;
    first_items [S + 1].

    One block of threads for 128 lanes of a row, a thread for each: where W is 64 those are of two query heads, where it
    is 256 they are half of one.
    """
    num_items, num_tiles, rows, width = sums.shape
    num_rows, num_lines = first_items.shape[0] - 1, -(-used * width // LANES)
    vector = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    def body(first_items, sums, logs, out):
        row, tile, line = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("line")
        lanes = pl.ds(pl.multiple_of(line * LANES, LANES), LANES)
        heads = [2 * line, 2 * line + 1] if width < LANES else [lax.div(line, jnp.int32(width // LANES))]

        def across(values):
            """One number a head -> one a lane."""
            full = [plgpu.layout_cast(jnp.full((LANES,), value, jnp.float32), vector) for value in values]
            if len(full) == 1:
                return full[0]
            return jnp.where(plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=vector) < width, *full)

        def add(item, state):
            maximum, total, out = state
            log = across([logs[item, tile, head] for head in heads])
            higher = jnp.maximum(maximum, log)
            shrink, weight = jnp.exp2(maximum - higher), jnp.exp2(log - higher)
            held = plgpu.load(sums.at[item, tile, lanes], layout=vector, optimized=False)
            return higher, total * shrink + weight, out * shrink + held * weight

        start = tuple(across([value] * len(heads)) for value in (MASKED, 0.0, 0.0))
        _, total, added = lax.fori_loop(first_items[row], first_items[row + 1], add, start)
        out[row, tile, lanes] = (added / jnp.maximum(total, 1e-30)).astype(dtype)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, num_tiles, num_lines * LANES), dtype),
        grid=(num_rows, num_tiles, num_lines),
        grid_names=("row", "tile", "line"),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        kernel_name="add_items",
    )(first_items, sums.reshape(num_items, num_tiles, rows * width), logs)
    return out[..., : used * width].reshape(num_rows, num_tiles, used, width)
