"""Ahead-of-time compilation: every program the engine will ever call, in parallel, through a persistent cache."""

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.config import ModelConfig
from jaxserve.engine import readout
from jaxserve.engine.chains import SplitStep, StagedStep, Step, WholeStep
from jaxserve.engine.executables import MISS_EVENT, Entry, ExecutableStore
from jaxserve.engine.spread import BY_RANK, BY_RANK_COLUMNS, EVERYWHERE, PAGES, STACKED, TOLD, Spread, specs_of
from jaxserve.engine.step import DeviceState, StepOutput, StepShape, forward, pick, run_layers, step
from jaxserve.engine.step import begin as begin_step
from jaxserve.engine.step import finish as finish_step
from jaxserve.model import sampling
from jaxserve.model.sampling import Asks
from jaxserve.model.sharding import Params
from jaxserve.model.stacked import repeats
from jaxserve.scheduling.plan import Bucket, num_words, packed_size
from jaxserve.types import MAX_LOGIT_BIAS, MAX_STOP_TOKENS

logger = logging.getLogger(__name__)

# XLA:CPU hands operations that do not depend on each other to several threads, which then are in the way of those that
# a step of few tokens is computed by (kernels_pallas.machine_code).
_IN_ORDER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts what JAX compiles in this process, and what its persistent cache did not hold. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._misses = 0
        self._after_ready = 0
        self._thread: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def start_counting_this_thread(self) -> None:
        """From now on the calling thread, the engine's, must not compile; in a notebook other threads may."""
        self._thread = threading.get_ident()

    @property
    def after_ready(self) -> int:
        """Compilations in the engine's thread since start_counting_this_thread; anything but 0 is a bug."""
        return self._after_ready

    @property
    def cache_misses(self) -> int:
        return self._misses

    def _on_duration(self, event: str, duration_secs: float, **_kwargs: Any) -> None:
        if event == _COMPILE_EVENT and threading.get_ident() == self._thread:
            self._after_ready += 1

    def _on_event(self, event: str, **_kwargs: Any) -> None:
        if event == MISS_EVENT:
            with self._lock:
                self._misses += 1


