"""Next tokens from logits, on the device: one pure function for every row of a step, whatever each row asked for.

Order, per row: penalties, bias, stop suppression -> temperature -> top_k -> top_p -> min_p -> one random draw.

* repetition penalty (Keskar et al. 2019, "CTRL", §4.1, with the sign rule of Hugging Face transformers): tokens of
  prompt and output; a positive logit is divided by it, any other is multiplied.
* presence and frequency penalty (OpenAI API reference, "Frequency and presence penalties"): output tokens only;
  logit -= presence * (count > 0) + frequency * count.
* top_k: the k likeliest stay, and every token that ties with the last of them.
* top_p (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration"): the smallest set of likeliest tokens
  whose probability, renormalised over what top_k left, reaches top_p; ties with the last of them stay.
* min_p (Nguyen et al. 2024, "Turning Up the Heat"): what has at least min_p times the probability of the likeliest
  token; a ratio, so it does not depend on top_k and top_p.

A row's answer depends on that row alone. Everything is measured as distance from the row's largest logit: a float32 >=
0, whose bits, read as int32, have the same order. Probabilities are summed as 31-bit fixed point: integer sums do not
depend on their order, so thresholds found by bisection and by candidates agree exactly, and a seeded row draws the same
token in every batch size. There is no sort of the vocabulary, and what no row asks for is behind lax.cond: on devices
that find their way alone. A GPU's host waits at every branch until the GPU has come there, and neither has anything to
do meanwhile; so there the host says what the rows of a step ask for at most (Asks), and thresholds are bisected in a
fixed number of turns.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 512  # tokens per block of the two-level inverse CDF
NUM_CANDIDATES = 128  # most nuclei and every usual top_k end among these; the others are bisected
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # outside of these the result is the same and float32 is not finite
IN_PROMPT = 1 << 30  # a bit of SamplingState.counts; a bool array of its own is what XLA's TPU compiler fails to gather
INFINITE_KEY = 0x7F800000  # the bits of +inf: every distance is at most this

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """What the device remembers per slot. V is the vocabulary, the last row scratch for padding."""

    counts: Array  # [slots + 1, V] int32: how often the token is in the slot's output, plus IN_PROMPT if it is there
    bias: Array  # [slots + 1, V] float32: added to the logits
    stop_ids: Array  # [slots + 1, max_stop] int32: padded with V


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """How each of the N rows of a step is sampled. A row whose emit is False gets a meaningless token."""

    slots: Array  # [N] int32
    positions: Array  # [N] int32: position in its sequence of the token being sampled
    emit: Array  # [N] bool: this row samples a token
    sample: Array  # [N] bool: temperature > 0; otherwise the likeliest token (the smallest id among equals)
    truncate: Array  # [N] bool: top_k, top_p or min_p is in force
    penalties: Array  # [N] bool: reads and updates the slot's counts
    bias: Array  # [N] bool: adds the slot's bias
    suppress_stop: Array  # [N] bool: the slot's stop tokens cannot be sampled
    logprobs: Array  # [N] bool
    constrained: Array  # [N] bool: only tokens of the row's mask can be sampled
    temperature: Array  # [N] float32; held within 1e-6 and 1e6
    top_p: Array  # [N] float32; >= 1 = off
    min_p: Array  # [N] float32 in [0, 1]; 0 = off
    presence_penalty: Array  # [N] float32
    frequency_penalty: Array  # [N] float32
    repetition_penalty: Array  # [N] float32 > 0
    top_k: Array  # [N] int32; 0 = off
    seed_low: Array  # [N] int32: low 32 bits of the seed, raw
    seed_high: Array  # [N] int32: high 32 bits
    choice: Array  # [N] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """One token per row. Natural log-probabilities of the raw logits; zero in steps where no row asks for them."""

    token_ids: Array  # [N] int32
    logprobs: Array  # [N] float32: of token_ids
    top_ids: Array  # [N, num_top] int32: likeliest first
    top_logprobs: Array  # [N, num_top] float32


class Asks(enum.Enum):
    """What the rows of a step ask for at most."""

    GREEDY = "greedy"  # the likeliest tokens
    DRAWS = "draws"  # and temperature, top_k, top_p, min_p
    ANYTHING = "anything"


def init_state(num_slots: int, vocab_size: int, max_stop: int) -> SamplingState:
    """-> the state of num_slots empty slots and one scratch slot."""
    rows = num_slots + 1
    return SamplingState(
        counts=jnp.zeros((rows, vocab_size), jnp.int32),
        bias=jnp.zeros((rows, vocab_size), jnp.float32),
        stop_ids=jnp.full((rows, max_stop), vocab_size, jnp.int32),
    )


def admit(
    state: SamplingState,
    slot: Array,
    token_ids: Array,
    num_prompt: Array,
    num_tokens: Array,
    bias_ids: Array,
    bias_values: Array,
    stop_ids: Array,
) -> SamplingState:
    """token_ids [N] int32 (prompt, then output so far, then padding), bias_* [B] (ids padded with V), stop_ids
    [max_stop] (padded with V) -> state in which the slot holds exactly this and nothing of its previous owner.

    Counting the output here equals having sampled it in this slot. Compile with the state donated.
    """
    vocab = state.counts.shape[1]
    index = jnp.arange(token_ids.shape[0])
    prompt = jnp.where(index < num_prompt, token_ids, vocab)
    output = jnp.where((index >= num_prompt) & (index < num_tokens), token_ids, vocab)
    return SamplingState(
        counts=state.counts.at[slot].set(
            jnp.zeros(vocab, jnp.int32).at[prompt].set(IN_PROMPT, mode="drop").at[output].add(1, mode="drop")
        ),
        bias=state.bias.at[slot].set(jnp.zeros(vocab, jnp.float32).at[bias_ids].add(bias_values, mode="drop")),
        stop_ids=state.stop_ids.at[slot].set(stop_ids),
    )


def sample(
    logits: Array,
    rows: SamplingRows,
    state: SamplingState,
    masks: Array,
    *,
    num_top: int,
    vocab_axis: int = 1,
    asks: Asks = Asks.ANYTHING,
    branches: bool = True,
) -> tuple[SamplingState, Sampled]:
    """logits [N, V] float32 -> one token per row, and the state in which rows with penalties have counted theirs.

    masks [N, ceil(V / 32)] int32: bit v % 32 of word v // 32 allows token v; all bits set in rows that are not
    constrained.

    vocab_axis 0: logits are [V, N]; turning them round costs as much as the CPU's whole head at two rows, so only steps
    that need more than an argmax do. A logit of -inf is never sampled unless the whole row is -inf. asks: rows that ask
    for more do not get it. branches: the device finds its way alone. Raises ValueError if num_top exceeds V.
    """
    if num_top > logits.shape[vocab_axis]:
        vocab = logits.shape[vocab_axis]
        raise ValueError(f"num_top is {num_top}; at most the vocabulary's {vocab} tokens can be reported")
    if asks is not Asks.ANYTHING:
        plain = asks is Asks.GREEDY
        token_ids = _argmax(logits, vocab_axis) if plain else _draw(_by_row(logits, vocab_axis), rows, branches, True)
        return state, _nothing_reported(token_ids, num_top)
    token_ids = _choose(logits, rows, state, masks, vocab_axis, branches)
    counted = jnp.where(rows.emit & rows.penalties, rows.slots, state.counts.shape[0])
    state = replace(state, counts=state.counts.at[counted, token_ids].add(1, mode="drop"))
    return state, _report(logits, token_ids, jnp.any(rows.emit & rows.logprobs), num_top, vocab_axis)


def _choose(
    logits: Array, rows: SamplingRows, state: SamplingState, masks: Array, vocab_axis: int, branches: bool
) -> Array:
    """logits [N, V] or [V, N] -> token ids [N]. A step of plain greedy rows costs one argmax."""
    adjusts = jnp.any(rows.emit & (rows.penalties | rows.bias | rows.suppress_stop))
    draws = jnp.any(rows.emit & rows.sample)
    constrained = jnp.any(rows.emit & rows.constrained)
    plain = functools.partial(_argmax, axis=vocab_axis)

    def general(logits: Array) -> Array:
        scores = _by_row(logits, vocab_axis)
        scores = lax.cond(adjusts, lambda x: _adjust(x, rows, state), lambda x: x, scores)
        return lax.cond(draws, lambda x: _draw(x, rows, branches), _argmax, scores)

    def masked(logits: Array) -> Array:
        allowed = lax.cond(constrained, lambda x: _forbid(x, masks, vocab_axis), lambda x: x, logits)
        return lax.cond(adjusts | draws, general, plain, allowed)

    return lax.cond(adjusts | draws | constrained, masked, plain, logits)


def _forbid(logits: Array, masks: Array, vocab_axis: int) -> Array:
    """logits [N, V] or [V, N], masks [N, words] -> -inf where the row's mask has no bit; the logits are not turned."""
    shifts = jnp.arange(32, dtype=jnp.int32)
    if vocab_axis == 1:
        bits = (masks[:, :, None] >> shifts & 1).reshape(masks.shape[0], -1)[:, : logits.shape[1]]
    else:
        bits = (masks.T[:, None, :] >> shifts[:, None] & 1).reshape(-1, masks.shape[0])[: logits.shape[0]]
    return jnp.where(bits != 0, logits, -jnp.inf)


