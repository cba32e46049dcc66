"""Layers as one array for each parameter: where they are, how they are filled, and that a scan of them is the chain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ModelConfig
from jaxserve.engine.step import Shared, StepShape, run_layers
from jaxserve.model.llama import Layout, rope_table
from jaxserve.model.sharding import Params, describe, make_mesh
from jaxserve.model.stacked import Stacks, abstract, period_of
from kernels_pallas import cache as kv_cache
from kernels_pallas.attention import DecodeRows, PrefillChunks, choose

PAGE = 16
ALTERNATING = ModelConfig(4, 32, 4, 2, 16, 48, 64, 512, windows=(6, None, 6, None), qk_norm=True)


def model_of(config: ModelConfig) -> tuple[StepShape, Params, dict[str, jax.Array]]:
    """On one CPU device in the TPU's layout; the leaves by path, random."""
    structure, description = describe(config, jnp.dtype("float32"), make_mesh(jax.devices()[:1]), "tpu")
    shape = StepShape(config, Layout.of("tpu"), structure, choose("cpu", "xla"), PAGE, 4, 64)
    rng = np.random.default_rng()
    leaves = {
        leaf.path: jnp.asarray(rng.normal(size=leaf.shape, scale=0.2), jnp.float32)
        for leaf in jax.tree.leaves(description)
    }
    return shape, description, leaves


def stack(description: Params, leaves: dict[str, jax.Array], period: int | None) -> Params:
    """Filled in a random order, as loading does."""
    stacks, kept = Stacks(description, period), {}
    for path in np.random.default_rng().permutation(list(leaves)):
        kept[path] = stacks.take(path, leaves[path] + 0)  # the caller's own
    return stacks.params(kept)


@pytest.mark.parametrize(
    ("windows", "period"),
    [((None,) * 4, 1), ((6, None, 6, None), 2), ((None, 6, 6, 6), None), ((6, 6, None) * 2, 3), ((None,), None)],
)
def test_a_turn_is_the_fewest_layers_after_which_their_kinds_repeat(windows, period):
    config = ModelConfig(len(windows), 32, 4, 2, 16, 48, 64, 512, windows=windows)
    assert period_of(config, "tpu") == period
    assert period_of(config, "cpu") is None and period_of(config, "gpu") is None, "which would copy the weights"


@pytest.mark.parametrize("period", [1, 2, 4, None])
def test_every_leaf_is_loaded_into_its_place_whatever_the_order(period):
    _, description, leaves = model_of(ALTERNATING)
    params = stack(description, leaves, period)
    wanted = abstract(description, period)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, wanted)
    for layer, parameters in enumerate(description.layers):
        turn, place = divmod(layer, period) if period else (..., layer)
        for parameter, array in zip(parameters, params.layers[place], strict=True):
            np.testing.assert_array_equal(array[turn], leaves[parameter.path], err_msg=parameter.path)
    for part in ("embed", "head"):
        for parameter, array in zip(getattr(description, part), getattr(params, part), strict=True):
            assert array.shape == parameter.shape and (array == leaves[parameter.path]).all()


def test_a_scan_over_layers_of_two_kinds_is_the_chain_of_them():
    """Hidden states and every page of the cache, of two decode rows and a chunk."""
    shape, description, leaves = model_of(ALTERNATING)
    rng = np.random.default_rng()
    rows = DecodeRows(jnp.array([[1, 2, 0, 0], [3, 0, 0, 0]]), jnp.array([20, 7]))
    positions = jnp.array([19, 6, *range(16)])
    chunks = PrefillChunks(jnp.array([[4, 0, 0, 0]]), jnp.array([16]), jnp.array([0, 16]), positions[2:])
    shared = Shared(
        rope=rope_table(ALTERNATING, positions),
        work=tuple(shape.attention.plan(rows, chunks, PAGE, kind) for kind in shape.kinds),
        picked=jnp.zeros(3, jnp.int32),
        rows=None,  # type: ignore[arg-type]  # layers do not look at it
    )
    hidden = jnp.asarray(rng.normal(size=(18, 32)), jnp.float32)
    empty = kv_cache.empty(4, 8, 2, 16, PAGE, jnp.dtype("float32"))
    cache = kv_cache.KVCache(jnp.asarray(rng.normal(size=empty.pages.shape), jnp.float32), empty.scales)

    def run(period: int | None) -> tuple[jax.Array, kv_cache.KVCache]:
        layers, chosen = stack(description, leaves, period).layers, dataclasses.replace(shape, period=period)
        step = jax.jit(
            lambda layers, hidden, cache: run_layers(layers, hidden, cache, jnp.int32(0), shared, shape=chosen)
        )
        assert ("scan" in str(jax.make_jaxpr(step)(layers, hidden, cache))) == (period is not None)
        return step(layers, hidden, cache)

    chained, scanned = run(None), run(2)
    for want, got in zip(jax.tree.leaves(chained), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert not np.allclose(scanned[0], hidden)
