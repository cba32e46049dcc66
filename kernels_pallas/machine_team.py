"""The threads that compute what XLA's programs call of our machine code (machine_products, machine_attention).

XLA:CPU shares each product out to threads that sleep in between, and waking one takes longer than its share of a decode
step's product (docs/kernels.md has the figures). Here the threads stay awake from one call to the next of a step: a
call is cut into pieces, a shared counter hands them out, and whoever is awake takes the next. A thread that found
nothing for a while sleeps until it is woken.
"""

import ctypes
import hashlib
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

from kernels_pallas import machine_vectors as simd
from kernels_pallas import machine_words as low

MAX_HELPERS = 15  # beyond that memory does not get faster

AWAKE = 200  # microseconds for which a helper waits for the next call of a step before it sleeps
_YIELD_TURNS = 20000  # of the wait for the others' last pieces, before the processor is offered to them
WIDE_REGISTERS = bool(binding.get_host_cpu_features().get("avx512f"))  # 32 of 16 numbers
# The team's memory, in words; what several threads write lies on cache lines of its own.
_LEFT, _DONE, _BUSY, _SLEEPING, _BELL = 0, 8, 24, 32, 40
_CODE, _FRAME, _PIECES, _THREADS, _PATIENCE, _PACE = range(16, 22)
_CODES, _TEAM_WORDS = 64, 320


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
        if piece is not None:
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


HANDLER = types.intp(types.CPointer(types.intp))
PIECE = types.void(types.intp, types.intp)


def _may_keep() -> bool:
    """Whether Numba finds a folder for compiled code: beside this file, or below the user's own."""
    try:
        numba.njit(cache=True)(num_threads)
    except RuntimeError:
        return False
    return True


_KEPT = _may_keep()
OPTIONS: dict[str, Any] = {"cache": _KEPT, "fastmath": True, "error_model": "numpy"}
# Numba keeps compiled code until the file changes that it comes from; this is what it sees of the other files.
_FILES = [Path(each).read_bytes() for each in (__file__, low.__file__, simd.__file__)]
VERSION = int(hashlib.sha256(b"".join(_FILES)).hexdigest()[:8], 16)


@numba.njit(inline="always")
def num_workers():
    return low.read(low.team() + 8 * _THREADS)


@numba.njit(inline="always")
def share(slot, frame, pieces, patience):
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


TEAM = _Team()
_help = numba.njit("void()", nogil=True, cache=_KEPT)(_helper)
