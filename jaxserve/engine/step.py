"""The step, whole and in the parts that it is compiled in on the CPU. Pure; the state is donated in and returned out.

Letters: S decode rows, T prefill tokens, R chunks, E embed, V vocab (scheduling.plan names the arrays). Where hidden is
[tokens, E] below, it is [E, tokens] in a feature-major layout (model.llama.Layout).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.config import ModelConfig
from jaxserve.model import sampling
from jaxserve.model.llama import Block, Layout, rope_table
from jaxserve.model.sharding import Params, Structure, merge
from jaxserve.scheduling import plan as plans
from jaxserve.scheduling.plan import Bucket, PlanArrays
from jaxserve.types import MAX_TOP_LOGPROBS
from kernels_pallas.attention import Attention, DecodeRows, LayerKind, PrefillChunks, Work
from kernels_pallas.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """Everything that lives on the device from step to step; donated in, returned out."""

    cache: KVCache
    last_token: jax.Array  # [slots + 1] the token each slot sampled last; the last slot is scratch
    sampling: sampling.SamplingState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """N tokens a row; N = 1 today, and nothing above or below assumes it."""

    token_ids: jax.Array  # [S + R, N]
    num_tokens: jax.Array  # [S + R]
    logprobs: jax.Array  # [S + R, N]
    top_ids: jax.Array  # [S + R, N, 20]
    top_logprobs: jax.Array  # [S + R, N, 20]
    hidden: jax.Array | None = None  # [C, E] of the prefill tokens, padded to the chunk size C; for engine.readout


@dataclass(frozen=True)
class StepShape:
    """What a step is compiled for, besides the arrays' shapes."""

    config: ModelConfig
    layout: Layout
    structure: Structure
    attention: Attention
    page_size: int
    max_pages: int  # M
    chunk_size: int  # C: prefill tokens of a step at most
    period: int | None = None  # layers of a turn where their parameters are stacked (model.stacked)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that the model has, each once."""
        return tuple(LayerKind(window=window) for window in dict.fromkeys(self.config.layer_windows))

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """[L] the kind of each layer, as an index."""
        numbers = {window: number for number, window in enumerate(dict.fromkeys(self.config.layer_windows))}
        return tuple(numbers[window] for window in self.config.layer_windows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """What all layers of a step share, and what comes after them."""

    rope: tuple[jax.Array, jax.Array]
    work: tuple[Work, ...]  # of the attention backend, for each kind of layer
    picked: jax.Array  # [S + R] index among the S + T tokens of each row's last one
    rows: sampling.SamplingRows


def step(
    params: Params, state: DeviceState, vector: jax.Array, masks: jax.Array, *, shape: StepShape, bucket: Bucket
) -> tuple[DeviceState, StepOutput]:
    """params, state, vector [packed plan] int32, masks as in finish -> the next state and the tokens sampled."""
    cache, hidden, rows, prefilled = forward(
        params.embed, params.layers, state.cache, state.last_token, vector, shape=shape, bucket=bucket
    )
    last_token, sampling_state, output = finish(
        params.embed, params.head, hidden, state.last_token, state.sampling, rows, masks, shape=shape
    )
    return DeviceState(cache, last_token, sampling_state), replace(output, hidden=prefilled)


def forward(
    embed: Sequence[jax.Array],
    layers: Sequence[Sequence[jax.Array]],
    cache: KVCache,
    last_token: jax.Array,
    vector: jax.Array,
    *,
    shape: StepShape,
    bucket: Bucket,
) -> tuple[KVCache, jax.Array, sampling.SamplingRows, jax.Array | None]:
    """All of a step before its logits -> the cache, hidden [S + R, E], how the rows are sampled, StepOutput.hidden."""
    hidden, shared = begin(embed, last_token, vector, shape=shape, bucket=bucket)
    hidden, cache = run_layers(layers, hidden, cache, jnp.int32(0), shared, shape=shape)
    hidden, prefilled = pick(hidden, shared, shape=shape, bucket=bucket)
    return cache, hidden, shared.rows, prefilled


def begin(
    embed: Sequence[jax.Array], last_token: jax.Array, vector: jax.Array, *, shape: StepShape, bucket: Bucket
) -> tuple[jax.Array, Shared]:
    """The packed plan -> hidden [S + T, E] and what the rest of the step shares."""
    arrays = plans.unpack(vector, bucket, shape.max_pages)
    num_decode = bucket.num_decode
    last = last_token[arrays.slots[:num_decode]]
    decode_ids = jnp.where(arrays.token_ids[:num_decode] == plans.TAKE_LAST, last, arrays.token_ids[:num_decode])
    token_ids = jnp.concatenate([decode_ids, arrays.token_ids[num_decode:]])
    hidden = merge(shape.structure.embed, embed)(token_ids)
    shared = Shared(
        rope=rope_table(shape.config, arrays.positions),
        work=_attention_work(arrays, shape, bucket),
        picked=_picked(arrays, bucket),
        rows=_sampling_rows(arrays),
    )
    return hidden, shared


def run_layers(
    layers: Sequence[Sequence[jax.Array]],
    hidden: jax.Array,
    cache: KVCache,
    first: jax.Array,
    shared: Shared,
    *,
    shape: StepShape,
) -> tuple[jax.Array, KVCache]:
    """hidden [S + T, E] through layers first, first + 1, …; traced once for each kind and called for each. first: the
    kinds of layers must repeat from there as from layer 0 (compile.layers_per_program). Stacked layers are scanned."""
    run = jax.jit(functools.partial(_layer, shape=shape), static_argnames="kind")

    def chain(
        layers: Sequence[Sequence[jax.Array]], hidden: jax.Array, cache: KVCache, first: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        for index, leaves in enumerate(layers):
            hidden, cache = run(list(leaves), hidden, cache, first + index, shared, kind=shape.layer_kinds[index])
        return hidden, cache

    if shape.period is None:
        return chain(layers, hidden, cache, first)
    turns = layers[0][0].shape[0]
    firsts = first + shape.period * jnp.arange(turns, dtype=jnp.int32)
    # The cache is carried, since scanning over it would make a second one.
    result, _ = lax.scan(lambda carry, turn: (chain(turn[0], *carry, turn[1]), None), (hidden, cache), (layers, firsts))
    return result


def pick(hidden: jax.Array, shared: Shared, *, shape: StepShape, bucket: Bucket) -> tuple[jax.Array, jax.Array | None]:
    """hidden [S + T, E] -> [S + R, E], each row's last token, and StepOutput.hidden."""
    axis = 1 if shape.layout.feature_major else 0
    rows = jnp.take(hidden, shared.picked, axis=axis)
    if not bucket.num_prefill:
        return rows, None
    prefilled = lax.slice_in_dim(hidden, bucket.num_decode, bucket.num_tokens, axis=axis)
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, shape.chunk_size - bucket.num_prefill)
    return rows, jnp.pad(prefilled, padding)


def finish(
    embed: Sequence[jax.Array],
    head: Sequence[jax.Array],
    hidden: jax.Array,
    last_token: jax.Array,
    state: sampling.SamplingState,
    rows: sampling.SamplingRows,
    masks: jax.Array,
    *,
    shape: StepShape,
    asks: sampling.Asks = sampling.Asks.ANYTHING,
) -> tuple[jax.Array, sampling.SamplingState, StepOutput]:
    """hidden [S + R, E], masks [S + R, ceil(V / 32)] int32 of the tokens that each row may sample -> logits, sampled;
    last_token and the sampling state take in what was drawn."""
    logits = merge(shape.structure.head, head)(hidden, merge(shape.structure.embed, embed))
    vocab_axis = 0 if shape.layout.feature_major else 1
    options = {"num_top": MAX_TOP_LOGPROBS, "vocab_axis": vocab_axis, "branches": shape.layout.branches}
    state, sampled = sampling.sample(logits, rows, state, masks, asks=asks, **options)
    output = StepOutput(
        token_ids=sampled.token_ids[:, None],
        num_tokens=rows.emit.astype(jnp.int32),
        logprobs=sampled.logprobs[:, None],
        top_ids=sampled.top_ids[:, None],
        top_logprobs=sampled.top_logprobs[:, None],
    )
    return last_token.at[rows.slots].set(sampled.token_ids), state, output


def _layer(
    leaves: Sequence[jax.Array],
    hidden: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    shared: Shared,
    *,
    shape: StepShape,
    kind: int,
) -> tuple[jax.Array, KVCache]:
    block: Block = merge(shape.structure.layer, leaves)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, layer: jax.Array) -> tuple[jax.Array, KVCache]:
        return shape.attention.attend(q, k, v, cache, layer, shared.work[kind])

    return block(hidden, cache, layer, shared.rope, attend)


