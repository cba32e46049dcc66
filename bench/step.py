"""Device time of a step per bucket, against its floor: what memory and arithmetic alone would take.

python -m bench.step [--dtype bfloat16] [--batch 1 4 16] [--context 128 2048] [--prefill 64 256] [--config config.json]

Floor: the larger of (bytes of all weights and of the K and V that are attended to) / bandwidth and (operations of all
products) / rate; bandwidth is that of reading a large array and rate that of a large product, best of several, both
measured in the same run, in the same dtype. The weights are random, in the shapes of the default model or of a
config.json. Steps are launched one after another without reading between them; sampling is greedy.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import device_kernels, queued_seconds, show
from jaxserve.child import ENVIRONMENT
from jaxserve.config import EngineConfig, ModelConfig, default_cache_dir
from jaxserve.engine.build import Engine, build
from jaxserve.engine.sizing import ITEMSIZE
from jaxserve.scheduling.buckets import choose_bucket
from jaxserve.scheduling.plan import EMIT, SAMPLE, TRUNCATE, Bucket, StepPlan, packed_size, unpack
from jaxserve.version import __version__

DEFAULT_SHAPES = {  # SmolLM2-135M
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Machine:
    """What this device does at best: bytes and operations per second."""

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Measured:
    """One bucket at one context; milliseconds. bound: which of the two makes the floor."""

    num_decode: int
    num_prefill: int
    num_chunks: int
    context: int
    step_ms: float
    floor_ms: float
    ratio: float
    bound: str
    sampled_ms: float | None = None  # the same step where every row draws within a top_p
    kernels_ms: float | None = None  # of its time, what the device's kernels took under the profiler


def measure_machine(dtype: str) -> Machine:
    """Reads an array of half a gigabyte, or 8 on an accelerator, as row sums and as a product with a vector, whichever
    is quicker; multiplies square matrices of random numbers."""
    on_cpu = jax.devices()[0].platform == "cpu"

    def best(run: Callable[[], jax.Array]) -> float:
        return min(queued_seconds(run, 1 if on_cpu else 4, 7))

    columns = (2**29 if on_cpu else 2**33) // 8192 // ITEMSIZE[dtype]
    rows, vector = jnp.ones((8192, columns), dtype), jnp.ones(columns, dtype)
    sums, product = jax.jit(lambda x: jnp.sum(x, axis=1)), jax.jit(lambda x, y: x @ y)
    reading = min(best(lambda: sums(rows)), best(lambda: product(rows, vector)))
    size = 2048 if on_cpu else 8192
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return Machine(rows.nbytes / reading, 2 * size**3 / best(lambda: product(square, square)))


def matmul_parameters(model: ModelConfig) -> tuple[int, int]:
    """-> weights of all layers' products, weights of the head."""
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.embed_dim * model.mlp_dim), model.vocab_size * model.embed_dim


def floor(engine: Engine, machine: Machine, bucket: Bucket, context: int) -> tuple[float, str]:
    """-> seconds that no step of this bucket can beat, and what binds it. A chunk's tokens see half of the chunk."""
    model, itemsize = engine.model, ITEMSIZE[engine.sizes.dtype]
    layers, head = matmul_parameters(model)
    share = bucket.num_prefill // max(bucket.num_chunks, 1)
    attended = bucket.num_decode * context + bucket.num_prefill * (context + share / 2)
    read = bucket.num_decode * context + bucket.num_chunks * (context + share)
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(engine.sizes.kv_dtype).itemsize
    weights = layers * (1 if model.quantization else itemsize) + head * itemsize
    seconds_memory = (weights + kv_bytes * read) / machine.bandwidth
    operations = 2 * (layers * bucket.num_tokens + head * bucket.num_rows)
    operations += 4 * model.num_layers * model.num_heads * model.head_dim * attended
    seconds_compute = operations / machine.rate
    return max(seconds_memory, seconds_compute), "memory" if seconds_memory > seconds_compute else "compute"


