"""Hopper GPUs that are not there, as compile targets: XLA's GPU compiler needs a description, not a device.

What it needs besides: JAX's CUDA plugin and NVIDIA's compiler (pip install jax-cuda13-plugin jax-cuda13-pjrt
nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink nvidia-cuda-nvrtc nvidia-cuda-runtime, all with --no-deps); no driver.
Nothing is tuned by trial on such a target, so that XLA may choose other products than it would on the device.
"""

import importlib.util
from dataclasses import dataclass

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class GpuChip:
    """One GPU, as its data sheet has it."""

    name: str
    memory_bytes: int
    bytes_per_second: int


H100 = GpuChip("NVIDIA H100 80GB HBM3", 85_000_000_000, 3_350_000_000_000)
H200 = GpuChip("NVIDIA H200", 150_000_000_000, 4_800_000_000_000)
GPUS = {"h100": H100, "h200": H200}

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


def gpu_devices(num_devices: int, chip: GpuChip = H200) -> list[jax.Device]:
    """num_devices GPUs of one host, to compile for."""
    description = _DESCRIPTION.format(
        name=chip.name, memory_bytes=chip.memory_bytes, bytes_per_second=chip.bytes_per_second
    )
    target = topologies.get_topology_desc(
        platform="cuda", topology_name="gpu", topology=f"1x1x{num_devices}", target_config=description
    )
    return list(target.devices)
