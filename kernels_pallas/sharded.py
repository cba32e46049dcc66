"""A kernel over several devices: XLA cannot partition one, but heads need nothing of each other."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P


def over_heads(attend: Callable, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> Callable:
    """attend(q [N, H, D], k, v [N, K, D], cache, layer, work) of one device's heads -> the same for all of them, which
    the mesh's axis "tp" shares out like the rows of a page."""
    if mesh is None or mesh.size == 1:
        return attend
    heads, pages, everywhere = P(None, "tp", None), P(None, None, "tp"), P()
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, pages, everywhere, everywhere),
        out_specs=(heads, pages),
        check_vma=False,
    )
