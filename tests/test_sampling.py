"""jaxserve.model.sampling against float64 numpy that sorts, counts and cumulates in the plain way."""

from dataclasses import dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.model import sampling
from jaxserve.model.sampling import Asks, SamplingRows, SamplingState, admit, init_state, sample

N, V, SLOTS, MAX_STOP, NUM_TOP = 6, 1000, 7, 4, 5
MAX_TOKENS, MAX_BIAS = 64, 8

compiled = jax.jit(
    partial(sample, num_top=NUM_TOP), donate_argnums=2, static_argnames=("vocab_axis", "asks", "branches")
)
admitted = jax.jit(admit, donate_argnums=0)
limits = jax.jit(sampling._limits)
random_bits = jax.jit(sampling._random_bits)


@dataclass(frozen=True)
class Row:
    """One row of SamplingRows; what is not given is plain greedy."""

    slots: int = SLOTS
    positions: int = 0
    emit: bool = True
    sample: bool = False
    truncate: bool = False
    penalties: bool = False
    bias: bool = False
    suppress_stop: bool = False
    logprobs: bool = False
    constrained: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_k: int = 0
    seed_low: int = 0
    seed_high: int = 0
    choice: int = 0


def rows_of(rows: list[Row]) -> SamplingRows:
    dtypes = {int: np.int32, float: np.float32, bool: np.bool_}
    return SamplingRows(
        **{f.name: jnp.asarray([getattr(r, f.name) for r in rows], dtypes[type(f.default)]) for f in fields(Row)}
    )


