"""The machine code that XLA's programs call on the CPU, by name. Numba compiles it when it is first asked for; XLA
calls it by its typed foreign function interface, whose call frame is read word by word (layout: jaxlib's
include/xla/ffi/api/c_api.h)."""

from typing import Any

import numpy as np

from kernels_pallas import machine_words as low
from kernels_pallas.machine_attention import compile_attention
from kernels_pallas.machine_products import compile_norm, compile_product, compile_wide_product, few_tokens
from kernels_pallas.machine_team import TEAM

_SHORT = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "float8_e4m3fn": "f8", "uint8": "f8"}


def product_name(kernel: Any, activations: Any, out: Any, tokens: int, *, scaled: bool, gated: bool) -> str:
    """By which XLA calls: kernel [O, I] x activations [I, T] (, scale [O] float32) -> out [O, T], float32 of room for
    the activations. gated: activations are [2 * I, T], and silu of the first half times the second is what is
    multiplied. The first three are dtypes. Of more than a few tokens the name says how many there are at most."""
    names = [_SHORT[str(np.dtype(dtype))] for dtype in (kernel, activations, out)]
    return "_".join(
        ("jaxserve_product", *names, str(_most(*names[:2], tokens)), *(["scaled"] * scaled), *(["gated"] * gated))
    )


def room_of_product(kernel: Any, activations: Any, tokens: int, num_in: int, *, gated: bool) -> int:
    """Numbers of float32 that a product needs beside: its activations as they are read, and those of a gate before."""
    names = (_SHORT[str(np.dtype(dtype))] for dtype in (kernel, activations))
    return num_in * (_most(*names, tokens) + (tokens if gated else 0))


def _most(kernel: str, activations: str, tokens: int) -> int:
    return tokens if tokens <= few_tokens(kernel, activations) else -(-tokens // 16) * 16


def attention_name(dtype: Any, activations: Any) -> str:
    """By which XLA calls attention (see cpu.attend_pages) with pages of a dtype."""
    return f"jaxserve_attention_{_SHORT[str(np.dtype(dtype))]}_{_SHORT[str(np.dtype(activations))]}"


def norm_name(activations: Any) -> str:
    """By which XLA calls: x [E, T], scale [E], eps [1] float32 -> x normed and scaled, [T] float32 of room."""
    return f"jaxserve_norm_{_SHORT[str(np.dtype(activations))]}"


def register(name: str) -> str:
    """Compiles what a name stands for, unless it is there, and makes it known to XLA: programs that call it can be
    loaded and run from then on. -> the name."""
    with TEAM.lock:
        if name not in TEAM.registered:
            _, what, *parts = name.split("_")
            slot = len(TEAM.registered)
            if what == "product":
                kernel, activations, out = (low.TYPES[part] for part in parts[:3])
                tokens, also = int(parts[3]), ("scaled" in parts, "gated" in parts)
                if tokens % 16:
                    code = compile_product(kernel, activations, out, tokens, *also, slot)
                else:
                    code = compile_wide_product(kernel, activations, out, tokens // 16, *also, slot)
            elif what == "norm":
                code = compile_norm(low.TYPES[parts[0]])
            else:
                code = compile_attention(low.TYPES[parts[0]], low.TYPES[parts[1]], slot)
            TEAM.add(name, *code, slot)
    return name
