"""What 8 bits cost in quality: weights and KV cache in each of them against float32, on the CPU or what is there.

python -m bench.quality [--model SmolLM2-135M-Instruct] [--only int8/int8 …] [--output quality.json]

A fixed text (tests/data/golden_smollm2.json's long-1989, the licence) goes through the engine's own step in chunks of
256 tokens, so that most tokens attend to keys and values that come out of the cache. Of its logits, against float32:

    logits      root of the mean squared difference, each position's mean taken off, as a share of the logits' spread
    KL          of the next token's distribution from float32's, nats, averaged over positions
    perplexity  of the text
    top 1       positions whose likeliest token is the same
    greedy      the golden prompts, answered one after another: how many of the golden tokens are there before the first
                other one, and how many answers are whole

The text's log-probabilities in float32 must be those that were recorded with torch, else nothing is measured.
"""

import argparse
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.step import surroundings
from checkpoints.hub import resolve_model
from jaxserve.config import DEFAULT_MODEL, EngineConfig, default_cache_dir
from jaxserve.engine.build import draw
from jaxserve.engine.compile import precision
from jaxserve.engine.sizing import DeviceFacts
from jaxserve.engine.step import StepShape, begin, run_layers
from jaxserve.engine.weights import load_params, read_model_config
from jaxserve.model.sharding import Params, make_mesh, merge
from jaxserve.planner.footprint import footprint
from jaxserve.scheduling.plan import Bucket, packed_size, unpack
from kernels_pallas.cache import KVCache

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden_smollm2.json"
TEXT, RECORDED_TOLERANCE = 7, 0.5  # nats of a text of 1,989 tokens
CHUNK = 256


@dataclass(frozen=True)
class Variant:
    dtype: str
    quantization: str
    kv_cache_dtype: str

    def __str__(self) -> str:
        weights = self.dtype if self.quantization == "none" else self.quantization
        return f"{weights}/{self.dtype if self.kv_cache_dtype == 'auto' else self.kv_cache_dtype}"


FLOAT32 = Variant("float32", "none", "auto")
VARIANTS = (
    Variant("float32", "int8", "auto"),
    Variant("float32", "fp8", "auto"),
    Variant("float32", "none", "bfloat16"),
    Variant("float32", "none", "int8"),
    Variant("float32", "none", "fp8"),
    Variant("float32", "int8", "int8"),
    Variant("float32", "fp8", "fp8"),
    Variant("bfloat16", "none", "auto"),
)


@dataclass(frozen=True)
class Quality:
    """Of one variant. weights: bytes; token: bytes of the cache for one token."""

    variant: str
    weights: int
    token: int
    perplexity: float
    logit_error: float  # share of the spread
    largest_logit_error: float  # likewise, of one logit
    kl: float  # nats
    same_top: float  # share of positions
    golden_tokens: float  # share
    whole_answers: str