def enable_persistent_cache(folder: str) -> None:
    """Keep every program, however small or quick to compile."""
    os.makedirs(folder, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass(frozen=True)
class Target:
    """What programs are compiled for. params and state are abstract arrays with shardings."""

    params: Params
    state: DeviceState
    shape: StepShape
    max_model_len: int
    spread: Spread
    layers_per_program: int | None  # None: a step is one program


@dataclass(frozen=True)
class Programs:
    """Compiled objects only: calling one with another shape is an error, never a compile."""

    steps: dict[Bucket, Step]
    admit: Any
    score: Any  # engine.readout
    pool: Any
    count: int


def layers_per_program(config: ModelConfig, platform: str) -> int | None:
    """CPU: the largest divisor of the layers up to 6 after which the kinds of layers repeat, else all of them;
    elsewhere a step is one program."""
    if platform != "cpu":
        return None
    return max((size for size in range(1, 7) if repeats(config, size)), default=config.num_layers)


# The names of programs that one machine lacks -> of those that any machine lacks.
Lacking = Callable[[Iterable[str]], Collection[str]]


def compile_programs(
    target: Target,
    buckets: Sequence[Bucket],
    progress: Callable[[int, int], None],
    *,
    folder: str | None = None,
    lacking: Lacking | None = None,
) -> Programs:
    """Every program, from the folder where an earlier start has kept it.

    Without a folder only JAX's own cache is asked, which needs every program traced and lowered. lacking: of several
    machines.
    """
    builder = _Builder(target)
    builder.add("admit", lambda: _lower_admit(target))
    num_spans = max((bucket.num_chunks for bucket in buckets), default=0)
    for name, lower in readout.lower(target.params, target.shape, target.spread, num_spans).items():
        builder.add(name, lower)
    # The slowest first: the pool then ends evenly.
    for bucket in sorted(buckets, key=lambda b: -b.num_tokens):
        builder.add_bucket(bucket)
    with precision(target.params):
        store = open_store(folder, target.spread.devices, _describe(target, buckets))
        done = compile_all(builder.lowerings, progress, store, lacking)
    return Programs(
        steps={bucket: builder.assemble(bucket, done) for bucket in buckets},
        admit=done["admit"],
        score=done["score"],
        pool=done["pool"],
        count=len(done),
    )


def compile_all(
    lowerings: Mapping[Any, Callable[[], Any]],
    progress: Callable[[int, int], None],
    store: ExecutableStore | None,
    lacking: Lacking | None = None,
) -> dict[Any, Any]:
    """Key -> how to lower it; gives key -> compiled program; progress(done, total) is called from the pool's threads.

    Lowering holds the GIL and runs here; compiling and loading do not and run in a pool. What one of several machines
    lacks all of them compile: GPUs measure while they compile, and share what they found, so that all machines get the
    same program.
    """
    counter = itertools.count(1)  # next() is atomic
    total = len(lowerings)
    with ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 2)) as pool:

        def submit(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
            def work() -> Any:
                result = function(*arguments)
                if result is not None:
                    progress(min(next(counter), total), total)
                return result

            return pool.submit(work)

        if store is None:
            futures = {key: submit(lower().compile) for key, lower in lowerings.items()}
            return {key: future.result() for key, future in futures.items()}
        futures = {key: submit(store.load, repr(key)) for key in lowerings}
        done = {key: future.result() for key, future in futures.items()}
        missing = [key for key, program in done.items() if program is None]
        if lacking is not None:
            names = lacking([repr(key) for key in missing])
            missing = [key for key in lowerings if repr(key) in names]
        with _not_cached_twice() if missing else nullcontext():
            anew = lacking is not None
            futures = {key: submit(store.compile, repr(key), lowerings[key](), anew) for key in missing}
            made: dict[Any, tuple[Entry, Any]] = {key: future.result() for key, future in futures.items()}
    store.save({repr(key): entry for key, (entry, _) in made.items()})
    return done | {key: program for key, (_, program) in made.items()}


class _Builder:
    """Collects how each distinct program is lowered."""

    def __init__(self, target: Target):
        self.target = target
        self.lowerings: dict[Any, Callable[[], Any]] = {}
        self._begun_by_bucket: dict[Bucket, Any] = {}

    def add(self, key: Any, lower: Callable[[], Any]) -> None:
        self.lowerings.setdefault(key, lower)

    def add_bucket(self, bucket: Bucket) -> None:
        """Nothing is traced here: a program that is found by its key need not be."""
        if self.target.layers_per_program is None:
            if self.target.shape.layout.branches:
                self.add(("step", bucket), lambda: self._lower_whole(bucket))
                return
            self.add(("forward", bucket), lambda: self._lower_forward(bucket))
            for asks in SplitStep.kinds:
                self.add(("finish", bucket.num_rows, asks), lambda asks=asks: self._lower_finish(bucket, asks))
            return
        self.add(("begin", bucket), lambda: self._lower_begin(bucket))
        self.add(("layers", bucket), lambda: self._lower_layers(bucket))
        if bucket.num_prefill:
            self.add(("pick", bucket), lambda: self._lower_pick(bucket))
        self.add(("finish", bucket.num_rows, Asks.ANYTHING), lambda: self._lower_finish(bucket, Asks.ANYTHING))

    def _layers_per_program(self, bucket: Bucket) -> int | None:
        """All of them in a step of few tokens: calls of machine code compile at once, and between programs the threads
        change."""
        size = self.target.layers_per_program
        return len(self.target.params.layers) if size is not None and self._is_few(bucket.num_tokens) else size

    def _is_few(self, num_tokens: int) -> bool:
        return num_tokens <= self.target.shape.layout.few_tokens

    def _lower_begin(self, bucket: Bucket) -> Any:
        t = self.target
        arguments = (t.params.embed, t.state.last_token, self._vector(bucket))
        return self._lower(*self._begin(bucket), arguments, few=self._is_few(bucket.num_tokens))

    def _begin(self, bucket: Bucket) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
        """The function, and how its arguments and results lie on the mesh."""
        function = functools.partial(begin_step, shape=self.target.shape, bucket=bucket)
        return function, (specs_of(self.target.params.embed), BY_RANK, BY_RANK), (self._tokens, STACKED)

    def _lower_layers(self, bucket: Bucket) -> Any:
        t = self.target
        hidden, shared = self._begun(bucket)
        some = t.params.layers[: self._layers_per_program(bucket)]
        first = t.spread.abstract((), jnp.int32, EVERYWHERE)
        ins = (specs_of(some), self._tokens, PAGES, EVERYWHERE, STACKED)
        layers = functools.partial(run_layers, shape=t.shape)
        return self._lower(
            layers,
            ins,
            (self._tokens, PAGES),
            (some, hidden, t.state.cache, first, shared),
            donate=(1, 2),
            few=self._is_few(bucket.num_tokens),
        )

    def _lower_pick(self, bucket: Bucket) -> Any:
        return self._lower(*self._pick(bucket), self._begun(bucket))

    def _pick(self, bucket: Bucket) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
        function = functools.partial(pick, shape=self.target.shape, bucket=bucket)
        return function, (self._tokens, STACKED), (self._tokens, self._tokens)

    def _lower_finish(self, bucket: Bucket, asks: Asks) -> Any:
        t = self.target
        rows, shared = self._begun(bucket)
        if bucket.num_prefill:
            rows, _ = self._abstract(*self._pick(bucket), (rows, shared))
        finish = functools.partial(finish_step, shape=t.shape, asks=asks)
        ins = (specs_of(t.params.embed), specs_of(t.params.head), self._tokens, BY_RANK, BY_RANK, STACKED, BY_RANK)
        state = (t.state.last_token, t.state.sampling)
        arguments = (t.params.embed, t.params.head, rows, *state, shared.rows, self._masks(bucket))
        few = self._is_few(bucket.num_rows)
        return self._lower(finish, ins, (BY_RANK, BY_RANK, TOLD), arguments, donate=(3, 4), few=few)

    def _begun(self, bucket: Bucket) -> tuple[jax.ShapeDtypeStruct, Any]:
        """Abstract (hidden, shared) after `begin`."""
        if bucket not in self._begun_by_bucket:
            t = self.target
            arguments = (t.params.embed, t.state.last_token, self._vector(bucket))
            self._begun_by_bucket[bucket] = self._abstract(*self._begin(bucket), arguments)
        return self._begun_by_bucket[bucket]

    def assemble(self, bucket: Bucket, done: dict[Any, Any]) -> Step:
        if ("forward", bucket) in done:
            samples = {asks: done["finish", bucket.num_rows, asks] for asks in SplitStep.kinds}
            return SplitStep(done["forward", bucket], samples)
        size = self._layers_per_program(bucket)
        if size is None:
            return WholeStep(done["step", bucket])
        firsts = range(0, len(self.target.params.layers), size)
        return StagedStep(
            first=done["begin", bucket],
            layers=done["layers", bucket],
            pick=done.get(("pick", bucket)),
            sample=done["finish", bucket.num_rows, Asks.ANYTHING],
            firsts=tuple(self.target.spread.put(np.int32(first), EVERYWHERE) for first in firsts),
        )

    @property
    def _tokens(self) -> Any:
        """How hidden states lie: each rank has its own tokens."""
        return BY_RANK_COLUMNS if self.target.shape.layout.feature_major else BY_RANK

    def _vector(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        return self.target.spread.abstract((packed_size(bucket, self.target.shape.max_pages),), jnp.int32)

    def _masks(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        shape = (bucket.num_rows, num_words(self.target.shape.config.vocab_size))
        return self.target.spread.abstract(shape, jnp.int32)

    def _lower_forward(self, bucket: Bucket) -> Any:
        t = self.target
        function = functools.partial(forward, shape=t.shape, bucket=bucket)
        arguments = (t.params.embed, t.params.layers, t.state.cache, t.state.last_token, self._vector(bucket))
        ins = (specs_of(t.params.embed), specs_of(t.params.layers), PAGES, BY_RANK, BY_RANK)
        return self._lower(function, ins, (PAGES, self._tokens, STACKED, self._tokens), arguments, donate=(2,))

    def _lower_whole(self, bucket: Bucket) -> Any:
        t = self.target
        function = functools.partial(step, shape=t.shape, bucket=bucket)
        arguments = (t.params, t.state, self._vector(bucket), self._masks(bucket))
        rows: Any = TOLD
        output = StepOutput(rows, rows, rows, rows, rows, hidden=self._tokens)
        ins = (specs_of(t.params), specs_of(t.state), BY_RANK, BY_RANK)
        return self._lower(function, ins, (specs_of(t.state), output), arguments, donate=(1,))

    def _lower(
        self,
        function: Callable[..., Any],
        ins: tuple[Any, ...],
        outs: tuple[Any, ...],
        arguments: tuple[Any, ...],
        donate: tuple[int, ...] = (),
        *,
        few: bool = False,
    ) -> Any:
        """Unused arguments stay, so that the text of a lowered program says which argument is which. few: of a step of
        few tokens."""
        spread = self.target.spread
        outputs = jax.tree.map(lambda leaf: leaf.sharding, self._abstract(function, ins, outs, arguments))
        jitted = jax.jit(
            spread.over(function, ins, outs),
            donate_argnums=donate,
            out_shardings=outputs,
            keep_unused=True,
            compiler_options=_IN_ORDER if few else spread.compiler_options,
        )
        return jitted.lower(*arguments)

    def _abstract(
        self, function: Callable[..., Any], ins: tuple[Any, ...], outs: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> Any:
        """What the function gives, as abstract arrays with their shardings."""
        spread = self.target.spread
        return spread.described(jax.eval_shape(spread.over(function, ins, outs), *arguments), outs)


def open_store(folder: str | None, devices: Sequence[jax.Device], description: str) -> ExecutableStore | None:
    """The programs kept in that folder for these devices; description: see ExecutableStore."""
    if folder is None:
        return None
    store = ExecutableStore(folder, devices, description)
    store.open()
    return store


def described(arrays: Any) -> tuple[list[tuple[Any, ...]], str]:
    """A tree of abstract arrays -> shapes, types and shardings, and how they are nested; the same in every process."""
    leaves, tree = jax.tree.flatten(arrays)
    return [(leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in leaves], str(tree)


def _describe(target: Target, buckets: Sequence[Bucket]) -> str:
    """All that the programs are made from, the same text in every process. The structure of the model follows from its
    config, the layout and the parameters."""
    shape = target.shape
    fields = {field.name: getattr(shape, field.name) for field in fields_of(shape)}
    fields |= {"structure": None, "attention": shape.attention.name}
    text = repr(
        (
            sorted(fields.items()),
            *described((target.params, target.state)),
            (target.max_model_len, str(target.spread.mesh), target.layers_per_program),
            list(buckets),
        )
    )
    assert " at 0x" not in text, "an address would differ in every process"
    return text


@contextmanager
def _not_cached_twice() -> Generator[None]:
    """What ExecutableStore keeps need not be in JAX's own cache too."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def precision(params: Params) -> Any:
    """float32 means float32: accelerators would otherwise multiply in bfloat16 or tf32."""
    return jax.default_matmul_precision("highest" if params.embed[0].dtype == jnp.float32 else "default")


def _lower_admit(target: Target) -> Any:
    spread, state = target.spread, target.state.sampling
    lengths = {"numbers": 3, "token_ids": target.max_model_len, "bias_ids": MAX_LOGIT_BIAS}
    arguments = [spread.abstract((length,), jnp.int32) for length in lengths.values()]
    arguments.append(spread.abstract((MAX_LOGIT_BIAS,), jnp.float32))
    arguments.append(spread.abstract((MAX_STOP_TOKENS,), jnp.int32))
    admit = spread.over(_admit, (BY_RANK,) * 6, BY_RANK)
    outputs = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(admit, donate_argnums=0, out_shardings=outputs, keep_unused=True).lower(state, *arguments)


def _admit(state: sampling.SamplingState, numbers: jax.Array, *arrays: jax.Array) -> sampling.SamplingState:
    """numbers [3]: slot, tokens of the prompt, tokens in all; arrays: the others of sampling.admit."""
    slot, num_prompt, num_tokens = (lax.index_in_dim(numbers, i, keepdims=False) for i in range(3))
    return sampling.admit(state, slot, arrays[0], num_prompt, num_tokens, *arrays[1:])


def lowerings(target: Target, buckets: Sequence[Bucket]) -> dict[Any, Callable[[], Any]]:
    """How to lower the programs of some steps; the target may be one that is not there."""
    builder = _Builder(target)
    for bucket in buckets:
        builder.add_bucket(bucket)
    return builder.lowerings
