"""The scheduler against a device that keeps token ids in its pages: a wrong page, slot or length is a wrong answer."""

import os
import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_runner import VOCAB, FakeRunner, expected, expected_readings, params
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduling import plan as words
from jaxserve.scheduling.readings import read_messages
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig, buckets
from jaxserve.types import Embedded, PromptLogprobs, Request, StepEvents

PAGE = 4
FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all; make test runs a tenth


def make_config(**changed) -> SchedulerConfig:
    default: dict[str, Any] = {
        "num_pages": 33,
        "page_size": PAGE,
        "max_model_len": 64,
        "max_running": 6,
        "decode_buckets": (2, 4, 6),
        "prefill_buckets": ((8, 1), (16, 3)),
    }
    return SchedulerConfig(**(default | changed))


@dataclass
class Server:
    """The engine's loop around a scheduler and a fake runner, checking everything after every turn."""

    config: SchedulerConfig
    depth: int = 1  # steps launched before the first of them is read; 0: no overlap
    now: float = 0.0
    answers: dict[int, list] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, list] = field(default_factory=dict)
    told: dict[int, list] = field(default_factory=dict)  # of the prompt
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    plans: list = field(default_factory=list)
    pending: deque = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        config = self.config
        self.runner = FakeRunner(config.num_pages, config.page_size, config.max_running, config.max_pages)

    def check(self) -> None:
        self.scheduler.check_invariants()
        self.runner.poison(self.scheduler._pool._free)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.answers[request.id], self.logprobs[request.id], self.told[request.id] = [], [], []
            self.scheduler.add(request, self.now)

    def abort(self, *ids: int) -> None:
        self.read(self.scheduler.abort(ids))
        self.check()

    def abort_now_and_then(self, rng: random.Random, aborted: set[int]) -> None:
        """Any request, ended ones too, and one that was never there; aborted takes in one that had not ended."""
        if self.answers and rng.random() < 0.03:
            victim = rng.choice(list(self.answers))
            if victim not in self.reasons:
                aborted.add(victim)
            self.abort(victim, 10**9)

    def read(self, events: StepEvents) -> None:
        columns = (events.request_ids, events.token_ids, events.finish_reasons, events.cached_tokens, events.logprobs)
        for request_id, token, reason, cached, logprobs in zip(*columns, strict=True):
            assert request_id not in self.reasons, "an event after the end"
            if token is not None:
                self.answers[request_id].append(token)
                self.logprobs[request_id].append(logprobs)
            assert self.cached.setdefault(request_id, cached) == cached or token is None
            if reason:
                self.reasons[request_id] = reason

    def read_prompts(self, messages: list[PromptLogprobs | Embedded]) -> None:
        for message in messages:
            id_ = message.request_id
            assert id_ not in self.reasons and not self.answers[id_] and id_ not in self.vectors
            if isinstance(message, Embedded):
                self.vectors[id_] = np.frombuffer(message.vector, np.float32)
            else:
                assert message.first == len(self.told[id_]) and message.logprobs
                self.told[id_].extend(message.logprobs)

    def turn(self) -> words.StepPlan | None:
        """One round of the engine's loop."""
        self.now += 0.01
        plan = self.scheduler.schedule(self.now)
        self.runner.poison(self.scheduler._pool._free)
        if plan is not None:
            self.plans.append(plan)
            self.pending.append((plan, self.runner.launch(plan)))
        assert self.pending or not self.scheduler.has_work, "work, but nothing to do"
        if self.pending and (plan is None or len(self.pending) > self.depth):
            done = self.pending.popleft()
            self.read_prompts(read_messages(*done))
            self.read(self.scheduler.commit(*done))
        self.check()
        return plan

    def run(self, max_turns: int = 5000) -> None:
        for _ in range(max_turns):
            if not self.scheduler.has_work and not self.pending:
                return
            self.turn()
        raise AssertionError(f"not finished after {max_turns} turns")

    def finish(self) -> None:
        """Run to the end; nothing may be held any more."""
        self.run()
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == stats.num_held_pages == 0
        self.scheduler.flush_cache()
        self.check()
        assert self.scheduler.stats().num_cached_pages == 0
        assert self.scheduler._pool.num_free == self.config.num_pages - 1

    def verify(self, requests: list[Request], aborted: frozenset[int] = frozenset()) -> None:
        for request in requests:
            tokens, reason = expected(request, self.config.max_model_len)
            if self.reasons[request.id] == "abort":
                assert request.id in aborted
                assert self.answers[request.id] == tokens[: len(self.answers[request.id])]
            else:
                assert (self.answers[request.id], self.reasons[request.id]) == (tokens, reason)
            for token, logprobs in zip(self.answers[request.id], self.logprobs[request.id], strict=True):
                count = request.params.num_logprobs
                assert (logprobs is None) == (count is None)
                if count is not None:
                    assert logprobs.logprob == -token
                    assert logprobs.top_ids == tuple(range(token, token + count))
                    assert logprobs.top_logprobs == tuple(-float(n) for n in range(count))
            self.verify_prompt(request)

    def verify_prompt(self, request: Request) -> None:
        scores, vector = expected_readings(request, self.config.pooling)
        told, count = self.told[request.id], request.params.num_prompt_logprobs
        complete = bool(self.answers[request.id]) or self.reasons[request.id] != "abort"
        if request.task == "embed":
            assert (request.id in self.vectors) == complete
            if complete:
                np.testing.assert_allclose(self.vectors[request.id], vector, atol=1e-6)
        assert len(told) == len(scores) * (count is not None and request.task == "generate") or not complete
        for item, score in zip(told, scores, strict=False):
            assert (item is None) == (score is None)
            if item is not None:
                assert (item.logprob, item.rank) == (-score, score + 1)
                assert item.top_ids == tuple(range(score, score + count))
                assert item.top_logprobs == tuple(-float(n) for n in item.top_ids)


