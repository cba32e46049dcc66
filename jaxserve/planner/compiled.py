"""The engine's own steps, compiled for a target: what the compiler says of memory and exchanges. Nothing is run."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jaxserve.engine.build import Blueprint
from jaxserve.engine.compile import layers_per_program, lowerings, precision
from jaxserve.model.sharding import Parameter
from jaxserve.scheduling.plan import Bucket

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """Bytes of one device. error: the compiler's words where it refused."""

    bucket: Bucket
    seconds: float
    arguments: int
    temporaries: int
    code: int
    collectives: dict[str, int]
    error: str | None = None
    out_of_memory: bool = False

    @property
    def needed(self) -> int:
        """While the step runs; what it gives back lies in what it was given."""
        return self.arguments + self.temporaries + self.code


def compile_step(blueprint: Blueprint, bucket: Bucket, platform: str) -> CompiledStep:
    """As the engine would for the mesh of the blueprint, which is one to compile for."""
    return _compile(blueprint, bucket, platform)[0]


def compile_program(blueprint: Blueprint, bucket: Bucket, platform: str) -> tuple[CompiledStep, list[Any]]:
    """The same with the compiled programs: one, or on CPU the stages of a step."""
    return _compile(blueprint, bucket, platform)


def _compile(blueprint: Blueprint, bucket: Bucket, platform: str) -> tuple[CompiledStep, list[Any]]:
    target = blueprint.runner.target(
        jax.tree.map(Parameter.abstract, blueprint.parameters),
        layers_per_program(blueprint.shape.config.num_layers, platform),
    )
    started, programs = time.monotonic(), []
    with compiling_for(target), precision(target.params):
        try:
            programs = [lower().compile() for lower in lowerings(target, [bucket]).values()]
        except JaxRuntimeError as error:
            text = str(error)
            full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
            return _failed(bucket, time.monotonic() - started, text, full), []
    analyses = [program.memory_analysis() for program in programs]
    total = sum((collectives(program.as_text()) for program in programs), Counter())
    step = CompiledStep(
        bucket=bucket,
        seconds=time.monotonic() - started,
        arguments=max(each.argument_size_in_bytes for each in analyses),
        temporaries=max(each.temp_size_in_bytes for each in analyses),
        code=sum(each.generated_code_size_in_bytes for each in analyses),
        collectives=dict(total),
    )
    return step, programs


def _failed(bucket: Bucket, seconds: float, text: str, out_of_memory: bool) -> CompiledStep:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if "Used" in line or "hbm" in line.lower()), lines[0] if lines else "?")
    return CompiledStep(bucket, seconds, 0, 0, 0, {}, error=said[:300], out_of_memory=out_of_memory)


@contextmanager
def compiling_for(target: Any) -> Iterator[None]:
    """Kernels ask the ambient mesh what they are compiled for."""
    mesh = target.replicated.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def instructions(text: str) -> list[tuple[str, str, str]]:
    """HLO -> (name, result type, opcode) of every instruction."""
    return re.findall(r"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(", text, re.MULTILINE)


def collectives(text: str) -> Counter[str]:
    """How many of each kind; an asynchronous pair counts once."""
    kinds = (opcode.removesuffix("-start") for _, _, opcode in instructions(text))
    return Counter(kind for kind in kinds if kind in COLLECTIVES)
