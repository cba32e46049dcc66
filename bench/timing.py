"""How long a device takes, and where its time goes."""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def queued_seconds(run: Callable[[], Any], queued: int, repeats: int) -> list[float]:
    """Seconds of a run, once for each repeat, in which so many are launched before the last is waited for: to be told
    that a GPU is done takes as long as a large copy. The first run compiles and does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / queued)
    return times


def device_kernels(run: Callable[[], Any], times: int) -> list[tuple[str, float, float]]:
    """(kernel, milliseconds, calls) of the device in one run, a mean over some; the longest first.

    Names lose their trailing numbers, so that layers share a line. Empty where the profiler sees no device (a CPU).
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                out = run()
            jax.block_until_ready(out)
        data = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    total: dict[str, list[float]] = {}
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                each = total.setdefault(re.sub(r"([_.]\d+)+$", "", event.name), [0.0, 0.0])
                each[0] += event.duration_ns / 1e6 / times
                each[1] += 1 / times
    return sorted(((name, ms, calls) for name, (ms, calls) in total.items()), key=lambda each: -each[1])


def show(kernels: list[tuple[str, float, float]], most: int) -> None:
    if not kernels:
        return
    for name, milliseconds, calls in kernels[:most]:
        print(f"{milliseconds:>24.3f} ms {calls:>7.1f} x  {name[:100]}", flush=True)
    print(f"{sum(milliseconds for _, milliseconds, _ in kernels):>24.3f} ms in all {len(kernels)}", flush=True)