def random_params(rng: random.Random, num_prompt: int, max_model_len: int):
    stop = tuple(rng.sample(range(VOCAB), rng.choice((0, 1, 10))))
    return params(
        max_tokens=rng.choice((0, 1, 1, 1, 1)) * rng.randint(1, min(24, max_model_len - num_prompt)),
        num_prompt_logprobs=rng.choice((None, None, 0, 3)),
        seed=rng.getrandbits(64),
        choice=rng.randrange(3),
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_k=rng.choice((0, 5)),
        top_p=rng.choice((1.0, 0.9)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        min_tokens=rng.choice((0, 0, 3, 9)),
        stop_token_ids=stop,
        num_logprobs=rng.choice((None, None, 0, 3)),
    )


def random_requests(rng: random.Random, count: int, config: SchedulerConfig) -> list[Request]:
    bases = [[rng.randrange(VOCAB) for _ in range(rng.choice((4, 8, 20, 28)))] for _ in range(3)]
    requests: list[Request] = []
    while len(requests) < count:
        tokens = list(rng.choice(bases)) if rng.random() < 0.7 else []
        tokens += [rng.randrange(VOCAB) for _ in range(rng.randint(0 if tokens else 1, 25))]
        priority, namespace = rng.choice((0, 0, 1)), rng.choice((0, 0, 0, 1))
        drawn = random_params(rng, len(tokens), config.max_model_len)
        for choice in range(rng.choice((1, 1, 1, 4))):  # n choices of one request arrive together
            own = replace(drawn, choice=choice)
            task: Any = "embed" if choice == 0 and rng.random() < 0.15 else "generate"
            requests.append(Request(len(requests), tuple(tokens), own, priority, namespace, task=task))
    return requests


def random_config(rng: random.Random, **changed) -> SchedulerConfig:
    drawn: dict[str, Any] = {
        "num_pages": rng.choice((17, 20, 26, 60)),
        "mixed": rng.random() < 0.5,
        "policy": rng.choice(("lpm", "fcfs")),
        "radix_cache": rng.random() < 0.85,
        "lpm_window": rng.choice((2, 64)),
        "lpm_patience": rng.choice((0.0, 0.05, 10.0)),
        "max_batch_running": rng.choice((None, 1, 2)),
        "max_batch_prefill_tokens": rng.choice((None, 4, 10)),
        "pooling": rng.choice(("last", "mean")),
    }
    return make_config(**(drawn | changed))


def serve_random(seed: int, count: int = 20, depth: int | None = None) -> Server:
    """A random workload with arrivals, aborts and flushes at random times; every answer is checked."""
    rng = random.Random(seed)
    config = random_config(rng)
    server = Server(config, rng.choice((0, 1, 1, 1, 2)) if depth is None else depth)
    requests = random_requests(rng, count, config)
    todo, aborted = list(requests), set()
    for _ in range(5000):
        if not todo and not server.scheduler.has_work and not server.pending:
            break
        for _ in range(rng.randint(0, 3)):
            if todo:
                server.add(todo.pop(0))
        server.abort_now_and_then(rng, aborted)
        if rng.random() < 0.01:
            server.scheduler.flush_cache()
            server.check()
        server.turn()
    server.finish()
    server.verify(requests, frozenset(aborted))
    assert server.runner.seen <= set(buckets(config))
    return server


def test_random_workloads_answer_right_and_every_mechanism_really_happens():
    """Thousands of requests; seeds are 0 .. n - 1, so a failure names its own."""
    seen: Counter[str] = Counter()
    for seed in range(1000 if FULL else 100):
        try:
            server = serve_random(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        stats = server.scheduler.stats()
        tree = server.scheduler._tree
        seen.update(server.runner.counts)
        seen["requests"] += len(server.answers)
        seen["preemptions"] += stats.preemptions_total
        seen["cached"] += stats.cached_tokens_total
        seen["evictions"] += tree.evictions_total if tree else 0
        seen["mixed"] += sum(p.bucket.num_decode > 0 and p.bucket.num_prefill > 0 for p in server.plans)
        seen["decode"] += sum(p.bucket.num_prefill == 0 for p in server.plans)
        seen["prefill"] += sum(p.bucket.num_decode == 0 for p in server.plans)
        seen["several_chunks"] += sum(len(p.sequences) - p.num_decode_rows > 1 for p in server.plans)
        seen.update(server.reasons.values())
        seen["vectors"] += len(server.vectors)
        seen["prompts"] += sum(bool(told) for told in server.told.values())
        seen["read_again"] += sum(p.readings is not None and p.num_cached_tokens > 0 for p in server.plans)
    print(dict(seen))
    for what in (
        *("preemptions", "cached", "evictions", "mixed", "decode", "prefill", "several_chunks", "take_last"),
        *("partial_chunks", "admissions", "stop", "length", "abort", "readings", "vectors", "prompts", "read_again"),
    ):
        assert seen[what] > 20, f"{what} happened {seen[what]} times: the workloads do not test it"
    assert seen["requests"] > 2000


@settings(max_examples=250 if FULL else 25, deadline=None)
@given(st.integers(10_000, 10**9), st.integers(1, 30), st.integers(0, 2))
def test_hypothesis_workloads_answer_right(seed: int, count: int, depth: int):
    serve_random(seed, count, depth)


def test_schedule_emits_every_listed_bucket_and_no_other():
    for mixed in (True, False):
        seen = set()
        for seed in range(20):
            rng = random.Random(seed)
            server = Server(make_config(mixed=mixed))
            for request in random_requests(rng, 20, server.config):
                server.add(request)
                if rng.random() < 0.5:
                    server.turn()
            server.finish()
            seen |= server.runner.seen
        assert seen == set(buckets(make_config(mixed=mixed)))


def prompt(count: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((7 * i + 13 * salt + 1) % VOCAB for i in range(count))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_request_that_fills_the_whole_pool_finishes(depth: int, mixed: bool):
    config = make_config(num_pages=17, mixed=mixed)
    server = Server(config, depth)
    requests = [Request(i, prompt(41, i), params(max_tokens=23)) for i in range(5)]
    server.add(*requests)
    server.finish()
    server.verify(requests)


def test_preempted_text_equals_undisturbed_text_and_preemption_takes_the_youngest():
    config = make_config(num_pages=17)
    server = Server(config)
    requests = [Request(i, prompt(9, i), params(max_tokens=40, temperature=1.0, seed=i)) for i in range(4)]
    server.add(*requests)
    server.finish()
    server.verify(requests)
    assert server.scheduler.stats().preemptions_total > 0
    assert next(iter(server.reasons)) == 0, "the oldest is never preempted, so it ends first"


def test_what_returns_after_preemption_is_mostly_a_cache_hit():
    server = Server(make_config(num_pages=17))
    server.add(*(Request(i, prompt(9, i), params(max_tokens=40)) for i in range(3)))
    server.finish()
    returns = [p for p in server.plans if p.num_new_sequences and p.num_cached_tokens]
    assert returns
    assert sum(p.num_cached_tokens for p in returns) > sum(p.num_new_tokens for p in returns)


def test_identical_prompts_that_arrive_together_compute_their_prefix_once():
    for size in (30, 16, 17, 5):
        server = Server(make_config(prefill_buckets=((64, 6),)))  # room for two prompts and more in one step
        requests = [Request(i, prompt(size), params(choice=i, max_tokens=3)) for i in range(6)]
        server.add(*requests)
        server.finish()
        server.verify(requests)
        shared = (size - 1) // PAGE * PAGE
        assert [server.cached[i] for i in range(6)] == [0] + [shared] * 5
        assert sum(p.num_new_tokens for p in server.plans) == size + 5 * (size - shared)


def test_a_namespace_sees_only_its_own_prefixes():
    server = Server(make_config())
    for i, namespace in enumerate((0, 1, 0, 1)):
        server.add(Request(i, prompt(20), params(), namespace=namespace))
        server.run()
    assert [server.cached[i] for i in range(4)] == [0, 0, 16, 16]


def test_generated_pages_are_found_by_the_next_turn_of_a_conversation():
    server = Server(make_config())
    server.add(Request(0, prompt(10), params(max_tokens=20)))
    server.run()
    follow_up = prompt(10) + tuple(server.answers[0]) + (5, 6, 7)
    server.add(Request(1, follow_up, params()))
    server.run()
    assert server.cached[1] == (10 + 19) // PAGE * PAGE


def test_without_the_radix_cache_nothing_is_kept():
    server = Server(make_config(radix_cache=False))
    requests = [Request(i, prompt(20), params()) for i in range(3)]
    server.add(*requests)
    server.finish()
    server.verify(requests)
    assert set(server.cached.values()) == {0}


def test_a_stop_token_counts_only_after_min_tokens():
    base = Request(0, prompt(9), params(max_tokens=12))
    free, _ = expected(base, 64)
    stop = (free[2],)
    for min_tokens, longer in ((0, False), (2, False), (3, True)):
        request = Request(1, prompt(9), params(max_tokens=12, stop_token_ids=stop, min_tokens=min_tokens))
        server = Server(make_config())
        server.add(request)
        server.finish()
        server.verify([request])
        assert (len(server.answers[1]) > 3) == longer
        if not longer:
            assert server.reasons[1] == "stop"
        suppressed = [p for p in server.plans if (p.arrays.flags & words.SUPPRESS_STOP).any()]
        assert len(suppressed) == min_tokens


def test_max_model_len_ends_a_request():
    server = Server(make_config())
    request = Request(0, prompt(60), params(max_tokens=50))
    server.add(request)
    server.finish()
    assert server.reasons[0] == "length" and len(server.answers[0]) == 4


def test_overlap_wastes_one_row_after_a_stop_and_none_at_max_tokens():
    free, _ = expected(Request(0, prompt(9), params(max_tokens=12)), 64)
    for changed, steps in (({"max_tokens": 5}, 5), ({"max_tokens": 12, "stop_token_ids": (free[4],)}, 6)):
        server = Server(make_config())
        server.add(Request(0, prompt(9), params(**changed)))
        server.finish()
        assert server.answers[0] == free[:5] and len(server.plans) == steps


def test_sampling_words_reach_the_plan_bit_by_bit():
    asked = params(
        seed=(0xDEADBEEF << 32) | 0x80000001, choice=3, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05,
        presence_penalty=0.1, frequency_penalty=-0.2, repetition_penalty=1.3, logit_bias=((5, 2.0),), num_logprobs=2,
    )  # fmt: skip
    server = Server(make_config())
    server.add(Request(0, prompt(5), asked), Request(1, prompt(6, 1), params()))
    server.turn()
    arrays = server.plans[0].arrays
    real = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    for name in real:
        assert getattr(arrays, name).view(np.float32)[0] == np.float32(getattr(asked, name)), name
    assert arrays.top_k[0] == 40 and arrays.choice[0] == 3
    assert np.uint32(arrays.seed_low[0]) == 0x80000001 and np.uint32(arrays.seed_high[0]) == 0xDEADBEEF
    every = words.EMIT | words.SAMPLE | words.TRUNCATE | words.PENALTIES | words.BIAS | words.LOGPROBS
    assert arrays.flags.tolist() == [every, words.EMIT, 0]
    assert server.plans[0].admissions == (words.Admission(0, prompt(5), 5, ((5, 2.0),), ()),)


def test_abort_answers_for_known_ids_only_and_frees_everything_at_once():
    server = Server(make_config())
    server.add(*(Request(i, prompt(20, i), params()) for i in range(9)))
    server.turn()
    server.turn()
    server.abort(0, 3, 8, 77, 0)
    assert {i: r for i, r in server.reasons.items() if r == "abort"} == {0: "abort", 3: "abort", 8: "abort"}
    server.abort(*range(9))
    stats = server.scheduler.stats()
    assert stats.num_running == stats.num_waiting == stats.num_held_pages == 0
    server.finish()


def test_fcfs_admits_in_order_and_lpm_prefers_the_longest_cached_prefix():
    for policy, first in (("fcfs", 1), ("lpm", 2)):
        server = Server(make_config(policy=policy, max_running=1, decode_buckets=(1,)))
        server.add(Request(0, prompt(20), params()))
        server.run()
        server.add(Request(1, prompt(20, 5), params()), Request(2, prompt(20), params()))
        server.run()
        assert list(server.reasons) == [0, first, 3 - first]


def test_lpm_starves_nobody():
    """A stream of requests that hit the cache meets one that does not: it waits its patience, not for ever."""
    ends = {}
    for patience in (0.5, 1e9):
        server = Server(make_config(max_running=2, decode_buckets=(2,), lpm_patience=patience))
        server.add(Request(0, prompt(20), params()))
        server.run()
        server.add(*(Request(i, prompt(20), params()) for i in range(200, 204)), Request(1, prompt(24, 9), params()))
        for i in range(2, 150):
            server.add(Request(i, (*prompt(20), i % VOCAB), params(max_tokens=4)))
            server.turn()
        server.finish()
        ends[patience] = list(server.reasons).index(1)
    assert ends[0.5] < 40 < ends[1e9]


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones():
    server = Server(make_config(num_pages=20, policy="fcfs"))
    for i in range(6):
        server.add(Request(i, prompt(10, i), params(max_tokens=20)))
    server.add(Request(6, prompt(60, 50), params(max_tokens=4)))
    for i in range(7, 100):
        server.add(Request(i, prompt(6, i), params(max_tokens=6)))
    server.finish()
    assert list(server.reasons).index(6) < 12


def test_batch_work_is_admitted_last_and_preempted_first():
    server = Server(make_config(num_pages=40))
    server.add(*(Request(i, prompt(12, i), params(max_tokens=30), priority=1) for i in range(8)))
    for _ in range(4):
        server.turn()
    assert server.scheduler.stats().num_running == 6
    server.add(*(Request(i, prompt(12, i), params(max_tokens=30)) for i in range(20, 26)))
    server.finish()
    assert server.scheduler.stats().preemptions_total >= 6
    assert set(list(server.reasons)[:6]) == set(range(20, 26))


@pytest.mark.parametrize("mixed", [True, False])
def test_batch_caps_hold_while_interactive_work_exists_and_only_then(mixed: bool):
    config = make_config(
        num_pages=120, mixed=mixed, max_batch_running=2, max_batch_prefill_tokens=8, prefill_buckets=((32, 4),)
    )
    server = Server(config)
    batch = [Request(i, prompt(30, i), params(max_tokens=10), priority=1) for i in range(12)]
    server.add(*batch)
    uncapped = capped = 0
    for turn in range(200):
        if turn == 8:
            server.add(*(Request(100 + i, prompt(30, 40 + i), params(max_tokens=30)) for i in range(3)))
        interactive = any(s.order[0] == 0 for s in server.scheduler._known.values())
        plan = server.turn()
        if plan is None:
            continue
        lows = [(row, s) for row, s in plan.sequences if s.order[0] == 1]
        prefill = sum(
            min(int(plan.arrays.kv_lens[row]), s.num_prompt) - int(plan.arrays.positions[_start(plan, row)])
            for row, s in lows
            if row >= plan.bucket.num_decode
        )
        if interactive:
            assert len(lows) <= 2 and prefill <= 8
            capped += len(lows) > 0
        else:
            uncapped += len(lows) > 2 or prefill > 8
        if not server.scheduler.has_work:
            break
    server.finish()
    assert uncapped and capped, "batch work went on under the cap, and faster without it"


def test_batch_caps_outlast_the_last_interactive_request_by_the_linger():
    config = make_config(num_pages=200, max_batch_running=1, batch_linger=5.0, max_running=4, decode_buckets=(2, 4))
    scheduler = Scheduler(config)
    for i in range(4):
        scheduler.add(Request(i, prompt(3, i), params(max_tokens=20), priority=1), now=0.0)
    scheduler.add(Request(9, prompt(3, 9), params(max_tokens=1)), now=0.0)

    def num_rows(now: float) -> int:
        plan = scheduler.schedule(now)
        assert plan is not None
        return len(plan.sequences)

    num_rows(0.0)
    scheduler.abort([9])
    assert [num_rows(now) for now in (0.1, 4.9, 5.1)] == [1, 1, 4]


@pytest.mark.parametrize("priority", [0, 1])
def test_batch_work_alone_gathers_slots_for_a_full_chunk(priority: int):
    sizes = {"num_pages": 400, "max_running": 16, "decode_buckets": (8, 16), "prefill_buckets": ((12, 1), (24, 3))}
    server = Server(make_config(mixed=False, **sizes))
    lengths = [8 + 7 * i % 17 for i in range(40)]  # they end one by one
    server.add(*(Request(i, prompt(12, i), params(max_tokens=n), priority=priority) for i, n in enumerate(lengths)))
    chunks = []  # prompt tokens of each prefill while more requests wait
    while server.scheduler.has_work:
        plan = server.turn()
        if plan is not None and plan.bucket.num_prefill and len(server.scheduler._waiting):
            chunks.append(plan.bucket.num_prefill)
    server.finish()
    assert 24 in chunks and (12 in chunks) == (priority == 0), chunks


def _start(plan: words.StepPlan, row: int) -> int:
    return plan.bucket.num_decode + int(plan.arrays.chunk_starts[row - plan.bucket.num_decode])


def test_taking_turns_stalls_decoding_for_one_step_at_most():
    server = Server(make_config(mixed=False, num_pages=200, max_model_len=256))
    server.add(Request(0, prompt(5), params(max_tokens=30)))
    for _ in range(3):
        server.turn()
    server.add(Request(1, prompt(250, 3), params(max_tokens=3)))
    for _ in range(20):
        server.turn()
    kinds = ["decode" if plan.num_decode_rows else "prefill" for plan in server.plans[3:]]
    assert all(pair != ("prefill", "prefill") for pair in pairwise(kinds))
    assert kinds.count("prefill") >= 9
    server.finish()


def test_add_refuses_what_could_never_fit_and_says_what_to_change():
    scheduler = Scheduler(make_config(num_pages=9))
    with pytest.raises(ValueError, match=r"holds 32 \(--max-total-tokens\)"):
        scheduler.add(Request(0, prompt(20), params(max_tokens=20)), 0.0)
    with pytest.raises(ValueError, match=r"64 tokens.*takes 63 \(--max-model-len\)"):
        scheduler.add(Request(0, prompt(64), params()), 0.0)
    scheduler.add(Request(0, prompt(20), params(max_tokens=13)), 0.0)
    with pytest.raises(ValueError, match="id 0 is in use"):
        scheduler.add(Request(0, prompt(3), params()), 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decode_buckets": (2, 4)}, "must ascend to max_running"),
        ({"decode_buckets": (4, 2, 6)}, "must ascend to max_running"),
        ({"prefill_buckets": ((10, 1),)}, "multiples of 4"),
        ({"prefill_buckets": ()}, "must ascend"),
        ({"prefill_buckets": ((8, 4), (16, 1))}, "most chunks"),
        ({"num_pages": 1}, "at least 2"),
        ({"max_batch_running": 0}, "at least 1"),
        ({"max_batch_prefill_tokens": 3}, "at least one page"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_config(**changed)


def test_stats_count_what_happened():
    server = Server(make_config())
    server.add(Request(0, prompt(20), params(max_tokens=5)))
    server.run()
    server.add(Request(1, prompt(20), params(max_tokens=5)))
    server.run()
    stats = server.scheduler.stats(compilations=3)
    assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.generation_tokens_total) == (40, 16, 10)
    assert stats.steps_total == len(server.plans) and stats.compilations_total == 3
    assert stats.step_tokens_total == sum(p.num_tokens for p in server.plans) == 20 + 4 + 4 + 4
    assert stats.padding_tokens_total == sum(p.bucket.num_tokens for p in server.plans) - stats.step_tokens_total
    assert [p.num_new_sequences for p in server.plans if p.num_new_sequences] == [1, 1]
    assert sum(p.num_cached_tokens for p in server.plans) == 16
