"""The engine's steps compiled for accelerators that are not there: what each needs, exchanges and copies.

python -m bench.aot_matrix [--models Llama-3.1-8B …] [--topologies v6e:2x4 …] [--steps largest|all] [--output FILE]

With --output, results are put into that JSON beside those that are there already, so that the matrix can be made in
pieces. Bytes are those of one device; seconds are what compiling took here, with whatever else this machine did.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no accelerator is touched

from jaxserve.config import ConfigError
from jaxserve.planner.compiled import compile_step
from jaxserve.planner.models import read_model
from jaxserve.planner.plan import ask, draw_on, largest
from jaxserve.planner.slices import Slice, parse_slice
from jaxserve.planner.targets import why_no_compiler
from jaxserve.scheduling.buckets import buckets
from jaxserve.scheduling.plan import Bucket

MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-32B", "Llama-3.3-70B")
TOPOLOGIES = ("v5e:1x1", "v5e:2x4", "v6e:1x1", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1", "h200:1", "h200:8")


def rows_of(model: str, where: Slice, steps: str) -> Iterable[dict[str, Any]]:
    """One result for every step, or one that says why there is none."""
    base = {"model": read_model(model)[0], "topology": where.name, "devices": where.num_devices}
    try:
        blueprint, _ = draw_on(where, ask(model, context=None, users=None, engine={}), to_compile=True)
    except ConfigError as error:
        yield base | {"refused": str(error)}
        return
    wanted: Sequence[Bucket] = largest(blueprint) if steps == "largest" else buckets(blueprint.sizes.scheduler)
    for bucket in wanted:
        step = compile_step(blueprint, bucket, where.chip.platform)
        yield base | {"available": where.chip.memory} | asdict(step) | {"needed": step.needed}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["topology"], *(row.get("bucket") or {}).values()


def line(row: dict[str, Any]) -> str:
    where = f"| {row['model']} | {row['topology']} "
    if "refused" in row:
        return where + f"| | | | | refused: {row['refused'].partition(':')[0]} |"
    rows, tokens = row["bucket"]["num_decode"], row["bucket"]["num_prefill"]
    if row["error"]:
        return where + f"| {rows} + {tokens} | {row['seconds']:.0f} s | | | {row['error'][:60]} |"
    exchanges = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "none"
    sizes = f"{row['arguments'] / 2**30:.2f} GiB | {row['temporaries'] / 2**20:.0f} MiB"
    return where + f"| {rows} + {tokens} | {row['seconds']:.0f} s | {sizes} | {exchanges} |"


def save(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    known = {key(row): row for row in json.loads(path.read_text())["steps"]} if path.exists() else {}
    known |= {key(row): row for row in rows}
    steps = [known[each] for each in sorted(known, key=str)]
    path.write_text(json.dumps({"unit": "bytes of one device", "steps": steps}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--steps", choices=("largest", "all"), default="largest")
    parser.add_argument("--output", type=Path, help="JSON file, added to")
    options = parser.parse_args()
    print("| model | slice | rows + prompt tokens | compile | held | temporaries | exchanges |\n|" + "---|" * 7)
    for model in options.models:
        for topology in options.topologies:
            where = parse_slice(topology)
            if missing := why_no_compiler(where):
                print(f"{topology}: {missing}", file=sys.stderr)
                continue
            for row in rows_of(model, where, options.steps):
                print(line(row), flush=True)
                if options.output:
                    save(options.output, [row])


if __name__ == "__main__":
    main()
