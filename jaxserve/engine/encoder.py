"""Encoders (BERT): their programs, and their turn in place of engine.loop's. The pipe speaks the same words."""

import functools
import logging
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ConfigError, EncoderConfig, EngineConfig
from jaxserve.engine.build import Report, compile_progress, devices_of, program_folder
from jaxserve.engine.compile import CompileCounter, compile_all, described, open_store, precision
from jaxserve.engine.history import History
from jaxserve.engine.loop import received
from jaxserve.engine.spread import BY_RANK, Spread, specs_of
from jaxserve.engine.weights import load_params
from jaxserve.model.bert import EncoderShape, describe, encode
from jaxserve.model.llama import Layout
from jaxserve.model.sharding import Parameter, Params, make_mesh
from jaxserve.scheduling.encoder import EncoderBatch, EncoderBucket, EncoderQueue, encoder_buckets
from jaxserve.scheduling.snapshot import MAX_WAITING
from jaxserve.types import (
    AbortRequests,
    AddRequests,
    Embedded,
    EngineStats,
    FinishReason,
    FlushCache,
    FromEngine,
    Request,
    RequestState,
    RequestView,
    StepEvents,
    Stop,
    TakeSnapshot,
    ToEngine,
)

logger = logging.getLogger(__name__)

# Tokens of one program. On the CPU more would only make the next text wait longer.
MAX_TOKENS = {"cpu": 512}
MAX_TOKENS_ACCELERATOR = 16384
# Options of decoders: of their cache, their sampling and their way of mixing work.
_DECODERS_ONLY = (
    *("max_total_tokens", "page_size", "schedule_policy", "disable_radix_cache", "mixed_chunk", "decode_log_interval"),
    *("record_plans", "max_batch_running", "max_batch_prefill_tokens", "batch_linger", "attention_backend"),
)


class Vectors(Protocol):
    """A batch in flight."""

    def result(self) -> np.ndarray:
        """[B, E] float32; waits."""
        ...


class Runner(Protocol):
    """What the loop needs of EncoderRunner."""

    def launch(self, batch: EncoderBatch) -> Vectors: ...


class Handle:
    def __init__(self, vectors: jax.Array):
        self._vectors = vectors
        vectors.copy_to_host_async()

    def result(self) -> np.ndarray:
        return np.asarray(self._vectors)


