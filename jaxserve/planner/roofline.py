"""A step's time from bytes, operations and exchanges: what hardware of the published figures would need at best.

The roofline of Williams et al. 2009: the slower of memory and arithmetic, and behind it the exchanges, which wait for
them. Plain arithmetic; nothing is measured.
"""

import math
from dataclasses import dataclass

from jaxserve.planner.slices import Slice


@dataclass(frozen=True, slots=True)
class Work:
    """Of one device in one step (or in several: sums)."""

    weight_bytes: int  # read once
    kv_bytes: int  # read
    flops: int
    reduce_bytes: int  # of one all-reduce
    num_reduces: int
    gather_bytes: int  # that a device gets from all others together


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds. memory and compute run side by side."""

    memory: float
    compute: float
    exchange: float

    @property
    def total(self) -> float:
        return max(self.memory, self.compute) + self.exchange


def step_time(work: Work, where: Slice, tp: int) -> StepTime:
    """tp: devices of the slice that exchange with each other."""
    chip = where.chip
    memory = (work.weight_bytes + work.kv_bytes) / chip.bandwidth
    compute = work.flops / chip.flops if chip.flops else 0.0
    if tp == 1 or not chip.link:
        return StepTime(memory, compute, 0.0)
    # Each of n devices sends and gets 2 (n - 1) / n of an all-reduce's bytes (reduce-scatter, then all-gather).
    sent = 2 * (tp - 1) / tp * work.reduce_bytes / chip.link
    exchange = work.num_reduces * (sent + hops(where, tp) * chip.latency)
    if work.gather_bytes:
        exchange += work.gather_bytes / chip.link + hops(where, tp) / 2 * chip.latency
    return StepTime(memory, compute, exchange)


def hops(where: Slice, tp: int) -> int:
    """Steps from neighbour to neighbour on the longest way of an all-reduce: there and back along each axis; 2 through
    a switch."""
    if where.chip.platform != "tpu":
        return 2
    devices_per_chip = where.num_devices // where.num_chips
    axes, left = [devices_per_chip], max(tp // devices_per_chip, 1)
    for size in sorted(where.axes, reverse=True):
        axes.append(min(size, left))
        left = max(left // size, 1)
    return 2 * sum(size - 1 for size in axes)


def attention_flops(num_heads: int, head_dim: int, num_pairs: int) -> int:
    """Two products of head_dim for each (query, key) pair of every head, two operations an element."""
    return 4 * num_heads * head_dim * num_pairs


def causal_pairs(num_tokens: int) -> int:
    return math.comb(num_tokens + 1, 2)
