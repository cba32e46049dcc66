"""Layers as one array for each parameter, with the layers in front: what a step scans over, where it does (TPU).

A scan is compiled once for all layers; on TPU it reads each layer's weights where they lie. XLA's GPU and CPU backends
copy them in every step, so that there a step is a chain of layers (docs/design.md).
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.model.sharding import Parameter, Params


def period_of(config: ModelConfig, platform: str) -> int | None:
    """How many layers one turn of a platform's scan computes: the fewest after which the kinds of layers repeat. None:
    no scan, since the platform has none or the kinds do not repeat."""
    if platform != "tpu":
        return None
    return next((size for size in range(1, config.num_layers) if repeats(config, size)), None)


def repeats(config: ModelConfig, size: int) -> bool:
    """Whether the kinds of layers are those of the first so many, again and again."""
    windows, count = config.layer_windows, config.num_layers
    return count % size == 0 and all(windows[i] == windows[i % size] for i in range(count))


def abstract(description: Params, period: int | None) -> Params:
    """Params of Parameter descriptions -> of abstract arrays, as programs take them. Of stacked layers there is one
    entry for each layer of a period, and its leaves are [turns, ...]."""
    leaves = jax.tree.map(Parameter.abstract, description)
    if period is None:
        return leaves
    turns = len(leaves.layers) // period
    return replace(leaves, layers=[[_stacked(leaf, turns) for leaf in layer] for layer in leaves.layers[:period]])


def _stacked(leaf: jax.ShapeDtypeStruct, turns: int) -> jax.ShapeDtypeStruct:
    assert isinstance(leaf.sharding, NamedSharding)
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((turns, *leaf.shape), leaf.dtype, sharding=sharding)


class Stacks:
    """Takes the leaves of layers one by one, in any order; each is put where it belongs and let go of, so that loading
    needs no second copy of the weights."""

    def __init__(self, description: Params, period: int | None):
        self._description = description
        self._arrays = abstract(description, period)
        self._places: dict[str, tuple[int, int, int]] = {}  # path -> layer of the period, leaf, turn
        if period is not None:
            for layer, leaves in enumerate(description.layers):
                turn, place = divmod(layer, period)
                self._places |= {leaf.path: (place, index, turn) for index, leaf in enumerate(leaves)}

    def take(self, path: str, array: jax.Array) -> jax.Array | None:
        """An array that was loaded, unless it is in its stack now."""
        if path not in self._places:
            return array
        place, index, turn = self._places[path]
        leaves = self._arrays.layers[place]
        if isinstance(leaves[index], jax.ShapeDtypeStruct):
            leaves[index] = jnp.zeros(leaves[index].shape, leaves[index].dtype, device=leaves[index].sharding)
        leaves[index] = _put(leaves[index].sharding)(leaves[index], array, turn)
        return None

    def params(self, others: dict[str, Any]) -> Params:
        """Once all were taken; others: what take() gave back, by path."""
        if not self._places:
            return jax.tree.map(lambda p: others[p.path], self._description)
        embed, head = ([others[p.path] for p in part] for part in (self._description.embed, self._description.head))
        return replace(self._arrays, embed=embed, head=head)


@functools.cache
def _put(sharding: NamedSharding) -> Any:
    """stack [turns, ...], leaf [...], turn -> the stack, in place."""
    return jax.jit(
        lambda stack, leaf, turn: lax.dynamic_update_index_in_dim(stack, leaf, turn, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
