"""The CPU's own backend: decode rows and products of a few tokens by machine_code, everything else as XLA does it."""

import functools
import importlib.util
import os
import struct
import sys
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import writes, xla
from kernels_pallas.cache import KVCache, is_quantised
from kernels_pallas.kinds import FULL, LayerKind, Work

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

MOST_TOKENS = 4  # of a product; with more, a processor that has AMX is quicker by XLA
_BRIEFLY = 0  # microseconds that helpers stay awake where XLA's threads want the processors between two calls


def why_not(dtype: jnp.dtype | None = None, activations: jnp.dtype | None = None) -> str | None:
    """Why there is no machine code here, or none for a cache and activations of these dtypes; None where there is."""
    if struct.calcsize("P") != 8 or sys.platform != "linux":
        return "its machine code needs 64 bits and Linux"  # whose semaphores wake the threads
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    kinds = ("float32", "bfloat16")
    if activations is not None and jnp.dtype(activations).name not in kinds:
        return f"its machine code needs float32 or bfloat16; this is {jnp.dtype(activations).name}"
    if dtype is not None and jnp.dtype(dtype).name not in kinds and not is_quantised(dtype):
        return f"its machine code needs a cache of float32, bfloat16 or 8 bits; this is {jnp.dtype(dtype).name}"
    return None


def register(name: str) -> None:
    """Makes known to XLA what a program calls that was compiled elsewhere."""
    from kernels_pallas import machine_code  # half a second, which other devices need not wait

    machine_code.register(name)


def product(
    kernel: jax.Array,
    x: jax.Array,
    scale: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
    *,
    gated: bool = False,
) -> jax.Array:
    """kernel [O, I] x [I, T] -> [O, T] of a dtype (None: that of x), each row times its scale [O]; T up to
    MOST_TOKENS. Sums are float32. gated: x is [2 * I, T], silu of its first half times the second what counts."""
    from kernels_pallas import machine_code

    (num_out, num_in), tokens, made = kernel.shape, x.shape[1], dtype or x.dtype
    name = machine_code.product_name(kernel.dtype, x.dtype, made, tokens, scaled=scale is not None, gated=gated)
    results = jax.ShapeDtypeStruct((num_out, tokens), made), jax.ShapeDtypeStruct((tokens * num_in,), jnp.float32)
    operands = (kernel, x) if scale is None else (kernel, x, scale)
    return jax.ffi.ffi_call(machine_code.register(name), results)(*operands)[0]


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int, kind: LayerKind = FULL) -> Work:
    """See kernels_pallas.attention. Decode rows are read as they are."""
    return Work(
        decode=rows,
        prefill=None if chunks is None else xla.plan_prefill(chunks, page_size, kind),
        kind=kind,
        writes=writes.plan(rows, chunks, page_size),
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, layer: int | jax.Array, work: Work
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention. XLA writes; in a step's decode rows that costs next to nothing."""
    attend_rows = functools.partial(decode, mixed=work.prefill is not None)
    return xla.attend(q, k, v, cache, layer, work, decode=attend_rows)


def decode(
    q: jax.Array,
    cache: KVCache,
    num_kv_heads: int,
    layer: int | jax.Array,
    rows: "DecodeRows",
    kind: LayerKind,
    *,
    mixed: bool = False,
) -> jax.Array:
    """q [S, H, D] against the pages of rows, which hold the new tokens already -> [S, H, D]. mixed: the step has
    prefill tokens, too."""
    from kernels_pallas import machine_code

    num_rows, num_heads, head_dim = q.shape
    name = machine_code.decode_name(head_dim, cache.pages.dtype, q.dtype)
    patience = machine_code.AWAKE if num_rows <= MOST_TOKENS and not mixed else _BRIEFLY
    numbers = np.array([num_kv_heads, kind.window or 0, patience], np.int32)
    reals = np.array([kind.scale_of(head_dim), kind.softcap or 0], np.float32)
    operands = [numbers, q, rows.page_table, rows.kv_lens, jnp.asarray(layer, jnp.int32).reshape(1), reals, cache.pages]
    if cache.scales is not None:
        operands.append(cache.scales)
    room = machine_code.room_of_decode(head_dim, num_heads // num_kv_heads, cache.pages.shape[3])
    shapes = ((q.shape, q.dtype), ((num_rows * num_kv_heads * room,), jnp.float32))
    results = tuple(jax.ShapeDtypeStruct(*each) for each in shapes)
    return jax.ffi.ffi_call(machine_code.register(name), results)(*operands)[0]
