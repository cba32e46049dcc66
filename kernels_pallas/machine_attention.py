"""Attention on the CPU in machine code: tiles of new tokens, one of a decode row and up to 64 of a prompt, against the
pages of their row.

A tile's queries of one kv head are a matrix [tokens * group, D]. The row's keys come in blocks of 64 tokens that begin
at multiples of 64: they are widened to float32 and turned over, so that a product's sums are vectors over keys, and an
online softmax (Milakov and Gimelshein 2018) goes from block to block. After so many blocks as make a part of the
context, sums begin anew and parts are merged (Flash-Decoding, Dao et al. 2023): parts of one decode row are computed by
several threads, those of a tile of a prompt one after another, and the result is the same, bit for bit, since every
sum is made in the order of the context.
"""

import math
from typing import Any

import numba
import numpy as np

from kernels_pallas import machine_vectors as simd
from kernels_pallas import machine_words as low
from kernels_pallas.cache import LANES
from kernels_pallas.machine_team import HANDLER, OPTIONS, PIECE, VERSION, WIDE_REGISTERS, share

BLOCK = 64  # keys
PART_BLOCKS = 8  # at least
MOST_PARTS = 16  # of a context

_NEVER = np.float32(-1e30)  # of scores that do not count; finite: differences stay free of NaN
_LEAST = np.float32(-1e29)  # of maxima: above that, so that such scores weigh nothing
_TOGETHER, _VECTORS = (8, 2) if WIDE_REGISTERS else (4, 1)  # of a product: rows and vectors that fill the registers
_STEP = 16 * _VECTORS


