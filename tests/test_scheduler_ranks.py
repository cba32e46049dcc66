"""Data parallel: several schedulers that take their steps together, against one fake device for each."""

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner, params
from test_scheduler import Server, make_config, prompt, random_config, random_requests

from jaxserve.scheduling import plan as words
from jaxserve.scheduling.buckets import SchedulerConfig, buckets
from jaxserve.scheduling.ranks import RankedScheduler
from jaxserve.scheduling.readings import read_messages
from jaxserve.types import Request

FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all; make test runs a tenth
ARRAYS = ("token_ids", "num_tokens", "logprobs", "top_ids", "top_logprobs")


@dataclass
class RankedServer(Server):
    """config: of each rank."""

    num_ranks: int = 3

    def __post_init__(self) -> None:
        config = self.config
        self.scheduler: Any = RankedScheduler(config, self.num_ranks)
        sizes = (config.num_pages, config.page_size, config.max_running, config.max_pages)
        self.runners = [FakeRunner(*sizes) for _ in range(self.num_ranks)]

    def check(self) -> None:
        self.scheduler.check_invariants()
        for rank, runner in zip(self.scheduler.ranks, self.runners, strict=True):
            runner.poison(rank._pool._free)

    def turn(self) -> words.JointPlan | None:
        self.now += 0.01
        plan = self.scheduler.schedule(self.now)
        for rank, runner in zip(self.scheduler.ranks, self.runners, strict=True):
            runner.poison(rank._pool._free)
        if plan is not None:
            assert len({part.bucket for part in plan.parts}) == 1 and plan.num_context_tokens >= plan.num_decode_rows
            assert plan.packed.tolist() == [word for part in plan.parts for word in part.packed.tolist()]
            self.plans.append(plan)
            told = [runner.launch(part) for runner, part in zip(self.runners, plan.parts, strict=True)]
            arrays = [np.concatenate([getattr(each, name) for each in told]) for name in ARRAYS]
            self.pending.append((plan, words.StepResult.of_ranks(arrays, [each.read for each in told])))
        assert self.pending or not self.scheduler.has_work, "work, but nothing to do"
        if self.pending and (plan is None or len(self.pending) > self.depth):
            done, result = self.pending.popleft()
            for part, told in zip(done.parts, result.parts, strict=True):
                self.read_prompts(read_messages(part, told))
            self.read(self.scheduler.commit(done, result))
        self.check()
        return plan

    def finish(self) -> None:
        self.run()
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == stats.num_held_pages == 0
        assert stats.steps_total == len(self.plans)
        tokens = sum(part.num_tokens for plan in self.plans for part in plan.parts)
        assert stats.step_tokens_total == tokens
        assert stats.padding_tokens_total == sum(p.bucket.num_tokens for p in self.plans) * self.num_ranks - tokens


def test_random_workloads_answer_right_on_every_rank():
    """Seeds are 0 .. n - 1, so a failure names its own."""
    busy = idle = 0
    for seed in range(200 if FULL else 20):
        rng = random.Random(seed)
        config = random_config(rng)
        server = RankedServer(config, rng.choice((0, 1, 1, 2)), num_ranks=rng.choice((2, 3)))
        requests = random_requests(rng, 30, config)
        todo, aborted = list(requests), set()
        while todo or server.scheduler.has_work or server.pending:
            for _ in range(rng.randint(0, 6)):
                if todo:
                    server.add(todo.pop(0))
            server.abort_now_and_then(rng, aborted)
            server.turn()
        server.finish()
        server.verify(requests, frozenset(aborted))
        assert {plan.bucket for plan in server.plans} <= set(buckets(config))
        used = [sum(part.num_tokens > 0 for part in plan.parts) for plan in server.plans]
        busy += sum(count == server.num_ranks for count in used)
        idle += sum(count < server.num_ranks for count in used)
    assert busy > 50 and idle > 50, (busy, idle)


def ranks_of(server: RankedServer) -> list[int]:
    """How many requests each rank has."""
    return [rank.num_open for rank in server.scheduler.ranks]


def config_of(**changed: Any) -> SchedulerConfig:
    return make_config(num_pages=200, max_running=8, decode_buckets=(4, 8), **changed)


def test_new_requests_go_to_the_least_busy_rank():
    server = RankedServer(config_of())
    server.add(*(Request(i, prompt(9, i), params()) for i in range(9)))
    assert ranks_of(server) == [3, 3, 3]
    server.abort(0, 3, 6)
    server.add(Request(20, prompt(9, 20), params()), Request(21, prompt(9, 21), params()))
    assert sorted(ranks_of(server)) == [2, 3, 3]
    server.finish()


def test_a_prompt_goes_where_its_prefix_is_unless_that_rank_is_much_busier():
    server = RankedServer(config_of())
    common = prompt(20, 7)
    server.add(Request(0, prompt(9, 1), params(max_tokens=50)), Request(1, common, params(max_tokens=2)))
    server.run()
    asked = Request(9, common, params())
    (holder,) = [i for i, rank in enumerate(server.scheduler.ranks) if rank.num_cached_pages_of(asked)]
    added = [Request(10 + i, (*common, i), params(max_tokens=30)) for i in range(6)]
    counts = []
    for request in added:
        server.add(request)
        counts.append(ranks_of(server)[holder])
    assert counts[:3] == [1, 2, 3], "up to a quarter of the rows more than the least busy rank"
    assert counts[3] == 3, "then the others get some"
    server.finish()
    assert sum(server.cached[request.id] > 0 for request in added) >= 3


def test_an_id_in_use_on_any_rank_is_refused():
    server = RankedServer(config_of())
    server.add(*(Request(i, prompt(9, i), params()) for i in range(3)))
    for request_id in range(3):
        with pytest.raises(ValueError, match="in use"):
            server.scheduler.add(Request(request_id, prompt(9, 8), params()), 0.0)
    server.finish()
