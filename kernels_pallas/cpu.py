"""The CPU's own backend: attention and products of a few tokens by machine_code, everything else as XLA does it."""

import importlib.util
import os
import struct
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import writes
from kernels_pallas.cache import KVCache, is_quantised
from kernels_pallas.kinds import FULL, LayerKind, Work

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

MOST_TOKENS = 32  # of a product; with more, XLA is quicker
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
    room = machine_code.room_of_product(kernel.dtype, x.dtype, tokens, num_in, gated=gated)
    results = jax.ShapeDtypeStruct((num_out, tokens), made), jax.ShapeDtypeStruct((room,), jnp.float32)
    operands = (kernel, x) if scale is None else (kernel, x, scale)
    return jax.ffi.ffi_call(machine_code.register(name), results)(*operands)[0]


def norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [E, T], scale [E] -> x over its root mean square (Zhang and Sennrich 2019), in float32, then rounded, then
    scaled; XLA does it in four operations, each of which takes longer to begin than to end."""
    from kernels_pallas import machine_code

    name = machine_code.register(machine_code.norm_name(x.dtype))
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[1:], jnp.float32)
    return jax.ffi.ffi_call(name, results)(x, scale.astype(x.dtype), np.array([eps], np.float32))[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Decode rows and chunks alike: each row has so many new tokens, one after another, the last of its context."""

    page_table: jax.Array  # [S + R, M]
    kv_lens: jax.Array  # [S + R] tokens including the new ones
    firsts: jax.Array  # [S + R] the row's first new token in a step; ascending
    counts: jax.Array  # [S + R] of new tokens, padding left out
    num_decode: int = field(metadata={"static": True})


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int, kind: LayerKind = FULL) -> Work:
    """See kernels_pallas.attention."""
    parts = []
    num_decode = 0 if rows is None else rows.kv_lens.shape[0]
    if rows is not None:
        parts.append((rows.page_table, rows.kv_lens, jnp.arange(num_decode), jnp.minimum(rows.kv_lens, 1)))
    if chunks is not None:
        starts, last = chunks.starts[:-1], chunks.positions.shape[0] - 1
        new = chunks.kv_lens - chunks.positions[jnp.minimum(starts, last)]
        new = jnp.clip(new, 0, chunks.starts[1:] - starts)
        parts.append((chunks.page_table, chunks.kv_lens, num_decode + starts, new))
    together = (jnp.concatenate(each).astype(jnp.int32) for each in zip(*parts, strict=True))
    return Work(Rows(*together, num_decode), None, kind, writes.plan(rows, chunks, page_size))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, layer: int | jax.Array, work: Work
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention. XLA writes; in a step's decode rows that costs next to nothing."""
    cache = writes.write(cache, layer, k, v, work.writes)
    return attend_pages(q, cache, k.shape[1], layer, work.decode, work.kind), cache


def attend_pages(
    q: jax.Array, cache: KVCache, num_kv_heads: int, layer: int | jax.Array, rows: Rows, kind: LayerKind
) -> jax.Array:
    """q [S + T, H, D] against the pages of rows, which hold the new tokens -> [S + T, H, D]; padding gives 0."""
    from kernels_pallas import machine_attention, machine_code, machine_team

    num_tokens, num_heads, head_dim = q.shape
    group, max_tokens = num_heads // num_kv_heads, rows.page_table.shape[1] * cache.pages.shape[3]
    name = machine_code.attention_name(cache.pages.dtype, q.dtype)
    patience = machine_team.AWAKE if num_tokens <= MOST_TOKENS else _BRIEFLY
    part_blocks = machine_attention.blocks_of_a_part(max_tokens)
    numbers = np.array([num_kv_heads, kind.window or 0, patience, rows.num_decode, part_blocks], np.int32)
    reals = np.array([kind.scale_of(head_dim), kind.softcap or 0], np.float32)
    where = (rows.page_table, rows.kv_lens, rows.firsts, rows.counts, jnp.asarray(layer, jnp.int32).reshape(1))
    operands = [numbers, q, *where, reals, cache.pages]
    if cache.scales is not None:
        operands.append(cache.scales)
    room = machine_attention.room(rows.num_decode, num_kv_heads, group, head_dim, max_tokens)
    results = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((room,), jnp.float32)
    return jax.ffi.ffi_call(machine_code.register(name), results)(*operands)[0]
