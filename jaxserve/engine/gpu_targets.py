"""Hopper GPUs that are not there, as compile targets: XLA's GPU compiler needs a description, not a device, and no
driver. Nothing is tuned by trial on such a target, so that XLA may choose other products than it would on the device.
"""

import importlib.util

import jax
from jax.experimental import topologies

from jaxserve.engine.chips import Chip

# What JAX needs for it; with what they depend on, pip would fetch gigabytes that only a GPU needs.
GPU_PACKAGES = (
    "jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink nvidia-cuda-nvrtc "
    "nvidia-cuda-runtime"
)

# The fields of xla/stream_executor/device_description.proto, for a GH100 chip with 132 multiprocessors.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bytes_per_second} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def has_gpu_compiler() -> bool:
    """Whether the packages that compile for a GPU are installed."""
    needed = ("jax_plugins.xla_cuda13", "nvidia.cu13")
    try:
        return all(importlib.util.find_spec(name) is not None for name in needed)
    except ModuleNotFoundError:  # of the package around it
        return False


def gpu_devices(chip: Chip, num_devices: int) -> list[jax.Device]:
    """num_devices GPUs of one host, to compile for."""
    description = _DESCRIPTION.format(
        name=chip.device_kind, memory_bytes=chip.memory, bytes_per_second=int(chip.bandwidth)
    )
    target = topologies.get_topology_desc(
        platform="cuda", topology_name="gpu", topology=f"1x1x{num_devices}", target_config=description
    )
    return list(target.devices)
