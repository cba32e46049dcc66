"""Products of a matrix and a few tokens on the CPU, in machine code.

A decode step reads every weight once and does little with it: what counts is that memory never waits. Sums are float32,
and each is made by one thread in one order: an answer does not depend on how many threads there are.
"""

from typing import Any

import numba
import numpy as np

from kernels_pallas import machine_words as low
from kernels_pallas.machine_team import AWAKE, HANDLER, OPTIONS, PIECE, VERSION, num_workers, share

PIECE_BYTES = 1 << 15  # of a matrix, at least: some microseconds of one thread


def _together(tokens: int) -> int:
    """Rows of a matrix whose sums are made side by side, in registers."""
    return 4 if tokens < 3 else 2


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
                low.dots(at, num_in * itemsize, low.address(results, 1), num_in, here, limit, together, tokens, kind)
            else:
                low.dots(at, num_in * itemsize, low.address(results, 1), num_in, here, limit, 1, tokens, kind)
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
        x = numba.carray(low.data(arguments, 1), (2 if gated else 1, num_in, tokens), given)
        room = numba.carray(low.data(results, 1), (tokens, num_in), np.float32)
        for token in range(tokens):
            for i in range(num_in):
                number = low.wide(x[0, i, token])
                room[token, i] = low.silu(number) * low.wide(x[1 if gated else 0, i, token]) if gated else number
        pieces = _num_spans(num_out, num_in * itemsize, num_workers())
        return share(slot, low.address_of(words), pieces, AWAKE)

    return handler, piece


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
