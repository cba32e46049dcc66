"""Two small programs on the hidden states that a step leaves behind, and their calls. Shapes are the same for every
bucket (step.readable pads to the chunk size C), so there is one program of each.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxserve.engine.step import StepShape
from jaxserve.model.sharding import Params, merge
from jaxserve.scheduling.plan import Readings, ReadResult
from jaxserve.types import MAX_TOP_LOGPROBS

BLOCK = 64  # tokens scored by one call: [64, V] logits at most are ever held


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Of BLOCK tokens; the alternatives are zeros unless they were asked for."""

    logprobs: jax.Array  # [64] float32
    ranks: jax.Array  # [64] int32
    top_ids: jax.Array  # [64, 20]
    top_logprobs: jax.Array  # [64, 20]


def score(
    embed: Sequence[jax.Array],
    head: Sequence[jax.Array],
    hidden: jax.Array,
    index: jax.Array,
    targets: jax.Array,
    wants_top: jax.Array,
    *,
    shape: StepShape,
) -> Scores:
    """hidden [C, E], index and targets [64], wants_top a bool -> natural log-probabilities of targets[i] behind token
    index[i], under the raw distribution, in float32."""
    vocab_axis = 0 if shape.layout.feature_major else 1
    picked = jnp.take(hidden, index, axis=1 - vocab_axis)
    logits = merge(shape.structure.head, head)(picked, merge(shape.structure.embed, embed))
    total = jax.nn.logsumexp(logits, axis=vocab_axis)
    chosen = jnp.expand_dims(targets, vocab_axis)
    own = jnp.take_along_axis(logits, chosen, axis=vocab_axis)
    ranks = 1 + (logits > own).sum(axis=vocab_axis, dtype=jnp.int32)
    num_top = min(MAX_TOP_LOGPROBS, logits.shape[vocab_axis])

    def top(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(logits.T if vocab_axis == 0 else logits, num_top)
        return ids, values - total[:, None]

    def none(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((BLOCK, num_top), jnp.int32), jnp.zeros((BLOCK, num_top), jnp.float32)

    return Scores(own.reshape(BLOCK) - total, ranks, *lax.cond(wants_top, top, none, logits))


def pool(head: Sequence[jax.Array], hidden: jax.Array, spans: jax.Array, *, shape: StepShape) -> jax.Array:
    """hidden [C, E], spans [R, 2] (start and stop among the C tokens) -> [R, E] float32: the sum of each span's hidden
    states after the final norm."""
    normed = merge(shape.structure.head, head).norm(hidden).astype(jnp.float32)
    normed = normed.T if shape.layout.feature_major else normed
    at = jnp.arange(normed.shape[0])
    member = (at >= spans[:, :1]) & (at < spans[:, 1:])
    normed = jnp.where(member.any(axis=0)[:, None], normed, 0.0)  # padding may hold anything, and 0 * nan is nan
    return jnp.einsum("rc,ce->re", member.astype(jnp.float32), normed, precision=lax.Precision.HIGHEST)


def lower(params: Params, shape: StepShape, replicated: NamedSharding, num_spans: int) -> dict[str, Callable[[], Any]]:
    """Abstract params -> name -> what lowers that program. num_spans: R."""
    embed_dim, dtype = shape.config.embed_dim, params.embed[0].dtype
    tokens = (embed_dim, shape.chunk_size) if shape.layout.feature_major else (shape.chunk_size, embed_dim)

    def array(size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=replicated)

    hidden, block = array(tokens, dtype), array((BLOCK,), jnp.int32)
    scoring = (params.embed, params.head, hidden, block, block, array((), jnp.bool_))
    pooling = (params.head, hidden, array((num_spans, 2), jnp.int32))

    def lowering(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
        program = jax.jit(functools.partial(function, shape=shape), out_shardings=replicated, keep_unused=True)
        return lambda: program.lower(*arguments)

    return {"score": lowering(score, scoring), "pool": lowering(pool, pooling)}


@dataclass(frozen=True)
class Reader:
    """Calls the compiled programs; nothing here waits for the device but Reading.result."""

    score: Any
    pool: Any
    params: Params
    replicated: NamedSharding
    num_spans: int  # R

    def launch(self, readings: Readings, hidden: jax.Array) -> "Reading":
        blocks = []
        wants_top = np.bool_(readings.num_top > 0)
        for start in range(0, len(readings.targets), BLOCK):
            index, targets = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.int32)
            part = slice(start, start + BLOCK)
            count = len(readings.targets[part])
            index[:count], targets[:count] = readings.index[part], readings.targets[part]
            arrays = jax.device_put((index, targets, wants_top), self.replicated)
            blocks.append(self.score(self.params.embed, self.params.head, hidden, *arrays))
        sums = None
        if readings.spans:
            spans = np.zeros((self.num_spans, 2), np.int32)
            spans[: len(readings.spans)] = readings.spans
            sums = self.pool(self.params.head, hidden, jax.device_put(spans, self.replicated))
        return Reading(readings, blocks, sums)

    def warm_up(self, hidden: jax.Array) -> None:
        """Run both programs once."""
        one = np.zeros(1, np.int32)
        self.launch(Readings(one, one, 1, ((0, 1),), ()), hidden).result()


@dataclass(frozen=True)
class Reading:
    """Readings in flight."""

    readings: Readings
    blocks: list[Scores]
    sums: jax.Array | None

    def __post_init__(self) -> None:
        for array in jax.tree.leaves((self.blocks, self.sums)):
            array.copy_to_host_async()

    def result(self) -> ReadResult:
        count = len(self.readings.targets)

        def joined(name: str, empty: np.ndarray) -> np.ndarray:
            return np.concatenate([np.asarray(getattr(block, name)) for block in self.blocks] or [empty])[:count]

        sums = np.zeros((0, 0), np.float32) if self.sums is None else np.asarray(self.sums)
        return ReadResult(
            logprobs=joined("logprobs", np.zeros(0, np.float32)),
            ranks=joined("ranks", np.zeros(0, np.int32)),
            top_ids=joined("top_ids", np.zeros((0, 0), np.int32)),
            top_logprobs=joined("top_logprobs", np.zeros((0, 0), np.float32)),
            sums=sums[: len(self.readings.spans)],
        )
