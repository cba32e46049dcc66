"""The one contract of paged attention, and the choice of who fulfils it.

A step has S decode rows with one token each, then T prefill tokens in R chunks; either may be absent. A backend gives
``plan``, run once per step and kind of layer (kernels_pallas.kinds: windows, soft caps), and ``attend``, run in every
layer with the plan of its kind, which writes the new tokens' K and V into the cache and then attends, so that a kernel
may fuse the two. q [S + T, H, D], k and v [S + T, K, D]; the result is [S + T, H, D] in q's dtype; scores, maxima and
sums are float32. Rows with kv_len 0 are padding: they write nothing, and what they return is finite and ignored. Pages
that lie wholly before a row's window are not read, and their entries in the page table may be anything.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import cpu, tpu, xla
from kernels_pallas.cache import KVCache, is_quantised
from kernels_pallas.kinds import FULL, LayerKind, Work

Layer = int | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """S rows with one new token each, at position kv_lens - 1."""

    page_table: jax.Array  # [S, M]
    kv_lens: jax.Array  # [S] tokens including the new one; 0 = unused row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillChunks:
    """R rows whose new tokens lie one after another among T: row r holds tokens starts[r] .. starts[r + 1], the last
    ones of which are padding where position >= kv_len. Starts, and first positions, are multiples of the page size."""

    page_table: jax.Array  # [R, M]
    kv_lens: jax.Array  # [R] tokens including this chunk; 0 = unused row
    starts: jax.Array  # [R + 1] unused rows start at T
    positions: jax.Array  # [T]


@dataclass(frozen=True)
class Attention:
    """One backend. The work that plan returns is what all layers of a kind share in a step."""

    name: str
    plan: Callable[[DecodeRows | None, PrefillChunks | None, int, LayerKind], Work]  # the int is the page size
    attend: Callable[[jax.Array, jax.Array, jax.Array, KVCache, Layer, Work], tuple[jax.Array, KVCache]]
    page_multiple: int = 1  # page sizes it can have are multiples of this


def choose(
    platform: str,
    wanted: str = "auto",
    *,
    num_kv_heads: int = 1,
    dtype: jnp.dtype = jnp.bfloat16,
    activations: jnp.dtype | None = None,
    capability: str | None = None,
    num_multiprocessors: int | None = None,
) -> Attention:
    """The backend for a JAX platform name: "pallas", "numba" (CPU), "xla", or with "auto" our kernels where there are
    some.

    "pallas" on the CPU runs the TPU kernels interpreted: right, and slow; for tests. Every backend attends with the
    heads of one device: who shares heads out over several calls it on each. num_kv_heads: of one device; dtype: of the
    cache; activations: the dtype of q, k and v, None: dtype; the rest: what gpu_facts says of a GPU. Raises ValueError
    where there is no such backend.
    """
    if platform == "cpu" and wanted in ("auto", "numba"):
        missing = cpu.why_not(dtype, activations)
        if missing is None:
            return Attention("numba (machine code of its own)", cpu.plan, cpu.attend)
        if wanted == "numba":
            raise ValueError(f"{missing}; 'xla' runs everywhere, and 'auto' takes what there is")
        return Attention(f"xla ({missing})", xla.plan, xla.attend)
    missing = None if platform in ("tpu", "cpu") else f"there are no kernels for {platform}"
    if is_gpu := platform in ("gpu", "cuda", "rocm"):
        from kernels_pallas import gpu  # a second that other devices need not wait

        missing = gpu.why_not(capability, dtype)
    elif missing is None and is_quantised(dtype):
        missing = f"the TPU kernels need a float cache; this is {jnp.dtype(dtype).name}"
    if missing is None and activations is not None and dtype != activations:
        given = f"{jnp.dtype(dtype).name}, and q {jnp.dtype(activations).name}"
        missing = f"the {'Hopper' if is_gpu else 'TPU'} kernels need a cache of q's dtype; this is {given}"
    if wanted == "xla" or (wanted == "auto" and missing):
        name = f"xla ({missing})" if wanted == "auto" else "xla"
        return Attention(name, xla.plan, xla.attend)
    if wanted not in ("auto", "pallas"):
        raise ValueError(f"no attention backend {wanted!r}; there are auto, pallas, xla, and numba on the CPU")
    if missing:
        raise ValueError(f"{missing}; 'xla' runs everywhere, and 'auto' takes what there is")
    if is_gpu:
        blocks = {} if num_multiprocessors is None else {"num_blocks": num_multiprocessors}
        plan = functools.partial(gpu.plan, num_kv_heads=num_kv_heads, **blocks)
        attend = functools.partial(gpu.attend, **blocks)
        return Attention("pallas (the Hopper kernels)", plan, attend, gpu.PAGE_MULTIPLE)
    interpret = platform == "cpu"
    attend = functools.partial(tpu.attend, interpret=interpret)
    name = "the TPU kernels, interpreted: for tests" if interpret else "the TPU kernels"
    return Attention(f"pallas ({name})", tpu.plan, attend, 1 if interpret else tpu.PAGE_MULTIPLE)


def gpu_facts(device: jax.Device) -> dict[str, Any]:
    """What choose() asks of a device: its compute capability ("9.0") and multiprocessors; None where it has none."""
    names = {"capability": "compute_capability", "num_multiprocessors": "core_count"}
    return {name: getattr(device, attribute, None) for name, attribute in names.items()}


def default_page_size(platform: str) -> int:
    """Tokens per page: 128 fills TPU tiles, 64 is a Hopper K tile, 16 keeps the CPU's prefix sharing fine-grained."""
    return {"tpu": 128, "gpu": 64, "cuda": 64, "rocm": 64}.get(platform, 16)


__all__ = [
    "FULL",
    "Attention",
    "DecodeRows",
    "KVCache",
    "LayerKind",
    "PrefillChunks",
    "Work",
    "choose",
    "default_page_size",
    "gpu_facts",
]