def step(logits, rows: SamplingRows, state: SamplingState, masks=None, **axis):
    """sample(), with masks that allow everything unless they are given."""
    num_rows, vocab = logits.shape if axis.get("vocab_axis", 1) else logits.shape[::-1]
    given = np.full((num_rows, -(-vocab // 32)), -1, np.int32) if masks is None else masks
    return compiled(logits, rows, state, given, **axis)


def admit_slot(
    state: SamplingState, slot: int, tokens=(), num_prompt: int = 0, bias=(), stops=(), vocab: int = V
) -> SamplingState:
    ids = np.zeros(MAX_TOKENS, np.int32)
    ids[: len(tokens)] = tokens
    bias_ids, bias_values = np.full(MAX_BIAS, vocab, np.int32), np.zeros(MAX_BIAS, np.float32)
    for i, (token, value) in enumerate(bias):
        bias_ids[i], bias_values[i] = token, value
    stop_ids = np.full(MAX_STOP, vocab, np.int32)
    stop_ids[: len(stops)] = stops
    return admitted(
        state, np.int32(slot), ids, np.int32(num_prompt), np.int32(len(tokens)), bias_ids, bias_values, stop_ids
    )


def draw(logits: np.ndarray, rows: list[Row], state: SamplingState | None = None) -> np.ndarray:
    state = init_state(SLOTS, logits.shape[1], MAX_STOP) if state is None else state
    return np.asarray(step(jnp.asarray(logits, jnp.float32), rows_of(rows), state)[1].token_ids)


def reference(scores: np.ndarray, row: Row) -> tuple[np.ndarray, float]:
    """scores [V] -> probabilities [V] float64 of what is kept, and how near the nucleus' mass came to top_p."""
    scaled = scores.astype(np.float64) / np.float64(np.float32(row.temperature))
    weights = np.exp(scaled - scaled.max())
    ranked = np.sort(scaled)[::-1]
    kept = np.ones(len(scores), bool)
    margin = 1.0
    if row.top_k > 0:
        kept = scaled >= ranked[min(row.top_k, len(scores)) - 1]
    if row.top_p < 1:
        order = np.argsort(-np.where(kept, scaled, -np.inf), kind="stable")
        mass = np.cumsum((weights * kept)[order]) / (weights * kept).sum()
        last = int(np.searchsorted(mass, np.float32(row.top_p)))
        margin = float(np.abs(mass - np.float32(row.top_p)).min())
        kept &= scaled >= scaled[order[min(last, len(order) - 1)]]
    if row.min_p > 0:
        kept &= weights >= np.float32(row.min_p)
        margin = min(margin, float(np.abs(weights - np.float32(row.min_p)).min()))
    weights = weights * kept
    return weights / weights.sum(), margin


def reference_token(probabilities: np.ndarray, bits: int) -> tuple[int, float]:
    """-> the token that u = bits / 2^32 hits in vocabulary order, and u's distance from the nearest border."""
    cdf = np.cumsum(probabilities)
    u = bits / 2**32
    borders = np.concatenate([[0.0], cdf[:-1]])
    return int(np.searchsorted(cdf, u, side="right")), float(np.abs(borders[1:] - u).min(initial=1.0))


def random_rows(rng: np.random.Generator, num: int) -> list[Row]:
    return [
        Row(
            sample=True,
            truncate=True,
            positions=int(rng.integers(10000)),
            seed_low=int(rng.integers(-(2**31), 2**31)),
            seed_high=int(rng.integers(-(2**31), 2**31)),
            temperature=float(rng.choice([0.3, 1.0, 1.7])),
            top_k=int(rng.choice([0, 1, 5, 127, 128, 129, 600, 999, 1000, 5000])),
            top_p=float(rng.choice([1.0, 1e-6, 0.1, 0.9, 0.999, 0.999999])),
            min_p=float(rng.choice([0.0, 0.001, 0.05, 1.0])),
        )
        for _ in range(num)
    ]


# Thresholds and draws


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_the_tokens_kept_are_those_of_a_sort(spread):
    rng = np.random.default_rng(1)
    checked = 0
    for trial in range(20):
        logits = rng.normal(size=(N, V)).astype(np.float32) * np.float32(spread)
        if trial % 2:
            logits = np.round(logits * 4) / 4  # many ties
        rows = random_rows(rng, N)
        distance = (logits.max(1, keepdims=True) - logits) / np.float32([r.temperature for r in rows])[:, None]
        limit = np.asarray(limits(jnp.asarray(distance), rows_of(rows)))
        for row, x, d, most in zip(rows, logits, distance, limit, strict=True):
            expected, margin = reference(x, row)
            if margin > 2e-6:
                checked += 1
                got = d.astype(np.float32).view(np.int32) <= most
                assert np.array_equal(got, expected > 0), f"seed 1, trial {trial}, {row}"
    assert checked > 50


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [V, 1024])
def test_a_device_without_branches_draws_the_same_tokens(rng, spread, vocab):
    """Of every kind of step; where no row asks for it, what a step could do besides is left out."""
    rows = random_rows(rng, 24)
    logits = jnp.asarray(rng.normal(size=(24, vocab)) * spread, jnp.float32)
    state = partial(init_state, SLOTS, vocab, MAX_STOP)
    wanted = step(logits, rows_of(rows), state())[1].token_ids
    for asks in (Asks.DRAWS, Asks.ANYTHING):
        found = step(logits, rows_of(rows), state(), asks=asks, branches=False)[1]
        np.testing.assert_array_equal(found.token_ids, wanted, err_msg=asks.value)
    plain = rows_of([replace(row, sample=False) for row in rows])
    wanted = step(logits, plain, state())
    found = step(logits, plain, state(), asks=Asks.GREEDY, branches=False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_token_is_the_one_the_uniform_number_hits():
    rng = np.random.default_rng(2)
    checked = 0
    for trial in range(40):
        logits = rng.normal(size=(N, V)).astype(np.float32) * 3
        rows = random_rows(rng, N)
        tokens, bits = draw(logits, rows), np.asarray(random_bits(rows_of(rows)))
        for row, x, token, b in zip(rows, logits, tokens, bits, strict=True):
            probabilities, margin = reference(x, row)
            expected, gap = reference_token(probabilities, int(b))
            if margin > 2e-6 and gap > 2e-6:
                checked += 1
                assert token == expected, f"seed 2, trial {trial}, {row}"
    assert checked > 100


def test_draws_follow_the_distribution():
    num, vocab = 4096, 24
    rng = np.random.default_rng(3)
    logits = rng.normal(size=vocab).astype(np.float32) * 1.5
    state = init_state(0, vocab, 1)
    for row in (
        Row(sample=True, temperature=1.3),
        Row(sample=True, truncate=True, top_k=9, top_p=0.9),
        Row(sample=True, truncate=True, min_p=0.05),
    ):
        expected, _ = reference(logits, row)
        counts = np.zeros(vocab)
        for batch in range(5):
            rows = rows_of([row] * num)
            seeds = jnp.arange(num, dtype=jnp.int32) + batch * num
            rows = SamplingRows(**{**vars(rows), "seed_low": seeds, "slots": jnp.zeros(num, jnp.int32)})
            state, sampled = step(jnp.broadcast_to(jnp.asarray(logits), (num, vocab)), rows, state)
            counts += np.bincount(np.asarray(sampled.token_ids), minlength=vocab)
        assert counts[expected == 0].sum() == 0
        kept = expected > 0
        statistic = ((counts - expected * counts.sum()) ** 2)[kept] / (expected * counts.sum())[kept]
        freedom = kept.sum() - 1
        assert statistic.sum() < freedom + 4 * np.sqrt(2 * freedom), statistic


def logit_lists():
    value = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 1.0, -1e30, -np.inf, 5.0]))
    return st.lists(value, min_size=24, max_size=24)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    logits=logit_lists(),
    temperature=st.sampled_from([1e-30, 1e-4, 0.5, 1.0, 2.0, 100.0, 1e30]),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(-(2**31), 2**31 - 1),
)
def test_a_drawn_token_is_always_one_of_those_kept(logits, temperature, top_k, top_p, min_p, seed):
    x = np.asarray(logits, np.float32)
    if np.isneginf(x).all():
        x[3] = 0
    drawing = Row(
        sample=True, truncate=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed_low=seed
    )
    plain = Row(sample=True, temperature=temperature, seed_low=seed)
    tokens = draw(np.stack([x] * 4), [drawing, plain, Row(), drawing])
    assert np.isfinite(x[tokens]).all()
    assert tokens[2] == x.argmax()
    assert tokens[0] == tokens[3]
    held = Row(temperature=float(np.clip(temperature, 1e-6, 1e6)), top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities, margin = reference(x, held)
    if margin > 1e-5 and temperature <= 2:
        assert probabilities[tokens[0]] > 0


def test_extreme_rows_stay_finite_and_in_range():
    flat, banned = np.zeros(V, np.float32), np.full(V, -np.inf, np.float32)
    single = banned.copy()
    single[417] = -3.0
    huge = np.linspace(-3e38, 3e38, V).astype(np.float32)
    infinite = np.zeros(V, np.float32)
    infinite[5] = np.inf
    everything = {"sample": True, "truncate": True, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "logprobs": True}
    for temperature in (1e-4, 1.0, 100.0):
        row = Row(**everything, temperature=temperature)
        state = init_state(SLOTS, V, MAX_STOP)
        logits = jnp.asarray(np.stack([flat, banned, single, huge, infinite, -flat]))
        _, sampled = step(logits, rows_of([row] * N), state)
        tokens = np.asarray(sampled.token_ids)
        assert ((tokens >= 0) & (tokens < V)).all()
        assert tokens[2] == 417
        assert tokens[4] == 5
        assert np.isfinite(np.asarray(sampled.logprobs)[[0, 2, 5]]).all()


def test_the_largest_and_smallest_uniform_number_hit_tokens_that_can_be_drawn():
    weights = np.zeros((2, V), np.int32)
    weights[:, [3, 4, 700]] = [2**29, 1, 2**30]
    bits = jnp.asarray([0, 2**32 - 1], jnp.uint32)
    assert list(np.asarray(sampling._inverse_cdf(jnp.asarray(weights), bits))) == [3, 700]


def test_high_words_of_products_are_exact():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2**32, size=(2, 1000), dtype=np.uint64)
    a[:3], b[:3] = 2**32 - 1, [2**32 - 1, 0, 1]
    got = np.asarray(sampling._multiply_high(jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32)))
    assert np.array_equal(got, ((a * b) >> np.uint64(32)).astype(np.uint32))


