"""The engine's own programs, compiled for TPUs and GPUs that are not there: libtpu and JAX's CUDA plugin hold the
compilers, their topologies are the targets."""

import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.build import draw
from jaxserve.engine.chips import CHIPS
from jaxserve.engine.compile import Target, _Builder, precision
from jaxserve.engine.gpu_targets import gpu_devices
from jaxserve.engine.sizing import DeviceFacts
from jaxserve.model.sharding import make_mesh
from jaxserve.planner.compiled import collectives, makers_of
from jaxserve.scheduling.buckets import buckets
from jaxserve.scheduling.plan import Bucket

SMOLLM2 = ModelConfig(30, 576, 9, 3, 64, 1536, 49152, 8192, rope_theta=1e5, tie_embeddings=True)
LLAMA_1B = ModelConfig(16, 2048, 32, 8, 64, 8192, 128256, 131072, rope_theta=5e5, tie_embeddings=True)
LLAMA_8B = ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 131072, rope_theta=5e5)
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-3.2-1B": LLAMA_1B, "Llama-3.1-8B": LLAMA_8B}
MIB = 2**20
__all__ = [
    "LLAMA_8B",
    "MIB",
    "MODELS",
    "SMOLLM2",
    "Compiled",
    "collectives",
    "compile_steps",
    "has_libtpu",
    "makers_of",
    "target_of",
]

has_libtpu = importlib.util.find_spec("libtpu") is not None


@dataclass(frozen=True)
class Compiled:
    """A step for a target, and what the compiler says of it, per device."""

    target: Target
    bucket: Bucket
    program: Any

    @property
    def cache_shape(self) -> tuple[int, ...]:
        pages = self.target.state.cache.pages
        return pages.sharding.shard_shape(pages.shape)

    @property
    def cache_bytes(self) -> int:
        return 2 * math.prod(self.cache_shape)

    @property
    def memory(self) -> Any:
        return self.program.memory_analysis()

    @property
    def text(self) -> str:
        return self.program.as_text()


def compile_steps(target: Target, buckets: Iterable[Bucket], *, whole: bool = False) -> dict[Bucket, Compiled]:
    """The steps of some buckets; whole (of a GPU's, all but the logits), or only their layers, which is where the cache
    is (sampling takes a minute)."""
    builder = _Builder(target if whole else replace(target, layers_per_program=target.shape.config.num_layers))
    kind = ("step" if target.shape.layout.branches else "forward") if whole else "layers"
    compiled = {}
    for bucket in buckets:
        builder.add_bucket(bucket)
        with precision(target.params):
            lowered = builder.lowerings[kind, bucket]()
        compiled[bucket] = Compiled(target, bucket, lowered.compile())
    return compiled


@contextmanager
def target_of(
    topology: str, num_devices: int, model: ModelConfig, *, num_layers: int, backend: str = "auto", **config: Any
) -> Iterator[tuple[Target, dict[tuple[int, int], Bucket]]]:
    """What the engine would compile for some chips of a TPU topology or some GPUs, and its buckets by (S, T).

    The cache is too large for VMEM, where the compiler would otherwise be free to move it and back.
    num_layers: may be fewer than the model's; a step is as many copies of the same layer.
    """
    model = replace(model, num_layers=num_layers)
    chip = CHIPS[topology.partition(":")[0]]
    if chip.platform == "gpu":
        devices = gpu_devices(chip, num_devices)
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(devices[:num_devices])
    config = {"max_model_len": 8192, "max_running": 64, "max_total_tokens": 2**18} | config
    facts = DeviceFacts(chip.platform, num_devices, None, chip.capability)
    engine = EngineConfig("model", "cache", attention_backend=backend, **config)
    blueprint = draw(model, engine, facts, lambda sizes: mesh)
    target = blueprint.runner.target(blueprint.params, None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it what they are compiled for
        yield target, {(b.num_decode, b.num_prefill): b for b in buckets(blueprint.sizes.scheduler)}
