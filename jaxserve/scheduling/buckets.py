"""What the scheduler is told, and the compiled shapes that follow from it."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from jaxserve.scheduling.plan import Bucket


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy; tokens, pages and rows are counts. Raises ValueError where the parts contradict each other."""

    num_pages: int  # page 0, which is scratch, included
    page_size: int
    max_model_len: int
    max_running: int
    decode_buckets: tuple[int, ...]  # ascending; the last is max_running
    prefill_buckets: tuple[tuple[int, int], ...]  # (T tokens, R chunks), ascending; the last T is the chunk size
    mixed: bool = True  # decode rows and chunks share a step; False: the two kinds of step take turns
    policy: Literal["lpm", "fcfs"] = "lpm"  # longest prefix match or first come, first served
    radix_cache: bool = True
    lpm_window: int = 64  # waiting requests that lpm looks at, oldest first
    lpm_patience: float = 10.0  # seconds after which a request is served in order of arrival
    max_batch_running: int | None = None  # rows of priority > 0 in a step while work of priority <= 0 exists
    max_batch_prefill_tokens: int | None = None  # the same for their prefill tokens; rounded down to pages
    batch_linger: float = 0.0  # seconds for which both limits outlast the last work of priority <= 0
    pooling: Literal["last", "mean"] = "last"  # the tokens of a prompt that its vector is made of

    def __post_init__(self) -> None:
        ascending = list(self.decode_buckets) == sorted(set(self.decode_buckets))
        if not self.decode_buckets or not ascending or self.decode_buckets[-1] != self.max_running:
            raise ValueError(f"decode_buckets {self.decode_buckets} must ascend to max_running ({self.max_running})")
        tokens, chunks = [t for t, _ in self.prefill_buckets], [r for _, r in self.prefill_buckets]
        if not tokens or list(self.prefill_buckets) != sorted(set(self.prefill_buckets)) or max(chunks) != chunks[-1]:
            raise ValueError(f"prefill_buckets {self.prefill_buckets} must ascend, the last with the most chunks")
        if any(t <= 0 or t % self.page_size for t in tokens) or min(chunks) < 1:
            raise ValueError(f"prefill_buckets {self.prefill_buckets}: tokens must be multiples of {self.page_size}")
        if self.num_pages < 2:
            raise ValueError(f"num_pages is {self.num_pages}; page 0 is scratch, so at least 2 are needed")
        if self.max_batch_running is not None and self.max_batch_running < 1:
            raise ValueError(f"max_batch_running is {self.max_batch_running}; at least 1, or None for no cap")
        if self.max_batch_prefill_tokens is not None and self.max_batch_prefill_tokens < self.page_size:
            raise ValueError(
                f"max_batch_prefill_tokens is {self.max_batch_prefill_tokens}; at least one page ({self.page_size})"
            )

    @property
    def max_pages(self) -> int:
        """M: pages per row."""
        return -(-self.max_model_len // self.page_size)

    @property
    def chunk_size(self) -> int:
        """Prefill tokens of one step at most."""
        return self.prefill_buckets[-1][0]

    @property
    def max_chunks(self) -> int:
        return self.prefill_buckets[-1][1]


def buckets(config: SchedulerConfig) -> tuple[Bucket, ...]:
    """Every Bucket that Scheduler.schedule can emit; the engine compiles exactly these."""
    decode = [Bucket(rows, 0, 0) for rows in config.decode_buckets]
    prefill = [Bucket(0, tokens, chunks) for tokens, chunks in config.prefill_buckets]
    mixed = [Bucket(config.max_running, tokens, chunks) for tokens, chunks in config.prefill_buckets]
    return tuple(decode + prefill + (mixed if config.mixed else []))


def choose_bucket(config: SchedulerConfig, num_decode: int, num_prefill: int, num_chunks: int) -> Bucket:
    """The smallest bucket for so many decode rows and so many prefill tokens (each chunk rounded up to pages)."""
    if not num_chunks:
        return Bucket(config.decode_buckets[bisect_left(config.decode_buckets, num_decode)], 0, 0)
    tokens, chunks = next(b for b in config.prefill_buckets if b[0] >= num_prefill and b[1] >= num_chunks)
    return Bucket(config.max_running if num_decode else 0, tokens, chunks)
