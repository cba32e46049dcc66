"""A drawn engine -> what each device would hold and do: sums over the real sharding table and the real state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.engine.build import Blueprint
from jaxserve.model.partition import Shares
from jaxserve.planner.roofline import Work, attention_flops, causal_pairs


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one device, and what a step reads and multiplies there."""

    weights: int
    kv: int
    state: int  # the rest of what lives from step to step: sampling state
    read_weights: int  # of weights, what a step reads: not an embedding of which only some rows are taken
    layer_elements: int  # of matrices that every token is multiplied with
    head_elements: int  # of the head's matrix, for the last token of a row
    token_bytes: int  # KV cache of one token
    num_heads: int  # query heads
    tp: int
    dp: int

    def decode(self, blueprint: Blueprint, rows: int, context: int) -> Work:
        """One token for each of a rank's rows, every one of which has so many tokens."""
        config = blueprint.shape.config
        pairs = config.num_layers * rows * context
        return Work(
            weight_bytes=self.read_weights,
            kv_bytes=rows * context * self.token_bytes,
            flops=2 * rows * (self.layer_elements + self.head_elements)
            + attention_flops(self.num_heads, config.head_dim, pairs),
            **self._exchanges(blueprint, rows, rows),
        )

    def prefill(self, blueprint: Blueprint, num_tokens: int) -> tuple[Work, int]:
        """A prompt alone -> the work of all its chunks together, and how many these are."""
        config, chunk = blueprint.shape.config, blueprint.shape.chunk_size
        num_chunks = -(-num_tokens // chunk)
        pairs = config.num_layers * causal_pairs(num_tokens)
        exchanges = self._exchanges(blueprint, min(chunk, num_tokens), 1)
        work = Work(
            weight_bytes=num_chunks * self.read_weights,
            kv_bytes=num_chunks * num_tokens * self.token_bytes // 2,
            flops=2 * num_tokens * self.layer_elements
            + 2 * num_chunks * self.head_elements
            + attention_flops(self.num_heads, config.head_dim, pairs),
            **exchanges | {"num_reduces": num_chunks * exchanges["num_reduces"]},
        )
        return work, num_chunks

    def _exchanges(self, blueprint: Blueprint, num_tokens: int, num_rows: int) -> dict[str, int]:
        """Behind the embedding, and in every layer behind o and behind down; then every device gets all logits."""
        config = blueprint.shape.config
        itemsize = np.dtype(blueprint.sizes.dtype).itemsize if blueprint.sizes.dtype == "float32" else 2
        logits = 4 * num_rows * config.vocab_size
        return {
            "reduce_bytes": num_tokens * config.embed_dim * itemsize,
            "num_reduces": 2 * config.num_layers + 1,
            "gather_bytes": logits * (self.tp - 1) // self.tp,
        }


def footprint(blueprint: Blueprint) -> Footprint:
    """Takes no memory: the blueprint's arrays are abstract."""
    params, config = blueprint.parameters, blueprint.shape.config
    state = blueprint.runner.target(blueprint.params, None).state
    weights = _bytes(jax.tree.leaves(params))
    has_head = any(leaf.path.startswith("head.out") for leaf in params.head)
    (embed,) = params.embed
    head = [leaf for leaf in params.head if len(leaf.shape) > 1] if has_head else [embed]
    mesh = embed.sharding.mesh.shape
    pages, kv = state.cache.pages, _bytes(jax.tree.leaves(state.cache))
    page_tokens = pages.sharding.shard_shape(pages.shape)[1] * pages.shape[3]
    return Footprint(
        weights=weights,
        kv=kv,
        state=_bytes(jax.tree.leaves(state)) - kv,
        read_weights=weights - (_bytes([embed]) if has_head else 0),
        layer_elements=sum(_elements(leaf) for leaf in jax.tree.leaves(params.layers) if len(leaf.shape) > 1),
        head_elements=sum(map(_elements, head)),
        token_bytes=kv // page_tokens,
        num_heads=Shares.of(config, mesh["tp"]).num_heads,
        tp=mesh["tp"],
        dp=mesh["dp"],
    )


def _elements(leaf: Any) -> int:
    """On each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _bytes(leaves: Iterable[Any]) -> int:
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in leaves)
