"""Compiled tiny engines for tests, without a server: the runner of engine.build under a scheduler of the test's choice.

Compiling is what costs: 10 to 30 s a shape when cold, 2 to 6 s from the persistent cache, so modules share what is
built here, and vary the scheduler instead. Its buckets may be any subset of the compiled ones.
"""

import functools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_llama import LLAMA3_SCALING, write_tiny_llama

from jaxserve.config import EngineConfig, default_cache_dir
from jaxserve.engine import runner as runner_module
from jaxserve.engine.build import Engine, build
from jaxserve.engine.loop import Runner
from jaxserve.engine.runner import ModelRunner
from jaxserve.engine.step import StepShape
from jaxserve.engine.weights import load_params, read_model_config
from jaxserve.model.llama import Layout
from jaxserve.model.sharding import describe, make_mesh
from jaxserve.model.stacked import abstract, period_of
from jaxserve.scheduling.grammar import Vocabulary
from jaxserve.scheduling.plan import Plan
from jaxserve.scheduling.ranks import make_scheduler
from jaxserve.scheduling.readings import read_messages
from jaxserve.scheduling.scheduler import SchedulerConfig, buckets
from jaxserve.types import Embedded, EngineStats, Request, SamplingParams, StepEvents, TokenLogprobs
from kernels_pallas.attention import choose

MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"rope_scaling": LLAMA3_SCALING},
    "tied": {"seed": 1, "tie": True, "heads": 9, "kv_heads": 3, "head_dim": 24, "embed": 72},
    "biased": {
        "seed": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 80,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
# Every model is compiled for a context of 512 tokens in pages of 16.
SMALL: dict[str, Any] = {"max_running": 2, "chunked_prefill_size": 16, "max_total_tokens": 1024}
FULL: dict[str, Any] = {"max_running": 4, "chunked_prefill_size": 64, "max_total_tokens": 1024, "mixed_chunk": True}


def cache_folder() -> str:
    """Compiled programs are kept from run to run: $JAXSERVE_TEST_CACHE, or the user's own cache."""
    return os.environ.get("JAXSERVE_TEST_CACHE") or default_cache_dir(os.environ, os.path.expanduser("~"))


@functools.cache
def shared_folder(name: str) -> str:
    """One of MODELS, written once a session."""
    return write_tiny_llama(tempfile.mkdtemp(prefix=f"tiny-{name}-"), **MODELS[name])


def shared_engine(name: str = "grouped") -> Engine:
    """Built once a session: "grouped" with every kind of step, the others small."""
    return _built_engine(name)


@functools.cache
def _built_engine(name: str) -> Engine:
    return build_engine(shared_folder(name), **(FULL if name == "grouped" else SMALL))


def quiet(stage: str, done: int, total: int, message: str) -> None:
    """Nobody watches the progress."""


def build_engine(folder: str, **config: Any) -> Engine:
    return build(EngineConfig(folder, cache_folder(), **{"dtype": "float32"} | config), quiet)


def build_runner(
    monkeypatch: Any,
    folder: str,
    sizes: SchedulerConfig,
    *,
    layout: str = "cpu",
    prefill_only: bool = False,
    attention: str = "xla",
) -> ModelRunner:
    """A runner on the CPU in the layout of any platform, each step being one program. attention: xla, or pallas for the
    TPU kernels, interpreted."""
    config = EngineConfig(folder, cache_folder())
    model, mesh = read_model_config(config), make_mesh(jax.devices()[:1])
    structure, description = describe(model, jnp.dtype("float32"), mesh, layout)
    chosen = choose("cpu", attention)
    period = period_of(model, layout)
    pages = (sizes.page_size, sizes.max_pages, sizes.chunk_size)
    shape = StepShape(model, Layout.of(layout), structure, chosen, *pages, period)
    made = ModelRunner(shape, sizes, mesh, jnp.dtype("float32"))
    monkeypatch.setattr(runner_module, "layers_per_program", lambda config, platform: None)
    wanted = [bucket for bucket in buckets(sizes) if bucket.num_prefill or not prefill_only]
    monkeypatch.setattr(runner_module, "buckets", lambda sizes: wanted)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    try:
        made.compile(abstract(description, period), lambda done, total: None)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    made.load(load_params(config, model, description, quiet, period=period))
    return made


@dataclass
class Answer:
    """What one request was told."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    reason: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    vector: np.ndarray | None = None


@dataclass
class Driver:
    """EngineLoop's turn as a plain loop, with a scheduler (and so a prefix cache) of its own."""

    runner: Runner
    config: SchedulerConfig
    overlap: bool = True
    vocabulary: Vocabulary | None = None  # for requests with a grammar
    num_ranks: int = 1
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(self.config, self.num_ranks)
        self._next_id = 0

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def run(
        self,
        wanted: Iterable[
            tuple[Sequence[int], SamplingParams | None] | tuple[Sequence[int], SamplingParams, str | None]
        ],
        on_turn: Callable[[int], None] = lambda turn: None,
    ) -> list[Answer]:
        """(prompt, params, grammar) of requests that arrive together -> their answers, in that order. No params: embed
        it."""
        answers: dict[int, Answer] = {}
        for prompt, params, *more in wanted:
            grammar = more[0] if more else None
            matcher = self.vocabulary.compile(grammar) if grammar is not None and self.vocabulary is not None else None
            task: Any = "embed" if params is None else "generate"
            given = params or SamplingParams(max_tokens=0, seed=0)
            request = Request(self._next_id, tuple(prompt), given, grammar=grammar, task=task)
            self.scheduler.add(request, 0.0, matcher)
            answers[self._next_id] = Answer()
            self._next_id += 1
        flight: deque[tuple[Plan, Any]] = deque()
        turn = 0
        while self.scheduler.has_work or flight:
            on_turn(turn)
            turn += 1
            if flight and not self.overlap:
                self._commit(*flight.popleft(), answers)
            plan = self.scheduler.schedule(float(turn))
            if plan is not None:
                self.plans.append(plan)
                flight.append((plan, self.runner.launch(plan)))
            while len(flight) > (plan is not None):
                self._commit(*flight.popleft(), answers)
            if plan is not None and plan.is_constrained:
                masks, events = self.scheduler.constrain(plan)
                flight[-1][1].sample(masks)
                self._read(events, answers)
            self.scheduler.check_invariants()
        return list(answers.values())

    def _commit(self, plan: Plan, handle: Any, answers: dict[int, Answer]) -> None:
        result = handle.result()
        messages = [m for part, told in zip(plan.parts, result.parts, strict=True) for m in read_messages(part, told)]
        for message in messages:
            answer = answers[message.request_id]
            assert not answer.token_ids and answer.vector is None, "told after the first token, or twice"
            if isinstance(message, Embedded):
                answer.vector = np.frombuffer(message.vector, np.float32)
            else:
                assert message.first == len(answer.prompt_logprobs)
                answer.prompt_logprobs.extend(message.logprobs)
        self._read(self.scheduler.commit(plan, result), answers)

    def _read(self, events: StepEvents, answers: dict[int, Answer]) -> None:
        columns = (events.request_ids, events.token_ids, events.finish_reasons, events.cached_tokens, events.logprobs)
        for request_id, token, reason, cached, logprobs in zip(*columns, strict=True):
            answer = answers[request_id]
            if token is not None:
                answer.token_ids.append(token)
                answer.logprobs.append(logprobs)
            answer.cached_tokens = cached
            if reason is not None:
                answer.reason = reason


def chunked(sizes: SchedulerConfig, *prefill: int, **changed: Any) -> SchedulerConfig:
    """sizes with only those of its prefill buckets that have so many tokens."""
    return replace(sizes, prefill_buckets=tuple(b for b in sizes.prefill_buckets if b[0] in prefill), **changed)


def greedy(max_tokens: int, **changed: Any) -> SamplingParams:
    """Greedy, every token with its 20 likeliest."""
    return SamplingParams(**({"max_tokens": max_tokens, "seed": 0, "temperature": 0.0, "num_logprobs": 20} | changed))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., V] -> natural log-probabilities, in the dtype given."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
