"""The engine's own steps, compiled for a target: what the compiler says of memory and exchanges. Nothing is run."""

import math
import re
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jaxserve.engine.build import Blueprint
from jaxserve.engine.compile import layers_per_program, lowerings, precision
from jaxserve.model.sampling import Asks
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
    cache_copies: int = 0  # instructions that make an array of the cache's shape, besides the kernels that write it
    error: str | None = None
    out_of_memory: bool = False

    @property
    def needed(self) -> int:
        """While the step runs; what it gives back lies in what it was given."""
        return self.arguments + self.temporaries + self.code


def compile_step(blueprint: Blueprint, bucket: Bucket, platform: str) -> CompiledStep:
    """As the engine would (on CPU a step is several programs), for the mesh of the blueprint: one to compile for."""
    target = blueprint.runner.target(blueprint.params, layers_per_program(blueprint.shape.config, platform))
    started = time.monotonic()
    with compiling_for(target), precision(target.params):
        try:
            programs = {key: lower().compile() for key, lower in lowerings(target, [bucket]).items()}
            texts = [program.as_text() for key, program in programs.items() if _runs(key)]
        except JaxRuntimeError as error:
            text = str(error)
            full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
            return _failed(bucket, time.monotonic() - started, text, full)
    analyses = [program.memory_analysis() for program in programs.values()]
    pages = target.state.cache.pages
    shape = pages.sharding.shard_shape(pages.shape)
    temporaries = max(each.temp_size_in_bytes for each in analyses)
    leaves = jax.tree.leaves((target.params, target.state))  # all are there, though not every program takes all of them
    held = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    in_place = platform != "tpu" and temporaries < pages.dtype.itemsize * math.prod(shape)
    return CompiledStep(
        bucket=bucket,
        seconds=time.monotonic() - started,
        arguments=max(held, *(each.argument_size_in_bytes for each in analyses)),
        temporaries=temporaries,
        code=sum(each.generated_code_size_in_bytes for each in analyses),
        collectives=dict(sum(map(collectives, texts), Counter())),
        cache_copies=sum(count for text in texts for count in copies_of(shape, text, in_place).values()),
    )


def _runs(key: Any) -> bool:
    """Whether a program is one of a step's: of those that sample, one is."""
    return key[0] != "finish" or key[-1] is Asks.ANYTHING


def _failed(bucket: Bucket, seconds: float, text: str, out_of_memory: bool) -> CompiledStep:
    said = " ".join(text.split())[:400]
    return CompiledStep(bucket, seconds, 0, 0, 0, {}, error=said, out_of_memory=out_of_memory)


@contextmanager
def compiling_for(target: Any) -> Generator[None]:
    """Kernels ask the ambient mesh what they are compiled for."""
    mesh = target.params.embed[0].sharding.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def instructions(text: str) -> list[tuple[str, str, str]]:
    """HLO -> (name, result type, opcode) of every instruction."""
    return re.findall(r"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(", text, re.MULTILINE)


def collectives(text: str) -> Counter[str]:
    """How many of each kind; an asynchronous pair counts once."""
    kinds = (opcode.removesuffix("-start") for _, _, opcode in instructions(text))
    return Counter(kind for kind in kinds if kind in COLLECTIVES)


# A tuple, its element or a reinterpretation is no new array; kernels write the one they are given.
_NO_COPY = {"parameter", "tuple", "get-tuple-element", "bitcast", "custom-call", "call", "while", "conditional"}
_WRITES = {"scatter", "dynamic-update-slice", "fusion"}


def makers_of(shape: tuple[int, ...], text: str) -> Counter[str]:
    """Opcodes of the instructions whose result is, or holds, an array of this shape."""
    written = f"[{','.join(map(str, shape))}]"
    return Counter(opcode for _, result, opcode in instructions(text) if written in result)


def copies_of(shape: tuple[int, ...], text: str, in_place: bool = False) -> Counter[str]:
    """Those of them that may need room for one more. in_place: there was none, so that what XLA writes, where it does
    (GPU and CPU), goes into the array that it is given."""
    harmless = _NO_COPY | (_WRITES if in_place else set())
    return Counter({opcode: count for opcode, count in makers_of(shape, text).items() if opcode not in harmless})