class Forward:
    """One row of a model, step by step: tokens in, logits of each of them out."""

    def __init__(self, model: str, variant: Variant):
        cache_dir = default_cache_dir(os.environ, os.path.expanduser("~"))
        found = resolve_model(model, cache_dir=cache_dir, progress=lambda stage, done, total: None)
        config = EngineConfig(
            found.folder,
            cache_dir,
            gguf_path=found.gguf_path,
            orbax_path=found.orbax_path,
            max_running=1,
            max_total_tokens=8192,
            **asdict(variant),
        )
        device = jax.devices()[0]
        blueprint = draw(
            read_model_config(config),
            config,
            DeviceFacts(device.platform, 1, None),
            lambda sizes: make_mesh([device]),
        )
        self.sums = footprint(blueprint)
        self._shape = blueprint.shape
        self._params = load_params(
            config, blueprint.shape.config, blueprint.parameters, lambda *stage: None, period=blueprint.shape.period
        )
        state = blueprint.runner.target(blueprint.params, None).state
        self._last_token = jnp.zeros(state.last_token.shape, state.last_token.dtype)
        self._cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.cache)
        self._run = jax.jit(
            functools.partial(_logits, shape=blueprint.shape), static_argnames="bucket", donate_argnames="cache"
        )
        self._length = 0

    def restart(self) -> None:
        """What the cache holds is written over."""
        self._length = 0

    def feed(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """[n, V] float32 of one chunk after another."""
        for start in range(0, len(token_ids), CHUNK):
            yield self.step(token_ids[start : start + CHUNK])

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """[n, V] float32 of up to CHUNK tokens; several must begin where a page does."""
        size, count = self._shape.page_size, len(token_ids)
        bucket = Bucket(1, 0, 0) if count == 1 and self._length else Bucket(0, CHUNK, 1)
        vector = np.zeros(packed_size(bucket, self._shape.max_pages), np.int32)
        arrays = unpack(vector, bucket, self._shape.max_pages)
        arrays.token_ids[:count] = token_ids
        arrays.positions[:] = self._length + np.arange(bucket.num_tokens)
        self._length += count
        arrays.kv_lens[:] = self._length
        if bucket.num_chunks:
            arrays.chunk_starts[:] = 0, CHUNK
        pages = -(-self._length // size)
        arrays.page_table[0, :pages] = 1 + np.arange(pages)
        with precision(self._params):
            logits, self._cache = self._run(self._params, self._last_token, self._cache, vector, bucket=bucket)
        return np.asarray(logits)[:count]

    def greedy(self, prompt: Sequence[int], wanted: Sequence[int]) -> int:
        """How many of the wanted tokens come before another one."""
        self.restart()
        *_, logits = self.feed(prompt)
        for done, token in enumerate(wanted):
            if int(logits[-1].argmax()) != token:
                return done
            logits = self.step([token])
        return len(wanted)


def _logits(
    params: Params, last_token: jax.Array, cache: KVCache, vector: jax.Array, *, shape: StepShape, bucket: Bucket
) -> tuple[jax.Array, KVCache]:
    """-> [S + T, V] of every token, where a step computes those of each row's last one."""
    hidden, shared = begin(params.embed, last_token, vector, shape=shape, bucket=bucket)
    hidden, cache = run_layers(params.layers, hidden, cache, jnp.int32(0), shared, shape=shape)
    logits = merge(shape.structure.head, params.head)(hidden, merge(shape.structure.embed, params.embed))
    return (logits.T if shape.layout.feature_major else logits), cache


def measure(forward: Forward, variant: Variant, text: Sequence[int], exact: np.ndarray, cases: list[Any]) -> Quality:
    """exact [T, V]: float32's logits of the text."""
    forward.restart()
    found = np.concatenate(list(forward.feed(text)))
    squares, spread, largest, kl = 0.0, 0.0, 0.0, 0.0
    for row in range(len(text)):  # a row at a time: [T, V] is 400 MB
        ours, theirs = found[row].astype(np.float64), exact[row].astype(np.float64)
        difference = (ours - ours.mean()) - (theirs - theirs.mean())
        squares, spread = squares + (difference**2).mean(), spread + theirs.var()
        largest = max(largest, np.abs(difference).max())
        p, q = _log_softmax(theirs), _log_softmax(ours)
        kl += float((np.exp(p) * (p - q)).sum())
    agreed = [forward.greedy(case["prompt_ids"], case["greedy_ids"]) for case in cases]
    lengths = [len(case["greedy_ids"]) for case in cases]
    whole = sum(a == b for a, b in zip(agreed, lengths, strict=True))
    return Quality(
        variant=str(variant),
        weights=forward.sums.weights,
        token=forward.sums.token_bytes,
        perplexity=math.exp(-log_probability(found, text) / (len(text) - 1)),
        logit_error=math.sqrt(squares / spread),
        largest_logit_error=float(largest / math.sqrt(spread / len(text))),
        kl=kl / len(text),
        same_top=float((found.argmax(-1) == exact.argmax(-1)).mean()),
        golden_tokens=sum(agreed) / sum(lengths),
        whole_answers=f"{whole} of {len(cases)}",
    )


def log_probability(logits: np.ndarray, text: Sequence[int]) -> float:
    """Of all tokens behind the first, natural logarithm."""
    return sum(float(_log_softmax(row.astype(np.float64))[token]) for row, token in zip(logits, text[1:], strict=False))


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def table(results: Sequence[Quality]) -> str:
    """Markdown."""
    lines = ["| weights/cache | MB | bytes a token | perplexity | logits | KL | top 1 | greedy | whole |"]
    lines.append("|---" * 9 + "|")
    for each in results:
        lines.append(
            f"| {each.variant} | {each.weights / 1e6:.0f} | {each.token:,} | {each.perplexity:.3f} "
            f"| {each.logit_error:.2%} | {each.kl:.5f} | {each.same_top:.1%} | {each.golden_tokens:.0%} "
            f"| {each.whole_answers} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what the golden prompts were tokenised for")
    parser.add_argument("--only", nargs="+", help="weights/cache, as the table names them")
    parser.add_argument("--output", type=Path, help="JSON; what is there of other variants is kept")
    args = parser.parse_args()
    told = {"model": args.model, "device": jax.devices()[0].device_kind} | surroundings()
    cases = json.loads(GOLDEN.read_text())["cases"]
    text = cases[TEXT]["prompt_ids"]
    forward = Forward(args.model, FLOAT32)
    exact = np.concatenate(list(forward.feed(text)))
    recorded = cases[TEXT]["prompt_logprob_sum"]
    if abs(log_probability(exact, text) - recorded) > RECORDED_TOLERANCE:
        raise SystemExit(f"float32 says {log_probability(exact, text):.2f} of the text, torch said {recorded:.2f}")
    results: dict[str, Quality] = {}
    if args.output and args.output.exists():
        results = {each["variant"]: Quality(**each) for each in json.loads(args.output.read_text())["results"]}
    for variant in (FLOAT32, *VARIANTS):
        if args.only is not None and str(variant) not in args.only:
            continue
        measured = forward if variant == FLOAT32 else Forward(args.model, variant)
        results[str(variant)] = measure(measured, variant, text, exact, cases)
        print(results[str(variant)], flush=True)
        if args.output:  # each takes a minute or two
            written = told | {"results": [asdict(each) for each in results.values()]}
            args.output.write_text(json.dumps(written, indent=1) + "\n")
    print(table(list(results.values())))


if __name__ == "__main__":
    main()
