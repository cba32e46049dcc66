"""What machine code is written with, and Numba has no words for: atomic memory, calls by address, numbers of 8 and 16
bits, XLA's call frame. Addresses are whole numbers."""

import platform
from typing import Any

import ml_dtypes
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Elements are read as bits where numpy has no such number: bfloat16 as uint16, float8_e4m3fn as uint8.
TYPES: dict[str, Any] = {"f32": np.float32, "bf16": np.uint16, "i8": np.int8, "f8": np.uint8}

_METADATA = 1  # XLA_FFI_Extension_Metadata
WORD, BYTE = ir.IntType(64), ir.IntType(8)


def instruction(signature: Any, emit: Any) -> Any:
    """What a signature's call is in LLVM: emit(builder, *arguments) -> the value, None where there is none."""

    def generate(context, builder, sig, args):
        value = emit(builder, *args)
        return context.get_dummy_value() if value is None else value

    by_arity = (
        lambda _context: (signature, generate),
        lambda _context, a: (signature, generate),
        lambda _context, a, b: (signature, generate),
        lambda _context, a, b, c: (signature, generate),
    )
    return intrinsic(by_arity[len(signature.args)])


def word_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


def _emit_team(builder: Any) -> Any:
    known = builder.module.globals.get("jaxserve_team")
    return builder.ptrtoint(known or ir.GlobalVariable(builder.module, WORD, "jaxserve_team"), WORD)


def _emit_write(builder: Any, address: Any, value: Any) -> None:
    builder.store_atomic(value, word_at(builder, address), "seq_cst", 8)


def _emit_swap(builder: Any, address: Any, old: Any, new: Any) -> Any:
    return builder.extract_value(builder.cmpxchg(word_at(builder, address), old, new, "seq_cst", "seq_cst"), 1)


def _emit_call(builder: Any, code: Any, frame: Any, index: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [WORD, WORD])
    builder.call(builder.inttoptr(code, kind.as_pointer()), [frame, index])


def declared(builder: Any, name: str, result: Any, kinds: list[Any]) -> Any:
    """A function of LLVM's own."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, kinds), name)


def _emit_pause(builder: Any) -> None:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        builder.call(declared(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
    elif machine in ("aarch64", "arm64"):
        hint = declared(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)])
        builder.call(hint, [ir.Constant(ir.IntType(32), 1)])  # yield


def _type_alloca(_context, count):
    """Room on the stack for a constant number of float32."""

    def generate(context, builder, sig, args):
        numbers = ir.ArrayType(ir.FloatType(), count.literal_value)
        return builder.ptrtoint(cgutils.alloca_once(builder, numbers), WORD)

    return types.intp(count), generate


def _emit_room(builder: Any, count: Any) -> Any:
    room = builder.alloca(ir.FloatType(), count)
    room.align = 64
    return builder.ptrtoint(room, WORD)


team = instruction(types.intp(), _emit_team)
read = instruction(types.intp(types.intp), lambda builder, at: builder.load_atomic(word_at(builder, at), "seq_cst", 8))
write = instruction(types.none(types.intp, types.intp), _emit_write)
add = instruction(
    types.intp(types.intp, types.intp),
    lambda builder, at, value: builder.atomic_rmw("add", word_at(builder, at), value, "seq_cst"),
)
swap = instruction(types.boolean(types.intp, types.intp, types.intp), _emit_swap)
call = instruction(types.none(types.intp, types.intp, types.intp), _emit_call)
pause = instruction(types.none(), _emit_pause)
bits = instruction(types.uint32(types.float32), lambda builder, x: builder.bitcast(x, ir.IntType(32)))
real = instruction(types.float32(types.uint32), lambda builder, x: builder.bitcast(x, ir.FloatType()))
words = instruction(types.CPointer(types.intp)(types.intp), word_at)
address_of = instruction(types.intp(types.CPointer(types.intp)), lambda builder, at: builder.ptrtoint(at, WORD))
pointer = instruction(types.voidptr(types.intp), lambda builder, at: builder.inttoptr(at, BYTE.as_pointer()))
room = instruction(types.intp(types.intp), _emit_room)  # on the stack, for so many float32; not in a loop
alloca: Any = intrinsic(prefer_literal=True)(_type_alloca)


# Numbers.


@numba.njit(inline="always")
def exp(x):
    """For x <= 0, within 2e-7 of it; written out so that several are computed at once (polynomial: Cephes' expf)."""
    x = max(x, np.float32(-87))
    power = np.int32(x * np.float32(1.44269504) - np.float32(0.5))
    n = np.float32(power)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * real(np.uint32(power + np.int32(127)) << np.uint32(23))


@numba.njit(inline="always")
def silu(x):
    small = exp(-abs(x))
    return x * (np.float32(1) if x >= 0 else small) / (np.float32(1) + small)


def wide(stored: Any) -> Any:
    """An element as float32, in machine code."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide_of(stored):
    if stored == types.uint16:
        return lambda stored: real(np.uint32(stored) << np.uint32(16))
    if stored == types.uint8:
        return lambda stored: _FLOAT8[stored]
    return lambda stored: np.float32(stored)


_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def like(array: Any, number: Any) -> Any:
    """float32 -> an element of an array, in machine code: itself, or the bits of the nearest bfloat16."""
    raise NotImplementedError


@overload(like, inline="always")
def _like_of(array, number):
    if array.dtype == types.float32:
        return lambda array, number: number

    def rounded(array, number):
        whole = bits(number)
        return np.uint16((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


# XLA's call frame.


@numba.njit(inline="always")
def describe(extension, api):
    """XLA asks once for which version of the interface this was made; it is told the one that it speaks."""
    if words(extension)[1] & 0xFFFFFFFF == _METADATA:
        _words_at(words(extension)[3], 4)[3] = words(api)[4]
    return 0


@numba.njit(inline="always")
def _words_at(address, count):
    return numba.carray(words(address), (count,), np.intp)


@numba.njit(inline="always")
def address(buffers, index):
    """Where the data is of the XLA_FFI_Buffer that a list of them has at an index."""
    return words(words(buffers)[index])[3]


@numba.njit(inline="always")
def data(buffers, index):
    return pointer(address(buffers, index))


@numba.njit(inline="always")
def dim(buffers, index, axis):
    return words(words(words(buffers)[index])[5])[axis]
