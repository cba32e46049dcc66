"""What makers publish of their accelerators, one device as JAX counts them. Imports nothing.

Sources name where to look; the figures were not checked against them one by one. Nothing was measured by us, but for
the CPU's bandwidth, the memory of TPUs, and what docs/plan.md holds against an H200; latencies are assumptions; the
planner's rooflines say so. Bytes are
bytes, rates are per second, links are one way.
"""

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Chip:
    """memory: what the compiler or driver lets programs have. link: out of one device, all its links together.
    latency: seconds of one hop on the way of an all-reduce; assumed."""

    name: str
    platform: str  # JAX's: "tpu", "gpu" or "cpu"
    device_kind: str  # as JAX says it
    memory: int | None
    bandwidth: float
    flops: float | None  # dense bfloat16
    link: float
    latency: float
    source: str
    capability: str | None = None  # a GPU's compute capability


_TPU = "cloud.google.com/tpu/docs: system architecture"
_HOP = 1e-6  # about 1 us: Austin et al. 2025, How to Scale Your Model
_NVLINK_HOP = 2e-6  # a switch between any two

# XLA's compiler lets a TPU's programs have a little less than is published: its memory less some 260 MiB that it keeps
# for itself. The MiB below are what libtpu 0.0.52 refuses to exceed (tests/aot/test_tpu.py).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "TPU v5 lite", 16126 * MIB, 819e9, 197e12, 200e9, _HOP, f"{_TPU} (v5e)"),
        Chip("v6e", "tpu", "TPU v6 lite", 31992 * MIB, 1640e9, 918e12, 400e9, _HOP, f"{_TPU} (v6e)"),
        Chip("v5p", "tpu", "TPU v5", 98024 * MIB, 2765e9, 459e12, 600e9, _HOP, f"{_TPU} (v5p)"),
        # JAX counts a chip's two chiplets: half of what is published for the chip (192 GiB, 7380 GB/s, 2307 TFLOP/s).
        Chip("tpu7x", "tpu", "TPU7x", 97012 * MIB, 3690e9, 1153e12, 300e9, _HOP, f"{_TPU} (Ironwood), halved"),
        # Memory as nvidia-smi shows it: 81559 and 143771 MiB.
        Chip(
            "h100",
            "gpu",
            "NVIDIA H100 80GB HBM3",
            81559 * MIB,
            3350e9,
            989e12,
            450e9,
            _NVLINK_HOP,
            "NVIDIA H100 SXM",
            "9.0",
        ),
        Chip("h200", "gpu", "NVIDIA H200", 143771 * MIB, 4800e9, 989e12, 450e9, _NVLINK_HOP, "NVIDIA H200 SXM", "9.0"),
        Chip("cpu", "cpu", "cpu", None, 25e9, None, 0.0, 0.0, "reads of memory on our 2-core machine (docs/design.md)"),
    )
}
