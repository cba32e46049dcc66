"""ModelRunner owns parameters, device state and executables. launch() dispatches and returns; only result() waits."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxserve.engine.compile import Lacking, Programs, Target, compile_programs, layers_per_program
from jaxserve.engine.readout import Reader, Reading
from jaxserve.engine.spread import BY_RANK, PAGES, Spread
from jaxserve.engine.step import DeviceState, StepOutput, StepShape
from jaxserve.model import sampling
from jaxserve.model.partition import Shares
from jaxserve.model.sharding import Params
from jaxserve.scheduling.buckets import SchedulerConfig, buckets
from jaxserve.scheduling.plan import (
    BIAS,
    GRAMMAR,
    LOGPROBS,
    PENALTIES,
    SAMPLE,
    SUPPRESS_STOP,
    Admission,
    Bucket,
    Plan,
    StepResult,
    num_words,
    packed_size,
    unpack,
)
from jaxserve.types import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from kernels_pallas import cache as kv_cache


def asks_of(flags: np.ndarray) -> sampling.Asks:
    """What a step asks for at most whose rows have these flags."""
    if (flags & (PENALTIES | BIAS | SUPPRESS_STOP | LOGPROBS | GRAMMAR)).any():
        return sampling.Asks.ANYTHING
    return sampling.Asks.DRAWS if (flags & SAMPLE).any() else sampling.Asks.GREEDY


class Handle:
    """A step in flight. result() waits for it; a constrained one must be told its masks before that."""

    def __init__(
        self,
        finish: Callable[[np.ndarray | None], tuple[StepOutput, Reading | None]],
        wants_logprobs: bool,
        num_ranks: int,
    ):
        self._finish = finish
        self._wants_logprobs = wants_logprobs
        self._num_ranks = num_ranks
        self._output: StepOutput | None = None
        self._reading: Reading | None = None

    def sample(self, masks: np.ndarray | None) -> None:
        """Dispatch the step's last part; masks [ranks * (S + R), words] int32, None where no row is constrained."""
        assert self._output is None, "a step samples once"
        output, self._reading = self._finish(masks)
        self._output = output
        for array in (output.token_ids, output.num_tokens):
            array.copy_to_host_async()

    def result(self) -> StepResult:
        output = self._output
        assert output is not None, "a constrained step was not told its masks"
        tokens = np.asarray(output.token_ids)
        if self._wants_logprobs:
            rest = (np.asarray(output.logprobs), np.asarray(output.top_ids), np.asarray(output.top_logprobs))
        else:
            empty = np.zeros((*tokens.shape, 0), np.float32)
            rest = (np.zeros(tokens.shape, np.float32), empty.astype(np.int32), empty)
        read = (None,) * self._num_ranks if self._reading is None else self._reading.result()
        return StepResult.of_ranks((tokens, np.asarray(output.num_tokens), *rest), read)


