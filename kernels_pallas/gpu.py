"""The GPU backend, for Hopper: Pallas kernels for decode rows and prefill chunks; XLA writes the cache, in place."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_decode, gpu_prefill, writes, xla
from kernels_pallas.cache import KVCache
from kernels_pallas.gpu_ops import PART, Interpret
from kernels_pallas.kinds import FULL, LayerKind, Work

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

PAGE_MULTIPLE = PART
CAPABILITY = "9.0"  # Hopper's: what wgmma is


def why_not(capability: str | None, dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot serve a GPU of a compute capability and a cache of a dtype; None: they can."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"the Hopper kernels need JAX 0.11 or newer; this is {jax.__version__}"
    if capability != CAPABILITY:
        return f"the GPU kernels need compute capability {CAPABILITY} (Hopper); this is {capability or 'unknown'}"
    if dtype != jnp.bfloat16:
        return f"the Hopper kernels need a bfloat16 cache; this is {jnp.dtype(dtype).name}"
    return None


def plan(
    rows: "DecodeRows | None",
    chunks: "PrefillChunks | None",
    page_size: int,
    kind: LayerKind = FULL,
    *,
    num_kv_heads: int,
    num_blocks: int = gpu_decode.NUM_BLOCKS,
) -> Work:
    """See kernels_pallas.attention. num_kv_heads: on one device. num_blocks: of threads that decode at once."""
    decode = prefill = None
    if rows is not None:
        options = {"num_kv_heads": num_kv_heads, "num_blocks": num_blocks}
        decode = gpu_decode.plan(rows.page_table, rows.kv_lens, page_size, kind, **options)
    if chunks is not None:
        prefill = gpu_prefill.plan(chunks.page_table, chunks.kv_lens, chunks.starts, chunks.positions, page_size, kind)
    decode, prefill = lax.optimization_barrier((decode, prefill))  # see attend
    return Work(decode, prefill, kind, writes.plan(rows, chunks, page_size))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: int | jax.Array,
    work: Work,
    *,
    num_blocks: int = gpu_decode.NUM_BLOCKS,
    interpret: Interpret = None,
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention.

    Mosaic refuses arrays that do not begin on a border of 256 bytes, and XLA hands a custom call a slice of a larger
    array in place; the barriers give the kernels arrays of their own.
    """

    def kernel(attend: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
        def run(q, cache, num_kv_heads, layer, plan, kind):
            q = lax.optimization_barrier(q)
            return attend(
                q, cache.pages, layer, plan, num_kv_heads=num_kv_heads, kind=kind, interpret=interpret, **options
            )

        return run

    decode, prefill = kernel(gpu_decode.attend, num_blocks=num_blocks), kernel(gpu_prefill.attend)
    return xla.attend(q, k, v, cache, layer, work, decode=decode, prefill=prefill)
