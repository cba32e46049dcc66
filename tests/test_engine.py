"""The engine on a tiny model: the same text whatever happens to a request, nothing compiled after ready, its ends."""

import functools
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from engines import Driver, chunked, greedy, shared_engine, shared_folder
from fake_runner import FakeRunner, expected
from fake_runner import params as fake_params
from tiny_llama import tiny_tokenizer

from bench.replay import replay
from jaxserve.config import EngineConfig
from jaxserve.engine import main as engine_main
from jaxserve.engine.grammars import load_vocabulary
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.record import Recording, RecordingRunner
from jaxserve.model.sampling import Asks
from jaxserve.scheduling.plan import Bucket, StepPlan
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig
from jaxserve.text.grammar import regex
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import (
    AbortRequests,
    AddRequests,
    EngineFailed,
    FlushCache,
    FromEngine,
    Ready,
    Request,
    SamplingParams,
    StepEvents,
    Stop,
    ToEngine,
)

VOCAB = tiny_tokenizer().get_vocab_size()
ROOT = Path(__file__).resolve().parent.parent
Prompt = list[int]


def draw_prompts(*lengths: int) -> list[Prompt]:
    seed = int(os.environ.get("SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"SEED={seed}")
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def seeded(max_tokens: int, seed: int = 7, **changed: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": max_tokens, "seed": seed, "temperature": 1.0} | changed))


def slots_of(driver: Driver, prompt: Prompt) -> set[int]:
    rows = [(plan, row) for plan in driver.plans for row, s in plan.sequences if s.request.token_ids == tuple(prompt)]
    return {int(plan.arrays.slots[row]) for plan, row in rows}


# The real runner, shared


def test_smoke_requests_are_answered_and_nothing_compiles():
    engine = shared_engine("tied")
    engine.counter.start_counting_this_thread()
    driver = Driver(engine.runner, engine.sizes.scheduler)
    wanted = [(prompt, greedy(5)) for prompt in draw_prompts(3, 40, 17)]
    wanted += [(wanted[0][0], seeded(6, top_p=0.9, top_k=20, frequency_penalty=0.5, logit_bias=((5, 2.0),)))]
    answers = driver.run(wanted)
    assert [len(answer.token_ids) for answer in answers] == [5, 5, 5, 6]
    assert all(answer.reason == "length" for answer in answers)
    assert all(0 <= token < VOCAB for answer in answers for token in answer.token_ids)
    assert driver.stats.num_held_pages == 0
    assert engine.counter.after_ready == 0
    jax.jit(lambda x: x + len(wanted))(np.float32(1))
    assert engine.counter.after_ready > 0, "the counter counts nothing"


def test_an_unknown_bucket_is_a_key_error_and_never_a_compile():
    engine = shared_engine("tied")
    plan_of = engine.runner.padding_plan
    engine.counter.start_counting_this_thread()
    before = engine.counter.after_ready
    with pytest.raises(KeyError):
        engine.runner._begin(Bucket(3, 0, 0), plan_of(Bucket(3, 0, 0)), Asks.ANYTHING)
    assert engine.counter.after_ready == before


SAMPLERS = {
    "seeded": {},
    "truncated": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.4},
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.2},
    "bias and min_tokens": {
        "logit_bias": ((9, 4.0), (11, 4.0), (2, 6.0)),
        "min_tokens": 18,
        "stop_token_ids": (2, 9),
        "frequency_penalty": 0.4,
    },
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_text_cold_warm_preempted_in_company_and_in_another_slot(sampler):
    engine = shared_engine()
    sizes = engine.sizes.scheduler
    prompt, *others = draw_prompts(70, 60, 64, 90, 33, 48)
    wanted = (prompt, seeded(30, **SAMPLERS[sampler]))
    company = [(other, seeded(40, seed, **SAMPLERS["penalties"])) for seed, other in enumerate(others)]
    driver = Driver(engine.runner, sizes)
    cold = driver.run([wanted])[0]
    (warm,) = driver.run([wanted])
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 64)
    assert cold.token_ids == warm.token_ids
    assert len(set(cold.token_ids)) > 1
    if "min_tokens" in SAMPLERS[sampler]:
        assert len(cold.token_ids) >= 18
        assert not {2, 9} & set(cold.token_ids[:17])
    others_first = Driver(engine.runner, sizes)
    *_, last = others_first.run([*company[:3], wanted])
    assert last.token_ids == cold.token_ids
    assert not slots_of(others_first, prompt) & slots_of(driver, prompt)
    # 11 pages take the three prompts and not their answers: the youngest gives way, and comes back.
    tight = Driver(engine.runner, replace(sizes, num_pages=12))
    short = [(other[:20], seeded(80, seed)) for seed, other in enumerate(others[:2])]
    *_, preempted = tight.run([*short, wanted])
    assert tight.stats.preemptions_total > 0
    assert sum(plan.num_new_sequences for plan in tight.plans) > 3, "nobody came back"
    assert preempted.token_ids == cold.token_ids
    one_by_one = Driver(engine.runner, chunked(sizes, 16), overlap=False)
    assert one_by_one.run([wanted])[0].token_ids == cold.token_ids


def test_penalties_and_bias_of_one_row_leave_its_neighbours_alone():
    engine = shared_engine()
    prompts = draw_prompts(20, 30, 25)
    plain = [(prompt, greedy(15)) for prompt in prompts]
    alone = [Driver(engine.runner, engine.sizes.scheduler).run([each])[0].token_ids for each in plain]
    odd = (prompts[0], greedy(15, frequency_penalty=2.0, logit_bias=((17, 50.0),)))
    together = Driver(engine.runner, engine.sizes.scheduler).run([odd, *plain])
    assert [answer.token_ids for answer in together[1:]] == alone
    assert together[0].token_ids[0] == 17


def test_choices_of_one_seed_differ_and_come_again():
    engine = shared_engine()
    (prompt,) = draw_prompts(40)
    wanted = [(prompt, seeded(12, choice=choice)) for choice in range(3)]
    first, again = (Driver(engine.runner, engine.sizes.scheduler).run(wanted) for _ in range(2))
    texts = [tuple(answer.token_ids) for answer in first]
    assert len(set(texts)) == 3
    assert texts == [tuple(answer.token_ids) for answer in again]
    assert first[1].cached_tokens == 32, "the second choice did not find the first one's prompt"


def test_recorded_plans_run_again_give_the_same_tokens(tmp_path):
    """What --record-plans writes is all that the device was told."""
    engine = shared_engine()
    config = EngineConfig(shared_folder("grouped"), "cache", record_plans=str(tmp_path / "plans"), disable_overlap=True)
    ticks = iter(range(10**6))
    recorder = RecordingRunner(engine.runner, config, clock=lambda: float(next(ticks)))
    wanted = [(prompt, seeded(9, **SAMPLERS["bias and min_tokens"])) for prompt in draw_prompts(30, 70)]
    vocabulary = load_vocabulary(shared_folder("grouped"), engine.model.vocab_size, engine.model.eos_token_ids)
    driver = Driver(recorder, engine.sizes.scheduler, vocabulary=vocabulary)
    answers = driver.run([*wanted, (wanted[0][0][:5], greedy(12), regex("[a-z]{4} [0-9]{30}"))])
    assert re.fullmatch("[a-z]{4} [0-9]{4,11}", text_of(shared_folder("grouped"), answers[2].token_ids))
    recorder.save(str(tmp_path / "plans"))
    recording = Recording.load(str(tmp_path / "plans"))
    assert recording.config == replace(config, record_plans=None)
    assert [plan.bucket for plan in recording.plans] == [plan.bucket for plan in driver.plans]
    assert [plan.admissions for plan in recording.plans] == [plan.admissions for plan in driver.plans]
    assert sum(len(plan.admissions) for plan in recording.plans) == 2
    steps = len(recording.plans)
    again = replay(engine.runner, recording, range(2, steps))
    assert (again.steps, again.different_tokens) == (steps - 2, 0)
    assert again.tokens > 20
    assert again.recorded_seconds == recording.read[-1] - recording.launched[2]
    other = tuple(np.where(ids > 0, ids - 1, 1) for ids in recording.token_ids)
    assert replay(engine.runner, replace(recording, token_ids=other), range(steps)).different_tokens > 20


def text_of(folder: str, ids: Sequence[int]) -> str:
    return Tokenizer.from_folder(folder).decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("overlap", [True, False])
def test_constrained_rows_obey_their_grammars_and_the_rows_beside_them_are_as_without_them(overlap):
    """More requests than rows, and fewer pages than they need: some wait, some are preempted."""
    engine, folder = shared_engine(), shared_folder("grouped")
    vocabulary = load_vocabulary(folder, engine.model.vocab_size, engine.model.eos_token_ids)
    prompts = draw_prompts(30, 5, 17, 40, 3, 8)
    patterns = [r"(yes|no) [a-f]{3,8}\.", None, "[0-9]{2}(:[0-9]{2})*", None, '"[^"]*"', None]
    stop = Tokenizer.from_folder(folder).eos_token_ids
    wanted = [
        (
            prompt,
            replace(seeded(40) if i % 3 else greedy(40), stop_token_ids=stop if pattern else ()),
            pattern and regex(pattern),
        )
        for i, (prompt, pattern) in enumerate(zip(prompts, patterns, strict=True))
    ]
    plain = Driver(engine.runner, engine.sizes.scheduler).run([w[:2] for w in wanted if w[2] is None])
    small = replace(engine.sizes.scheduler, num_pages=8)
    driver = Driver(engine.runner, small, overlap, vocabulary)
    answers = driver.run(wanted)
    assert [a.token_ids for a, p in zip(answers, patterns, strict=True) if p is None] == [a.token_ids for a in plain]
    again = Driver(engine.runner, engine.sizes.scheduler, overlap, vocabulary).run(wanted[::-1])[::-1]
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]
    for answer, pattern in zip(answers, patterns, strict=True):
        if pattern is not None:
            text = text_of(folder, answer.token_ids)
            matcher = vocabulary.compile(regex(pattern)).inner
            assert matcher.try_consume_tokens(answer.token_ids) == len(answer.token_ids), text
            assert answer.reason == "length" or re.fullmatch(pattern, text), text
    assert answers[0].reason == "stop"
    assert driver.stats.preemptions_total > 0