class ModelRunner:
    """Built in three acts, because loading and compiling run side by side: construct, compile(), load(params)."""

    def __init__(self, shape: StepShape, sizes: SchedulerConfig, mesh: Mesh | AbstractMesh, kv_dtype: jnp.dtype):
        self._shape = shape
        self._sizes = sizes
        self._spread = Spread(mesh)
        self._kv_dtype = kv_dtype
        self._programs: Programs
        self._params: Params
        self._state: DeviceState
        self._open: dict[int, jax.Array] = {}  # masks that allow everything, by the number of rows
        self._reader: Reader

    @property
    def num_programs(self) -> int:
        return self._programs.count

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What launch() takes."""
        return tuple(self._programs.steps)

    def compile(
        self,
        params: Params,
        progress: Callable[[int, int], None],
        *,
        folder: str | None = None,
        lacking: Lacking | None = None,
    ) -> None:
        """params: abstract arrays with their shardings; folder: where programs are kept (engine.executables); lacking:
        see compile_programs."""
        platform = self._spread.devices[0].platform
        target = self.target(params, layers_per_program(self._shape.config, platform))
        self._programs = compile_programs(target, buckets(self._sizes), progress, folder=folder, lacking=lacking)

    def target(self, params: Params, layers_per_program: int | None) -> Target:
        """What compile() compiles for; params: abstract arrays with their shardings."""
        return Target(
            params=params,
            state=self._abstract_state(),
            shape=self._shape,
            max_model_len=self._sizes.max_model_len,
            spread=self._spread,
            layers_per_program=layers_per_program,
        )

    def load(self, params: Params, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Take the parameters, make the state, and run every program once on a plan that writes nothing."""
        self._params = params
        self._state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self._abstract_state()
        )
        self._admit([None] * self._spread.num_ranks)
        programs = self._programs
        num_spans = max((bucket.num_chunks for bucket in programs.steps), default=0)
        self._reader = Reader(programs.score, programs.pool, params, self._spread, num_spans)
        hidden = None
        for done, bucket in enumerate(programs.steps, start=1):
            for asks in programs.steps[bucket].kinds:
                output = self._begin(bucket, self.padding_plan(bucket), asks, warm_up=True)(None)
                output.token_ids.block_until_ready()
                hidden = output.hidden if hidden is None else hidden
            progress(done, len(programs.steps))
        if hidden is not None:
            self._reader.warm_up(hidden)

    def launch(self, plan: Plan) -> Handle:
        """Dispatch a step, or of a constrained one what needs no masks; nothing else may be launched before it got
        them."""
        for admissions in zip_longest(*(part.admissions for part in plan.parts)):
            self._admit(admissions)
        flags = np.concatenate([part.arrays.flags for part in plan.parts])
        begun = self._begin(plan.bucket, plan.packed, asks_of(flags))

        def finish(masks: np.ndarray | None) -> tuple[StepOutput, Reading | None]:
            output = begun(masks)
            readings = [part.readings for part in plan.parts]
            if not any(readings):
                return replace(output, hidden=None), None
            assert output.hidden is not None, "only prefill tokens are read"
            return replace(output, hidden=None), self._reader.launch(readings, output.hidden)

        handle = Handle(finish, bool((flags & LOGPROBS).any()), len(plan.parts))
        if not plan.is_constrained:
            handle.sample(None)
        return handle

    def padding_plan(self, bucket: Bucket) -> np.ndarray:
        """A packed plan, of each rank, all of whose rows are unused."""
        vector = np.zeros(packed_size(bucket, self._sizes.max_pages), np.int32)
        arrays = unpack(vector, bucket, self._sizes.max_pages)
        arrays.slots[:] = self._sizes.max_running
        arrays.chunk_starts[:] = bucket.num_prefill
        return np.tile(vector, self._spread.num_ranks)

    def _begin(
        self, bucket: Bucket, packed: np.ndarray, asks: sampling.Asks, *, warm_up: bool = False
    ) -> Callable[[np.ndarray | None], StepOutput]:
        """Dispatch what needs no masks -> what dispatches the rest."""
        vector = self._spread.put(packed)
        step = self._programs.steps[bucket]
        self._state, begun = step.begin(self._params, self._state, vector, warm_up=warm_up)

        def finish(masks: np.ndarray | None) -> StepOutput:
            given = self._open_masks(bucket.num_rows) if masks is None else self._spread.put(masks)
            self._state, output = step.finish(self._params, self._state, begun, given, asks)
            return output

        return finish

    def _open_masks(self, num_rows: int) -> jax.Array:
        """Masks that allow everything; they stay on the device."""
        if num_rows not in self._open:
            shape = (num_rows * self._spread.num_ranks, num_words(self._shape.config.vocab_size))
            self._open[num_rows] = self._spread.put(np.full(shape, -1, np.int32))
        return self._open[num_rows]

    def _admit(self, admissions: Iterable[Admission | None]) -> None:
        """One of each rank, None: nothing is admitted there."""
        each = [self._admission(admission) for admission in admissions]
        arrays = (self._spread.put(np.concatenate(parts)) for parts in zip(*each, strict=True))
        self._state = replace(self._state, sampling=self._programs.admit(self._state.sampling, *arrays))

    def _admission(self, admission: Admission | None) -> tuple[np.ndarray, ...]:
        """As engine.compile's admit takes it; None fills the scratch slot."""
        admission = admission or Admission(self._sizes.max_running, (), 0, (), ())
        tokens = np.zeros(self._sizes.max_model_len, np.int32)
        tokens[: len(admission.token_ids)] = admission.token_ids
        vocab_size = self._shape.config.vocab_size
        bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
        bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, value) in enumerate(admission.logit_bias):
            bias_ids[i], bias_values[i] = token, value
        stop_ids = np.full(MAX_STOP_TOKENS, vocab_size, np.int32)
        stop_ids[: len(admission.stop_token_ids)] = admission.stop_token_ids
        numbers = np.array([admission.slot, admission.num_prompt, len(admission.token_ids)], np.int32)
        return numbers, tokens, bias_ids, bias_values, stop_ids

    def _abstract_state(self) -> DeviceState:
        """Of all ranks, with shardings."""
        config, sizes, spread = self._shape.config, self._sizes, self._spread
        shares = Shares.of(config, spread.mesh.shape["tp"])
        heads = (shares.num_kv_heads * shares.tp, config.head_dim)

        def one_rank() -> DeviceState:
            return DeviceState(
                cache=kv_cache.empty(config.num_layers, sizes.num_pages, *heads, sizes.page_size, self._kv_dtype),
                last_token=jnp.zeros(sizes.max_running + 1, jnp.int32),
                sampling=sampling.init_state(sizes.max_running, config.vocab_size, MAX_STOP_TOKENS),
            )

        def place(tree: Any, spec: Any) -> Any:
            return jax.tree.map(lambda leaf: spread.abstract(leaf.shape, leaf.dtype, spec), tree)

        state = jax.eval_shape(one_rank)
        cache, last_token = place(state.cache, PAGES), place(state.last_token, BY_RANK)
        return DeviceState(cache, last_token, place(state.sampling, BY_RANK))
