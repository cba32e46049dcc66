"""The attention kernels of this device: right, and how fast beside its own ceilings and other implementations.

python -m bench.kernels [--backend gpu|interpreted|xla] [--output bench/results/kernels-h200.json] [--small]

In one run: the device's ceilings, the bandwidth of a large copy, read and written, and the rate of a large product.
Then each shape is checked against the definition (kernels_pallas.reference, float32) on fresh random inputs, in memory
that was filled with NaN before: pages of nobody, tails of pages and what the kernels write to. Then a
decode step of 64 rows with 4,096 tokens each and the prefill of 8,192 tokens, as the engine calls them (the writes of
the new tokens included): the kernels, our XLA path, and cuDNN's attention, over contiguous K and V and over pages, the
latter by a private function of JAX. A call is a chain over several layers, so that no two read the same memory in a row
and the host's share is small; figures are medians.

--small: a small case of everything, for a trial on a CPU; interpreted: the Hopper kernels there.
"""

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import queued_seconds
from kernels_pallas import reference, xla
from kernels_pallas.attention import FULL, Attention, DecodeRows, LayerKind, PrefillChunks, choose, gpu_facts
from kernels_pallas.cache import KVCache, rows_per_page

PAGE = 64
TOLERANCE = 3e-2  # bfloat16 weights and outputs; values reach 4
SHAPES = {"llama-8b": (32, 8, 128), "llama-8b, 1 of 8": (4, 1, 128), "smollm2": (9, 3, 64), "gemma": (8, 4, 256)}
KINDS = {"full": FULL, "window": LayerKind(window=1000), "softcap": LayerKind(softcap=20.0, window=4096)}


def backend(name: str) -> Callable[[int], Attention]:
    """kv heads -> the implementation that is checked and timed."""
    if name == "xla":
        return lambda num_kv_heads: choose("cpu", "xla")
    if name == "gpu":
        device = jax.devices()[0]
        return lambda heads: choose(device.platform, "pallas", num_kv_heads=heads, **gpu_facts(device))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas import gpu

    options = {"num_blocks": 2}
    attend = functools.partial(gpu.attend, interpret=plgpu.InterpretGPUParams(detect_races=True), **options)
    return lambda heads: Attention("interpreted", functools.partial(gpu.plan, num_kv_heads=heads, **options), attend)


