"""Prometheus metrics: the engine's own counts, read when scraped, and latencies as the client sees them.

Names are SGLang's with the prefix jaxserve:, plus vLLM's for the queue, the cache and finished requests; those that
autoscalers read have the prefix vllm: too.
"""

import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from jaxserve.client import EngineClient
from jaxserve.text.generate import Delta
from jaxserve.types import EngineStats, StepEvents

CONTENT_TYPE = CONTENT_TYPE_LATEST
THROUGHPUT_WINDOW = 1.0  # seconds between two readings of jaxserve:gen_throughput
THROUGHPUT_STALE = 3.0  # seconds without a step after which it reads 0

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6)
_E2E = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960)


class Metrics:
    """One per server; owns its registry, so that two servers in one process (tests) do not meet."""

    def __init__(self, client: EngineClient, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"jaxserve:{name}", text, list(labels), registry=self.registry, buckets=buckets)
            return made.labels(**labels)

        self.ttft = histogram("time_to_first_token_seconds", "From the request to its first token.", _TTFT)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a choice.", _ITL)
        self.tpot = histogram("time_per_output_token_seconds", "Mean between the tokens of a choice.", _ITL)
        self.e2e = histogram("e2e_request_latency_seconds", "From the request to its last token.", _E2E)
        self.requests = Counter(
            "jaxserve:num_requests", "Generation requests accepted.", list(labels), registry=self.registry
        ).labels(**labels)
        self.success = Counter(
            "jaxserve:request_success",
            "Finished choices by reason.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self.aborted = Counter(
            "jaxserve:num_aborted_requests",
            "Generation requests that ended early: the client left, or the engine did.",
            list(labels),
            registry=self.registry,
        ).labels(**labels)
        self.open = Gauge(
            "jaxserve:num_open_requests", "Requests being answered now.", list(labels), registry=self.registry
        ).labels(**labels)
        self.batch_results = Counter(
            "jaxserve:batch_requests",
            "Requests of batches by what became of them; unexecuted: cancelled or expired.",
            [*labels, "state"],
            registry=self.registry,
        )
        batch_gauge = Gauge(
            "jaxserve:num_batch_requests",
            "Requests of batches that are at work in the engine or wait in the store.",
            [*labels, "state"],
            registry=self.registry,
        )
        self.num_batch_running = batch_gauge.labels(**labels, state="running")
        self.num_batch_pending = batch_gauge.labels(**labels, state="pending")
        self.labels = labels
        self.throughput = _Throughput(clock)
        client.observers.append(self.throughput.observe)
        self.registry.register(_EngineCollector(client, labels, self.throughput))

    def render(self) -> bytes:
        """The text exposition format 0.0.4."""
        return generate_latest(self.registry)

    def batch_request(self) -> AbstractContextManager[None]:
        """Around one request of a batch; its times are not measured, since it waits on purpose."""
        return self.num_batch_running.track_inprogress()

    def count_batch_result(self, state: str) -> None:
        """state: completed, failed or unexecuted."""
        self.batch_results.labels(**self.labels, state=state).inc()

    @contextmanager
    def measure_vectors(self, count: int) -> Generator[None]:
        """Around a request for so many vectors."""
        started, complete = self.clock(), False
        self.requests.inc()
        self.open.inc()
        try:
            yield
            complete = True
            self.e2e.observe(self.clock() - started)
            self.success.labels(**self.labels, finished_reason="stop").inc(count)
        finally:
            self.open.dec()
            if not complete:
                self.aborted.inc()

    async def measure(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Passes the deltas of one request on and takes its times."""
        started = self.clock()
        first: dict[int, tuple[float, int]] = {}
        last: dict[int, float] = {}
        done: dict[int, int] = {}
        complete = False
        self.requests.inc()
        self.open.inc()
        try:
            async for choice, delta in deltas:
                self._observe_tokens(choice, delta, started, last, done)
                if choice in last and choice not in first:
                    first[choice] = last[choice], done[choice]
                if delta.finish_reason is not None:
                    self._observe_rate(first.get(choice), last.get(choice), done.get(choice, 0))
                    self.success.labels(**self.labels, finished_reason=delta.finish_reason).inc()
                yield choice, delta
            complete = True
            self.e2e.observe(self.clock() - started)
        finally:
            self.open.dec()
            if not complete:
                self.aborted.inc()
            await deltas.aclose()

    def _observe_rate(self, first: tuple[float, int] | None, last: float | None, count: int) -> None:
        if first is not None and last is not None and count > first[1]:
            self.tpot.observe((last - first[0]) / (count - first[1]))

    def _observe_tokens(
        self, choice: int, delta: Delta, started: float, last: dict[int, float], done: dict[int, int]
    ) -> None:
        now = self.clock()
        new = delta.num_tokens - done.get(choice, 0)
        if new <= 0:
            return
        if choice in last:
            for _ in range(new):
                self.itl.observe((now - last[choice]) / new)
        else:
            self.ttft.observe(now - started)
        last[choice], done[choice] = now, delta.num_tokens


class _Throughput:
    """Generated tokens per second over the last window, from the engine's running total."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.since, self.total, self.rate = clock(), 0, 0.0

    def observe(self, events: StepEvents) -> None:
        now, total = self.clock(), events.stats.generation_tokens_total
        if now - self.since >= THROUGHPUT_WINDOW:
            if now - self.since < THROUGHPUT_STALE:
                self.rate = (total - self.total) / (now - self.since)
            self.since, self.total = now, total

    def value(self) -> float:
        return self.rate if self.clock() - self.since < THROUGHPUT_STALE else 0.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


_EMPTY = EngineStats(*([0] * 13))

# name, help, reading. Counters get the suffix _total.
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], int]], ...] = (
    ("prompt_tokens", "Prompt tokens of admitted requests.", lambda s: s.prompt_tokens_total),
    ("cached_tokens", "Prompt tokens served from the prefix cache.", lambda s: s.cached_tokens_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prompt_tokens_total),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.cached_tokens_total),
    ("generation_tokens", "Sampled tokens.", lambda s: s.generation_tokens_total),
    ("preemptions", "Sequences that lost their pages and started again.", lambda s: s.preemptions_total),
    ("engine_steps", "Steps run on the device.", lambda s: s.steps_total),
)
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_running_reqs", "Sequences that hold pages.", lambda s: s.num_running),
    ("num_requests_running", "The same, by vLLM's name.", lambda s: s.num_running),
    ("num_queue_reqs", "Sequences that wait to be admitted.", lambda s: s.num_waiting),
    ("num_requests_waiting", "The same, by vLLM's name.", lambda s: s.num_waiting),
    ("num_pages", "Pages of the KV cache.", lambda s: s.num_pages),
    ("num_held_pages", "Pages held by running sequences.", lambda s: s.num_held_pages),
    ("num_cached_pages", "Pages in the prefix cache that no sequence holds.", lambda s: s.num_cached_pages),
    (
        "token_usage",
        "Share of the KV cache held by running sequences.",
        lambda s: _ratio(s.num_held_pages, s.num_pages),
    ),
    ("kv_cache_usage_perc", "The same, by vLLM's name (1 = full).", lambda s: _ratio(s.num_held_pages, s.num_pages)),
    (
        "cache_hit_rate",
        "Share of prompt tokens served from the prefix cache, since the start.",
        lambda s: _ratio(s.cached_tokens_total, s.prompt_tokens_total),
    ),
    (
        "padding_waste_ratio",
        "Share of computed token positions that held no token, since the start.",
        lambda s: _ratio(s.padding_tokens_total, s.padding_tokens_total + s.step_tokens_total),
    ),
)