# Company


def mixed_rows() -> list[Row]:
    return [
        Row(slots=0),
        Row(slots=1, sample=True, seed_low=11, positions=3),
        Row(slots=2, sample=True, truncate=True, top_p=0.8, seed_low=12, positions=70),
        Row(slots=3, sample=True, truncate=True, top_k=300, top_p=0.99, seed_low=13, choice=1),
        Row(slots=4, penalties=True, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
        Row(slots=5, sample=True, bias=True, suppress_stop=True, seed_high=5, temperature=0.7),
    ]


def mixed_state() -> SamplingState:
    state = init_state(SLOTS, V, MAX_STOP)
    state = admit_slot(state, 4, tokens=(1, 2, 3, 3, 4), num_prompt=2)
    return admit_slot(state, 5, bias=((7, 4.0), (8, -np.inf)), stops=(9, 10))


def test_a_row_gets_the_same_token_alone_and_in_any_company_row_and_batch_size():
    rng = np.random.default_rng(5)
    rows = mixed_rows()
    plain = Row(slots=SLOTS, emit=False)
    for trial in range(5):
        logits = rng.normal(size=(N, V)).astype(np.float32) * 3
        together = draw(logits, rows, mixed_state())
        order = rng.permutation(N)
        shuffled = draw(logits[order], [rows[i] for i in order], mixed_state())
        assert np.array_equal(shuffled, together[order]), f"seed 5, trial {trial}"
        for i, row in enumerate(rows):
            alone = draw(
                np.roll(logits, trial, axis=0),
                [row if (i + trial) % N == j else plain for j in range(N)],
                mixed_state(),
            )
            assert alone[(i + trial) % N] == together[i], f"seed 5, trial {trial}, row {i}"
            single = draw(logits[i : i + 1], [row], mixed_state())
            assert single[0] == together[i], f"seed 5, trial {trial}, row {i} as a batch of one"


def test_a_row_without_limits_is_untouched_by_a_step_that_truncates():
    rng = np.random.default_rng(6)
    free = [Row(sample=True, seed_low=i) for i in range(N)]
    for _ in range(10):
        logits = rng.normal(size=(N, V)).astype(np.float32)
        cut = [Row(sample=True, truncate=True, top_k=2), *free[1:-1], Row(sample=True, truncate=True, seed_low=N - 1)]
        assert np.array_equal(draw(logits, free)[1:], draw(logits, cut)[1:])


def test_the_token_depends_on_every_bit_of_seed_on_choice_and_on_position():
    base = Row(sample=True, seed_low=1, seed_high=2, choice=0, positions=9)
    others = [
        {"seed_low": 1 - 2**31},
        {"seed_high": 3},
        {"choice": 1},
        {"positions": 10},
        {"seed_low": 2, "seed_high": 1},
    ]
    rows = [base, *(Row(**{**vars(base), **change}) for change in others)]
    assert len(set(np.asarray(random_bits(rows_of(rows))).tolist())) == len(rows)


def test_random_numbers_and_tokens_are_frozen():
    rows = [Row(sample=True, seed_low=s, seed_high=h, choice=c, positions=p) for s, h, c, p in GOLDEN_KEYS]
    logits = np.broadcast_to(np.sin(np.arange(V) * 0.37).astype(np.float32) * 3, (N, V))
    assert np.asarray(random_bits(rows_of(rows))).tolist() == GOLDEN_BITS
    assert draw(logits, rows).tolist() == GOLDEN_TOKENS


GOLDEN_KEYS = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, -1, 127, 8191)]
GOLDEN_BITS = [4165894930, 3704974950, 3326851143, 346279018, 1353695780, 1605343514]
GOLDEN_TOKENS = [971, 855, 769, 73, 310, 375]