# The loop, on a runner that hashes what it reads


LOOP_SIZES = SchedulerConfig(
    num_pages=33,
    page_size=4,
    max_model_len=64,
    max_running=6,
    decode_buckets=(2, 4, 6),
    prefill_buckets=((8, 1), (16, 3)),
)


class PromptRunner(FakeRunner):
    """Done at launch."""

    def launch(self, plan: StepPlan) -> Any:
        return SimpleNamespace(result=functools.partial(lambda result: result, super().launch(plan)))


class Harness:
    """EngineLoop in a thread of its own, spoken to as the pipe's reader does."""

    def __init__(self, runner: Any = None, **options: Any) -> None:
        sizes = LOOP_SIZES
        self.runner = runner or PromptRunner(sizes.num_pages, sizes.page_size, sizes.max_running, sizes.max_pages)
        self.scheduler = Scheduler(sizes)
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.sent: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        options = {"compilations": lambda: 0} | options
        self.loop = EngineLoop(self.scheduler, self.runner, self.inbox, self.sent.put, **options)
        self.tokens: dict[int, list[int | None]] = {}
        self.reasons: dict[int, str] = {}
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def start(self) -> "Harness":
        self.thread.start()
        return self

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, (self.tokens, self.reasons)
            events = self.sent.get(timeout=20)
            assert isinstance(events, StepEvents)
            self.stats = events.stats
            for request_id, token, reason in zip(
                events.request_ids, events.token_ids, events.finish_reasons, strict=True
            ):
                self.tokens.setdefault(request_id, []).append(token)
                if reason is not None:
                    assert request_id not in self.reasons, "ended twice"
                    self.reasons[request_id] = reason

    def stop(self) -> None:
        self.inbox.put(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive()


def make_requests(count: int, max_tokens: int = 9) -> list[Request]:
    prompts = [tuple((i * 7 + j) % 97 for j in range(3 + 5 * i)) for i in range(count)]
    return [Request(i, prompt, fake_params(max_tokens=max_tokens)) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_loop_answers_everything_with_and_without_overlap(overlap):
    harness = Harness(overlap=overlap).start()
    requests = make_requests(9)
    harness.inbox.put(AddRequests(tuple(requests[:5])))
    harness.inbox.put(AddRequests(tuple(requests[5:])))
    harness.wait_until(lambda: len(harness.reasons) == 9)
    harness.stop()
    for request in requests:
        assert (harness.tokens[request.id], harness.reasons[request.id]) == expected(request, 64)
    assert bool(harness.runner.counts["take_last"]) == overlap
    assert not harness.scheduler.has_work
    harness.scheduler.check_invariants()


class HeldRunner(PromptRunner):
    """Launches some steps, then waits until it is let go on."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(LOOP_SIZES.num_pages, LOOP_SIZES.page_size, LOOP_SIZES.max_running, LOOP_SIZES.max_pages)
        self.steps_left, self.go_on = num_steps, threading.Event()

    def launch(self, plan: StepPlan) -> Any:
        self.steps_left -= 1
        if self.steps_left < 0:
            assert self.go_on.wait(20)
        return super().launch(plan)


def test_an_abort_is_answered_once_and_frees_its_pages_and_unknown_ids_are_ignored():
    runner = HeldRunner(12)
    harness = Harness(runner).start()
    requests = make_requests(3, max_tokens=40)
    harness.inbox.put(AddRequests(tuple(requests)))
    harness.wait_until(lambda: len(harness.tokens.get(0, ())) > 2)
    harness.inbox.put(AbortRequests((0, 77)))
    harness.inbox.put(AbortRequests((0,)))
    runner.go_on.set()
    harness.wait_until(lambda: len(harness.reasons) == 3)
    assert harness.reasons == {0: "abort", 1: "length", 2: "length"}
    assert harness.tokens[0][-1] is None
    assert harness.tokens[0][:-1] == expected(requests[0], 64)[0][: len(harness.tokens[0]) - 1]
    assert harness.tokens[1] == expected(requests[1], 64)[0]
    harness.stop()
    assert harness.scheduler.stats().num_held_pages == 0


def test_a_flush_empties_the_prefix_cache_of_an_idle_engine():
    harness = Harness().start()
    (request,) = make_requests(5)[4:]
    harness.inbox.put(AddRequests((request,)))
    harness.wait_until(lambda: bool(harness.reasons))
    assert harness.stats.num_cached_pages > 0
    harness.inbox.put(FlushCache())
    harness.stop()
    assert harness.scheduler.stats().num_cached_pages == 0


def test_stop_ends_a_loop_that_is_busy_and_one_that_is_idle():
    Harness().start().stop()
    harness = Harness().start()
    harness.inbox.put(AddRequests(tuple(make_requests(3, max_tokens=45))))
    harness.wait_until(lambda: bool(harness.tokens))
    harness.stop()


def test_the_loop_says_how_full_and_fast_it_is(caplog):
    caplog.set_level(logging.INFO, logger="jaxserve.engine.loop")
    harness = Harness(decode_log_interval=4, compilations=lambda: 3).start()
    harness.inbox.put(AddRequests(tuple(make_requests(2, max_tokens=12))))
    harness.wait_until(lambda: len(harness.reasons) == 2)
    harness.stop()
    prefill = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Prefill batch.")]
    decode = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Decode batch.")]
    assert "#new-seq: 2, #new-token: 11, #cached-token: 0, cache hit rate: 0.00%" in prefill[0]
    assert "#running-req: 2" in decode[0] and "gen throughput (token/s):" in decode[0] and "#cache_miss: 3" in decode[0]
    assert len(decode) in (2, 3)


# How it ends


HANG = """
import logging, queue, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_engine import Harness, make_requests
from jaxserve.engine.loop import start_watchdog
from jaxserve.types import AddRequests
class Hung:
    def launch(self, plan):
        return self
    def result(self):
        time.sleep(60)
logging.basicConfig()
harness = Harness(Hung())
start_watchdog(harness.loop, 0.4)
time.sleep(1.2)  # an idle engine is not a hung one
print("idle", flush=True)
harness.inbox.put(AddRequests(tuple(make_requests(1))))
harness.loop.run()
"""


def test_the_watchdog_ends_a_process_whose_step_hangs_and_leaves_an_idle_one():
    code = HANG.format(root=str(ROOT), tests=str(ROOT / "tests"))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "idle\n"), ended.stderr
    assert "--watchdog-timeout" in ended.stderr


def run_main(config: EngineConfig) -> tuple[int, list[FromEngine]]:
    """engine.main.run until it ends by itself -> its exit code and all it said."""
    ours, theirs = Pipe()
    said: list[FromEngine] = []

    def listen() -> None:
        # Not until the pipe's end: the engine's own reader still holds the other one.
        while not said or not isinstance(said[-1], EngineFailed):
            said.append(ours.recv())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    code = engine_main.run(theirs, config)
    theirs.close()
    listener.join(5)
    return code, said


def test_what_a_person_can_mend_ends_the_engine_with_2_and_says_what(tmp_path):
    code, said = run_main(EngineConfig(str(tmp_path), str(tmp_path)))
    assert code == 2
    assert isinstance(said[-1], EngineFailed)
    assert said[-1].exit_code == 2 and "config.json" in said[-1].message
    folder = shared_folder("tied")
    code, said = run_main(EngineConfig(folder, str(tmp_path), max_model_len=10**6))
    assert (code, said[-1].exit_code) == (2, 2)
    assert "--max-model-len 1000000" in said[-1].message
    code, said = run_main(EngineConfig(folder, str(tmp_path), tp_size=3))
    assert code == 2 and "--tp-size 3 and --dp-size 1 take 3 devices" in said[-1].message


def test_a_step_that_fails_ends_the_engine_with_1_and_its_message(monkeypatch):
    """Everything is real but the device."""

    class Broken:
        num_programs = 1

        def launch(self, plan: Any) -> Any:
            raise RuntimeError("the device caught fire")

    engine = shared_engine("tied")
    monkeypatch.setattr(
        "jaxserve.engine.build.build", lambda config, report, machines: replace(engine, runner=Broken())
    )
    monkeypatch.setattr("gc.freeze", lambda: None)  # this process goes on
    ours, theirs = Pipe()
    results: list[int] = []
    config = EngineConfig("unused", "unused", watchdog_timeout=0)
    thread = threading.Thread(target=lambda: results.append(engine_main.run(theirs, config)), daemon=True)
    thread.start()
    ready = ours.recv()
    assert isinstance(ready, Ready)
    assert (ready.vocab_size, ready.page_size, ready.platform) == (VOCAB, 16, "cpu")
    assert ready.num_pages == engine.sizes.scheduler.num_pages - 1
    ours.send(AddRequests((Request(0, (5, 6, 7), greedy(3)),)))
    failed = ours.recv()
    thread.join(10)
    assert failed == EngineFailed("RuntimeError: the device caught fire", exit_code=1)
    assert results == [1]


def test_the_end_of_the_pipe_ends_the_engine(monkeypatch):
    engine = shared_engine("tied")
    monkeypatch.setattr("jaxserve.engine.build.build", lambda config, report, machines: engine)
    monkeypatch.setattr("gc.freeze", lambda: None)
    ours, theirs = Pipe()
    results: list[int] = []
    config = EngineConfig("unused", "unused", watchdog_timeout=0)
    thread = threading.Thread(target=lambda: results.append(engine_main.run(theirs, config)), daemon=True)
    thread.start()
    assert isinstance(ours.recv(), Ready)
    ours.send(AddRequests((Request(0, (5, 6, 7), greedy(400)),)))
    assert isinstance(ours.recv(), StepEvents)
    ours.close()
    thread.join(20)
    assert results == [0]