def blocks_of_a_part(max_tokens: int) -> int:
    """Of a context of so many tokens at most."""
    blocks = -(-max_tokens // BLOCK)
    return max(PART_BLOCKS, -(-blocks // MOST_PARTS))


def room(num_rows: int, num_kv_heads: int, group: int, head_dim: int, max_tokens: int) -> int:
    """Numbers of float32 that the parts of decode rows need: of each kv head a counter of 64 bits, then of each part
    its sums, maxima and totals."""
    parts = -(-max_tokens // (BLOCK * blocks_of_a_part(max_tokens)))
    width = -(-head_dim // _STEP) * _STEP
    return num_rows * num_kv_heads * (2 + parts * group * (width + 2))


def compile_attention(stored: Any, given: Any, slot: int) -> tuple[Any, Any]:
    """-> what XLA calls, and what computes a piece: a tile with the query heads of one kv head, or of a decode row, and
    one part of its context. cpu.attend_pages says what the operands are."""
    version = VERSION
    itemsize, sample = np.dtype(stored).itemsize, stored(0)
    eight_bits = itemsize == 1

    @numba.cfunc(PIECE, **OPTIONS)
    def piece(frame, index):
        assert version
        arguments, results = low.words(frame)[9], low.words(frame)[14]
        num_tokens, num_heads, head_dim = low.dim(arguments, 1, 0), low.dim(arguments, 1, 1), low.dim(arguments, 1, 2)
        num_rows, max_pages = low.dim(arguments, 2, 0), low.dim(arguments, 2, 1)
        numbers: Any = numba.carray(low.data(arguments, 0), (5,), np.int32)
        num_kv_heads, window, _, num_decode, part_blocks = numbers
        lengths = numba.carray(low.data(arguments, 3), (num_rows,), np.int32)
        firsts = numba.carray(low.data(arguments, 4), (num_rows,), np.int32)
        counts = numba.carray(low.data(arguments, 5), (num_rows,), np.int32)
        layer = np.int64(numba.carray(low.data(arguments, 6), (1,), np.int32)[0])
        scale, cap = numba.carray(low.data(arguments, 7), (2,), np.float32)
        page_rows, page_size = low.dim(arguments, 8, 2), low.dim(arguments, 8, 3)
        part, group = part_blocks * BLOCK, num_heads // num_kv_heads
        tile = _tile_tokens(group)

        row = 0
        units = _units(lengths[0], counts[0], window, part, tile, num_decode > 0)
        while index >= units * num_kv_heads:
            index -= units * num_kv_heads
            row += 1
            units = _units(lengths[row], counts[row], window, part, tile, row < num_decode)
        alone = row < num_decode
        unit, head = index // num_kv_heads, index % num_kv_heads
        length: Any = np.int64(lengths[row])
        count: Any = np.int64(counts[row])
        before = 0 if alone else (units - 1 - unit) * tile  # the last of a prompt reads most: it begins
        tokens = min(tile, count - before)
        position, token = length - count + before, firsts[row] + before
        end, start = position + tokens, max(position + 1 - window, 0) if window > 0 else 0
        first_part, last_part = start // part, (end - 1) // part
        if alone:
            first_part += unit
            last_part = first_part
        used = tokens * group
        rows = used if tokens == 1 else -(-used // _TOGETHER) * _TOGETHER

        width = -(-head_dim // _STEP) * _STEP
        row_bytes, block_bytes, place_bytes = 4 * width, 4 * BLOCK, 16 * BLOCK  # a place: address, scales of K and of V
        room = low.room(rows * (3 * width + BLOCK + 4) + (2 * width + 8) * BLOCK)
        queries_at, sums_at, merged_at = room, room + rows * row_bytes, room + 2 * rows * row_bytes
        scores_at = merged_at + rows * row_bytes
        keys_at = scores_at + rows * block_bytes
        values_at = keys_at + BLOCK * row_bytes
        places_at = values_at + BLOCK * row_bytes  # of a block's keys, and of the next one's
        states_at = places_at + 2 * place_bytes
        sums = numba.carray(low.pointer(sums_at), (rows, width), np.float32)
        merged = numba.carray(low.pointer(merged_at), (rows, width), np.float32)
        states = numba.carray(low.pointer(states_at), (2, rows), np.float32)  # maxima and totals of a part
        all_states = numba.carray(low.pointer(states_at + 8 * rows), (2, rows), np.float32)
        shape: Any = (num_tokens, num_kv_heads, group, head_dim)
        q, out = numba.carray(low.data(arguments, 1), shape, given), numba.carray(low.data(results, 0), shape, given)
        queries = numba.carray(low.pointer(queries_at), (rows, width), np.float32)
        queries[:] = 0
        for m in range(used):
            for d in range(head_dim):
                queries[m, d] = low.wide(q[token + m // group, head, m % group, d]) * scale

        table_at = low.address(arguments, 2) + 4 * row * max_pages
        scales_at = low.address(arguments, 9) if eight_bits else 0
        cache = (low.address(arguments, 8), scales_at, layer * low.dim(arguments, 8, 1), page_rows, page_size, itemsize)
        for number in range(first_part, last_part + 1):
            states[0, :] = _LEAST
            states[1, :] = 0
            sums[:] = 0
            first_block = max(number * part_blocks, start // BLOCK)
            last_block = min((number + 1) * part_blocks, (end - 1) // BLOCK + 1)
            here = places_at + (first_block & 1) * place_bytes
            _find(here, table_at, cache, head, num_kv_heads, first_block, start, end)
            for block in range(first_block, last_block):
                here, ahead = places_at + (block & 1) * place_bytes, 0
                if block + 1 < last_block:
                    ahead = places_at + (block + 1 & 1) * place_bytes
                    _find(ahead, table_at, cache, head, num_kv_heads, block + 1, start, end)
                num_keys = min(end - block * BLOCK, BLOCK)
                filled = -(-num_keys // _STEP) * _STEP
                _load(here, ahead, keys_at, values_at, num_keys, filled, width, head_dim, cache, sample)
                _multiply(
                    queries_at, row_bytes, keys_at, block_bytes, scores_at, block_bytes, head_dim, rows, filled, 0
                )
                factors_at = here + 8 * BLOCK if eight_bits else 0
                shown = (position - block * BLOCK, end - block * BLOCK, window)
                _weigh(scores_at, sums_at, states_at, factors_at, rows, group, width, num_keys, filled, shown, cap)
                _multiply(scores_at, block_bytes, values_at, row_bytes, sums_at, row_bytes, num_keys, rows, width, 1)
            if not alone and last_part > first_part:
                if number == first_part:
                    merged[:], all_states[:] = sums, states
                else:
                    _merge(merged, all_states, sums, states)

        if alone and units > 1:
            slots, most_parts = num_decode * num_kv_heads, -(-max_pages * page_size // part)
            own, counters_at = row * num_kv_heads + head, low.address(results, 1)
            parts_at = counters_at + 8 * slots + own * most_parts * 4 * group * (width + 2)
            if not _gather(counters_at + 8 * own, parts_at, unit, units, sums, states, merged, all_states):
                return
        if units > 1 if alone else last_part > first_part:
            sums, states = merged, all_states
        for m in range(used):
            inverse = np.float32(1) / states[1, m]
            for d in range(head_dim):
                out[token + m // group, head, m % group, d] = low.like(out, sums[m, d] * inverse)

    @numba.cfunc(HANDLER, **OPTIONS)
    def handler(words):
        assert version
        if words[1] != 0:
            return low.describe(words[1], words[2])
        arguments, results = words[9], words[14]
        num_tokens, num_heads, num_rows = low.dim(arguments, 1, 0), low.dim(arguments, 1, 1), low.dim(arguments, 2, 0)
        numbers: Any = numba.carray(low.data(arguments, 0), (5,), np.int32)
        num_kv_heads, window, patience, num_decode, part_blocks = numbers
        lengths = numba.carray(low.data(arguments, 3), (num_rows,), np.int32)
        firsts = numba.carray(low.data(arguments, 4), (num_rows,), np.int32)
        counts = numba.carray(low.data(arguments, 5), (num_rows,), np.int32)
        out = numba.carray(low.data(results, 0), (num_tokens, num_heads * low.dim(arguments, 1, 2)), given)
        counters = numba.carray(low.data(results, 1), (num_decode * num_kv_heads,), np.int64)
        counters[:] = 0
        pieces, written, part, tile = 0, 0, part_blocks * BLOCK, _tile_tokens(num_heads // num_kv_heads)
        for row in range(num_rows):
            pieces += _units(lengths[row], counts[row], window, part, tile, row < num_decode) * num_kv_heads
            out[written : firsts[row]] = 0  # padding
            written = firsts[row] + counts[row]
        out[written:] = 0
        return share(slot, low.address_of(words), pieces, patience)

    return handler, piece


@numba.njit(inline="always")
def _tile_tokens(group):
    """New tokens of a prompt that are computed together: as many as make a matrix of some 128 rows, 8 to 64."""
    return min(max(128 // group // 8 * 8, 8), 64)


@numba.njit(inline="always")
def _units(length, count, window, part, tile, alone):
    """Parts of a decode row's context, or tiles of a prompt's new tokens."""
    if count <= 0:
        return 0
    if not alone:
        return -(-count // tile)
    start = max(length - window, 0) if window > 0 else 0
    return (length - 1) // part - start // part + 1


def _function(make: Any) -> Any:
    """A function that Numba compiles, and keeps, for all kinds of pages at once."""
    return numba.njit(**OPTIONS)(make(VERSION))


@numba.njit(inline="always")
def _values_begin(head_dim):
    """-> the row, of those of a head in a page, and the lane."""
    return (0, LANES // 2) if head_dim <= LANES // 2 else (-(-head_dim // LANES), 0)


@_function
def _find(version):
    def find(places_at, table_at, cache, head, num_kv_heads, block, start, end):
        """Where the keys of a block lie, of which only those from position start to end may be there: the others are
        said to lie where one of these does, for what is not there may be NaN. Behind the addresses [BLOCK] come the
        scales of K and V [2, BLOCK], where there are some."""
        assert version
        pages, scales_at, first_page, page_rows, page_size, itemsize = cache
        rows_per_head = page_rows // num_kv_heads
        oldest, num_keys = max(start - block * BLOCK, 0), min(end - block * BLOCK, BLOCK)
        places = numba.carray(low.pointer(places_at), (BLOCK,), np.int64)
        scales = numba.carray(low.pointer(places_at + 8 * BLOCK), (2, BLOCK), np.float32)
        index, offset = (block * BLOCK + oldest) // page_size, (block * BLOCK + oldest) % page_size
        table = numba.carray(low.pointer(table_at), (index + BLOCK + 1,), np.int32)
        page = first_page + table[index]
        for n in range(-(-num_keys // _STEP) * _STEP):
            if oldest < n < num_keys:
                offset += 1
                if offset == page_size:
                    index, offset = index + 1, 0
                    page = first_page + table[index]
            line = (page * page_rows + head * rows_per_head) * page_size + offset
            places[n] = pages + line * LANES * itemsize
            if scales_at != 0:
                at = scales_at + 4 * ((page * 2 * num_kv_heads + 2 * head) * page_size + offset)
                scales[0, n] = numba.carray(low.pointer(at), (1,), np.float32)[0]
                scales[1, n] = numba.carray(low.pointer(at + 4 * page_size), (1,), np.float32)[0]

    return find


@_function
def _load(version):
    def load(places_at, ahead_at, keys_at, values_at, num_keys, filled, width, head_dim, cache, sample):
        """A block's keys, float32 [width, BLOCK], and values [BLOCK, width] from pages of a sample's type. What the
        next block needs is fetched meanwhile. ahead_at: its places, 0 where there is none."""
        assert version
        value_row, value_lane = _values_begin(head_dim)
        _, _, _, _, page_size, itemsize = cache
        row = page_size * LANES
        places = numba.carray(low.pointer(places_at), (BLOCK,), np.int64)
        ahead = numba.carray(low.pointer(ahead_at), (BLOCK,), np.int64)
        for lane in range(0, width, 16):
            offset = (lane // LANES * row + lane % LANES) * itemsize
            for n in range(0, filled, 16):
                simd.turned(places_at + 8 * n, offset, keys_at + 4 * (lane * BLOCK + n), 4 * BLOCK, sample)
        for n in range(num_keys):
            if ahead_at != 0:
                for line in range(0, min(width, LANES) * itemsize, 64):
                    simd.prefetch_near(ahead[n] + line)
                    simd.prefetch_near(ahead[n] + (value_row * row + value_lane) * itemsize + line)
            for lane in range(0, width, 16):
                offset = ((value_row + lane // LANES) * row + value_lane + lane % LANES) * itemsize
                simd.widened(places[n] + offset, values_at + 4 * (n * width + lane), sample)

    return load


@_function
def _multiply(version):
    def multiply(a, a_stride, b, b_stride, c, c_stride, count, rows, columns, adds):
        """float32 a [rows, count] times b [count, columns] -> c, or added to it."""
        assert version
        for n in range(0, columns, _STEP):
            right, out = b + 4 * n, c + 4 * n
            if adds:
                simd.multiply(a, a_stride, right, b_stride, out, c_stride, count, rows, None, _TOGETHER, _VECTORS, 1)
            else:
                simd.multiply(a, a_stride, right, b_stride, out, c_stride, count, rows, None, _TOGETHER, _VECTORS, 0)

    return multiply


@_function
def _weigh(version):
    def weigh(scores_at, sums_at, states_at, factors_at, rows, group, width, num_keys, filled, shown, cap):
        """A block's scores [rows, filled of BLOCK] become weights, and sums [rows, width] shrink to their new maxima.
        factors_at: of scales of K and V [2, BLOCK], or 0. shown: the tile's first position, the one behind its last,
        both counted from the block's first key, and the window."""
        assert version
        position, end, window = shown
        scores = numba.carray(low.pointer(scores_at), (rows, BLOCK), np.float32)
        states = numba.carray(low.pointer(states_at), (2, rows), np.float32)
        vectors = filled // 16
        factors = numba.carray(low.pointer(factors_at), (2, BLOCK), np.float32)
        all_seen = filled == num_keys and position + 1 >= num_keys and (window <= 0 or end - window <= 0)
        for m in range(rows):
            if factors_at != 0:
                for n in range(filled):
                    scores[m, n] *= factors[0, n]
            if cap > 0:
                for n in range(filled):
                    scores[m, n] = cap * np.float32(math.tanh(scores[m, n] / cap))
            at = scores_at + 4 * m * BLOCK
            if not all_seen:
                newest = position + m // group
                oldest = newest - window + 1 if window > 0 else 0
                simd.only(at, vectors, oldest, min(newest, num_keys - 1), _NEVER)
            highest = simd.largest(at, vectors, _LEAST)
            before = states[0, m]
            if highest > before:
                shrink = low.exp(before - highest)
                states[0, m] = highest
                states[1, m] *= shrink
                simd.scaled(sums_at + 4 * m * width, width // 16, shrink)
            states[1, m] += simd.weights(at, vectors, max(before, highest))
            if factors_at != 0:
                for n in range(filled):
                    scores[m, n] *= factors[1, n]

    return weigh


@_function
def _gather(version):
    def gather(counter, parts_at, unit, units, sums, states, merged, all_states):
        """Puts a part of a decode row's context with the others [units] that are there. -> whether all are; then they
        are merged, in their order."""
        assert version
        group, width = sums.shape
        size = 4 * group * (width + 2)
        for which in range(2):
            for other in range(units if which else 1):
                at = parts_at + (other if which else unit) * size
                part = numba.carray(low.pointer(at), (group, width), np.float32)
                its_states = numba.carray(low.pointer(at + 4 * group * width), (2, group), np.float32)
                if which == 0:
                    part[:], its_states[:] = sums, states
                elif other == 0:
                    merged[:], all_states[:] = part, its_states
                else:
                    _merge(merged, all_states, part, its_states)
            if which == 0 and low.add(counter, 1) < units - 1:
                return False
        return True

    return gather


@_function
def _merge(version):
    def merge(into, all_states, sums, states):
        """A part's sums [rows, width], its maxima and totals [2, rows] into those of the parts before it."""
        assert version
        for m in range(sums.shape[0]):
            highest = max(all_states[0, m], states[0, m])
            before, here = low.exp(all_states[0, m] - highest), low.exp(states[0, m] - highest)
            all_states[0, m] = highest
            all_states[1, m] = all_states[1, m] * before + states[1, m] * here
            for d in range(sums.shape[1]):
                into[m, d] = into[m, d] * before + sums[m, d] * here

    return merge