class EncoderRunner:
    """Owns parameters and executables, one for each bucket."""

    def __init__(self, shape: EncoderShape, buckets: Sequence[EncoderBucket], spread: Spread):
        self._shape, self._buckets, self._spread = shape, tuple(buckets), spread
        self._programs: dict[EncoderBucket, Any] = {}
        self._params: Params

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def compile(self, params: Params, progress: Callable[[int, int], None], *, folder: str | None = None) -> None:
        """params: abstract arrays with their shardings; folder: where programs are kept (engine.executables)."""
        # The slowest first: the pool then ends evenly.
        buckets = sorted(self._buckets, key=lambda b: -b.num_rows * b.num_tokens)
        lowerings = {bucket: functools.partial(self._lower, params, bucket) for bucket in buckets}
        with precision(params):
            store = open_store(folder, self._spread.devices, self._describe(params))
            self._programs = compile_all(lowerings, progress, store)

    def _lower(self, params: Params, bucket: EncoderBucket) -> Any:
        spread = self._spread
        batch = spread.abstract((bucket.num_rows // spread.num_ranks, bucket.num_tokens + 1), jnp.int32)
        function = spread.over(functools.partial(encode, shape=self._shape), (specs_of(params), BY_RANK), BY_RANK)
        jitted = jax.jit(
            function,
            out_shardings=spread.sharding(BY_RANK),
            keep_unused=True,
            compiler_options=spread.compiler_options,
        )
        return jitted.lower(params, batch)

    def _describe(self, params: Params) -> str:
        """All that the programs are made from, the same text in every process."""
        return repr((self._shape.config, self._shape.layout, self._buckets, *described(params)))

    def load(self, params: Params, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Take the parameters, and run every program once on padding."""
        self._params = params
        for done, bucket in enumerate(self._programs, start=1):
            self.launch(EncoderBatch(bucket, ())).result()
            progress(done, len(self._programs))

    def launch(self, batch: EncoderBatch) -> Handle:
        """Dispatches and returns."""
        rows = np.zeros((batch.bucket.num_rows, batch.bucket.num_tokens + 1), np.int32)
        for row, request in zip(rows, batch.requests, strict=False):
            row[: len(request.token_ids)] = request.token_ids
            row[-1] = len(request.token_ids)
        return Handle(self._programs[batch.bucket](self._params, self._spread.put(rows)))


@dataclass(frozen=True)
class Encoder:
    """Everything the loop and the Ready message need."""

    runner: EncoderRunner
    buckets: tuple[EncoderBucket, ...]
    max_len: int
    dtype: str
    counter: CompileCounter
    platform: str
    device_kind: str
    notes: tuple[str, ...]
    num_devices: int


def build_encoder(config: EngineConfig, model: EncoderConfig, report: Report) -> Encoder:
    """Raises ConfigError or checkpoints.files.CheckpointError for what the user can mend."""
    _refuse_quantization(config)
    counter = CompileCounter()
    programs = program_folder(config)
    devices = _devices(config)
    platform = devices[0].platform
    max_len = _max_len(config, model)
    max_tokens = config.chunked_prefill_size or MAX_TOKENS.get(platform, MAX_TOKENS_ACCELERATOR)
    ranks = len(devices)
    each = encoder_buckets(max_len, max_tokens, -(-(config.max_running or max_tokens * ranks) // ranks))
    buckets = tuple(EncoderBucket(bucket.num_rows * ranks, bucket.num_tokens) for bucket in each)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    mesh = make_mesh(devices, dp=ranks)
    layout = Layout.of(platform)
    structure, description = describe(model, jnp.dtype(dtype), mesh, layout)
    runner = EncoderRunner(EncoderShape(model, layout, structure), buckets, Spread(mesh))
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        loading = pool.submit(load_params, config, model, description, report)
        runner.compile(jax.tree.map(Parameter.abstract, description), compile_progress(report), folder=programs)
        params = loading.result()
    runner.load(params, lambda done, total: report("warmup", done, total, f"ran {done}/{total}"))
    return Encoder(runner, buckets, max_len, dtype, counter, platform, devices[0].device_kind, _notes(config), ranks)


def _refuse_quantization(config: EngineConfig) -> None:
    if config.quantization not in ("auto", "none"):
        raise ConfigError(f"--quantization {config.quantization}: encoders are served in --dtype; leave the flag out")
    if config.kv_cache_dtype != "auto":
        raise ConfigError(f"--kv-cache-dtype {config.kv_cache_dtype}: an encoder has no KV cache; leave the flag out")


def _devices(config: EngineConfig) -> list[jax.Device]:
    """Each holds the whole encoder and takes rows of its own: --dp-size of them; one on CPU, elsewhere all."""
    found = devices_of(config)
    if config.tp_size not in (None, 1):
        raise ConfigError(f"--tp-size {config.tp_size}: an encoder is not shared out; use --dp-size")
    wanted = config.dp_size or (1 if found[0].platform == "cpu" else len(found))
    if wanted > len(found):
        raise ConfigError(f"--dp-size {wanted} takes {wanted} devices; {len(found)} are there")
    return found[:wanted]


def _max_len(config: EngineConfig, model: EncoderConfig) -> int:
    if config.max_model_len and config.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's {model.max_position} positions"
        )
    return config.max_model_len or model.max_seq_len


def _notes(config: EngineConfig) -> tuple[str, ...]:
    defaults = EngineConfig(config.model_path, config.cache_dir)
    given = [name for name in _DECODERS_ONLY if getattr(config, name) != getattr(defaults, name)]
    return (f"options without effect on an encoder: {', '.join(given)}",) if given else ()


class EncoderLoop:
    """Receive, launch a batch, read the one before (overlap, unless that is switched off)."""

    def __init__(
        self,
        buckets: Sequence[EncoderBucket],
        runner: Runner,
        inbox: "queue.SimpleQueue[ToEngine]",
        send: Callable[[FromEngine], None],
        *,
        compilations: Callable[[], int],
        overlap: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._queue = EncoderQueue(buckets)
        self._runner, self._inbox, self._send = runner, inbox, send
        self._compilations, self._overlap, self._clock = compilations, overlap, clock
        self._running: dict[int, Request] = {}
        self._prompt_tokens = self._steps = self._padding = self._tokens = 0
        self._history = History()
        self.busy_since: float | None = None  # read by the watchdog's thread

    def run(self) -> None:
        """Until Stop."""
        flight: tuple[EncoderBatch, Vectors] | None = None
        while self._receive(wait=flight is None and not len(self._queue)):
            self.busy_since = self._clock()
            if flight is not None and not self._overlap:
                self._answer(*flight)
                flight = None
            launched = None
            if (batch := self._queue.take()) is not None:
                launched = (batch, self._launch(batch))
            if flight is not None:
                self._answer(*flight)
            flight = launched
            self.busy_since = None

    def _receive(self, *, wait: bool) -> bool:
        """Take in everything that has arrived; False to stop."""
        for message in received(self._inbox, wait=wait):
            match message:
                case AddRequests(requests):
                    for request in requests:
                        self._queue.add(request)
                        self._history.arrived(request.id, request.priority, self._clock())
                case AbortRequests(request_ids):
                    running = [id_ for id_ in request_ids if self._running.pop(id_, None)]
                    self._end([*running, *self._queue.remove(request_ids)], "abort")
                case FlushCache():
                    logger.debug("an encoder keeps no prefixes: nothing to flush")
                case TakeSnapshot():
                    views = (*_views(self._running.values(), "prefill"), *_views(self._queue, "waiting"))
                    self._send(self._history.snapshot(views, b"", self._stats(), self._clock()))
                case Stop():
                    return False
        return True

    def _launch(self, batch: EncoderBatch) -> Vectors:
        self._running.update((request.id, request) for request in batch.requests)
        num_tokens = sum(len(request.token_ids) for request in batch.requests)
        self._steps += 1
        self._prompt_tokens += num_tokens
        self._tokens += num_tokens
        num_rows, padded = batch.bucket.num_rows, batch.bucket.num_rows * batch.bucket.num_tokens
        self._padding += padded - num_tokens
        self._history.entered("prefill", (request.id for request in batch.requests), self._clock())
        self._history.launched((0, padded, num_rows), 0, num_tokens, self._clock())
        logger.info(
            "Embedding batch. #seq: %d, #token: %d, shape: %d x %d, #queue-req: %d, #cache_miss: %d",
            len(batch.requests), num_tokens, batch.bucket.num_rows, batch.bucket.num_tokens, len(self._queue),
            self._compilations(),
        )  # fmt: skip
        return self._runner.launch(batch)

    def _answer(self, batch: EncoderBatch, flight: Vectors) -> None:
        vectors = flight.result()
        self._history.read(self._clock())
        done = []
        for row, request in enumerate(batch.requests):
            if self._running.pop(request.id, None) is not None:  # else it was aborted meanwhile
                self._send(Embedded(request.id, vectors[row].tobytes()))
                done.append(request.id)
        self._end(done, "stop")

    def _end(self, request_ids: list[int], reason: FinishReason) -> None:
        count = len(request_ids)
        nothing = (None,) * count
        events = StepEvents(tuple(request_ids), nothing, (reason,) * count, (0,) * count, nothing, stats=self._stats())
        self._history.told(events, self._clock())
        self._send(events)

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._queue),
            num_pages=0,
            num_held_pages=0,
            num_cached_pages=0,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=0,
            generation_tokens_total=0,
            preemptions_total=0,
            steps_total=self._steps,
            padding_tokens_total=self._padding,
            step_tokens_total=self._tokens,
            compilations_total=self._compilations(),
        )


def _views(requests: Iterable[Request], state: RequestState) -> tuple[RequestView, ...]:
    """Texts have neither slots nor pages."""
    return tuple(
        RequestView(r.id, state, r.priority, -1, len(r.token_ids), 0, 0, 0, 0, 0) for r in islice(requests, MAX_WAITING)
    )
