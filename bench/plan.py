"""What `jaxserve plan` says of this CPU against what an engine of the default model really takes here.

python -m bench.plan [--output FILE]

Arrays are counted by JAX; resident memory is what the kernel says the process grew by, programs and libraries included.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

import jax

from checkpoints.hub import resolve_model
from jaxserve.config import DEFAULT_MODEL, EngineConfig, default_cache_dir
from jaxserve.engine.build import build
from jaxserve.planner.plan import make_plan


def resident() -> int:
    """Bytes of this process in memory. Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    cache = default_cache_dir(os.environ, str(Path.home()))
    model = resolve_model(DEFAULT_MODEL, cache_dir=cache, progress=lambda *_: None)
    plan = make_plan(model.folder, "cpu")
    assert plan.memory is not None
    before = resident()
    config = EngineConfig(model.folder, cache, gguf_path=model.gguf_path, orbax_path=model.orbax_path)
    engine = build(config, lambda *_: None)
    params, state = (jax.tree.leaves(tree) for tree in (engine.runner._params, engine.runner._state))
    pages = engine.runner._state.cache.pages.nbytes
    weights, held = (sum(leaf.nbytes for leaf in leaves) for leaves in (params, state))
    rows = {
        "weights": (plan.memory.weights, weights),
        "KV cache": (plan.memory.kv_cache, pages),
        "state": (plan.memory.state, held - pages),
        "resident": (plan.memory.used, resident() - before),
    }
    print("| | predicted | measured |\n|---|---|---|")
    for name, (predicted, measured) in rows.items():
        print(f"| {name} | {predicted / 2**20:.1f} MiB | {measured / 2**20:.1f} MiB |")
    if options.output:
        found = {name: {"predicted": a, "measured": b} for name, (a, b) in rows.items()}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
