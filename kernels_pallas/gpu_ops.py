"""What the Hopper kernels share: tiles of shared memory, products on the tensor cores, and the parts of a page."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.cache import LANES
from kernels_pallas.kinds import LayerKind

PART = 64  # tokens of a page that are fetched at once: the rows of a tile of K that wgmma takes
ROWS = 64  # of q, in one warpgroup's product
LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite: exp2 of a difference of two of them is not NaN

# Of the 168 a thread that three warpgroups start with: the one that fetches gives some to the two that compute.
FETCH_REGISTERS, COMPUTE_REGISTERS = 40, 232
# Reductions are along rows, which lie within a warp: they need no shared memory.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)

Interpret = Any  # None, or plgpu.InterpretGPUParams (JAX 0.11)


def tiles(dtype: jnp.dtype | type) -> tuple[Any, ...]:
    """How TMA lays out a matrix in shared memory so that wgmma reads it without bank conflicts: rows of 128 bytes."""
    mosaic: Any = plgpu  # whose transforms are children of a protocol, which the type checker takes for abstract
    return mosaic.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), mosaic.SwizzleTransform(128)


def head_parts(num_kv_heads: int, num_page_rows: int) -> int:
    """Rows of a page that belong to one kv head."""
    return num_page_rows // num_kv_heads


def keys_of(buffer: Any, first: jax.Array, head_rows: int) -> list[Any]:
    """buffer [rows, n, 128] in shared memory, a head's head_rows of which begin at first -> K by its lanes, transposed:
    [64 or 128, n]."""
    if head_rows == 1:
        return [buffer.at[first, :, pl.ds(0, LANES // 2)].transpose((1, 0))]
    return [buffer.at[first + row].transpose((1, 0)) for row in range(head_rows // 2)]


def values_of(buffer: Any, first: jax.Array, head_rows: int) -> list[Any]:
    """The same for V, not transposed: [n, 64 or 128]."""
    if head_rows == 1:
        return [buffer.at[first, :, pl.ds(LANES // 2, LANES // 2)]]
    return [buffer.at[first + row] for row in range(head_rows // 2, head_rows)]


def base2(kind: LayerKind, head_dim: int) -> tuple[float, Callable[[jax.Array], jax.Array]]:
    """What q k is multiplied by, and what is done to it then, to be a score in base 2."""
    scale = kind.scale_of(head_dim)
    if kind.softcap is None:
        return scale * LOG2_E, lambda scores: scores
    cap = kind.softcap
    return scale / cap, lambda scores: jnp.tanh(scores) * (cap * LOG2_E)


def column_slices(width: int) -> list[Any]:
    """The lanes of a head, cut like the rows that hold it."""
    return [pl.ds(lane, min(width, LANES)) for lane in range(0, width, LANES)]


def await_if(condition: jax.Array, barrier: Any) -> None:
    @pl.when(condition)
    def _() -> None:
        plgpu.barrier_wait(barrier)


def product(
    shape: tuple[int, int], pairs: Iterable[tuple[Any, Any]], meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """The sum of a @ b over pairs of references to shared memory -> float32 in registers. meanwhile: what is done
    between asking the tensor cores and waiting for them."""
    pairs = list(pairs)

    def run(total: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(total, a, b)
        meanwhile()
        return total[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_products(
    totals: Sequence[jax.Array], a: jax.Array, values: Sequence[Any], scratch: Any, meanwhile: Callable = lambda: None
) -> list[jax.Array]:
    """totals + a @ each of values; a in registers, the values in shared memory. scratch: shared memory for a where the
    kernel is interpreted, whose products take nothing from registers and give nothing to what is there."""
    if scratch is not None:
        scratch[...] = a
        plgpu.commit_smem()
        added = [total + product((ROWS, b.shape[1]), [(scratch, b)]) for total, b in zip(totals, values, strict=True)]
        meanwhile()
        return added

    def run(refs: Sequence[Any]) -> None:
        for ref, b in zip(refs, values, strict=True):
            plgpu.wgmma(ref, a, b)
        meanwhile()

    return list(pl.run_state(run)([plgpu.ACC.init(total) for total in totals]))
