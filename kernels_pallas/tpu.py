"""The TPU backend: Pallas kernels for decode rows and prefill chunks over one cache, written in place."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import tpu_decode, tpu_prefill
from kernels_pallas.cache import KVCache, pack
from kernels_pallas.kinds import FULL, LayerKind, Work

if TYPE_CHECKING:
    from kernels_pallas.attention import DecodeRows, PrefillChunks

PAGE_MULTIPLE = 16  # tokens: a page is whole tiles of (16, 128) bfloat16 or (8, 128) float32


def plan(rows: "DecodeRows | None", chunks: "PrefillChunks | None", page_size: int, kind: LayerKind = FULL) -> Work:
    """See kernels_pallas.attention."""
    decode, prefill = (), None
    if rows is not None:
        decode = tpu_decode.plan(rows.page_table, rows.kv_lens, page_size, kind)
    if chunks is not None:
        prefill = tpu_prefill.plan(chunks.page_table, chunks.kv_lens, chunks.starts, chunks.positions, page_size, kind)
    return Work(decode, prefill, kind)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: int | jax.Array,
    work: Work,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    max_block_tokens: int | None = None,
    interpret: tpu_decode.Interpret = False,
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention. mesh: axis "tp" shares out the heads, which need no exchange.
    max_block_tokens: KV tokens in a block, where not each kernel's own choice."""
    blocks = {} if max_block_tokens is None else {"max_block_tokens": max_block_tokens}
    local = functools.partial(_attend, interpret=interpret, **blocks)
    if mesh is None or mesh.size == 1:
        return local(q, k, v, cache, layer, work)
    heads, pages, everywhere = P(None, "tp", None), P(None, None, "tp"), P()
    shared_out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, pages, everywhere, everywhere),
        out_specs=(heads, pages),
        check_vma=False,
    )
    return shared_out(q, k, v, cache, jnp.asarray(layer, jnp.int32), work)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, layer: int | jax.Array, work: Work, **options: Any
) -> tuple[jax.Array, KVCache]:
    """One device's heads."""
    options |= {"num_kv_heads": k.shape[1], "kind": work.kind}
    new, pages = pack(k, v).astype(cache.pages.dtype), cache.pages
    outs, start = [], 0
    for part in work.decode:
        stop = start + part.kv_lens.shape[0] - 1
        out, pages = tpu_decode.attend(q[start:stop], new[start:stop], pages, layer, part, **options)
        outs.append(out)
        start = stop
    if work.prefill is not None:
        out, pages = tpu_prefill.attend(q[start:], new[start:], pages, layer, work.prefill, **options)
        outs.append(out)
    return (outs[0] if len(outs) == 1 else jnp.concatenate(outs)), KVCache(pages, cache.scales)
