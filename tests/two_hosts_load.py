"""One of two processes that load a model together: `python tests/two_hosts_load.py RANK PORT FOLDER`.

Prints one line of JSON: bytes read, bytes of its devices' shards (each shard once), bytes of the whole model, and a sum
over the shards. Four virtual CPU devices each; nothing is compiled.
"""

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.files import Index, SafetensorsSource
from jaxserve.config import Cluster, EngineConfig
from jaxserve.engine import weights
from jaxserve.engine.hosts import start_jax
from jaxserve.model.sharding import describe, make_mesh


class Counting(SafetensorsSource):
    """Knows how much was read."""

    num_bytes = 0

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        values = super().read(name, index)
        Counting.num_bytes += values.nbytes
        return values


def load(folder: str) -> dict[str, Any]:
    config = EngineConfig(folder, folder, load_format="safetensors")
    model = weights.read_model_config(config)
    mesh = make_mesh(jax.devices())
    _, description = describe(model, jnp.dtype("float32"), mesh, "cpu")
    weights.SafetensorsSource = Counting  # ty: ignore[invalid-assignment]
    params = weights.load_params(config, model, description, lambda *stage: None)
    leaves = jax.tree.leaves(params)
    own = [{str(shard.index): np.asarray(shard.data) for shard in leaf.addressable_shards} for leaf in leaves]
    shards = [array for each in own for array in each.values()]
    return {
        "devices": (jax.local_device_count(), jax.device_count()),
        "read": Counting.num_bytes,
        "owned": sum(array.nbytes for array in shards),
        "whole": sum(leaf.nbytes for leaf in leaves),
        "sum": float(sum(np.abs(array, dtype=np.float64).sum() for array in shards)),
    }


if __name__ == "__main__":
    rank, port, folder = sys.argv[1:]
    start_jax(Cluster(2, int(rank), "127.0.0.1", int(port), b"", 60.0), None)
    print(json.dumps(load(folder)), flush=True)
    os._exit(0)