# What autoscalers and gateways that were set up for vLLM read by its full name.
_VLLM_GAUGES = frozenset(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


class _EngineCollector:
    """Turns client.stats into metrics at the moment of a scrape."""

    def __init__(self, client: EngineClient, labels: dict[str, str], throughput: _Throughput) -> None:
        self.client, self.labels, self.throughput = client, labels, throughput

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats, ready = self.client.stats or _EMPTY, self.client.ready
        for name, text, read in _COUNTERS:
            yield self._family(CounterMetricFamily, name, text, read(stats))
        for name, text, read_float in _GAUGES:
            yield self._family(GaugeMetricFamily, name, text, read_float(stats))
            if name in _VLLM_GAUGES:
                yield self._family(GaugeMetricFamily, name, text, read_float(stats), "vllm")
        page_size = ready.page_size if ready else 0
        yield self._family(
            GaugeMetricFamily, "num_used_tokens", "Token slots held by sequences.", stats.num_held_pages * page_size
        )
        yield self._family(
            GaugeMetricFamily, "max_total_num_tokens", "Token slots of the KV cache.", stats.num_pages * page_size
        )
        yield self._family(GaugeMetricFamily, "gen_throughput", "Tokens per second.", self.throughput.value())
        compilations = CounterMetricFamily(
            "jaxserve:compilations", "Programs compiled; serving > 0 is a bug.", labels=[*self.labels, "phase"]
        )
        compilations.add_metric([*self.labels.values(), "startup"], ready.cache_misses if ready else 0)
        compilations.add_metric([*self.labels.values(), "serving"], stats.compilations_total)
        yield compilations

    def _family(self, kind: Any, name: str, text: str, value: float, prefix: str = "jaxserve") -> Metric:
        family = kind(f"{prefix}:{name}", text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family
