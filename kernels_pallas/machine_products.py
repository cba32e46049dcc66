"""Products of a matrix and a few tokens on the CPU, in machine code.

A decode step reads every weight once and does little with it: what counts is that memory never waits. Sums are float32,
and each is made by one thread in one order: an answer does not depend on how many threads there are.
"""

import ctypes
import functools
import sys
from typing import Any

import numba
import numpy as np
from llvmlite import binding

from kernels_pallas import machine_vectors as simd
from kernels_pallas import machine_words as low
from kernels_pallas.machine_team import AWAKE, HANDLER, OPTIONS, PIECE, VERSION, WIDE_REGISTERS, num_workers, share

PIECE_BYTES = 1 << 15  # of a matrix, at least: some microseconds of one thread
_CHUNK = 64  # numbers of a row that are widened at a time
_UNIT = 16  # rows that are not divided among threads


def _together(tokens: int) -> int:
    """Rows of a matrix whose sums are made side by side, in registers."""
    return 4 if tokens < 3 else 2


def few_tokens(kernel: Any, activations: Any) -> int:
    """Of these dtypes: whose sums are made with a row's numbers side by side; of more, tokens lie side by side."""
    return 4 if _in_tiles(low.TYPES[kernel], low.TYPES[activations]) else 8


def compile_product(
    stored: Any, given: Any, made: Any, tokens: int, scaled: bool, gated: bool, slot: int
) -> tuple[Any, Any]:
    """-> what XLA calls, and what computes a piece: some rows of the kernel."""
    itemsize, kind, version = np.dtype(stored).itemsize, list(low.TYPES.values()).index(stored), VERSION
    together = _together(tokens)
    num_sums = together * tokens

    @numba.cfunc(PIECE, **OPTIONS)
    def piece(frame, index):
        assert version
        arguments, results = low.words(frame)[9], low.words(frame)[14]
        num_out, num_in = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1)
        kernel = numba.carray(low.data(arguments, 0), (num_out, num_in), stored)
        x = numba.carray(low.data(results, 1), (tokens, num_in), np.float32)
        out = numba.carray(low.data(results, 0), (num_out, tokens), made)
        scale = numba.carray(low.data(arguments, 2 if scaled else 0), (num_out,), np.float32)
        here = low.alloca(num_sums)
        o, end = _span(index, num_out, num_in * itemsize, num_workers())
        limit = low.address(arguments, 0) + end * num_in * itemsize
        while o < end:
            at = low.address(arguments, 0) + o * num_in * itemsize
            count = together if o + together <= end else 1
            if count == together:
                simd.dots(at, num_in * itemsize, low.address(results, 1), num_in, here, limit, together, tokens, kind)
            else:
                simd.dots(at, num_in * itemsize, low.address(results, 1), num_in, here, limit, 1, tokens, kind)
            sums = numba.carray(low.pointer(here), (together, tokens), np.float32)
            for r in range(count):
                for token in range(tokens):
                    total = sums[r, token]
                    for i in range(num_in // 16 * 16, num_in):
                        total += low.wide(kernel[o + r, i]) * x[token, i]
                    out[o + r, token] = low.like(out, total * scale[o + r] if scaled else total)
            o += count

    @numba.cfunc(HANDLER, **OPTIONS)
    def handler(words):
        assert version
        if words[1] != 0:
            return low.describe(words[1], words[2])
        arguments, results = words[9], words[14]
        num_out, num_in = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1)
        halves = numba.carray(low.data(arguments, 1), (2 if gated else 1, num_in, tokens), given)
        if gated:
            _lay_in_rows(_gate(halves, low.address(results, 1) + 4 * num_in * tokens), low.address(results, 1))
        else:
            _lay_in_rows(halves[0], low.address(results, 1))
        pieces = _num_spans(num_out, num_in * itemsize, num_workers())
        return share(slot, low.address_of(words), pieces, AWAKE)

    return handler, piece