# Penalties, bias, stop suppression and the state behind them


def penalised(logits: np.ndarray, row: Row, prompt: list[int], output: list[int]) -> np.ndarray:
    scores = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        factor = row.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        scores[token] -= row.presence_penalty + row.frequency_penalty * output.count(token)
    return scores


def test_penalties_follow_their_formulas_over_random_histories():
    rng = np.random.default_rng(7)
    for trial in range(20):
        logits = rng.normal(size=(N, V)).astype(np.float32)
        histories = [[int(t) for t in rng.integers(0, 40, size=rng.integers(0, MAX_TOKENS))] for _ in range(N)]
        cuts = [int(rng.integers(0, len(h) + 1)) for h in histories]
        state = init_state(SLOTS, V, MAX_STOP)
        rows = []
        for slot, (history, cut) in enumerate(zip(histories, cuts, strict=True)):
            state = admit_slot(state, slot, history, cut)
            penalties = rng.uniform([-2, -2, 0.5], [2, 2, 2])
            names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
            rows.append(Row(slots=slot, penalties=True, **dict(zip(names, map(float, penalties), strict=True))))
        scores = np.asarray(sampling._adjust(jnp.asarray(logits), rows_of(rows), state))
        tokens = draw(logits, rows, state)
        for x, row, history, cut, got, token in zip(logits, rows, histories, cuts, scores, tokens, strict=True):
            expected = penalised(x, row, history[:cut], history[cut:])
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5, err_msg=f"seed 7, trial {trial}")
            assert expected[token] > expected.max() - 1e-4


