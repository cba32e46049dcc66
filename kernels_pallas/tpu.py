"""The TPU backend: Pallas kernels for decode rows and prefill chunks over one cache, written in place."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

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
    max_block_tokens: int | None = None,
    interpret: tpu_decode.Interpret = False,
) -> tuple[jax.Array, KVCache]:
    """See kernels_pallas.attention. max_block_tokens: KV tokens in a block, where not each kernel's own choice."""
    options: dict[str, Any] = {"num_kv_heads": k.shape[1], "kind": work.kind, "interpret": interpret}
    if max_block_tokens is not None:
        options["max_block_tokens"] = max_block_tokens
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