def _by_row(logits: Array, vocab_axis: int) -> Array:
    return logits if vocab_axis == 1 else logits.T


def _argmax(scores: Array, axis: int = 1) -> Array:
    """scores [N, V] -> [N] int32, the first of equals; two plain reductions, which vectorise unlike jnp.argmax."""
    return _first_at(scores, scores.max(axis=axis, keepdims=True), axis)


def _first_at(scores: Array, peak: Array, axis: int = 1) -> Array:
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    last = scores.shape[axis] - 1
    return jnp.where(scores == peak, ids, last).min(axis=axis)


def _adjust(logits: Array, rows: SamplingRows, state: SamplingState) -> Array:
    """logits [N, V] -> with penalties, bias and stop suppression, each in the rows that ask for it."""
    known = state.counts[rows.slots]
    seen, counts = (known != 0) & rows.penalties[:, None], known & (IN_PROMPT - 1)
    repetition = rows.repetition_penalty[:, None]
    scores = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    presence, frequency = rows.presence_penalty[:, None], rows.frequency_penalty[:, None]
    penalised = scores - jnp.where(counts > 0, presence + frequency * counts.astype(jnp.float32), 0.0)
    scores = jnp.where(rows.penalties[:, None], penalised, scores)
    scores = jnp.where(rows.bias[:, None], scores + state.bias[rows.slots], scores)
    stops = jnp.where(rows.suppress_stop[:, None], state.stop_ids[rows.slots], logits.shape[1])
    return scores.at[jnp.arange(logits.shape[0])[:, None], stops].set(-jnp.inf, mode="drop")