def test_counting_while_sampling_equals_being_admitted_with_the_history():
    rng = np.random.default_rng(8)
    prompt = [5, 6, 6, 900]
    row = Row(slots=2, penalties=True, sample=True, frequency_penalty=0.7, repetition_penalty=1.3, seed_low=4)
    state = admit_slot(init_state(SLOTS, V, MAX_STOP), 2, prompt, len(prompt))
    history = list(prompt)
    for position in range(12):
        logits = rng.normal(size=(N, V)).astype(np.float32) * 4
        now = Row(**{**vars(row), "positions": position})
        elsewhere = admit_slot(init_state(SLOTS, V, MAX_STOP), 6, history, len(prompt))
        moved = Row(**{**vars(now), "slots": 6})
        padding = [Row(emit=False)] * (N - 2)
        again = draw(logits, [Row(slots=0), moved, *padding], elsewhere)[1]
        logits[0] = logits[1]
        state, sampled = step(jnp.asarray(logits), rows_of([now, Row(slots=1), *padding]), state)
        assert int(sampled.token_ids[0]) == again
        history.append(int(again))
    fresh = admit_slot(init_state(SLOTS, V, MAX_STOP), 2, history, len(prompt))
    for name in ("counts", "bias", "stop_ids"):
        assert np.array_equal(np.asarray(getattr(state, name)), np.asarray(getattr(fresh, name))), name


def test_a_new_owner_finds_nothing_of_the_old_one():
    state = admit_slot(init_state(SLOTS, V, MAX_STOP), 3, (1, 2, 3), 1, bias=((4, 50.0),), stops=(5,))
    neighbour = admit_slot(state, 2, (9, 9), 1)
    state = admit_slot(neighbour, 3)
    expected = admit_slot(init_state(SLOTS, V, MAX_STOP), 2, (9, 9), 1)
    for name in ("counts", "bias", "stop_ids"):
        assert np.array_equal(np.asarray(getattr(state, name)), np.asarray(getattr(expected, name))), name


def test_rows_that_do_not_emit_or_use_no_penalties_count_nothing():
    rows = [Row(slots=0), Row(slots=1, emit=False, penalties=True), Row(slots=2, penalties=True)]
    rows += [Row(slots=SLOTS, emit=False)] * (N - len(rows))
    logits = np.zeros((N, V), np.float32)
    logits[:, 17] = 1
    state, _ = step(jnp.asarray(logits), rows_of(rows), init_state(SLOTS, V, MAX_STOP))
    counts = np.asarray(state.counts)
    assert counts.sum() == 1
    assert counts[2, 17] == 1


def test_bias_and_stop_suppression_reach_only_the_rows_that_ask():
    state = admit_slot(init_state(SLOTS, V, MAX_STOP), 0, bias=((20, 9.0), (30, -np.inf)), stops=(40, 50))
    logits = np.zeros((N, V), np.float32)
    logits[:, [20, 30, 40, 50, 60]] = [1, 12, 8, 7, 6]
    rows = [
        Row(slots=0),
        Row(slots=0, bias=True),
        Row(slots=0, suppress_stop=True),
        Row(slots=0, bias=True, suppress_stop=True),
        Row(slots=1, bias=True, suppress_stop=True),
        Row(slots=SLOTS, emit=False),
    ]
    assert draw(logits, rows, state)[:5].tolist() == [30, 20, 30, 20, 30]
    logits[:, 30] = 0
    assert draw(logits, rows[2:3] * N, admit_slot(init_state(SLOTS, V, MAX_STOP), 0, stops=(40, 50)))[0] == 60


# Log-probabilities


