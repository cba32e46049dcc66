"""ModelRunner owns parameters, device state and executables. launch() dispatches and returns; only result() waits."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.compile import Programs, Target, compile_programs, layers_per_program
from jaxserve.engine.step import DeviceState, StepOutput, StepShape
from jaxserve.model import sampling
from jaxserve.model.sharding import Params
from jaxserve.scheduling.buckets import SchedulerConfig, buckets
from jaxserve.scheduling.plan import LOGPROBS, Admission, Bucket, StepPlan, StepResult, packed_size, unpack
from jaxserve.types import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from kernels_pallas import cache as kv_cache


class Handle:
    """A step in flight. result() waits for it."""

    def __init__(self, output: StepOutput, wants_logprobs: bool):
        self._output = output
        self._wants_logprobs = wants_logprobs
        for array in (output.token_ids, output.num_tokens):
            array.copy_to_host_async()

    def result(self) -> StepResult:
        output = self._output
        tokens = np.asarray(output.token_ids)
        if self._wants_logprobs:
            rest = (np.asarray(output.logprobs), np.asarray(output.top_ids), np.asarray(output.top_logprobs))
        else:
            empty = np.zeros((*tokens.shape, 0), np.float32)
            rest = (np.zeros(tokens.shape, np.float32), empty.astype(np.int32), empty)
        return StepResult(tokens, np.asarray(output.num_tokens), *rest)


class ModelRunner:
    """Built in three acts, because loading and compiling run side by side: construct, compile(), load(params)."""

    def __init__(self, shape: StepShape, sizes: SchedulerConfig, mesh: Mesh, dtype: jnp.dtype):
        self._shape = shape
        self._sizes = sizes
        self._platform = mesh.devices.flat[0].platform
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._pages_sharding = NamedSharding(mesh, PartitionSpec(None, None, "tp", None, None))
        self._dtype = dtype
        self._programs: Programs
        self._params: Params
        self._state: DeviceState

    @property
    def num_programs(self) -> int:
        return self._programs.count

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What launch() takes."""
        return tuple(self._programs.steps)

    def compile(self, params: Params, progress: Callable[[int, int], None], *, folder: str | None = None) -> None:
        """params: abstract arrays with their shardings; folder: where programs are kept (engine.executables)."""
        target = Target(
            params=params,
            state=self._abstract_state(),
            shape=self._shape,
            max_model_len=self._sizes.max_model_len,
            replicated=self._replicated,
            layers_per_program=layers_per_program(self._shape.config.num_layers, self._platform),
        )
        self._programs = compile_programs(target, buckets(self._sizes), progress, folder=folder)

    def load(self, params: Params, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Take the parameters, make the state, and run every program once on a plan that writes nothing."""
        self._params = params
        self._state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self._abstract_state()
        )
        self._admit(Admission(self._sizes.max_running, (), 0, (), ()))
        for done, bucket in enumerate(self._programs.steps, start=1):
            self._run(bucket, self.padding_plan(bucket), warm_up=True).token_ids.block_until_ready()
            progress(done, len(self._programs.steps))

    def launch(self, plan: StepPlan) -> Handle:
        for admission in plan.admissions:
            self._admit(admission)
        output = self._run(plan.bucket, plan.packed)
        return Handle(output, bool((plan.arrays.flags & LOGPROBS).any()))

    def padding_plan(self, bucket: Bucket) -> np.ndarray:
        """A packed plan all of whose rows are unused."""
        vector = np.zeros(packed_size(bucket, self._sizes.max_pages), np.int32)
        arrays = unpack(vector, bucket, self._sizes.max_pages)
        arrays.slots[:] = self._sizes.max_running
        arrays.chunk_starts[:] = bucket.num_prefill
        return vector

    def _run(self, bucket: Bucket, packed: np.ndarray, *, warm_up: bool = False) -> StepOutput:
        vector = jax.device_put(packed, self._replicated)
        self._state, output = self._programs.steps[bucket](self._params, self._state, vector, warm_up=warm_up)
        return output

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