def _draw(scores: Array, rows: SamplingRows, branches: bool, truncated: bool = False) -> Array:
    """scores [N, V] -> token ids [N]: drawn in rows that sample, the likeliest in the others. truncated: some row is,
    without looking."""
    largest = jnp.finfo(jnp.float32).max
    scores = jnp.minimum(scores, largest)
    peak = scores.max(axis=1, keepdims=True)
    temperature = jnp.clip(jnp.where(rows.sample, rows.temperature, 1.0), MIN_TEMPERATURE, MAX_TEMPERATURE)
    distance = (jnp.maximum(peak, -largest) - scores) / temperature[:, None]
    truncates = rows.emit & rows.sample & rows.truncate

    def limits(distance: Array) -> Array:
        found = _limits(distance, rows) if branches else _bisected_limits(distance, rows)
        return jnp.where(truncates, found, INFINITE_KEY)

    def no_limits(distance: Array) -> Array:
        return jnp.full(distance.shape[:1], INFINITE_KEY, jnp.int32)

    limit = limits(distance) if truncated else lax.cond(jnp.any(truncates), limits, no_limits, distance)
    drawn = _inverse_cdf(_weights(distance, limit), _random_bits(rows))
    return jnp.where(rows.sample, drawn, _first_at(scores, peak))


def _keys(distance: Array) -> Array:
    """float32 >= 0 -> int32 of the same order."""
    return lax.bitcast_convert_type(distance, jnp.int32)


def _weights(distance: Array, limit: Array) -> Array:
    """distance [N, V], limit [N] key -> [N, V] int32: exp(-distance) in fixed point, and 0 beyond the limit.

    The unit is the power of two that makes the row's sum lie within 2^30 and 2^31 (and a rounding more: sum as uint32).
    A power of two, because it hides that a float sum differs in its last bits from one batch size to another.
    """
    probability = jnp.where(_keys(distance) <= limit[:, None], jnp.exp(-distance), 0.0)
    total = jnp.maximum(probability.sum(axis=1, keepdims=True), 1.0)
    exponent = (_keys(total) >> 23) - 127
    scale = lax.bitcast_convert_type((30 - exponent + 127) << 23, jnp.float32)
    return (probability * scale + 0.5).astype(jnp.int32)


