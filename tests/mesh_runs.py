"""Engines on meshes of eight virtual CPU devices, in a process of their own: `python tests/mesh_runs.py NAME...`.

Prints one line of JSON: run -> what it answered, and which collectives its programs hold. XLA's flags must be set
before jax is imported, and NPROC too: the devices' threads meet in every collective, and two cores would have too few.
"""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["NPROC"] = "16"

import numpy as np
from engines import Driver, build_engine, cache_folder, greedy, quiet, shared_folder
from tiny_bert import write_tiny_bert

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Engine
from jaxserve.engine.encoder import build_encoder
from jaxserve.engine.grammars import load_vocabulary
from jaxserve.engine.weights import read_encoder_config
from jaxserve.scheduling.encoder import EncoderQueue
from jaxserve.text.grammar import regex
from jaxserve.types import Request, SamplingParams

SIZES: dict[str, Any] = {"max_running": 4, "chunked_prefill_size": 16, "max_total_tokens": 4096, "device": "cpu"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Name -> model of tests/engines.py, with weights and cache in 8 bits where that is said, ranks, devices of a rank.
RUNS = {
    f"{model} {dp}x{tp}": (model, dp, tp)
    for model, meshes in {
        "tied": ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2), (8, 1)),
        "grouped": ((1, 1), (1, 2), (1, 8)),
        "biased": ((1, 1), (1, 2), (1, 4)),
        "tied-int8": ((1, 1), (1, 2), (2, 2)),
        "grouped-fp8": ((1, 1), (1, 2), (1, 8)),
    }.items()
    for dp, tp in meshes
}


def wanted(vocab_size: int) -> list[tuple[Any, ...]]:
    """Greedy, sampled and constrained texts, scored prompts and vectors; more of them than there are rows."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in (5, 40, 17, 30, 3)]
    sampled = SamplingParams(max_tokens=10, seed=5, temperature=1.0, top_p=0.9, presence_penalty=0.3, num_logprobs=2)
    scored = SamplingParams(max_tokens=0, seed=0, num_prompt_logprobs=2)
    texts: list[tuple[Any, ...]] = [(prompt, greedy(12)) for prompt in prompts]
    texts += [(prompt, sampled) for prompt in prompts[1:3]]
    texts += [(prompt, scored) for prompt in prompts[1:4]]
    texts += [(prompt, None) for prompt in prompts[2:]]
    return [*texts, (prompts[0], greedy(8), regex("[0-9]{9}")), (prompts[3], greedy(8), regex("(ab|cd)+"))]


def answers_of(engine: Engine, folder: str) -> list[dict[str, Any]]:
    vocabulary = load_vocabulary(folder, engine.model.vocab_size, engine.model.eos_token_ids)
    sizes = engine.sizes
    driver = Driver(engine.runner, sizes.scheduler, vocabulary=vocabulary, num_ranks=sizes.dp)
    return [
        {
            "tokens": answer.token_ids,
            "reason": answer.reason,
            "logprobs": [told.logprob for told in answer.logprobs if told is not None],
            "prompt": [told.logprob for told in answer.prompt_logprobs if told is not None],
            "vector": [] if answer.vector is None else answer.vector.tolist(),
        }
        for answer in driver.run(wanted(engine.model.vocab_size))
    ]


def collectives_of(program: Any) -> dict[str, int]:
    """How many of each kind; an asynchronous pair counts once."""
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program.as_text())
    return dict(Counter(found))


def run_encoder(dp: int) -> dict[str, Any]:
    """A tiny BERT on dp devices: vectors of texts of several lengths."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_bert(folder)
        sizes: dict[str, Any] = {"max_running": 4, "chunked_prefill_size": 64}
        config = EngineConfig(folder, cache_folder(), device="cpu", dp_size=dp, **sizes)
        model = read_encoder_config(config)
        assert model is not None
        encoder = build_encoder(config, model, quiet)
    line = EncoderQueue(encoder.buckets)
    for index, length in enumerate((3, 16, 9, 30, 40, 2, 7)):
        ids = tuple(range(4, 4 + length))
        line.add(Request(index, tuple(4 + i % 20 for i in ids), SamplingParams(max_tokens=0, seed=0), task="embed"))
    vectors: dict[int, list[float]] = {}
    while (batch := line.take()) is not None:
        for request, vector in zip(batch.requests, encoder.runner.launch(batch).result(), strict=False):
            vectors[request.id] = vector.tolist()
    return {"vectors": [vectors[index] for index in sorted(vectors)], "devices": encoder.num_devices}


def run(name: str) -> dict[str, Any]:
    model, dp, tp = RUNS[name]
    model, _, small = model.partition("-")
    options = {"quantization": small, "kv_cache_dtype": small} if small else {}
    engine = build_engine(shared_folder(model), **SIZES, **options, dp_size=dp, tp_size=tp)
    programs = engine.runner._programs
    step = next(step for bucket, step in programs.steps.items() if not bucket.num_prefill)
    parts = {"begin": step.first, "layers": step.layers, "finish": step.sample}
    return {
        "answers": answers_of(engine, shared_folder(model)),
        "collectives": {part: collectives_of(program) for part, program in parts.items()},
        "layers": engine.model.num_layers // len(step.firsts),
        "devices": engine.num_devices,
        "pages": engine.runner._state.cache.pages.addressable_shards[0].data.shape,
    }


if __name__ == "__main__":
    found = {name: run(name) for name in sys.argv[1:]}
    found |= {f"encoder {dp}": run_encoder(dp) for dp in (1, 2)}
    print(json.dumps(found))