def _attention_work(arrays: PlanArrays, shape: StepShape, bucket: Bucket) -> tuple[Work, ...]:
    """What the layers of each kind share: the backend's plan for the decode rows and the chunks."""
    num_decode = bucket.num_decode
    rows = chunks = None
    if num_decode:
        rows = DecodeRows(arrays.page_table[:num_decode], arrays.kv_lens[:num_decode])
    if bucket.num_prefill:
        chunks = PrefillChunks(
            arrays.page_table[num_decode:],
            arrays.kv_lens[num_decode:],
            arrays.chunk_starts,
            arrays.positions[num_decode:],
        )
    return tuple(shape.attention.plan(rows, chunks, shape.page_size, kind) for kind in shape.kinds)


def _picked(arrays: PlanArrays, bucket: Bucket) -> jax.Array:
    """[S + R] index among the S + T tokens of each row's last real token."""
    num_decode = bucket.num_decode
    decode = jnp.arange(num_decode)
    if not bucket.num_prefill:
        return decode
    starts = jnp.minimum(arrays.chunk_starts[:-1], bucket.num_prefill - 1)
    first = arrays.positions[num_decode:][starts]
    last = starts + jnp.maximum(arrays.kv_lens[num_decode:] - first, 1) - 1
    return jnp.concatenate([decode, num_decode + jnp.minimum(last, bucket.num_prefill - 1)])


def _sampling_rows(arrays: PlanArrays) -> sampling.SamplingRows:
    def flag(bit: int) -> jax.Array:
        return arrays.flags & bit != 0

    def real(words: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(words, jnp.float32)

    return sampling.SamplingRows(
        slots=arrays.slots,
        positions=arrays.kv_lens,
        emit=flag(plans.EMIT),
        sample=flag(plans.SAMPLE),
        truncate=flag(plans.TRUNCATE),
        penalties=flag(plans.PENALTIES),
        bias=flag(plans.BIAS),
        suppress_stop=flag(plans.SUPPRESS_STOP),
        logprobs=flag(plans.LOGPROBS),
        constrained=flag(plans.GRAMMAR),
        temperature=real(arrays.temperature),
        top_p=real(arrays.top_p),
        min_p=real(arrays.min_p),
        presence_penalty=real(arrays.presence_penalty),
        frequency_penalty=real(arrays.frequency_penalty),
        repetition_penalty=real(arrays.repetition_penalty),
        top_k=arrays.top_k,
        seed_low=arrays.seed_low,
        seed_high=arrays.seed_high,
        choice=arrays.choice,
    )