def _limits(distance: Array, rows: SamplingRows) -> Array:
    """distance [N, V] -> [N] the largest key that top_k, top_p and min_p all keep."""
    num_candidates = min(NUM_CANDIDATES, distance.shape[1])
    nearest, ids = lax.top_k(-distance, num_candidates)
    nearest = _keys(jnp.abs(nearest))  # ascending
    keys = _keys(distance)

    k = jnp.clip(rows.top_k, 1, distance.shape[1])
    by_rank = jnp.take_along_axis(nearest, jnp.minimum(k, num_candidates)[:, None] - 1, axis=1)[:, 0]
    by_rank = _bisect_where(k > num_candidates, by_rank, keys, jnp.ones_like(keys), k.astype(jnp.uint32))
    by_rank = jnp.where(rows.top_k > 0, by_rank, INFINITE_KEY)

    weights = _weights(distance, by_rank)
    goal = jnp.maximum(_multiply_high(_fraction(rows.top_p), weights.sum(axis=1, dtype=jnp.uint32)), 1)
    mass = _running_sum(jnp.take_along_axis(weights, ids, axis=1).astype(jnp.uint32))
    reached = jnp.minimum((mass < goal[:, None]).sum(axis=1), num_candidates - 1)
    by_mass = jnp.take_along_axis(nearest, reached[:, None], axis=1)[:, 0]
    by_mass = _bisect_where((mass[:, -1] < goal) & (rows.top_p < 1), by_mass, keys, weights, goal)
    by_mass = jnp.where(rows.top_p < 1, by_mass, INFINITE_KEY)

    by_ratio = _keys(jnp.abs(jnp.log(rows.min_p)))
    return jnp.minimum(jnp.minimum(by_rank, by_mass), by_ratio)


def _bisected_limits(distance: Array, rows: SamplingRows) -> Array:
    """The same, without candidates, which are a sort of the vocabulary where a device has nothing quicker."""
    keys = _keys(distance)
    k = jnp.clip(rows.top_k, 1, distance.shape[1]).astype(jnp.uint32)
    by_rank = jnp.where(rows.top_k > 0, _bisect(keys, lambda inside: inside, k), INFINITE_KEY)
    weights = _weights(distance, by_rank)
    goal = jnp.maximum(_multiply_high(_fraction(rows.top_p), weights.sum(axis=1, dtype=jnp.uint32)), 1)
    by_mass = _bisect(keys, lambda inside: jnp.where(inside, weights, 0), goal)
    by_mass = jnp.where(rows.top_p < 1, by_mass, INFINITE_KEY)
    return jnp.minimum(jnp.minimum(by_rank, by_mass), _keys(jnp.abs(jnp.log(rows.min_p))))


def _bisect(keys: Array, weigh: Callable[[Array], Array], goal: Array) -> Array:
    """keys [N, V], weigh: [N, V] bool -> int32 or bool, goal [N] -> [N]: the smallest key whose tokens (key and below)
    weigh at least goal. Always 31 turns: who waits for none need not ask how many there are."""
    bounds = jnp.zeros(keys.shape[0], jnp.int32), keys.max(axis=1)
    return lax.fori_loop(0, 31, lambda _, bounds: _halve(keys, weigh, goal, bounds), bounds)[1]


def _halve(
    keys: Array, weigh: Callable[[Array], Array], goal: Array, bounds: tuple[Array, Array]
) -> tuple[Array, Array]:
    """bounds [N], [N] of keys, between which the one is that _bisect looks for -> nearer ones; equal ones stay."""
    low, high = bounds
    middle = low + (high - low) // 2
    enough = weigh(keys <= middle[:, None]).sum(axis=1, dtype=jnp.uint32) >= goal
    return jnp.where(enough | (low >= high), low, middle + 1), jnp.where(enough, middle, high)


