"""The machine code that XLA's programs call on the CPU, by name: compiled by Numba when it is first asked for, and called
by XLA's typed foreign function interface, whose call frame is read word by word (layout: jaxlib's
include/xla/ffi/api/c_api.h)."""

from typing import Any

import numpy as np

from kernels_pallas import machine_words as low
from kernels_pallas.machine_attention import compile_attention
from kernels_pallas.machine_products import compile_product
from kernels_pallas.machine_team import TEAM

_SHORT = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "float8_e4m3fn": "f8", "uint8": "f8"}


def product_name(kernel: Any, activations: Any, out: Any, tokens: int, *, scaled: bool, gated: bool) -> str:
    """By which XLA calls: kernel [O, I] x activations [I, T] (, scale [O] float32) -> out [O, T], [T * I] float32 of
    room. gated: activations are [2 * I, T], and silu of the first half times the second is what is multiplied. The
    first three are dtypes."""
    names = (_SHORT[str(np.dtype(dtype))] for dtype in (kernel, activations, out))
    return "_".join(("jaxserve_product", *names, str(tokens), *(["scaled"] * scaled), *(["gated"] * gated)))


def attention_name(dtype: Any, activations: Any) -> str:
    """By which XLA calls attention (see cpu.attend_pages) with pages of a dtype."""
    return f"jaxserve_attention_{_SHORT[str(np.dtype(dtype))]}_{_SHORT[str(np.dtype(activations))]}"


def register(name: str) -> str:
    """Compiles what a name stands for, unless it is there, and makes it known to XLA: programs that call it can be
    loaded and run from then on. -> the name."""
    with TEAM.lock:
        if name not in TEAM.registered:
            _, what, *parts = name.split("_")
            slot = len(TEAM.registered)
            if what == "product":
                kernel, activations, out = (low.TYPES[part] for part in parts[:3])
                code = compile_product(
                    kernel, activations, out, int(parts[3]), "scaled" in parts, "gated" in parts, slot
                )
            else:
                code = compile_attention(low.TYPES[parts[0]], low.TYPES[parts[1]], slot)
            TEAM.add(name, *code, slot)
    return name
