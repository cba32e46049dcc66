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

from jaxserve.engine.spread import BY_RANK, BY_RANK_COLUMNS, EVERYWHERE, TOLD, Spread, specs_of
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


def lower(params: Params, shape: StepShape, spread: Spread, num_spans: int) -> dict[str, Callable[[], Any]]:
    """Abstract params -> name -> what lowers that program. num_spans: R."""
    embed_dim, dtype = shape.config.embed_dim, params.embed[0].dtype
    size, tokens = (shape.chunk_size, embed_dim), BY_RANK
    if shape.layout.feature_major:
        size, tokens = size[::-1], BY_RANK_COLUMNS
    hidden, block = spread.abstract(size, dtype, tokens), spread.abstract((BLOCK,), jnp.int32)
    scoring = (params.embed, params.head, hidden, block, block, spread.abstract((), jnp.bool_, EVERYWHERE))
    pooling = (params.head, hidden, spread.abstract((num_spans, 2), jnp.int32))
    head = specs_of(params.head)

    def lowering(function: Callable[..., Any], ins: tuple[Any, ...], arguments: tuple[Any, ...]) -> Callable[[], Any]:
        over = spread.over(functools.partial(function, shape=shape), ins, TOLD)
        program = jax.jit(
            over,
            out_shardings=spread.sharding(TOLD),
            keep_unused=True,
            compiler_options=spread.compiler_options,
        )
        return lambda: program.lower(*arguments)

    return {
        "score": lowering(score, (specs_of(params.embed), head, tokens, BY_RANK, BY_RANK, EVERYWHERE), scoring),
        "pool": lowering(pool, (head, tokens, BY_RANK), pooling),
    }


@dataclass(frozen=True)
class Reader:
    """Calls the compiled programs; nothing here waits for the device but Reading.result."""

    score: Any
    pool: Any
    params: Params
    spread: Spread
    num_spans: int  # R

    def launch(self, readings: Sequence[Readings | None], hidden: jax.Array) -> "Reading":
        """readings: of each rank."""
        wanted = [each or _NOTHING for each in readings]
        blocks, wants_top = [], np.asarray(any(each.num_top > 0 for each in wanted))
        for start in range(0, max(len(each.targets) for each in wanted), BLOCK):
            index, targets = np.zeros((2, len(wanted), BLOCK), np.int32)
            part = slice(start, start + BLOCK)
            for rank, each in enumerate(wanted):
                count = len(each.targets[part])
                index[rank, :count], targets[rank, :count] = each.index[part], each.targets[part]
            arrays = (self.spread.put(index.ravel()), self.spread.put(targets.ravel()))
            wants = self.spread.put(wants_top, EVERYWHERE)
            blocks.append(self.score(self.params.embed, self.params.head, hidden, *arrays, wants))
        sums = None
        if any(each.spans for each in wanted):
            spans = np.zeros((len(wanted), self.num_spans, 2), np.int32)
            for rank, each in enumerate(wanted):
                spans[rank, : len(each.spans)] = np.reshape(each.spans, (-1, 2))
            sums = self.pool(self.params.head, hidden, self.spread.put(spans.reshape(-1, 2)))
        return Reading(tuple(readings), blocks, sums)

    def warm_up(self, hidden: jax.Array) -> None:
        """Run both programs once."""
        one = np.zeros(1, np.int32)
        self.launch([Readings(one, one, 1, ((0, 1),), ())] * self.spread.num_ranks, hidden).result()


_NOTHING = Readings(np.zeros(0, np.int32), np.zeros(0, np.int32), 0, (), ())


@dataclass(frozen=True)
class Reading:
    """Readings in flight, of each rank."""

    readings: tuple[Readings | None, ...]
    blocks: list[Scores]
    sums: jax.Array | None

    def __post_init__(self) -> None:
        for array in jax.tree.leaves((self.blocks, self.sums)):
            array.copy_to_host_async()

    def result(self) -> tuple[ReadResult | None, ...]:
        return tuple(None if each is None else self._result(each, rank) for rank, each in enumerate(self.readings))

    def _result(self, readings: Readings, rank: int) -> ReadResult:
        count, num_ranks = len(readings.targets), len(self.readings)

        def own(array: Any) -> np.ndarray:
            return np.split(np.asarray(array), num_ranks)[rank]

        def joined(name: str, empty: np.ndarray) -> np.ndarray:
            return np.concatenate([own(getattr(block, name)) for block in self.blocks] or [empty])[:count]

        sums = np.zeros((0, 0), np.float32) if self.sums is None else own(self.sums)
        return ReadResult(
            logprobs=joined("logprobs", np.zeros(0, np.float32)),
            ranks=joined("ranks", np.zeros(0, np.int32)),
            top_ids=joined("top_ids", np.zeros((0, 0), np.int32)),
            top_logprobs=joined("top_logprobs", np.zeros((0, 0), np.float32)),
            sums=sums[: len(readings.spans)],
        )