def _bisect_where(missing: Array, known: Array, keys: Array, weights: Array, goal: Array) -> Array:
    """missing [N] bool, known [N], keys [N, V], weights [N, V] int32, goal [N] uint32 -> [N]: known, but where missing
    the smallest key whose tokens (key and below) weigh at least goal; there known is a key that is not too large.

    Exact: halves the range of int32 keys until one is left, at most 31 times and usually 25.
    """

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        return _halve(keys, lambda inside: jnp.where(inside, weights, 0), goal, bounds)

    def bisect() -> Array:
        largest = jnp.where(weights > 0, keys, 0).max(axis=1)
        bounds = known, jnp.where(missing, largest, known)
        return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, bounds)[0]

    return lax.cond(jnp.any(missing), bisect, lambda: known)


def _fraction(value: Array) -> Array:
    """float32 -> uint32 in units of 2^-32, held within 0 and just below 1."""
    below_one = 1 - 2.0**-24
    return (jnp.clip(value, 0.0, below_one) * 2.0**31).astype(jnp.int32).astype(jnp.uint32) << 1


def _multiply_high(a: Array, b: Array) -> Array:
    """uint32, uint32 -> the upper 32 bits of their 64-bit product, from four 16-bit products."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    return a_high * b_high + (middle >> 16) + ((a_low * b_high + (middle & 0xFFFF)) >> 16)


def _random_bits(rows: SamplingRows) -> Array:
    """-> [N] uint32, a function of (seed, choice, position) alone.

    fold_in(fold_in(seed, choice), position) with threefry2x32 (Salmon et al. 2011), named, so that no setting of JAX
    changes it. The first word of the resulting key is itself uniform: no further draw is made from it.
    """

    def one(low: Array, high: Array, choice: Array, position: Array) -> Array:
        words = lax.bitcast_convert_type(jnp.stack([high, low]), jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, choice), position))[0]

    return jax.vmap(one)(rows.seed_low, rows.seed_high, rows.choice, rows.positions)


def _inverse_cdf(weights: Array, bits: Array) -> Array:
    """weights [N, V] int32 with a sum below 2^32, bits [N] uint32 -> [N] int32: the first token, in vocabulary order,
    whose cumulated weight exceeds bits / 2^32 of the sum. A token of weight 0 is never the first; a row of zeros gives
    V - 1.
    """
    num_rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(num_rows, -1, BLOCK).astype(jnp.uint32)
    sums = blocks.sum(axis=2, dtype=jnp.uint32)
    cdf = _running_sum(sums)
    goal = _multiply_high(bits, cdf[:, -1])
    block = jnp.minimum((cdf <= goal[:, None]).sum(axis=1), sums.shape[1] - 1)
    row = jnp.arange(num_rows)
    rest = goal - (cdf[row, block] - sums[row, block])
    inside = _running_sum(blocks[row, block])
    token = block * BLOCK + (inside <= rest[:, None]).sum(axis=1)
    return jnp.minimum(token, vocab - 1).astype(jnp.int32)


def _running_sum(values: Array) -> Array:
    """values [N, K] uint32 -> [N, K] inclusive sums. One operation, where jnp.cumsum becomes a hundred on CPU."""
    length = values.shape[1]
    return lax.reduce_window(values, np.uint32(0), lax.add, (1, length), (1, 1), [(0, 0), (length - 1, 0)])


def _report(logits: Array, token_ids: Array, wanted: Array, num_top: int, vocab_axis: int) -> Sampled:
    """logits [N, V] or [V, N], token_ids [N], wanted (scalar bool) -> Sampled; log-probabilities only if wanted."""

    def compute() -> tuple[Array, Array, Array]:
        rows = _by_row(logits, vocab_axis)
        total = jax.nn.logsumexp(rows, axis=1, keepdims=True)
        top, ids = lax.top_k(rows, num_top)
        return jnp.take_along_axis(rows, token_ids[:, None], axis=1)[:, 0] - total[:, 0], ids, top - total

    def skip() -> tuple[Array, Array, Array]:
        none = _nothing_reported(token_ids, num_top)
        return none.logprobs, none.top_ids, none.top_logprobs

    logprobs, top_ids, top_logprobs = lax.cond(wanted, compute, skip)
    return Sampled(token_ids, logprobs, top_ids, top_logprobs)


def _nothing_reported(token_ids: Array, num_top: int) -> Sampled:
    shape = (token_ids.shape[0], num_top)
    return Sampled(token_ids, jnp.zeros(shape[:1], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