def poison(num_bytes: int) -> None:
    """Leave NaN in memory that is then free, for what is allocated next."""
    jax.block_until_ready(jnp.full(num_bytes // 2, jnp.nan, jnp.bfloat16))


def make_step(
    rng: np.random.Generator, shape: tuple[int, int, int], lengths: Sequence[int], chunks: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """A step of decode rows of so many tokens and chunks of (cached, new): page tables over pages in random order."""
    heads, kv_heads, dim = shape
    kv_lens = np.array([*lengths, *(cached + new for cached, new in chunks)], np.int32)
    counts = -(-kv_lens // PAGE)
    table = np.zeros((len(kv_lens), max(counts)), np.int32)
    order = 1 + rng.permutation(int(counts.sum())).astype(np.int32)
    for row, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
        table[row, :count] = order[start : start + count]
    starts, positions, row_of = [0], [], []
    for number, (cached, new) in enumerate(chunks):
        padded = -(-new // PAGE) * PAGE
        starts.append(starts[-1] + padded)
        positions += range(cached, cached + padded)
        row_of += [len(lengths) + number] * new + [-1] * (padded - new)
    token_rows = np.array([*(row if length else -1 for row, length in enumerate(lengths)), *row_of])
    tokens = np.array([*(max(length - 1, 0) for length in lengths), *positions], np.int32)
    num_decode = len(lengths)
    return {
        "num_pages": int(counts.sum()) + 1,
        "rows": DecodeRows(jnp.asarray(table[:num_decode]), jnp.asarray(kv_lens[:num_decode])) if lengths else None,
        "chunks": PrefillChunks(
            *(jnp.asarray(x) for x in (table[num_decode:], kv_lens[num_decode:])),
            jnp.asarray(starts, jnp.int32),
            jnp.asarray(positions, jnp.int32),
        )
        if chunks
        else None,
        "table": table,
        "token_rows": token_rows,
        "positions": tokens,
        "q": random(rng, len(tokens), heads, dim),
        "k": random(rng, len(tokens), kv_heads, dim),
        "v": random(rng, len(tokens), kv_heads, dim),
    }


def random(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Drawn on the device: caches are gigabytes."""
    return jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, jnp.bfloat16)


def random_pages(rng: np.random.Generator, step: dict[str, Any], shape: tuple[int, int, int], layers: int) -> jax.Array:
    return random(rng, layers, step["num_pages"], rows_per_page(shape[1], shape[2]), PAGE, 128)


def check(
    rng: np.random.Generator, attention: Attention, shape: tuple[int, int, int], kind: LayerKind
) -> dict[str, float]:
    """The largest difference from the definition in one step: of its decode rows, of its chunks."""
    size = 3 * PAGE
    lengths = [0, 1, PAGE, PAGE + 1, int(rng.integers(2, size)), size]
    step = make_step(rng, shape, lengths, [(0, int(rng.integers(1, size))), (2 * PAGE, PAGE + 1)])
    pages = np.array(random_pages(rng, step, shape, 2).astype(jnp.float32))
    owned = np.zeros((*pages.shape[1:2], PAGE), bool)
    for token, (row, position) in enumerate(zip(step["token_rows"], step["positions"], strict=True)):
        if row >= 0 and (token == 0 or step["token_rows"][token - 1] != row):  # what was there before the step
            before = np.arange(position)
            owned[step["table"][row, before // PAGE], before % PAGE] = True
    pages = np.where(owned[None, :, None, :, None], pages, np.nan)
    cache = KVCache(jnp.asarray(pages, jnp.bfloat16))
    real = step["token_rows"] >= 0
    q, k, v = (step[name] for name in "qkv")
    k, v = (jnp.where(real[:, None, None], x, jnp.nan) for x in (k, v))
    poison(64 * q.nbytes)
    run = jax.jit(lambda q, k, v, cache, work: attention.attend(q, k, v, cache, jnp.int32(1), work))
    work = jax.jit(lambda rows, chunks: attention.plan(rows, chunks, PAGE, kind))(step["rows"], step["chunks"])
    out, after = run(q, k, v, cache, work)
    table = step["table"][np.where(real, step["token_rows"], 0)]
    page = table[np.arange(len(real)), step["positions"] // PAGE]
    with jax.default_matmul_precision("highest"):
        wide = KVCache(cache.pages.astype(jnp.float32))
        place = (np.where(real, page, pages.shape[1]), step["positions"] % PAGE)
        wide = reference.write(wide, 1, k.astype(jnp.float32), v.astype(jnp.float32), *place)
        positions = np.where(real, step["positions"], -1)
        want = reference.attend(q.astype(jnp.float32), wide, 1, table, positions, shape[1], kind)
    np.testing.assert_array_equal(
        *(
            np.asarray(x[1][page[real], :, step["positions"][real] % PAGE], np.float32)
            for x in (after.pages, wide.pages)
        )
    )
    apart = np.abs(np.asarray(out, np.float32) - np.asarray(want))
    apart = np.where(np.isfinite(apart), apart, math.inf)  # rows of padding must be finite too
    apart[~real] = np.where(apart[~real] == math.inf, math.inf, 0)
    return {"decode": float(apart[: len(lengths)].max()), "prefill": float(apart[len(lengths) :].max())}


def checked(
    rng: np.random.Generator, attention: Attention, shape: tuple[int, int, int], kind: LayerKind
) -> dict[str, Any]:
    """What check says, and whether it is right; a kernel that fails is wrong, and says how."""
    try:
        apart = check(rng, attention, shape, kind)
    except Exception as error:
        return {"right": False, "error": f"{type(error).__name__}: {str(error).strip()[:2000]}"}
    return {"right": max(apart.values()) < TOLERANCE, "differs": apart}


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    return float(np.median(queued_seconds(run, 1 if jax.devices()[0].platform == "cpu" else 8, repeats)))


def ceilings(small: bool) -> dict[str, float]:
    """Bytes read and written a second by a copy, and operations a second of a product; of random numbers."""
    size = 2**22 if small else 2**30
    many = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    side = 512 if small else 8192
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x, y: x @ y)
    bandwidth = 2 * many.nbytes / median_seconds(lambda: copy(many), 10)
    return {
        "copy_bytes_s": bandwidth,
        "product_flop_s": 2 * side**3 / median_seconds(lambda: product(square, square), 10),
    }


def chain(attention: Attention, layers: int, kind: LayerKind) -> Callable:
    """A step's attention in all layers, each taking the outputs of the one before."""

    @functools.partial(jax.jit, donate_argnums=3)
    def run(q, k, v, cache, rows, chunks):
        work = attention.plan(rows, chunks, PAGE, kind)
        for layer in range(layers):
            out, cache = attention.attend(q, k, v, cache, jnp.int32(layer), work)
            q = (q + out).astype(q.dtype)
        return q, cache

    return run


def time_ours(
    attention: Attention, step: dict[str, Any], pages: jax.Array, repeats: int, kind: LayerKind = FULL
) -> float:
    """Seconds a layer."""
    layers = pages.shape[0]
    run = chain(attention, layers, kind)
    held = [KVCache(jnp.copy(pages))]

    def once() -> jax.Array:
        out, held[0] = run(step["q"], step["k"], step["v"], held[0], step["rows"], step["chunks"])
        return out

    return median_seconds(once, repeats) / layers


def time_cudnn_dense(
    rng: np.random.Generator, shape: tuple[int, int, int], rows: int, queries: int, keys: int, layers: int, repeats: int
) -> float:
    """jax.nn.dot_product_attention over contiguous K and V that are there already: no writes, no pages."""
    heads, kv_heads, dim = shape
    q = random(rng, rows, queries, heads, dim)
    k, v = (random(rng, layers, rows, keys, kv_heads, dim) for _ in range(2))

    @jax.jit
    def run(q, k, v):
        for layer in range(layers):
            attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=queries > 1)
            q = q + attend(q, k[layer], v[layer])
        return q

    return median_seconds(lambda: run(q, k, v), repeats) / layers


def time_cudnn_paged(
    rng: np.random.Generator, shape: tuple[int, int, int], rows: int, keys: int, layers: int, repeats: int
) -> float:
    """cuDNN over pages, through what JAX does not publish: a yardstick that may be gone with the next version."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    heads, kv_heads, dim = shape
    count = keys // PAGE
    q = random(rng, rows, 1, heads, dim)
    k, v = (random(rng, layers, rows * count, PAGE, kv_heads, dim) for _ in range(2))
    table = jnp.asarray(rng.permutation(rows * count).reshape(rows, 1, count, 1), jnp.int32)
    used, full = jnp.ones(rows, jnp.int32), jnp.full(rows, keys, jnp.int32)

    @jax.jit
    def run(q, k, v):
        for layer in range(layers):
            options = {"scale": dim**-0.5, "mask_type": MaskType.PADDING}
            q = q + paged_attention(q, k[layer], v[layer], used, full, table, table, **options)
        return q

    return median_seconds(lambda: run(q, k, v), repeats) / layers


def compare(named: dict[str, Callable[[], float]], floor: float) -> dict[str, Any]:
    """Milliseconds of each, or why there are none; and the floor's share of them."""
    results: dict[str, Any] = {"floor_ms": floor * 1e3}
    for name, run in named.items():
        try:
            seconds = run()
        except Exception as error:
            results[name] = {"skipped": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            continue
        results[name] = {"ms": seconds * 1e3, "of_floor": floor / seconds}
    return results


def decode(rng: np.random.Generator, ours: Callable, shape: tuple[int, int, int], limits: dict, small: bool) -> dict:
    """64 rows of 4,096 tokens: the floor is reading K and V once, at the copy's bandwidth."""
    rows, context, layers, repeats = (4, 192, 2, 2) if small else (64, 4096, 4, 15)
    kv_bytes = rows * context * 2 * shape[1] * shape[2] * 2
    step = make_step(rng, shape, [context] * rows, [])
    pages = random_pages(rng, step, shape, layers)
    windowed = LayerKind(window=context // 4)
    return {"rows": rows, "context": context, "kv_bytes": kv_bytes} | compare(
        {
            "kernels": lambda: time_ours(ours(shape[1]), step, pages, repeats),
            "kernels again": lambda: time_ours(ours(shape[1]), step, pages, repeats),
            "kernels, window of a quarter": lambda: time_ours(ours(shape[1]), step, pages, repeats, windowed),
            "xla": lambda: time_ours(Attention("xla", xla.plan, xla.attend), step, pages, repeats),
            "cudnn, contiguous": lambda: time_cudnn_dense(rng, shape, rows, 1, context, layers, repeats),
            "cudnn, pages": lambda: time_cudnn_paged(rng, shape, rows, context, layers, repeats),
        },
        kv_bytes / limits["copy_bytes_s"],
    )


def ragged(rng: np.random.Generator, ours: Callable, shape: tuple[int, int, int], limits: dict, small: bool) -> dict:
    """As many tokens in rows of very different lengths, one of which has a third of them."""
    rows, tokens, layers, repeats = (4, 512, 2, 2) if small else (64, 64 * 4096, 4, 15)
    weights = rng.exponential(size=rows)
    weights[0] = weights[1:].sum() / 2
    lengths = np.maximum((tokens * weights / weights.sum()).astype(int), 1).tolist()
    kv_bytes = sum(lengths) * 2 * shape[1] * shape[2] * 2
    step = make_step(rng, shape, lengths, [])
    pages = random_pages(rng, step, shape, layers)
    return {"rows": rows, "longest": max(lengths), "kv_bytes": kv_bytes} | compare(
        {"kernels": lambda: time_ours(ours(shape[1]), step, pages, repeats)}, kv_bytes / limits["copy_bytes_s"]
    )


def prefill(
    rng: np.random.Generator, ours: Callable, shape: tuple[int, int, int], limits: dict, small: bool, cached: int
) -> dict:
    """8,192 tokens, new or the last half of them: the floor is their products, causal, at the large product's rate."""
    tokens, layers, repeats = (256, 2, 2) if small else (8192, 4, 10)
    new = tokens - cached * tokens // 2
    pairs = new * (tokens - new) + new * (new + 1) // 2
    flops = 4 * shape[0] * shape[2] * pairs
    step = make_step(rng, shape, [], [(tokens - new, new)])
    pages = random_pages(rng, step, shape, layers)
    peers = {
        "kernels": lambda: time_ours(ours(shape[1]), step, pages, repeats),
        "kernels again": lambda: time_ours(ours(shape[1]), step, pages, repeats),
        "xla": lambda: time_ours(Attention("xla", xla.plan, xla.attend), step, pages, 2),
    }
    if not cached:
        peers["cudnn, contiguous"] = lambda: time_cudnn_dense(rng, shape, 1, tokens, tokens, layers, repeats)
    return {"tokens": tokens, "new": new, "flops": flops} | compare(peers, flops / limits["product_flop_s"])


def facts() -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "seed": None,
    }


def show(title: str, result: dict[str, Any]) -> None:
    print(f"{title}: floor {result['floor_ms']:.3f} ms")
    for name, each in result.items():
        if isinstance(each, dict):
            said = (
                f"{each['ms']:9.3f} ms  {each['of_floor']:6.1%} of the floor's speed"
                if "ms" in each
                else each["skipped"]
            )
            print(f"  {name:30} {said}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("gpu", "interpreted", "xla"), default="gpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--small", action="store_true", help="a small case of everything")
    parser.add_argument("--check", action="store_true", help="only whether they are right")
    parser.add_argument("--seed", type=int, default=int(np.random.SeedSequence().entropy % 2**31))
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    rng, ours = np.random.default_rng(args.seed), backend(args.backend)
    result = facts() | {"seed": args.seed, "backend": args.backend, "small": args.small, "checks": []}

    def keep() -> None:  # after each part: what was measured is kept whatever comes
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    result["ceilings"] = limits = {} if args.check else ceilings(args.small)
    if limits:
        print(f"copy {limits['copy_bytes_s'] / 1e12:.3f} TB/s, product {limits['product_flop_s'] / 1e12:.1f} TFLOP/s")
    for name in args.shapes:
        shape = (2, 1, SHAPES[name][2]) if args.small else SHAPES[name]
        for kind in args.kinds:
            told = {"shape": name, "kind": kind} | checked(rng, ours(shape[1]), shape, KINDS[kind])
            result["checks"].append(told)
            print(f"{name:20} {kind:8} {told}{'' if told['right'] else '  WRONG'}", flush=True)
        keep()
        if args.check:
            continue
        parts = {
            "decode": decode,
            "decode, ragged": ragged,
            "prefill": functools.partial(prefill, cached=0),
            "prefill, half cached": functools.partial(prefill, cached=1),
        }
        for title, part in parts.items():
            timed = part(rng, ours, shape, limits, args.small)
            result.setdefault("timings", {}).setdefault(name, {})[title] = timed
            show(f"{name}, {title}", timed)
            keep()
    return 0 if all(each["right"] for each in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
