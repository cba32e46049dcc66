"""What a decode step on the CPU is made of, in machine code of its own that XLA's programs call: products of a matrix
and a few tokens, and attention of decode rows over their pages.

A decode step reads every weight once and does little with it. XLA:CPU shares each product out to threads that sleep in
between, and waking one takes longer than the product's share (docs/kernels.md has the figures). Here the threads stay
awake from one call to the next of a step: a call is cut into pieces, a shared counter hands them out, and whoever is
awake takes the next. A thread that found nothing for a while sleeps until it is woken.

Numba compiles the loops. XLA calls them by its typed foreign function interface, whose call frame is read here word by
word (layout: jaxlib's include/xla/ffi/api/c_api.h). Sums are float32, and each is made by one thread in one order: an
answer does not depend on how many threads there are.
"""

import ctypes
import hashlib
import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numba
import numpy as np
from llvmlite import binding
from numba import types

from kernels_pallas import machine_words as low
from kernels_pallas.cache import LANES, shares_lanes

PIECE_BYTES = 1 << 15  # of a matrix, at least: some microseconds of one thread
MAX_HELPERS = 15  # beyond that memory does not get faster

_NEVER = np.float32(-1e30)
AWAKE = 200  # microseconds for which a helper waits for the next call of a step before it sleeps
_YIELD_TURNS = 20000  # of the wait for the others' last pieces, before the processor is offered to them
# Numba keeps compiled code until the file changes that it comes from; these are that file's eyes on the other one.
_WORDS_DIGEST = int(hashlib.sha256(Path(low.__file__).read_bytes()).hexdigest()[:8], 16)
# The team's memory, in words; what several threads write lies on cache lines of its own.
_LEFT, _DONE, _BUSY, _SLEEPING, _BELL = 0, 8, 24, 32, 40
_CODE, _FRAME, _PIECES, _THREADS, _PATIENCE, _PACE = range(16, 22)
_CODES, _TEAM_WORDS = 64, 320

_SHORT = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "float8_e4m3fn": "f8", "uint8": "f8"}