def test_logprobs_are_those_of_the_raw_distribution_likeliest_first():
    rng = np.random.default_rng(9)
    logits = rng.normal(size=(N, V)).astype(np.float32) * 3
    rows = [Row(**{**vars(row), "logprobs": i == 2}) for i, row in enumerate(mixed_rows())]
    _, sampled = step(jnp.asarray(logits), rows_of(rows), mixed_state())
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :NUM_TOP]
    tokens = np.asarray(sampled.token_ids)
    assert np.array_equal(np.asarray(sampled.top_ids), order)
    np.testing.assert_allclose(np.asarray(sampled.top_logprobs), np.take_along_axis(exact, order, 1), atol=2e-6)
    np.testing.assert_allclose(np.asarray(sampled.logprobs), exact[np.arange(N), tokens], atol=2e-6)


def test_more_top_logprobs_than_tokens_are_refused():
    with pytest.raises(ValueError, match="num_top is 20; at most the vocabulary's 16"):
        sample(jnp.zeros((1, 16)), rows_of([Row()]), init_state(0, 16, 1), np.full((1, 1), -1, np.int32), num_top=20)


# Masks


def packed(allowed: np.ndarray) -> np.ndarray:
    """allowed [N, V] bool -> masks [N, ceil(V / 32)] int32."""
    bits = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), bool)
    bits[:, : allowed.shape[1]] = allowed
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("vocab", [V, 1024])
def test_a_constrained_row_samples_what_an_unconstrained_one_does_of_the_tokens_its_mask_allows(vocab, axis):
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(N, vocab)).astype(np.float32) * 3
    drawn = random_rows(rng, 2)
    rows = [Row(constrained=True), Row(), *(replace(row, constrained=True) for row in drawn), Row(sample=True)]
    rows.append(Row(constrained=True, penalties=True, presence_penalty=1.5, suppress_stop=True, bias=True, slots=1))
    state = init_state(SLOTS, vocab, MAX_STOP)
    state = admit_slot(state, 1, range(40), 3, [(5, 9.0), (6, 30.0)], [7, 900], vocab=vocab)
    for density in (0.5, 0.02):
        allowed = rng.random((N, vocab)) < density
        allowed[:, -1] = True
        allowed[[i for i, row in enumerate(rows) if not row.constrained]] = True
        allowed[:, 6] &= density > 0.1
        with_mask = jnp.asarray(logits if axis else logits.T)
        copy = jax.tree.map(jnp.array, state)
        _, masked = step(with_mask, rows_of(rows), copy, packed(allowed), vocab_axis=axis)
        barred = np.where(allowed, logits, -np.inf)
        free = [replace(row, constrained=False) for row in rows]
        _, plain = step(jnp.asarray(barred), rows_of(free), jax.tree.map(jnp.array, state))
        np.testing.assert_array_equal(masked.token_ids, plain.token_ids)
        assert allowed[np.arange(N), np.asarray(masked.token_ids)].all()
        assert int(masked.token_ids[0]) == int(np.argmax(barred[0]))
        assert int(masked.token_ids[1]) == int(np.argmax(logits[1]))


def test_log_probabilities_of_a_constrained_row_are_of_the_raw_distribution():
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(N, V)).astype(np.float32)
    allowed = np.ones((N, V), bool)
    allowed[0] = False
    allowed[0, 123] = True
    rows = [Row(constrained=True, logprobs=True), *[Row(logprobs=True)] * (N - 1)]
    _, masked = step(jnp.asarray(logits), rows_of(rows), init_state(SLOTS, V, MAX_STOP), packed(allowed))
    assert masked.token_ids[0] == 123
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(masked.logprobs[0], exact[0, 123], atol=1e-5)
    np.testing.assert_allclose(masked.top_logprobs[0], np.sort(exact[0])[::-1][:NUM_TOP], atol=1e-5)


def test_masks_are_read_only_where_a_row_is_constrained():
    logits = np.zeros((N, V), np.float32)
    logits[:, 17] = 1
    none = np.zeros((N, -(-V // 32)), np.int32)
    for rows in ([Row()] * N, [Row(emit=False, constrained=True)] * N):
        assert step(jnp.asarray(logits), rows_of(rows), init_state(SLOTS, V, MAX_STOP), none)[1].token_ids[0] == 17
