"""Functions written for one device, run on all devices of a mesh: jax.shard_map, and how each kind of array lies there.

Axis "dp": ranks that each serve rows of their own, with their own pages, slots and packed plan; nothing is exchanged
between them. Axis "tp": the devices of a rank, which hold their shares of the weights and of the cache
(model.partition), and the same of everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

EVERYWHERE = P()  # the same on every device
BY_RANK = P("dp")  # each rank's array, one after another along axis 0
BY_RANK_COLUMNS = P(None, "dp")  # the same along axis 1
PAGES = P(None, "dp", "tp")  # [L, P, R, ...] of the KV cache: pages by rank, heads by device


@dataclass(frozen=True)
class Stacked:
    """A tree of arrays of any shape, which get a leading axis for the ranks while they are between two programs."""


STACKED = Stacked()


@dataclass(frozen=True)
class Told:
    """A tree of arrays that the host reads: by rank, or where ranks are on several machines the whole everywhere, since
    the machine with the front end reads all of them."""


TOLD = Told()


@dataclass(frozen=True)
class Spread:
    """Where arrays of each kind lie on a mesh, and how a device's function becomes one of all devices."""

    mesh: Mesh | AbstractMesh  # abstract: for shapes only

    @property
    def num_ranks(self) -> int:
        return self.mesh.shape["dp"]

    @property
    def devices(self) -> list[jax.Device]:
        """In the order of the mesh, ranks first."""
        assert isinstance(self.mesh, Mesh), "an abstract mesh has no devices"
        return list(self.mesh.devices.flat)

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What XLA is told for programs that read weights. TPU7x: bfloat16 arrays keep the tiles they come in; left to
        itself the compiler lays out every weight anew in every step, which needs room for all of them once more. GPUs:
        it computes nothing twice to save memory, of which it believes that a cache written in place needs double."""
        device = self.devices[0]
        if device.device_kind == "TPU7x":
            return {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}
        return {"xla_disable_hlo_passes": "rematerialization"} if device.platform == "gpu" else None

    @property
    def is_one(self) -> bool:
        """A single device: functions stay as they are."""
        return self.mesh.size == 1

    @cached_property
    def is_far(self) -> bool:
        """Devices of several machines."""
        return isinstance(self.mesh, Mesh) and len({device.process_index for device in self.devices}) > 1

    def sharding(self, spec: Any) -> NamedSharding:
        """spec: one of the above."""
        return NamedSharding(self.mesh, EVERYWHERE if self.is_one else self._plain(spec))

    def abstract(self, shape: tuple[int, ...], dtype: Any, spec: P = BY_RANK) -> jax.ShapeDtypeStruct:
        """An array of one rank's shape -> the description of all ranks' array."""
        ranks = [self.num_ranks if axis == "dp" else 1 for axis in spec]
        whole = tuple(size * (ranks[i] if i < len(ranks) else 1) for i, size in enumerate(shape))
        return jax.ShapeDtypeStruct(whole, dtype, sharding=self.sharding(spec))

    def put(self, array: np.ndarray | np.int32, spec: P = BY_RANK) -> jax.Array:
        """A host array, the same on every machine -> on the devices; asynchronous."""
        if not self.is_far:
            return jax.device_put(array, self.sharding(spec))
        # device_put would compare the machines' arrays first, by a program of its own
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, self.sharding(spec), lambda index: whole[index])

    def over(self, function: Callable[..., Any], ins: tuple[Any, ...], outs: Any) -> Callable[..., Any]:
        """function of one device's arrays -> the same of the mesh's. ins: a spec, or a tree of them, per argument;
        outs: a prefix of the result's tree."""
        if self.is_one:
            return function

        def local(*arguments: Any) -> Any:
            given = (
                jax.tree.map(lambda x: x.reshape(x.shape[1:]), argument) if isinstance(spec, Stacked) else argument
                for spec, argument in zip(ins, arguments, strict=True)
            )
            results = function(*given)
            return jax.tree.map(self._given_out, outs, results, is_leaf=_is_spec)

        into, out_of = (jax.tree.map(self._plain, specs, is_leaf=_is_spec) for specs in (ins, outs))
        return jax.shard_map(local, mesh=self.mesh, in_specs=into, out_specs=out_of, check_vma=False)

    def _given_out(self, spec: Any, part: Any) -> Any:
        """A part of a device's results as it leaves that device."""
        if isinstance(spec, Stacked):
            return jax.tree.map(lambda x: x[None], part)
        if isinstance(spec, Told) and self._plain(spec) == EVERYWHERE:
            return jax.tree.map(lambda x: lax.all_gather(x, "dp", tiled=True), part)
        return part

    def _plain(self, spec: Any) -> P:
        """A spec as JAX takes it."""
        if isinstance(spec, Told):
            return EVERYWHERE if self.is_far and self.num_ranks > 1 else BY_RANK
        return BY_RANK if isinstance(spec, Stacked) else spec

    def described(self, tree: Any, specs: Any) -> Any:
        """Abstract arrays, and a prefix of their tree -> the same with shardings."""
        return jax.tree.map(
            lambda spec, part: jax.tree.map(lambda leaf: self._described(leaf, spec), part),
            specs,
            tree,
            is_leaf=_is_spec,
        )

    def _described(self, leaf: jax.ShapeDtypeStruct, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(spec))


def specs_of(arrays: Any) -> Any:
    """Abstract arrays with NamedShardings -> their specs."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, arrays)


def _is_spec(value: Any) -> bool:
    return isinstance(value, P | Stacked | Told)