class _Team:
    """The threads that help, and the memory that they and the callers share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.registered: dict[str, tuple[Any, Any]] = {}  # the code lives as long as programs may call it
        self.memory = np.zeros(_TEAM_WORDS + 8, np.int64)
        address = -(-self.memory.ctypes.data // 64) * 64
        self.words = (ctypes.c_int64 * _TEAM_WORDS).from_address(address)
        binding.add_symbol("jaxserve_team", address)
        self.helpers = min(num_threads() - 1, MAX_HELPERS)
        self.words[_THREADS] = self.helpers + 1
        if self.helpers:
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(address + 8 * _BELL), 0, 0)

    def add(self, name: str, handler: Any, piece: Any, slot: int) -> None:
        """Makes a kernel known to XLA; the lock is held."""
        if not self.registered and self.helpers:
            started = time.perf_counter()
            _rest(10_000)
            self.words[_PACE] = round(1 / (time.perf_counter() - started))  # turns in 100 microseconds
            for number in range(self.helpers):
                threading.Thread(target=_help, name=f"decode-{number}", daemon=True).start()
        self.registered[name] = (handler, piece)
        self.words[_CODES + slot] = piece.address
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        jax.ffi.register_ffi_target(name, capsule(handler.address, None, None), platform="cpu")


def num_threads() -> int:
    """Processors that this process may use: by its affinity and its cgroup's quota; NPROC says otherwise, as to XLA."""
    given = os.environ.get("NPROC", "")
    if given.isdigit() and int(given):
        return int(given)
    found = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        found = min(found, max(int(quota) // int(period), 1))
    return found


def product_name(kernel: Any, activations: Any, out: Any, tokens: int, *, scaled: bool, gated: bool) -> str:
    """By which XLA calls: kernel [O, I] x activations [I, T] (, scale [O] float32) -> out [O, T], [T * I] float32 of
    room. gated: activations are [2 * I, T], and silu of the first half times the second is what is multiplied. The
    first three are dtypes."""
    names = (_SHORT[str(np.dtype(dtype))] for dtype in (kernel, activations, out))
    return "_".join(("jaxserve_product", *names, str(tokens), *(["scaled"] * scaled), *(["gated"] * gated)))


def decode_name(head_dim: int, dtype: Any, activations: Any) -> str:
    """By which XLA calls decode attention (see cpu.decode) with pages of a dtype."""
    return f"jaxserve_decode_{head_dim}_{_SHORT[str(np.dtype(dtype))]}_{_SHORT[str(np.dtype(activations))]}"


def register(name: str) -> str:
    """Compiles what a name stands for, unless it is there, and makes it known to XLA: programs that call it can be
    loaded and run from then on. -> the name."""
    with _TEAM.lock:
        if name not in _TEAM.registered:
            _, what, *parts = name.split("_")
            slot = len(_TEAM.registered)
            if what == "product":
                kernel, activations, out = (low.TYPES[part] for part in parts[:3])
                code = _compile_product(
                    kernel, activations, out, int(parts[3]), "scaled" in parts, "gated" in parts, slot
                )
            else:
                code = _compile_decode(int(parts[0]), low.TYPES[parts[1]], low.TYPES[parts[2]], slot)
            _TEAM.add(name, *code, slot)
    return name


def _together(tokens: int) -> int:
    """Rows of a matrix whose sums are made side by side, in registers."""
    return 4 if tokens < 3 else 2


def room_of_decode(head_dim: int, group: int, page_size: int) -> int:
    """Numbers of float32 that the attention of one row and kv head needs beside."""
    blocks, width = _blocks_of(head_dim)
    return group * (2 * blocks * width + 2 + page_size)


def _blocks_of(head_dim: int) -> tuple[int, int]:
    """-> blocks of lanes that K of a head has, and the numbers of each: what a page holds behind the last one's end is
    0, so that only a single block is narrower than its lanes."""
    blocks = -(-head_dim // LANES)
    return blocks, head_dim if blocks == 1 else LANES


_HANDLER = types.intp(types.CPointer(types.intp))
_PIECE = types.void(types.intp, types.intp)


def _may_keep() -> bool:
    """Whether Numba finds a folder for compiled code: beside this file, or below the user's own."""
    try:
        numba.njit(cache=True)(room_of_decode)
    except RuntimeError:
        return False
    return True


_KEPT = _may_keep()
_OPTIONS: dict[str, Any] = {"cache": _KEPT, "fastmath": True, "error_model": "numpy"}


def _compile_product(
    stored: Any, given: Any, made: Any, tokens: int, scaled: bool, gated: bool, slot: int
) -> tuple[Any, Any]:
    """-> what XLA calls, and what computes a piece: some rows of the kernel."""
    itemsize, kind, version = np.dtype(stored).itemsize, list(low.TYPES.values()).index(stored), _WORDS_DIGEST
    together = _together(tokens)
    num_sums = together * tokens

    @numba.cfunc(_PIECE, **_OPTIONS)
    def piece(frame, index):
        assert version
        arguments, results = low.words(frame)[9], low.words(frame)[14]
        num_out, num_in = low.dim(arguments, 0, 0), low.dim(arguments, 0, 1)
        kernel = numba.carray(low.data(arguments, 0), (num_out, num_in), stored)
        x = numba.carray(low.data(results, 1), (tokens, num_in), np.float32)
        out = numba.carray(low.data(results, 0), (num_out, tokens), made)
        scale = numba.carray(low.data(arguments, 2 if scaled else 0), (num_out,), np.float32)
        here = low.alloca(num_sums)
        o, end = _span(index, num_out, num_in * itemsize, low.read(low.team() + 8 * _THREADS))
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

    @numba.cfunc(_HANDLER, **_OPTIONS)
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
        pieces = _num_spans(num_out, num_in * itemsize, low.read(low.team() + 8 * _THREADS))
        return _share(slot, low.address_of(words), pieces, AWAKE)

    return handler, piece


def _compile_decode(head_dim: int, stored: Any, given: Any, slot: int) -> tuple[Any, Any]:
    """-> what XLA calls, and what computes a piece: one row with the query heads of one kv head."""
    version = _WORDS_DIGEST
    itemsize, shared = np.dtype(stored).itemsize, shares_lanes(head_dim)
    eight_bits = itemsize == 1
    blocks, width = _blocks_of(head_dim)
    rows_per_head = 1 if shared else 2 * blocks
    value_row, value_lane = (0, LANES // 2) if shared else (blocks, 0)

    @numba.cfunc(_PIECE, **_OPTIONS)
    def piece(frame, index):
        assert version
        arguments, results = low.words(frame)[9], low.words(frame)[14]
        num_rows, num_heads, max_pages = low.dim(arguments, 1, 0), low.dim(arguments, 1, 1), low.dim(arguments, 2, 1)
        num_kv_heads, window, _ = numba.carray(low.data(arguments, 0), (3,), np.int32)
        row, head, group = index // num_kv_heads, index % num_kv_heads, num_heads // num_kv_heads
        length = numba.carray(low.data(arguments, 3), (num_rows,), np.int32)[row]
        shape: Any = (num_rows, num_kv_heads, group, head_dim)
        q, out = numba.carray(low.data(arguments, 1), shape, given), numba.carray(low.data(results, 0), shape, given)
        if length <= 0:
            for g in range(group):
                for d in range(head_dim):
                    out[row, head, g, d] = 0
            return
        table = numba.carray(low.data(arguments, 2), (num_rows, max_pages), np.int32)
        layer = np.int64(numba.carray(low.data(arguments, 4), (1,), np.int32)[0])
        scale, cap = numba.carray(low.data(arguments, 5), (2,), np.float32)
        num_pages, page_rows, page_size = low.dim(arguments, 6, 1), low.dim(arguments, 6, 2), low.dim(arguments, 6, 3)
        pages = low.address(arguments, 6)
        scales_at = low.address(arguments, 7) if eight_bits else 0

        room = low.address(results, 1) + 4 * index * group * (2 * blocks * width + 2 + page_size)
        queries = numba.carray(low.pointer(room), (group, blocks, width), np.float32)
        room += 4 * group * blocks * width
        sums = numba.carray(low.pointer(room), (group, blocks, width), np.float32)
        room += 4 * group * blocks * width
        scores = numba.carray(low.pointer(room), (group, page_size), np.float32)
        room += 4 * group * page_size
        maxima = numba.carray(low.pointer(room), (group,), np.float32)
        totals = numba.carray(low.pointer(room + 4 * group), (group,), np.float32)
        for g in range(group):
            maxima[g], totals[g] = _NEVER, np.float32(0)
            for block in range(blocks):
                for d in range(width):
                    sums[g, block, d], queries[g, block, d] = np.float32(0), np.float32(0)
            for d in range(head_dim):
                queries[g, d // width, d % width] = low.wide(q[row, head, g, d]) * scale

        first = max(length - window, 0) if window > 0 else 0
        last_page = (length - 1) // page_size
        for index in range(first // page_size, last_page + 1):
            page = layer * num_pages + table[row, index]
            ahead = layer * num_pages + table[row, min(index + 1, last_page)]
            at = pages + (page * page_rows + head * rows_per_head) * page_size * LANES * itemsize
            ahead = pages + (ahead * page_rows + head * rows_per_head) * page_size * LANES * itemsize
            for line in range(0, rows_per_head * page_size * LANES * itemsize, 64):
                low.prefetch(ahead + line)
            keys = numba.carray(low.pointer(at), (blocks, page_size, LANES), stored)
            at += (value_row * page_size * LANES + value_lane) * itemsize
            values = numba.carray(low.pointer(at), (blocks, page_size, LANES), stored)
            at = scales_at + 4 * (page * 2 * num_kv_heads + 2 * head) * page_size
            scales = numba.carray(low.pointer(at), (2, page_size), np.float32)
            start, stop = max(first - index * page_size, 0), min(length - index * page_size, page_size)
            for g in range(group):
                highest = maxima[g]
                for t in range(start, stop):
                    score = np.float32(0)
                    for block in range(blocks):
                        for d in range(width):
                            score += queries[g, block, d] * low.wide(keys[block, t, d])
                    if eight_bits:
                        score *= scales[0, t]
                    if cap > 0:
                        score = cap * np.float32(math.tanh(score / cap))
                    scores[g, t] = score
                    highest = max(highest, score)
                shrink = low.exp(maxima[g] - highest)
                maxima[g] = highest
                total = totals[g] * shrink
                for t in range(start, stop):
                    weight = low.exp(scores[g, t] - highest)
                    total += weight
                    scores[g, t] = weight * scales[1, t] if eight_bits else weight
                totals[g] = total
                for block in range(blocks):
                    for d in range(width):
                        sums[g, block, d] *= shrink
                for t in range(start, stop):
                    weight = scores[g, t]
                    for block in range(blocks):
                        for d in range(width):
                            sums[g, block, d] += weight * low.wide(values[block, t, d])
        for g in range(group):
            share = np.float32(1) / totals[g]
            for d in range(head_dim):
                out[row, head, g, d] = low.like(out, sums[g, d // width, d % width] * share)

    @numba.cfunc(_HANDLER, **_OPTIONS)
    def handler(words):
        assert version
        if words[1] != 0:
            return low.describe(words[1], words[2])
        arguments = words[9]
        num_kv_heads, _, patience = numba.carray(low.data(arguments, 0), (3,), np.int32)
        return _share(slot, low.address_of(words), low.dim(arguments, 1, 0) * num_kv_heads, patience)

    return handler, piece


# How work is shared out.


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


@numba.njit(inline="always")
def _share(slot, frame, pieces, patience):
    """Has every piece of a call computed, by the helpers too unless they are busy with another call; they wait for the
    next one as many microseconds as patience says. -> 0.

    A piece is taken before its code and frame are read, and those do not change until all pieces are done: nobody who
    comes late computes with a frame that is gone.
    """
    team = low.team()
    code = low.read(team + 8 * (_CODES + slot))
    if pieces < 2 or not low.swap(team + 8 * _BUSY, 0, 1):
        for index in range(pieces):
            low.call(code, frame, index)
        return 0
    low.write(team + 8 * _CODE, code)
    low.write(team + 8 * _FRAME, frame)
    low.write(team + 8 * _PIECES, pieces)
    low.write(team + 8 * _PATIENCE, patience * low.read(team + 8 * _PACE) // 100)
    low.write(team + 8 * _DONE, 0)
    low.write(team + 8 * _LEFT, pieces)
    for _ in range(low.read(team + 8 * _SLEEPING)):
        _sem_post(low.pointer(team + 8 * _BELL))
    while _take(team):
        pass
    turns = 0
    while low.read(team + 8 * _DONE) < pieces:
        low.pause()
        turns += 1
        if turns > _YIELD_TURNS:
            _sched_yield()
    low.write(team + 8 * _BUSY, 0)
    return 0


@numba.njit(inline="always")
def _take(team):
    """Computes the next piece. -> whether there was one."""
    if low.read(team + 8 * _LEFT) <= 0:
        return False
    left = low.add(team + 8 * _LEFT, -1)
    if left <= 0:
        return False
    low.call(low.read(team + 8 * _CODE), low.read(team + 8 * _FRAME), low.read(team + 8 * _PIECES) - left)
    low.add(team + 8 * _DONE, 1)
    return True


def _helper():
    """A helper's life."""
    team = low.team()
    turns = 0
    while True:
        if _take(team):
            turns = 0
            continue
        low.pause()
        turns += 1
        if turns > low.read(team + 8 * _PATIENCE):
            low.add(team + 8 * _SLEEPING, 1)
            if low.read(team + 8 * _LEFT) <= 0:  # else the one who shared it out may not have seen that we sleep
                _sem_wait(low.pointer(team + 8 * _BELL))
            low.add(team + 8 * _SLEEPING, -1)
            turns = 0


_sem_post = types.ExternalFunction("sem_post", types.int32(types.voidptr))
_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.voidptr))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@numba.njit("void(intp)", cache=_KEPT)
def _rest(turns):
    for _ in range(turns):
        low.pause()


_TEAM = _Team()
_help = numba.njit("void()", nogil=True, cache=_KEPT)(_helper)
