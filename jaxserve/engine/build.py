"""From an EngineConfig to a runner that is ready: sizes, weights and programs."""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.compile import CompileCounter, enable_persistent_cache
from jaxserve.engine.processor import cpu_features, prefers_bfloat16
from jaxserve.engine.runner import ModelRunner
from jaxserve.engine.sizing import DeviceFacts, Sizes, resolve
from jaxserve.engine.step import StepShape
from jaxserve.engine.weights import load_params, read_model_config
from jaxserve.model.llama import Layout
from jaxserve.model.partition import Shares
from jaxserve.model.sharding import Params, describe, make_mesh
from jaxserve.model.stacked import abstract, period_of
from kernels_pallas import cpu
from kernels_pallas.attention import Attention, choose, gpu_facts

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]  # stage, done, total, message


@dataclass(frozen=True)
class Engine:
    """Everything the loop and the Ready message need."""

    runner: ModelRunner
    sizes: Sizes
    model: ModelConfig
    counter: CompileCounter
    platform: str
    device_kind: str
    num_devices: int


@dataclass(frozen=True)
class Blueprint:
    """All that is decided before weights are read and programs compiled; it holds no memory of a device."""

    sizes: Sizes
    shape: StepShape
    runner: ModelRunner
    parameters: Params  # of Parameter descriptions

    @property
    def params(self) -> Params:
        """Of abstract arrays with their shardings, as programs take them."""
        return abstract(self.parameters, self.shape.period)


def draw(
    model: ModelConfig, config: EngineConfig, device: DeviceFacts, mesh_of: Callable[[Sizes], Mesh | AbstractMesh]
) -> Blueprint:
    """The engine for devices that may not be there: an abstract mesh, or one of compile targets, will do.

    Raises ConfigError naming the flag when what was asked for does not fit.
    """
    sizes = resolve(model, config, device)
    mesh, dtype = mesh_of(sizes), jnp.dtype(sizes.dtype)
    structure, parameters = describe(model, dtype, mesh, device.platform)
    shape = StepShape(
        config=model,
        layout=Layout.of(device.platform),
        structure=structure,
        attention=_attention(config, device, model, sizes),
        page_size=sizes.scheduler.page_size,
        max_pages=sizes.scheduler.max_pages,
        chunk_size=sizes.scheduler.chunk_size,
        period=period_of(model, device.platform),
    )
    return Blueprint(sizes, shape, ModelRunner(shape, sizes.scheduler, mesh, jnp.dtype(sizes.kv_dtype)), parameters)


class Machines(Protocol):
    """Several that serve one model (engine.hosts): each must build the same. The first two raise ConfigError."""

    def agree(self, facts: DeviceFacts) -> DeviceFacts: ...

    def check(self, what: Mapping[str, str]) -> None: ...

    def lacking(self, names: Iterable[str]) -> Collection[str]: ...


def build(config: EngineConfig, report: Report, machines: Machines | None = None) -> Engine:
    """Raises ConfigError or checkpoints.files.CheckpointError for what the user can mend."""
    counter = CompileCounter()
    programs = program_folder(config)
    devices = devices_of(config)
    platform = devices[0].platform
    model = read_model_config(config)
    own = [device for device in devices if device.process_index == jax.process_index()]
    facts = DeviceFacts(platform, len(own), _memory(own[0]), **_features_of(own[0]))
    if machines is not None:
        facts = machines.agree(facts)
    blueprint = draw(model, config, facts, lambda sizes: make_mesh(devices[: sizes.dp * sizes.tp], sizes.dp))
    sizes, runner = blueprint.sizes, blueprint.runner
    if config.record_plans and sizes.dp > 1:
        raise ConfigError("--record-plans records one rank; leave --dp-size out")
    devices = devices[: sizes.dp * sizes.tp]
    if machines is not None:
        machines.check({"devices": str(devices), "sizes": str(sizes), "attention": blueprint.shape.attention.name})
    logger.info("mesh: dp %d x tp %d of %s", sizes.dp, sizes.tp, devices[0].device_kind)
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        loading = pool.submit(load_params, config, model, blueprint.parameters, report, period=blueprint.shape.period)
        lacking = None if machines is None else machines.lacking
        runner.compile(blueprint.params, compile_progress(report), folder=programs, lacking=lacking)
        params = loading.result()
    try:
        runner.load(params, lambda done, total: report("warmup", done, total, f"ran {done}/{total}"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"the device's memory is too small for the largest step at --mem-fraction-static {config.mem_fraction}; "
            "lower that, --max-running-requests or --chunked-prefill-size, or free what others hold of the memory"
        ) from error
    return Engine(runner, sizes, model, counter, platform, devices[0].device_kind, len(devices))


def program_folder(config: EngineConfig) -> str:
    """Where compiled programs are kept; JAX's own cache, inside of it, is on from now."""
    folder = config.compilation_cache_dir or os.path.join(config.cache_dir, "programs")
    enable_persistent_cache(os.path.join(folder, "xla"))
    return folder


def devices_of(config: EngineConfig) -> list[jax.Device]:
    """The devices that may be used. Raises ConfigError where there are none."""
    try:
        return jax.devices() if config.device == "auto" else jax.devices(config.device)
    except RuntimeError as error:
        raise ConfigError(f"--device {config.device}: {error}") from error


def _attention(config: EngineConfig, device: DeviceFacts, model: ModelConfig, sizes: Sizes) -> Attention:
    page_size = sizes.scheduler.page_size
    try:
        attention = choose(
            device.platform,
            config.attention_backend,
            num_kv_heads=Shares.of(model, sizes.tp).num_kv_heads,
            dtype=jnp.dtype(sizes.kv_dtype),
            activations=jnp.dtype(sizes.dtype),
            capability=device.capability,
            num_multiprocessors=device.num_multiprocessors,
        )
    except ValueError as error:
        raise ConfigError(f"--attention-backend {config.attention_backend}: {error}") from error
    if page_size % attention.page_multiple:
        raise ConfigError(
            f"--page-size {page_size}: {attention.name} take multiples of {attention.page_multiple}; "
            "change it, or give --attention-backend xla"
        )
    logger.info("attention: %s", attention.name)
    return attention


def _features_of(device: jax.Device) -> dict[str, Any]:
    """Fields of DeviceFacts."""
    if device.platform == "cpu":
        quick = prefers_bfloat16(cpu_features(), jax.__version_info__)
        return {"prefers_bfloat16": quick, "machine_code": cpu.why_not() is None}
    return gpu_facts(device)


def _memory(device: jax.Device) -> int | None:
    """Bytes of a device's memory, of which mem_fraction may be used; None on CPU."""
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(f"{device.device_kind} does not tell its memory; give --max-total-tokens")
    limit = int(stats["bytes_limit"])
    preallocated = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")) if device.platform == "gpu" else 1.0
    return int(limit / preallocated)


def compile_progress(report: Report) -> Callable[[int, int], None]:
    started, lock = time.monotonic(), threading.Lock()

    def progress(done: int, total: int) -> None:
        with lock:
            left = (time.monotonic() - started) / done * (total - done)
            report("compile", done, total, f"compiled {done}/{total}, {left:.0f} s left")

    return progress
