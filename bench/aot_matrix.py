"""The engine's steps compiled for accelerators that are not there: what each needs, exchanges and copies.

python -m bench.aot_matrix [--models Llama-3.1-8B …] [--topologies v6e:2x4 …] [--steps largest|all] [--rows N]
                           [--output FILE]

With --output, results are put into that JSON beside those that are there already, so that the matrix can be made in
pieces. Bytes are those of one device; seconds are what compiling took here, with whatever else this machine did. For a
slice that is too small by arithmetic a step is compiled all the same, with a small cache: the compiler must refuse it
too. Every step is held against faults(), and the exit code is 1 where one has any.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no accelerator is touched

from jaxserve.config import ConfigError
from jaxserve.engine.build import Blueprint
from jaxserve.planner.compiled import CompiledStep, compile_step
from jaxserve.planner.models import read_model
from jaxserve.planner.plan import ask, draw_on, largest
from jaxserve.planner.slices import Slice, parse_slice
from jaxserve.planner.targets import why_no_compiler
from jaxserve.scheduling.buckets import buckets
from jaxserve.scheduling.plan import Bucket

MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-32B", "Llama-3.3-70B")
TOPOLOGIES = ("v5e:1x1", "v5e:2x4", "v6e:1x1", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1", "h200:1", "h200:8")
SMALL = {
    "max_total_tokens": 2**17,
    "max_running": 16,
    "chunked_prefill_size": 128,
}  # where the model itself is too large
MIB = 2**20


def compiled(model: str, where: Slice, steps: str = "largest", engine: Mapping[str, Any] | None = None) -> list[Any]:
    """-> (step, its faults) of each, for the slice's own memory. Raises ConfigError where the engine refuses it."""
    blueprint, _ = draw_on(where, ask(model, context=None, users=None, engine=engine), to_compile=True)
    wanted: Sequence[Bucket] = largest(blueprint) if steps == "largest" else buckets(blueprint.sizes.scheduler)
    for_each = (compile_step(blueprint, bucket, where.chip.platform) for bucket in wanted)
    return [(step, faults(step, blueprint, where)) for step in for_each]


def too_large(model: str, where: Slice) -> CompiledStep:
    """A small step of a model that does not fit, compiled without asking the arithmetic."""
    anywhere = replace(where, chip=replace(where.chip, memory=None))
    blueprint, _ = draw_on(anywhere, ask(model, context=None, users=None, engine=SMALL), to_compile=True)
    return compile_step(blueprint, largest(blueprint)[0], where.chip.platform)


def exchanges(blueprint: Blueprint) -> dict[str, int]:
    """That a step's program must hold, and no others: two sums in a layer (a scan's layers are one period), one behind
    the embedding, and the logits' parts gathered."""
    if blueprint.sizes.tp == 1:
        return {}
    layers = blueprint.shape.period or blueprint.shape.config.num_layers
    return {"all-reduce": 2 * layers + 1, "all-gather": 1}


def bound(blueprint: Blueprint, bucket: Bucket) -> int:
    """Of temporaries: some float32 copies of the logits and of the activations of a layer; of an embedding whose width
    is no whole number of lanes (SmolLM2), one that has."""
    config, tp = blueprint.shape.config, blueprint.sizes.tp
    logits = 4 * bucket.num_rows * config.vocab_size
    activations = 2 * bucket.num_tokens * (config.embed_dim + config.mlp_dim // tp)
    relaid = 2 * config.vocab_size * -(-config.embed_dim // 128) * 128 if config.embed_dim % 128 else 0
    return 64 * MIB + 8 * logits + 8 * activations + relaid


def faults(step: CompiledStep, blueprint: Blueprint, where: Slice) -> list[str]:
    """What a step breaks of what is promised of every step."""
    if step.error is not None:
        return [step.error]
    found = []
    if step.needed > (where.chip.memory or 0):
        found.append(f"needs {step.needed} bytes of {where.chip.memory}")
    if step.cache_copies:
        found.append(f"{step.cache_copies} copies of the cache")
    if step.collectives != exchanges(blueprint):
        found.append(f"exchanges {step.collectives}, not {exchanges(blueprint)}")
    if step.temporaries >= bound(blueprint, step.bucket):
        found.append(f"{step.temporaries / MIB:.0f} MiB of temporaries, of {bound(blueprint, step.bucket) / MIB:.0f}")
    return found


def rows_of(model: str, where: Slice, steps: str, engine: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One result for every step, or one of a step that is too large."""
    base = {"model": read_model(model)[0], "topology": where.name, "devices": where.num_devices}
    base["available"] = where.chip.memory
    try:
        for step, found in compiled(model, where, steps, engine):
            yield base | asdict(step) | {"needed": step.needed, "faults": found}
    except ConfigError as error:
        if where.chip.platform == "gpu":  # whose compiler does not look at memory
            print(f"{model} on {where.name} is refused by arithmetic: {error}", file=sys.stderr)
            return
        step = too_large(model, where)
        found = [] if step.out_of_memory else ["is refused by arithmetic, and not by the compiler"]
        yield base | {"refused": str(error)} | asdict(step) | {"faults": found}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["topology"], *row["bucket"].values()


def line(row: dict[str, Any]) -> str:
    rows, tokens = row["bucket"]["num_decode"], row["bucket"]["num_prefill"]
    where = f"| {row['model']} | {row['topology']} | {rows} + {tokens} | {row['seconds']:.0f} s "
    if row["faults"]:
        return where + f"| | | {'; '.join(row['faults'])[:100]} |"
    if row["out_of_memory"]:
        return where + "| | | out of memory, as it must be |"
    told = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "none"
    sizes = f"{row['arguments'] / 2**30:.2f} GiB | {row['temporaries'] / MIB:.0f} MiB"
    return where + f"| {sizes} | {told} |"


def save(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    known = {key(row): row for row in json.loads(path.read_text())["steps"]} if path.exists() else {}
    known |= {key(row): row for row in rows}
    steps = [known[each] for each in sorted(known, key=str)]
    path.write_text(json.dumps({"unit": "bytes of one device", "steps": steps}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--steps", choices=("largest", "all"), default="largest")
    parser.add_argument("--rows", type=int, help="decode rows at most, where not the engine's default")
    parser.add_argument("--output", type=Path, help="JSON file, added to")
    options = parser.parse_args()
    engine = {} if options.rows is None else {"max_running": options.rows}
    bad = False
    print("| model | slice | rows + prompt tokens | compile | held | temporaries | exchanges |\n|" + "---|" * 7)
    for model in options.models:
        for topology in options.topologies:
            where = parse_slice(topology)
            if missing := why_no_compiler(where):
                print(f"{topology}: {missing}", file=sys.stderr)
                continue
            for row in rows_of(model, where, options.steps, engine):
                print(line(row), flush=True)
                bad |= bool(row["faults"])
                if options.output:
                    save(options.output, [row])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
