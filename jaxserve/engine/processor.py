"""What the machine's own processor can do."""

import platform
from contextlib import suppress


def cpu_features() -> str:
    """Linux: what the processor can do, which code for the CPU is made for; elsewhere its name."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()


def prefers_bfloat16(features: str, jax_version: tuple[int, ...]) -> bool:
    """Whether a step on this CPU is quicker in bfloat16 than in float32: with AMX, which XLA uses from JAX 0.11 on;
    0.10 is many times slower (docs/design.md has the figures)."""
    return jax_version >= (0, 11) and "amx_bf16" in features.split()
