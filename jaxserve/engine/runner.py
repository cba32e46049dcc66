"""ModelRunner owns parameters, device state and executables. launch() dispatches and returns; only result() waits."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.compile import Programs, Target, compile_programs, layers_per_program
from jaxserve.engine.readout import Reader, Reading
from jaxserve.engine.step import DeviceState, StepOutput, StepShape
from jaxserve.model import sampling
from jaxserve.model.sharding import Params
from jaxserve.scheduling.buckets import SchedulerConfig, buckets
from jaxserve.scheduling.plan import LOGPROBS, Admission, Bucket, StepPlan, StepResult, num_words, packed_size, unpack
from jaxserve.types import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from kernels_pallas import cache as kv_cache


class Handle:
    """A step in flight. result() waits for it; a constrained one must be told its masks before that."""

    def __init__(
        self,
        finish: Callable[[np.ndarray | None], tuple[StepOutput, Reading | None]],
        wants_logprobs: bool,
    ):
        self._finish = finish
        self._wants_logprobs = wants_logprobs
        self._output: StepOutput | None = None
        self._reading: Reading | None = None

    def sample(self, masks: np.ndarray | None) -> None:
        """Dispatch the step's last part; masks [S + R, words] int32, None where no row is constrained."""
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
        read = None if self._reading is None else self._reading.result()
        return StepResult(tokens, np.asarray(output.num_tokens), *rest, read)


class ModelRunner:
    """Built in three acts, because loading and compiling run side by side: construct, compile(), load(params)."""

    def __init__(self, shape: StepShape, sizes: SchedulerConfig, mesh: Mesh | AbstractMesh, dtype: jnp.dtype):
        self._shape = shape
        self._sizes = sizes
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._pages_sharding = NamedSharding(mesh, PartitionSpec(None, None, "tp", None, None))
        self._dtype = dtype
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

    def compile(self, params: Params, progress: Callable[[int, int], None], *, folder: str | None = None) -> None:
        """params: abstract arrays with their shardings; folder: where programs are kept (engine.executables)."""
        platform = self._mesh.devices.flat[0].platform
        target = self.target(params, layers_per_program(self._shape.config.num_layers, platform))
        self._programs = compile_programs(target, buckets(self._sizes), progress, folder=folder)

    def target(self, params: Params, layers_per_program: int | None) -> Target:
        """What compile() compiles for; params: abstract arrays with their shardings."""
        return Target(
            params=params,
            state=self._abstract_state(),
            shape=self._shape,
            max_model_len=self._sizes.max_model_len,
            replicated=self._replicated,
            layers_per_program=layers_per_program,
        )

    def load(self, params: Params, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Take the parameters, make the state, and run every program once on a plan that writes nothing."""
        self._params = params
        self._state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self._abstract_state()
        )
        self._admit(Admission(self._sizes.max_running, (), 0, (), ()))
        programs = self._programs
        num_spans = max((bucket.num_chunks for bucket in programs.steps), default=0)
        self._reader = Reader(programs.score, programs.pool, params, self._replicated, num_spans)
        hidden = None
        for done, bucket in enumerate(programs.steps, start=1):
            output = self._run(bucket, self.padding_plan(bucket), warm_up=True)
            output.token_ids.block_until_ready()
            hidden = output.hidden if hidden is None else hidden
            progress(done, len(programs.steps))
        if hidden is not None:
            self._reader.warm_up(hidden)

    def launch(self, plan: StepPlan) -> Handle:
        """Dispatch a step, or of a constrained one what needs no masks; nothing else may be launched before it got
        them."""
        for admission in plan.admissions:
            self._admit(admission)
        begun = self._begin(plan.bucket, plan.packed)

        def finish(masks: np.ndarray | None) -> tuple[StepOutput, Reading | None]:
            output = begun(masks)
            if plan.readings is None:
                return replace(output, hidden=None), None
            assert output.hidden is not None, "only prefill tokens are read"
            return replace(output, hidden=None), self._reader.launch(plan.readings, output.hidden)

        handle = Handle(finish, bool((plan.arrays.flags & LOGPROBS).any()))
        if not plan.is_constrained:
            handle.sample(None)
        return handle

    def padding_plan(self, bucket: Bucket) -> np.ndarray:
        """A packed plan all of whose rows are unused."""
        vector = np.zeros(packed_size(bucket, self._sizes.max_pages), np.int32)
        arrays = unpack(vector, bucket, self._sizes.max_pages)
        arrays.slots[:] = self._sizes.max_running
        arrays.chunk_starts[:] = bucket.num_prefill
        return vector

    def _run(self, bucket: Bucket, packed: np.ndarray, *, warm_up: bool = False) -> StepOutput:
        return self._begin(bucket, packed, warm_up=warm_up)(None)

    def _begin(
        self, bucket: Bucket, packed: np.ndarray, *, warm_up: bool = False
    ) -> Callable[[np.ndarray | None], StepOutput]:
        """Dispatch what needs no masks -> what dispatches the rest."""
        vector = jax.device_put(packed, self._replicated)
        step = self._programs.steps[bucket]
        self._state, begun = step.begin(self._params, self._state, vector, warm_up=warm_up)

        def finish(masks: np.ndarray | None) -> StepOutput:
            given = self._open_masks(bucket.num_rows) if masks is None else jax.device_put(masks, self._replicated)
            self._state, output = step.finish(self._params, self._state, begun, given)
            return output

        return finish

    def _open_masks(self, num_rows: int) -> jax.Array:
        """Masks that allow everything; they stay on the device."""
        if num_rows not in self._open:
            words = num_words(self._shape.config.vocab_size)
            self._open[num_rows] = jax.device_put(np.full((num_rows, words), -1, np.int32), self._replicated)
        return self._open[num_rows]

    def _admit(self, admission: Admission) -> None:
        tokens = np.zeros(self._sizes.max_model_len, np.int32)
        tokens[: len(admission.token_ids)] = admission.token_ids
        vocab_size = self._shape.config.vocab_size
        bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
        bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, value) in enumerate(admission.logit_bias):
            bias_ids[i], bias_values[i] = token, value
        stop_ids = np.full(MAX_STOP_TOKENS, vocab_size, np.int32)
        stop_ids[: len(admission.stop_token_ids)] = admission.stop_token_ids
        scalars = [np.int32(x) for x in (admission.slot, admission.num_prompt, len(admission.token_ids))]
        arrays = (scalars[0], tokens, scalars[1], scalars[2], bias_ids, bias_values, stop_ids)
        admitted = self._programs.admit(self._state.sampling, *jax.device_put(arrays, self._replicated))
        self._state = replace(self._state, sampling=admitted)

    def _abstract_state(self) -> DeviceState:
        def state() -> DeviceState:
            config, sizes = self._shape.config, self._sizes
            heads = (config.num_kv_heads, config.head_dim)
            return DeviceState(
                cache=kv_cache.empty(config.num_layers, sizes.num_pages, *heads, sizes.page_size, self._dtype),
                last_token=jnp.zeros(sizes.max_running + 1, jnp.int32),
                sampling=sampling.init_state(sizes.max_running, config.vocab_size, MAX_STOP_TOKENS),
            )

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = self._pages_sharding if leaf.ndim == 5 else self._replicated
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, jax.eval_shape(state))
