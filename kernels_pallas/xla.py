"""Paged attention in plain XLA: loops over blocks of pages with online softmax (Milakov and Gimelshein 2018, Rabe and
Staats 2021) and a traced bound, so that one program serves every context length and reads only what the rows hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import writes
from kernels_pallas.cache import LANES, KVCache, numbers, shares_lanes, split_scales
from kernels_pallas.kinds import FULL, LayerKind, Work

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

DECODE_BLOCK_TOKENS = 64
DECODE_TURN_ITEMS = 4  # at least: fewer rows than that take several blocks each in a turn
PREFILL_BLOCK_TOKENS = 128
_MASKED = -1e30  # finite: a row that sees nothing yet keeps exp() and its rescaling free of NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlan:
    """A work list: item j is one block of pages of one row, so that a step costs the sum of its contexts, not the
    number of rows times the longest. N = max(S, 4) items are done at a time, whoever's they are: little enough that a
    turn's K and V stay in the cores' own caches from the gather to the second product."""

    item_rows: jax.Array  # [J] row of each item, J >= S * blocks of the longest row possible; S past the end
    item_starts: jax.Array  # [J] position of its first token
    item_pages: jax.Array  # [J, n]
    num_turns: jax.Array  # [] loop turns of N items
    kv_lens: jax.Array  # [S] from the first page that is read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    pages: jax.Array  # [J] the rows' pages, one after another: the only KV that is read
    page_rows: jax.Array  # [J] row that owns pages[j]; -1 past the end
    page_positions: jax.Array  # [J] position of its first token
    num_blocks: jax.Array  # []
    token_rows: jax.Array  # [T] row of each token; -2 for padding
    positions: jax.Array  # [T]


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int, kind: LayerKind = FULL) -> Work:
    """See kernels_pallas.attention."""
    return Work(
        decode=None if rows is None else _plan_decode(rows, page_size, kind),
        prefill=None if chunks is None else _plan_prefill(chunks, page_size, kind),
        kind=kind,
        writes=writes.plan(rows, chunks, page_size),
    )


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: int | jax.Array,
    work: Work,
    *,
    decode: Callable[..., jax.Array] | None = None,
    prefill: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention. All writes come before all reads: interleaved, XLA copies the whole cache. decode
    and prefill: of (q, cache, num_kv_heads, layer, the plan of theirs, kind), where they are not this module's."""
    decode_plan, prefill_plan = work.decode, work.prefill
    num_decode = 0 if decode_plan is None else decode_plan.kv_lens.shape[0]
    cache = writes.write(cache, layer, k, v, work.writes)
    outs = []
    if decode_plan is not None:
        outs.append((decode or _decode)(q[:num_decode], cache, k.shape[1], layer, decode_plan, work.kind))
    if prefill_plan is not None:
        outs.append((prefill or _prefill)(q[num_decode:], cache, k.shape[1], layer, prefill_plan, work.kind))
    return (outs[0] if len(outs) == 1 else jnp.concatenate(outs)), cache


