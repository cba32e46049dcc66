"""Devices that are not there, for the compilers that make programs for them; and an abstract mesh where these are
missing."""

import importlib.util
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxserve.engine.gpu_targets import GPU_PACKAGES, gpu_devices, has_gpu_compiler
from jaxserve.engine.sizing import Sizes
from jaxserve.model.sharding import make_mesh
from jaxserve.planner.slices import Slice

# libtpu reads these when it is loaded: no metadata server is asked, and several processes may load it at once.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


def why_no_compiler(where: Slice) -> str | None:
    """What is missing to compile for a slice, and how to get it; None where nothing is."""
    platform = where.chip.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu, which holds the TPU's compiler, is not installed: pip install 'jaxserve[aot]'"
    if platform == "gpu" and not has_gpu_compiler():
        return f"JAX's CUDA plugin and NVIDIA's compiler are not installed: pip install --no-deps {GPU_PACKAGES}"
    return None


def abstract_mesh(where: Slice, sizes: Sizes) -> AbstractMesh:
    """Enough for shapes and shardings."""
    return AbstractMesh((sizes.dp, sizes.tp), ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))


def compile_mesh(where: Slice, sizes: Sizes) -> Mesh:
    """Enough to compile for, where why_no_compiler() has nothing to say."""
    if where.chip.platform == "cpu":
        return make_mesh(jax.devices("cpu")[: sizes.dp * sizes.tp], sizes.dp)
    if where.chip.platform == "gpu":
        return make_mesh(gpu_devices(where.chip, where.num_devices)[: sizes.dp * sizes.tp], sizes.dp)
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hosts: dict[str, Any] = {}
    if where.num_hosts == 1:  # libtpu would take 8 chips for two hosts of 4, and the engine such devices for far ones
        hosts["chips_per_host_bounds"] = (*where.axes, 1, 1)[:3]
    found = topologies.get_topology_desc(platform="tpu", topology_name=where.name, **hosts)
    devices = np.asarray(found.devices)
    assert devices.size == where.num_devices, f"{where.name} has {devices.size} devices, not {where.num_devices}"
    return make_mesh(list(devices.flat)[: sizes.dp * sizes.tp], sizes.dp)
