"""What batch work may cost an interactive request where prefills and decodes take turns."""

import pytest
from fake_runner import params
from test_scheduler import Server, make_config, prompt

from jaxserve.scheduling import plan as words
from jaxserve.types import Request

CAPS = {"max_batch_running": 3, "max_batch_prefill_tokens": 8}
SIZES = {"num_pages": 400, "max_model_len": 256, "max_running": 8, "decode_buckets": (4, 8)}


def batch(count: int, length: int, max_tokens: int) -> list[Request]:
    return [Request(i, prompt(length, i), params(max_tokens=max_tokens), priority=1) for i in range(count)]


def priorities(plan: words.StepPlan) -> set[int]:
    return {sequence.order[0] for _, sequence in plan.sequences}


@pytest.mark.parametrize("mixed", [True, False])
def test_an_interactive_prompt_shares_its_bucket_with_a_batch_but_takes_no_larger_one(mixed: bool):
    server = Server(make_config(mixed=mixed, prefill_buckets=((16, 2), (32, 4)), **SIZES))
    server.add(*batch(6, 30, 4))
    server.add(Request(100, prompt(10, 50), params(max_tokens=4)))
    plan = server.turn()
    assert plan is not None and priorities(plan) == {0, 1}
    assert (plan.bucket.num_prefill, plan.num_new_tokens) == (16, 14), "10 of 12 in its pages, and one page of a batch"
    server.finish()


@pytest.mark.parametrize("num_turns", range(2, 8))
def test_an_interactive_prompt_comes_next_whatever_the_batch_does(num_turns: int):
    server = Server(make_config(mixed=False, prefill_buckets=((16, 2), (32, 4)), **SIZES, **CAPS))
    server.add(*batch(20, 60, 9))
    for _ in range(num_turns):
        server.turn()
    server.add(Request(100, prompt(60, 50), params(max_tokens=4)))
    plans = [server.turn(), server.turn()]
    assert [plan is not None and plan.bucket.num_prefill for plan in plans] == [32, 32]
    assert all(plan is not None and 0 in priorities(plan) for plan in plans)
    server.finish()


def test_most_gaps_of_an_interactive_stream_hold_no_prefill_of_a_batch():
    server = Server(make_config(mixed=False, prefill_buckets=((16, 2), (32, 4)), **SIZES, **CAPS))
    server.add(Request(100, prompt(10, 50), params(max_tokens=200)))
    server.turn()
    server.add(*batch(20, 100, 2))
    kinds = [plan.bucket.num_prefill > 0 for plan in (server.turn() for _ in range(100)) if plan is not None]
    assert 20 <= sum(kinds) <= 26, "a fourth of the steps"
    server.finish()


def test_batch_work_by_itself_takes_every_other_step_for_its_prompts():
    server = Server(make_config(mixed=False, prefill_buckets=((16, 2), (32, 4)), **SIZES, **CAPS))
    server.add(*batch(20, 100, 50))
    kinds = [plan.bucket.num_prefill > 0 for plan in (server.turn() for _ in range(12)) if plan is not None]
    assert sum(kinds) >= 6, kinds
    server.finish()