def _plan_decode(rows: "DecodeRows", page_size: int, kind: LayerKind) -> DecodePlan:
    per_block = max(DECODE_BLOCK_TOKENS // page_size, 1)
    table, kv_lens = kind.last_pages(rows.page_table, rows.kv_lens, page_size)
    table = _pad_to(table, per_block, axis=1)
    num_rows, num_pages = table.shape
    counts = -(-kv_lens // (per_block * page_size))
    per_turn = max(num_rows, DECODE_TURN_ITEMS)
    row, block, used, total = _work_list(counts, -(-num_rows * num_pages // per_block // per_turn) * per_turn)
    return DecodePlan(
        item_rows=jnp.where(used, row, num_rows),
        item_starts=block * per_block * page_size,
        item_pages=jnp.where(used[:, None], table.reshape(num_rows, -1, per_block)[row, block], 0),
        num_turns=-(-total // per_turn),
        kv_lens=kv_lens,
    )


def _work_list(counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """counts [R] of items per row -> for each of length items: its row, its number in the row, whether it exists; and
    their total."""
    ends = jnp.cumsum(counts)
    item = jnp.arange(length)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), counts.shape[0] - 1)
    used = item < ends[-1]
    return row, jnp.where(used, item - (ends - counts)[row], 0), used, ends[-1]


def _plan_prefill(chunks: "PrefillChunks", page_size: int, kind: LayerKind) -> PrefillPlan:
    num_rows, max_pages = chunks.page_table.shape
    num_tokens = chunks.positions.shape[0]
    per_block = max(PREFILL_BLOCK_TOKENS // page_size, 1)
    first_tokens = jnp.minimum(chunks.starts[:-1], num_tokens - 1)
    seen = kind.first_page(chunks.positions[first_tokens], page_size)  # [R] by a row's first new token
    counts = jnp.where(chunks.kv_lens > 0, -(-chunks.kv_lens // page_size) - seen, 0)  # [R] pages each row reads
    most_pages = num_rows * kind.most_pages(max_pages, page_size, num_tokens)
    row, index, used, total = _work_list(counts, -(-most_pages // per_block) * per_block)
    index = index + seen[row]
    pages = jnp.where(used, chunks.page_table[row, jnp.minimum(index, max_pages - 1)], 0)

    token = jnp.arange(num_tokens)
    token_row = jnp.clip(jnp.searchsorted(chunks.starts, token, side="right") - 1, 0, num_rows - 1)
    real = chunks.positions < chunks.kv_lens[token_row]
    return PrefillPlan(
        pages=pages,
        page_rows=jnp.where(used, row, -1),
        page_positions=index * page_size,
        num_blocks=-(-total // per_block),
        token_rows=jnp.where(real, token_row, -2),
        positions=chunks.positions,
    )


def _decode(
    q: jax.Array, cache: KVCache, num_kv_heads: int, layer: int | jax.Array, plan: DecodePlan, kind: LayerKind
) -> jax.Array:
    """q [S, H, D] against the rows' pages -> [S, H, D].

    Where K and V share lanes the products run over all of them, q padded with zeros and the upper half of the result
    kept: twice the arithmetic, half the time, since the halves need no copies of their own.
    """
    num_rows, num_heads, head_dim = q.shape
    block = plan.item_pages.shape[1] * cache.pages.shape[3]
    per_turn = max(num_rows, DECODE_TURN_ITEMS)
    shared = shares_lanes(head_dim)
    grouped = _padded(
        _scaled(q, num_kv_heads, kind), LANES if shared else -(-head_dim // LANES) * LANES
    )  # [S, K, G, W]

    def body(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def take(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, turn * per_turn, per_turn)

        rows = take(plan.item_rows)
        lens = jnp.where(rows < num_rows, plan.kv_lens[rows], 0)
        behind = lens[:, None] - (take(plan.item_starts)[:, None] + jnp.arange(block))  # [S, n] 1: the new token
        visible = behind > 0 if kind.window is None else (behind > 0) & (behind <= kind.window)
        keys, values = (
            jnp.where(visible[:, None, :, None], kv, 0)  # free inside the gather; an unwritten page may hold NaN
            for kv in _gather(cache, layer, take(plan.item_pages), num_kv_heads, q)
        )
        scores = jnp.einsum("skgd,sknd->skgn", grouped[rows], keys, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], kind.capped(scores), _MASKED)
        items = _accumulate(_start((per_turn, *grouped.shape[1:])), scores, values, "skgn,sknd->skgd")
        return _merge(carry, items, rows)

    out = _normalise(lax.fori_loop(0, plan.num_turns, body, _start(grouped.shape)))
    out = out[..., LANES // 2 : LANES // 2 + head_dim] if shared else out[..., :head_dim]
    return out.reshape(num_rows, num_heads, head_dim).astype(q.dtype)


def _merge(carry: tuple[jax.Array, ...], items: tuple[jax.Array, ...], rows: jax.Array) -> tuple[jax.Array, ...]:
    """Online softmaxes of items [S, K, G(, W)] into those of their rows [S]; a row has any number of items."""
    maximum, total, out = carry
    item_maximum, item_total, item_out = items
    new_maximum = maximum.at[rows].max(item_maximum, mode="drop")
    weights = jnp.exp(item_maximum - new_maximum[rows])
    shrink = jnp.exp(maximum - new_maximum)
    total = (total * shrink).at[rows].add(item_total * weights, mode="drop")
    out = (out * shrink[..., None]).at[rows].add(item_out * weights[..., None], mode="drop")
    return new_maximum, total, out


def _prefill(
    q: jax.Array, cache: KVCache, num_kv_heads: int, layer: int | jax.Array, plan: PrefillPlan, kind: LayerKind
) -> jax.Array:
    """q [T, H, D] of R chunks against the pages of their rows -> [T, H, D].

    All tokens meet all pages of the list, and a mask keeps rows apart: the list is short where rows are many.
    """
    num_tokens, num_heads, head_dim = q.shape
    page_size = cache.pages.shape[3]
    per_block = max(PREFILL_BLOCK_TOKENS // page_size, 1)
    grouped = jnp.moveaxis(_scaled(q, num_kv_heads, kind), 0, 2)  # [K, G, T, D]

    def body(b: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def take(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, b * per_block, per_block)

        row = jnp.repeat(take(plan.page_rows), page_size)
        position = (take(plan.page_positions)[:, None] + jnp.arange(page_size)).reshape(-1)
        behind = plan.positions[:, None] - position
        visible = (row == plan.token_rows[:, None]) & (behind >= 0)  # [T, n]
        if kind.window is not None:
            visible &= behind < kind.window
        keys, values = (kv[0] for kv in _gather(cache, layer, take(plan.pages)[None], num_kv_heads, q))
        if shares_lanes(head_dim):
            keys, values = keys[..., :head_dim], values[..., LANES // 2 : LANES // 2 + head_dim]
        else:
            keys, values = keys[..., :head_dim], values[..., :head_dim]
        values = jnp.where(jnp.any(visible, axis=0)[:, None], values, 0)
        scores = jnp.einsum("kgtd,knd->kgtn", grouped, keys, preferred_element_type=jnp.float32)
        return _accumulate(carry, jnp.where(visible, kind.capped(scores), _MASKED), values, "kgtn,knd->kgtd")

    out = _normalise(lax.fori_loop(0, plan.num_blocks, body, _start((*grouped.shape[:3], head_dim))))
    return jnp.moveaxis(out, 2, 0).reshape(num_tokens, num_heads, head_dim).astype(q.dtype)


def _gather(
    cache: KVCache, layer: int | jax.Array, ids: jax.Array, num_kv_heads: int, q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """ids [S, n] of pages -> keys, values [S, K, n * page_size, W], rows of 128 lanes side by side; where K and V share
    lanes both are the same array. Whole rows of a page, in the order wanted: they move at memory speed. Rows of 8 bits
    are widened to q's dtype."""
    pages, shared = cache.pages, shares_lanes(q.shape[-1])
    num_layers, num_pages, page_rows, page_size, lanes = pages.shape
    flat = pages.reshape(num_layers * num_pages * page_rows, page_size * lanes)
    first = ((ids + layer * num_pages) * page_rows)[:, None, :, None]  # [S, 1, n, 1]
    per_head = page_rows // num_kv_heads if shared else page_rows // (2 * num_kv_heads)
    step = per_head if shared else 2 * per_head
    head = (jnp.arange(num_kv_heads) * step)[None, :, None, None]

    def take(offset: int) -> jax.Array:
        index = first + head + offset + jnp.arange(per_head)  # [S, K, n, c]
        rows = flat[index].reshape(*index.shape, page_size, lanes)
        return jnp.moveaxis(rows, 3, 4).reshape(*index.shape[:2], index.shape[2] * page_size, per_head * lanes)

    keys = numbers(take(0))
    values = keys if shared else numbers(take(per_head))
    if cache.scales is None:
        return keys.astype(q.dtype), values.astype(q.dtype)
    flat_scales = cache.scales.reshape(num_layers * num_pages, *cache.scales.shape[2:])
    scales = jnp.moveaxis(flat_scales[ids + layer * num_pages], 1, 2)  # [S, 2 * K, n, page_size]
    of_keys, of_values = split_scales(scales.reshape(*scales.shape[:2], -1, 1), axis=1)
    if shared:
        of_both = jnp.where(jnp.arange(lanes) < LANES // 2, of_keys, of_values)
        keys = (keys.astype(jnp.float32) * of_both).astype(q.dtype)
        return keys, keys
    wide = (keys.astype(jnp.float32) * of_keys, values.astype(jnp.float32) * of_values)
    return wide[0].astype(q.dtype), wide[1].astype(q.dtype)


def _scaled(q: jax.Array, num_kv_heads: int, kind: LayerKind) -> jax.Array:
    """q [N, H, D] -> [N, K, G, D] times the scale."""
    return (q * kind.scale_of(q.shape[-1])).reshape(q.shape[0], num_kv_heads, -1, q.shape[-1])


def _start(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of an online softmax that has seen nothing: running maximum, sum and weighted values."""
    return jnp.full(shape[:-1], _MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)


def _accumulate(
    carry: tuple[jax.Array, ...], scores: jax.Array, values: jax.Array, equation: str
) -> tuple[jax.Array, ...]:
    """One block of an online softmax: scores [..., n], values as the equation says."""
    maximum, total, out = carry
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    weighted = jnp.einsum(equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_maximum, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + weighted


def _normalise(carry: tuple[jax.Array, ...]) -> jax.Array:
    _, total, out = carry
    return out / jnp.maximum(total, 1e-30)[..., None]


def _padded(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _pad_to(x: jax.Array, multiple: int, axis: int) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pad)