def make_plan(
    engine: Engine,
    bucket: Bucket,
    context: int,
    *,
    rows: int | None = None,
    chunks: int | None = None,
    sampled: bool = False,
) -> StepPlan | None:
    """Decode rows with context tokens before the new one, chunks behind context cached tokens (whole pages) that share
    the prefill tokens evenly; all that the bucket has, or so many. None where a row would be longer than the server
    allows."""
    sizes = engine.sizes.scheduler
    page_size, num_decode = sizes.page_size, bucket.num_decode
    cached = context // page_size * page_size
    chunks = min(chunks or bucket.num_chunks, bucket.num_prefill // page_size)  # there may be more rows than pages
    share = bucket.num_prefill // max(chunks, 1) // page_size * page_size
    if max(context + 1, cached + share if chunks else 0) > sizes.max_model_len:
        return None
    packed = engine.runner.padding_plan(bucket)
    assert packed.size == packed_size(bucket, sizes.max_pages)
    arrays = unpack(packed, bucket, sizes.max_pages)
    used = num_decode + chunks
    arrays.kv_lens[: num_decode if rows is None else rows] = context + 1
    arrays.kv_lens[num_decode:used] = cached + share
    arrays.positions[:num_decode] = context
    arrays.positions[num_decode:] = cached + np.arange(bucket.num_prefill) % share
    for chunk in range(chunks):
        arrays.chunk_starts[chunk] = chunk * share
    if chunks:  # what the last chunk leaves over is padding
        arrays.positions[num_decode + chunks * share :] = cached + share
    arrays.slots[:used] = np.arange(used) % sizes.max_running
    arrays.flags[:used] = EMIT
    if sampled:
        arrays.flags[:used] |= SAMPLE | TRUNCATE
        arrays.temperature[:] = np.float32(0.8).view(np.int32)
        arrays.top_p[:] = np.float32(0.95).view(np.int32)
    pages = -(-arrays.kv_lens[:used] // page_size)
    start = 0
    for row, count in enumerate(pages):  # pages of their own, as long as the pool has some
        arrays.page_table[row, :count] = 1 + (start + np.arange(count)) % (sizes.num_pages - 1)
        start += count
    return StepPlan(bucket, packed, arrays, (), (), bucket.num_tokens)


def step_seconds(engine: Engine, plan: StepPlan, budget: float) -> float:
    """Median over 5 runs of the time per step; budget: seconds for all of them, more or less."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            handle = engine.runner.launch(plan)
        handle.result()
        return (time.perf_counter() - start) / count

    count = max(2, round(budget / 6 / max(run(2), 1e-6)))
    return float(np.median([run(count) for _ in range(5)]))


def against(engine: Engine, plan: dict[str, Any], budget: float) -> dict[str, dict[str, float]]:
    """What `jaxserve plan --json` said before the machine was there, and what is found on it: bytes of a device, and
    seconds of the steps that it gives a roofline of."""
    sizes, memory = engine.sizes.scheduler, plan["memory"]
    params, state = (jax.tree.leaves(tree) for tree in (engine.runner._params, engine.runner._state))
    pages = engine.runner._state.cache.pages.nbytes
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", math.nan)
    found = {
        "weights, bytes": (memory["weights"], sum(leaf.nbytes for leaf in params)),
        "KV cache, bytes": (memory["kv_cache"], pages),
        "state, bytes": (memory["state"], sum(leaf.nbytes for leaf in state) - pages),
        "in all, bytes at most": (
            memory["weights"] + memory["kv_cache"] + memory["state"] + (memory["temporaries"] or 0),
            used,
        ),
    }
    for speed in (plan["alone"], plan["full"]):
        users, context = speed["users"], speed["context"] - 1
        step = make_plan(engine, choose_bucket(sizes, users, 0, 0), context, rows=users)
        assert step is not None
        name = f"a step of {users} with {context} tokens, s"
        found[name] = (speed["step_seconds"], step_seconds(engine, step, budget))
    if plan["prompt"] is not None:
        context, chunk = plan["alone"]["context"], sizes.chunk_size
        bucket = choose_bucket(sizes, 0, chunk, 1)
        steps = [make_plan(engine, bucket, start, chunks=1) for start in range(0, context, chunk)]
        seconds = [step_seconds(engine, step, budget / len(steps)) for step in steps if step is not None]
        found[f"a prompt of {context}, s"] = (plan["prompt"]["seconds"], sum(seconds))
    print(f"{'':36} {'predicted':>12} {'measured':>12} {'ratio':>6}")
    for name, (predicted, measured) in found.items():
        shown = [f"{value / 2**20:.1f} MiB" if "bytes" in name else f"{value * 1e3:.3f} ms" for value in found[name]]
        print(f"{name:36} {shown[0]:>12} {shown[1]:>12} {measured / predicted:>6.3f}", flush=True)
    return {name: {"predicted": predicted, "measured": measured} for name, (predicted, measured) in found.items()}


def surroundings() -> dict[str, Any]:
    """When, where and with what something is measured."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "versions": {"jaxserve": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
    }


def facts(engine: Engine, shapes: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Of what is measured, beside where."""
    return {
        "device": engine.device_kind,
        "platform": engine.platform,
        **surroundings(),
        "dtype": engine.sizes.dtype,
        "quantization": engine.model.quantization,
        "kv_cache_dtype": engine.sizes.kv_dtype,
        "shapes": shapes,
        "page_size": engine.sizes.scheduler.page_size,
        "num_pages": engine.sizes.scheduler.num_pages,
        "bandwidth_gb_s": round(machine.bandwidth / 1e9, 2),
        "rate_gflop_s": round(machine.rate / 1e9, 1),
    }


def measure(engine: Engine, machine: Machine, args: argparse.Namespace) -> list[Measured]:
    """Every compiled bucket that the flags let through, at every context."""
    results = []
    print(f"{'decode':>6} {'prefill':>8} {'context':>8} {'step ms':>9} {'floor ms':>9} {'ratio':>6}  bound")
    for bucket in engine.runner.buckets:
        batch_wanted = args.batch is None or bucket.num_decode in (*args.batch, 0)
        if not batch_wanted or (args.prefill is not None and bucket.num_prefill not in (*args.prefill, 0)):
            continue
        for context in args.context:
            plan = make_plan(engine, bucket, context)
            if plan is None:
                continue
            seconds = step_seconds(engine, plan, args.seconds)
            least, bound = floor(engine, machine, bucket, context)
            drawn = make_plan(engine, bucket, context, sampled=True) if args.sampled else None
            shape = (bucket.num_decode, bucket.num_prefill, bucket.num_chunks, context)
            figures = (round(seconds * 1e3, 3), round(least * 1e3, 3), round(seconds / least, 2), bound)
            sampled = drawn and round(step_seconds(engine, drawn, args.seconds) * 1e3, 3)
            traced = device_kernels(lambda plan=plan: engine.runner.launch(plan).result(), 5) if args.kernels else []
            kernels = round(sum(milliseconds for _, milliseconds, _ in traced), 3) or None
            result = Measured(*shape, *figures, sampled, kernels)
            results.append(result)
            prefill = f"{bucket.num_prefill}/{bucket.num_chunks}" if bucket.num_prefill else "-"
            print(
                f"{bucket.num_decode:>6} {prefill:>8} {context:>8} {result.step_ms:>9.2f} {result.floor_ms:>9.2f} "
                f"{result.ratio:>6.2f}  {bound}" + (f"; {result.sampled_ms} ms where rows draw" if drawn else ""),
                flush=True,
            )
            show(traced, args.kernels)
    return results


def say(stage: str, done: int, total: int, message: str) -> None:
    if stage == "compile" or done == total:
        print(f"{stage}: {message}", file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", type=Path, help="config.json of another model (default: SmolLM2-135M's shapes)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("none", "int8", "fp8"), default="none")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "float32", "bfloat16", "int8", "fp8"), default="auto")
    parser.add_argument("--batch", type=int, nargs="+", help="decode rows (default: every compiled number)")
    parser.add_argument("--prefill", type=int, nargs="+", help="prefill tokens (default: every compiled number)")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 2048], help="tokens before the new ones")
    parser.add_argument("--max-running", type=int, help="the engine's --max-running-requests")
    parser.add_argument("--chunked-prefill-size", type=int)
    parser.add_argument("--mixed", action="store_true", help="compile and measure mixed steps too")
    parser.add_argument("--sampled", action="store_true", help="each step with rows that draw, too")
    parser.add_argument("--plan", type=Path, help="of jaxserve plan --json with the same flags: to compare")
    parser.add_argument("--kernels", type=int, default=0, help="of the device, that a step spends most time in")
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure, about")
    parser.add_argument("--output", type=Path, help="default: bench/results/step-PLATFORM-DTYPE.json")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    if not ENVIRONMENT.keys() <= os.environ.keys():  # what an engine process is started with counts from its start
        os.execve(sys.executable, [sys.executable, "-m", "bench.step", *sys.argv[1:]], ENVIRONMENT | os.environ)
    shapes = json.loads(args.config.read_text()) if args.config else DEFAULT_SHAPES
    cache_dir = default_cache_dir(os.environ, os.path.expanduser("~"))
    options = {
        "max_running": args.max_running,
        "chunked_prefill_size": args.chunked_prefill_size,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shapes))
        config = EngineConfig(
            folder, cache_dir, load_format="dummy", dtype=args.dtype, mixed_chunk=args.mixed or None, **options
        )
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{config.allocator_fraction:.3f}")  # as in a server
        machine = measure_machine(args.dtype)  # while there is room
        engine = build(config, say)
    told = facts(engine, shapes, machine)
    cpu = told["machine"]["cpu"] if engine.platform == "cpu" else engine.device_kind
    print(f"{cpu[:48]}, {args.dtype}: {told['bandwidth_gb_s']} GB/s, {told['rate_gflop_s']} GFLOP/s")
    results = measure(engine, machine, args)
    compared = against(engine, json.loads(args.plan.read_text()), args.seconds) if args.plan else None
    output = args.output or Path(__file__).parent / "results" / f"step-{engine.platform}-{args.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    found = {"steps": [asdict(result) for result in results], "plan": compared}
    output.write_text(json.dumps(told | found, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