def compile_wide_product(
    stored: Any, given: Any, made: Any, vectors: int, scaled: bool, gated: bool, slot: int
) -> tuple[Any, Any]:
    """The same for up to 16 * vectors tokens. A sum is made number by number, 16 tokens at once; of bfloat16, where the
    processor has AMX, pair by pair in its tiles of 16 rows and 16 tokens."""
    itemsize, version, sample = np.dtype(stored).itemsize, VERSION, stored(0)
    padded, tiled = 16 * vectors, _in_tiles(stored, given)
    is_direct = given is np.float32 and not gated  # as many tokens as fill the vectors need no room
    row_tiles, together = 2, (16 if vectors == 1 else 8) if WIDE_REGISTERS else 4
    num_sums, num_widened, is_wide = row_tiles * _UNIT * padded, together * _CHUNK, stored is np.float32

    @numba.cfunc(PIECE, **OPTIONS)
    def piece(frame, index):
        assert version
        arguments, results = low.words(frame)[9], low.words(frame)[14]
        num_out, num_in, tokens = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1), low.dim(results, 0, 1)
        out = numba.carray(low.data(results, 0), (num_out, tokens), made)
        scale = numba.carray(low.data(arguments, 2 if scaled else 0), (num_out,), np.float32)
        start, end = _span(index, -(-num_out // _UNIT), _UNIT * num_in * itemsize, num_workers())
        o, end = start * _UNIT, min(end * _UNIT, num_out)
        row_bytes, x_at = num_in * itemsize, low.address(results, 1)
        if is_direct and tokens == padded:
            x_at = low.address(arguments, 1)
        sums_at = low.alloca(num_sums)
        sums = numba.carray(low.pointer(sums_at), (row_tiles * _UNIT, padded), np.float32)
        in_tiles = tiled and num_in % 32 == 0
        if in_tiles:
            _configure(low.alloca(16))
        widened_at = low.alloca(num_widened)
        widened = numba.carray(low.pointer(widened_at), (together, _CHUNK), np.float32)
        while o < end:
            at = low.address(arguments, 0) + o * row_bytes
            if in_tiles and end - o >= _UNIT:
                count = _UNIT
                if end - o >= row_tiles * _UNIT:
                    count = row_tiles * _UNIT
                    simd.tiles(at, row_bytes, x_at, num_in, sums_at, count * row_bytes, row_tiles, vectors)
                else:
                    simd.tiles(at, row_bytes, x_at, num_in, sums_at, count * row_bytes, 1, vectors)
            elif in_tiles:
                count = end - o
                _dots_of_pairs(at, x_at, num_in, sums[:count])
            else:
                count = min(together, end - o)
                sums[:] = 0
                for i in range(0, num_in, _CHUNK):
                    numbers = min(_CHUNK, num_in - i)
                    left, stride = at + i * itemsize, row_bytes
                    ahead = at + count * row_bytes + 64 * i
                    if not is_wide:
                        for r in range(count):
                            for n in range(0, numbers // 16 * 16, 16):
                                simd.widened(
                                    left + r * row_bytes + n * itemsize, widened_at + 4 * (r * _CHUNK + n), sample
                                )
                            row = numba.carray(low.pointer(left + r * row_bytes), (numbers,), stored)
                            for n in range(numbers // 16 * 16, numbers):
                                widened[r, n] = low.wide(row[n])
                        left, stride = widened_at, 4 * _CHUNK
                    right = x_at + 4 * i * padded
                    simd.multiply(
                        left,
                        stride,
                        right,
                        4 * padded,
                        sums_at,
                        4 * padded,
                        numbers,
                        count,
                        ahead,
                        together,
                        vectors,
                        1,
                    )
            for r in range(count):
                for token in range(tokens):
                    total = sums[r, token]
                    out[o + r, token] = low.like(out, total * scale[o + r] if scaled else total)
            o += count
        if in_tiles:
            simd.released()

    @numba.cfunc(HANDLER, **OPTIONS)
    def handler(words):
        assert version
        if words[1] != 0:
            return low.describe(words[1], words[2])
        arguments, results = words[9], words[14]
        num_out, num_in, tokens = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1), low.dim(results, 0, 1)
        halves = numba.carray(low.data(arguments, 1), (2 if gated else 1, num_in, tokens), given)
        room_at, in_tiles = low.address(results, 1), tiled and num_in % 32 == 0
        if gated:
            _lay_in_columns(_gate(halves, room_at + 4 * num_in * padded), room_at, padded, in_tiles)
        elif not is_direct or tokens < padded:
            _lay_in_columns(halves[0], room_at, padded, in_tiles)
        pieces = _num_spans(-(-num_out // _UNIT), _UNIT * num_in * itemsize, num_workers())
        return share(slot, low.address_of(words), pieces, AWAKE)

    return handler, piece


def compile_norm(given: Any) -> tuple[Any, None]:
    """-> what XLA calls. It takes less time than handing a piece of it to somebody would."""
    version = VERSION

    @numba.cfunc(HANDLER, **OPTIONS)
    def handler(words):
        assert version
        if words[1] != 0:
            return low.describe(words[1], words[2])
        arguments, results = words[9], words[14]
        size, tokens = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1)
        x = numba.carray(low.data(arguments, 0), (size, tokens), given)
        scale = numba.carray(low.data(arguments, 1), (size,), given)
        (eps,) = numba.carray(low.data(arguments, 2), (1,), np.float32)
        out = numba.carray(low.data(results, 0), (size, tokens), given)
        factors = numba.carray(low.data(results, 1), (tokens,), np.float32)
        factors[:] = 0
        for i in range(size):
            for token in range(tokens):
                number = low.wide(x[i, token])
                factors[token] += number * number
        for token in range(tokens):
            factors[token] = np.float32(1) / np.sqrt(factors[token] / np.float32(size) + eps)
        for i in range(size):
            for token in range(tokens):
                rounded = low.like(out, low.wide(x[i, token]) * factors[token])
                out[i, token] = low.like(out, low.wide(rounded) * low.wide(scale[i]))
        return 0

    return handler, None


@numba.njit
def _gate(halves, out):
    """silu of the first of halves [2, num_in, tokens] times the second -> float32 [num_in, tokens], put there."""
    num_in, tokens = halves.shape[1:]
    count, one = num_in * tokens, halves.itemsize
    left, sample = halves.ctypes.data, halves[0, 0, 0]
    for n in range(0, count // 16 * 16, 16):
        simd.gated(left + n * one, left + (count + n) * one, out + 4 * n, sample)
    made = numba.carray(low.pointer(out), (num_in, tokens), np.float32)
    for n in range(count // 16 * 16, count):
        i, token = n // tokens, n % tokens
        made[i, token] = low.silu(low.wide(halves[0, i, token])) * low.wide(halves[1, i, token])
    return made


@numba.njit
def _lay_in_rows(x, room_at):
    """Activations [num_in, tokens] as float32 [tokens, num_in]."""
    num_in, tokens = x.shape
    room = numba.carray(low.pointer(room_at), (tokens, num_in), np.float32)
    for token in range(tokens):
        for i in range(num_in):
            room[token, i] = low.wide(x[i, token])


@numba.njit
def _lay_in_columns(x, room_at, padded, in_pairs):
    """Activations [num_in, tokens] as float32 [num_in, padded], or as pairs of bfloat16 [num_in / 2, padded, 2]."""
    num_in, tokens = x.shape
    if in_pairs:
        pairs = numba.carray(low.pointer(room_at), (num_in // 2, padded, 2), np.uint16)
        for i in range(num_in // 2):
            for token in range(tokens):
                pairs[i, token, 0] = low.like(pairs, low.wide(x[2 * i, token]))
                pairs[i, token, 1] = low.like(pairs, low.wide(x[2 * i + 1, token]))
            pairs[i, tokens:] = 0
        return
    room = numba.carray(low.pointer(room_at), (num_in, padded), np.float32)
    for i in range(num_in):
        for token in range(tokens):
            room[i, token] = low.wide(x[i, token])
        room[i, tokens:] = 0


@numba.njit(inline="always")
def _configure(at):
    """Eight tiles of 16 rows of 64 bytes (Intel's manual, volume 1, 18.3)."""
    rows = numba.carray(low.pointer(at), (64,), np.uint8)
    rows[:] = 0
    rows[0] = 1
    for tile in range(8):
        rows[16 + 2 * tile], rows[48 + tile] = 64, 16
    simd.configured(at)


@numba.njit
def _dots_of_pairs(at, x_at, num_in, sums):
    """What tiles leave over: rows of bfloat16 times pairs."""
    rows, padded = sums.shape
    kernel = numba.carray(low.pointer(at), (rows, num_in), np.uint16)
    pairs = numba.carray(low.pointer(x_at), (num_in // 2, padded, 2), np.uint16)
    sums[:] = 0
    for r in range(rows):
        for i in range(num_in):
            for token in range(padded):
                sums[r, token] += low.wide(kernel[r, i]) * low.wide(pairs[i // 2, token, i % 2])


def _in_tiles(stored: Any, given: Any) -> bool:
    return stored is given is low.TYPES["bf16"] and _has_tiles()


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor has AMX for bfloat16, and the kernel lets this process use it."""
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16") and sys.platform == "linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@numba.njit
def _num_spans(num_rows, row_bytes, threads):
    """Pieces that a matrix is cut into."""
    least, left, count = max(PIECE_BYTES // row_bytes, 1), num_rows, 0
    while left > 0:
        left -= max(left // threads, least)
        count += 1
    return count


@numba.njit
def _span(index, num_rows, row_bytes, threads):
    """-> the first row of a piece, and the row behind its last. Each takes a part of what is left: long ones to begin
    with, which memory likes, short ones at the end, so that nobody waits long for the last."""
    least, start = max(PIECE_BYTES // row_bytes, 1), 0
    for _ in range(index):
        start += max((num_rows - start) // threads, least)
    return start, min(start + max((num_rows - start) // threads, least), num_rows)
