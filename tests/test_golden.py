"""The default model, for real: the golden tokens whatever the company, the cache, the chunks and the preemptions; and
seeded text that depends on nothing but its prompt, parameters and seed."""

import math
import os
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from jaxserve.llm import LLM, Completion
from tests.draws import draw, drawn_cdf, is_tie, reference_logits, same_but_for_a_tie, uniform_at
from tests.golden import NAMES, Case
from tests.real_engines import Engines, RealServer

FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all
SHORT = range(6)
pytestmark = pytest.mark.timeout(3600 if FULL else 600)  # seconds; ten thousand tokens, one at a time
# 48 pages, so that a few long rows leave no room for others.
TIGHT: dict[str, Any] = {"max_total_tokens": 768, "max_model_len": 768, "chunked_prefill_size": 16}
CHUNK_64: dict[str, Any] = {"chunked_prefill_size": 64}
WHOLE: dict[str, Any] = {"include_stop": True, "skip_special_tokens": False}  # the answer with its end-of-message token
WHOLE_HTTP: dict[str, Any] = {"include_stop_str_in_output": True, "skip_special_tokens": False}

LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES[7:]]
# Sampled in three ways: freely, cut off, and with everything the device remembers per slot.
FREE: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "ignore_eos": True}
CUT: dict[str, Any] = {"ignore_eos": True, "temperature": 0.9, "top_p": 0.9, "top_k": 60, "min_p": 0.02}
STATEFUL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "logit_bias": {504: 2.0, 28: -3.0},
    "min_tokens": 20,
}
STYLES = {"free": FREE, "cut": CUT, "stateful": STATEFUL}


# Through the HTTP API


@pytest.mark.parametrize("name", [*NAMES[:7], *LONGER])
def test_chat_over_http_gives_the_golden_tokens_cold_and_warm(live: RealServer, golden: list[Case], name: str):
    case = golden[NAMES.index(name)]
    live.flush()
    for cached in (0, case.cacheable(live.engine["page_size"])):
        reply = live.chat(case.prompt, max_tokens=case.max_tokens, logprobs=True, extra_body=WHOLE_HTTP)
        _check_chat(live, case, reply)
        assert reply.usage.prompt_tokens == len(case.prompt_ids)
        assert reply.usage.prompt_tokens_details.cached_tokens == cached


def _check_chat(live: RealServer, case: Case, reply: Any) -> None:
    content = reply.choices[0].logprobs.content
    tokens, logprobs = [entry.token for entry in content], [entry.logprob for entry in content]
    case.check_reply(live.tokenizer, reply.choices[0].message.content, tokens, logprobs)


def _check_completion(live: RealServer, case: Case, choice: Any) -> None:
    """The first tokens of what may be longer: in a batch all have the same max_tokens."""
    count = len(case.greedy_ids)
    tokens, logprobs = choice.logprobs.tokens[:count], choice.logprobs.token_logprobs[:count]
    case.check_reply(live.tokenizer, choice.text[: len(case.text)], tokens, logprobs)


def test_golden_answers_scored_as_prompts_have_their_golden_log_probabilities(live: RealServer, golden: list[Case]):
    """The prompt and its answer, fed in as one prompt; the cache being warm or cold makes no difference."""
    cases = golden[:7]
    prompts = [case.prompt_ids + case.greedy_ids for case in cases]
    told = {"max_tokens": 0, "echo": True, "logprobs": 0, "extra_body": {"prompt_logprobs": 0}}
    reply = live.complete(prompts, **told)
    assert reply.usage.prompt_tokens == sum(map(len, prompts)) and reply.usage.completion_tokens == 0
    for case, prompt, choice in zip(cases, prompts, reply.choices, strict=True):
        columns, count = choice.logprobs, len(case.greedy_ids)
        assert choice.finish_reason == "length" and len(columns.token_logprobs) == len(prompt)
        assert columns.token_logprobs[0] is None and max(columns.token_logprobs[1:]) <= 0
        case.check_logprobs(columns.token_logprobs[-count:], None)
        ranks = [choice.prompt_logprobs[at][str(prompt[at])]["rank"] for at in range(len(prompt) - count, len(prompt))]
        assert ranks == [1] * count
        assert choice.text == live.tokenizer.decode(prompt, skip_special_tokens=False)
        starts = [*columns.text_offset, len(choice.text)]
        pieces = [choice.text[start:stop] for start, stop in pairwise(starts)]
        assert pieces == [live.tokenizer.token_text(token_id) for token_id in prompt]


def test_a_chat_model_embeds_alike_alone_and_in_company(live: RealServer, golden: list[Case]):
    prompts = [case.prompt_ids for case in golden[:7]]
    together = live.client.embeddings.create(model=live.model, input=prompts)
    assert together.usage.prompt_tokens == sum(map(len, prompts))
    vectors = [item.embedding for item in together.data]
    assert {len(vector) for vector in vectors} == {live.engine["embedding_size"]}
    for index in (0, 6):
        (alone,) = live.client.embeddings.create(model=live.model, input=prompts[index]).data
        assert alone.embedding == pytest.approx(vectors[index], abs=1e-5)
        assert math.hypot(*alone.embedding) == pytest.approx(1, abs=1e-5)
    assert math.dist(vectors[0], vectors[1]) > 0.01


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_golden_prompts_of_ids_in_one_request_make_a_batch(live: RealServer, golden: list[Case], warm: bool):
    """Sixteen prompts, the golden ones first; with a warm cache there is next to nothing to prefill."""
    cases = golden[:7]
    prompts = [case.prompt_ids for case in cases] + [[*golden[n % 6].prompt_ids, 504 + n] for n in range(9)]
    if not warm:
        live.flush()
    before = live.wait_idle()
    reply = live.complete(prompts, max_tokens=48, logprobs=1, extra_body=WHOLE_HTTP)
    after = live.wait_idle()
    for case, choice in zip(cases, reply.choices, strict=False):
        _check_completion(live, case, choice)
    steps, tokens = (after[name] - before[name] for name in ("engine_steps_total", "generation_tokens_total"))
    assert tokens / steps > 3, "they ran one after another"
    cached = reply.usage.prompt_tokens_details.cached_tokens / reply.usage.prompt_tokens
    assert cached > 0.9 if warm else cached < 0.5


def test_golden_tokens_over_http_among_sampled_requests(live: RealServer, golden: list[Case]):
    """Sixteen clients at once: six ask greedily, ten sample with penalties; nobody's cache is flushed."""
    before = live.wait_idle()

    def other(n: int) -> Any:
        body = {"ignore_eos": True, "top_k": 50, "repetition_penalty": 1.1}
        return live.complete(
            f"Company {n}: once upon a time",
            temperature=1.2,
            seed=n,
            max_tokens=64,
            presence_penalty=0.5,
            extra_body=body,
        )

    def ask(case: Case) -> Any:
        return live.chat(case.prompt, max_tokens=48, logprobs=True, extra_body=WHOLE_HTTP)

    with ThreadPoolExecutor(16) as pool:
        company = [pool.submit(other, n) for n in range(10)]
        replies = [pool.submit(ask, golden[n]) for n in SHORT]
        for n, reply in zip(SHORT, replies, strict=True):
            _check_chat(live, golden[n], reply.result())
        assert all(each.result().choices[0].finish_reason == "length" for each in company)
    after = live.wait_idle()
    steps, tokens = (after[name] - before[name] for name in ("engine_steps_total", "generation_tokens_total"))
    assert tokens / steps > 4, "they ran one after another"


# Through LLM, chunked and preempted


def _generate(llm: LLM, prompts: Any, **options: Any) -> Any:
    return llm.generate(prompts, temperature=0.0, num_logprobs=2, **WHOLE, **options)


def _alone_and_cold(llm: LLM, case: Case, chunk: int) -> None:
    """The golden answer, and as many steps as its chunks and tokens are; the last one launched may be in vain."""
    llm.flush_cache()
    before = llm.stats.steps_total if llm.stats else 0
    done = _generate(llm, case.prompt_ids, max_tokens=case.max_tokens)
    case.check(done.choices[0])
    assert done.cached_tokens == 0 and llm.stats is not None
    wanted = math.ceil(len(case.prompt_ids) / chunk) + len(case.greedy_ids) - 1
    assert llm.stats.steps_total - before in (wanted, wanted + 1)


@pytest.mark.parametrize("name", [*NAMES[:6], "long-689"])
def test_golden_tokens_in_chunks_of_16(engines: Engines, golden: list[Case], name: str):
    _alone_and_cold(engines.get(**TIGHT), golden[NAMES.index(name)], 16)


@contextmanager
def crowd(llm: LLM, golden: list[Case]) -> Generator[None, None, None]:
    """Six rows that fill the tight pool while they last. Alone they would just fit, and guests are younger: it is a
    guest who is preempted."""
    llm.flush_cache()
    before = llm.stats.preemptions_total if llm.stats else 0
    failed: list[BaseException] = []

    def fill() -> None:
        prompts = [[600 + n, *golden[1].prompt_ids[:30]] for n in range(6)]
        try:
            llm.generate(prompts, max_tokens=90, ignore_eos=True, temperature=1.0, seed=3)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    while thread.is_alive() and (llm.stats is None or llm.stats.num_running < 6):
        time.sleep(0.001)
    yield
    thread.join()
    assert not failed and llm.stats is not None
    assert llm.stats.preemptions_total >= before + 2, "nobody was preempted"


def test_golden_tokens_after_preemption(engines: Engines, golden: list[Case]):
    llm = engines.get(**TIGHT)
    cases = [golden[n] for n in (1, 4, 1, 4, 1, 4, 1, 4, 1, 4)]
    with crowd(llm, golden):
        done = _generate(llm, [case.prompt_ids for case in cases], max_tokens=48)
    for case, completion in zip(cases, done, strict=True):
        case.check(completion.choices[0])


def test_seeded_text_is_the_same_cold_warm_in_company_in_another_slot_and_preempted(
    engines: Engines, golden: list[Case], cache_dir: str
):
    llm = engines.get(**TIGHT)
    rest = {"seed": 2**63 + 11, "max_tokens": 36 if FULL else 28}
    jobs = [(golden[n].prompt_ids, STYLES[style] | rest) for style in STYLES for n in (1, 4)]

    def ask(job: tuple[list[int], dict[str, Any]]) -> Completion:
        return llm.generate(job[0], **job[1])

    llm.flush_cache()
    cold = [ask(job) for job in jobs]
    warm = [ask(job) for job in jobs]
    assert cold[0].cached_tokens == 0 and all(each.cached_tokens >= 32 for each in warm)
    with crowd(llm, golden), ThreadPoolExecutor(10) as pool:  # its rows took the first slots
        crowded = list(pool.map(ask, [*jobs, *jobs[:4]]))[: len(jobs)]
    compared = 0
    for (prompt, options), first, *others in zip(jobs, cold, warm, crowded, strict=True):
        for other in others:
            compared += same_but_for_a_tie(cache_dir, prompt, first.token_ids, other.token_ids, options)
    assert compared > 0.7 * sum(len(each.token_ids) for each in warm + crowded)
    assert len({each.token_ids for each in cold}) == len(jobs)
    assert llm.generate(jobs[0][0], **jobs[0][1] | {"seed": 12}).token_ids != cold[0].token_ids


@pytest.mark.parametrize("style", STYLES)
def test_choices_differ_and_are_the_same_again(engines: Engines, golden: list[Case], cache_dir: str, style: str):
    llm = engines.get(**TIGHT)
    prompt, options = golden[1].prompt_ids, STYLES[style] | {"seed": 77, "max_tokens": 24}
    four, again, two = (llm.generate(prompt, n=n, **options).choices for n in (4, 4, 2))
    assert len({choice.token_ids for choice in four}) == 4
    for others in (again, two):
        for index, (one, other) in enumerate(zip(four, others, strict=False)):
            same_but_for_a_tie(cache_dir, prompt, one.token_ids, other.token_ids, options, index)


@pytest.mark.parametrize("style", STYLES)
def test_a_seeded_token_is_the_one_an_independent_model_draws(
    engines: Engines, golden: list[Case], cache_dir: str, style: str
):
    """Weights from the GGUF file, a float64 forward in numpy, and the draw as its docstring defines it."""
    prompt, options = golden[0].prompt_ids, STYLES[style] | {"seed": 1234567890123456789, "max_tokens": 40}
    output = engines.get(**TIGHT).generate(prompt, **options).token_ids
    logits = reference_logits(cache_dir, [*prompt, *output])[len(prompt) - 1 :]
    assert len(output) >= 20
    for n, token in enumerate(output):
        cdf, uniform = drawn_cdf(logits[n], prompt, output[:n], options), uniform_at(options["seed"], len(prompt) + n)
        drawn = draw(cdf, uniform)
        assert drawn == token or is_tie(cdf, uniform, drawn, token), (n, drawn, token)


# Through LLM with room for everything


@pytest.mark.parametrize("name", ["capital", "long-689", *LONGER])
def test_golden_tokens_in_chunks_of_64(engines: Engines, golden: list[Case], name: str):
    _alone_and_cold(engines.get(**CHUNK_64), golden[NAMES.index(name)], 64)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_golden_tokens_in_a_batch_of_16(engines: Engines, golden: list[Case], warm: bool):
    llm = engines.get(**CHUNK_64)
    cases = [*golden[:7], *golden[:6], *golden[1:4]]
    if not warm:
        llm.flush_cache()
    before = llm.stats
    done = _generate(llm, [case.prompt_ids for case in cases], max_tokens=48 if FULL else 32)
    assert before is not None and llm.stats is not None
    for case, completion in zip(cases, done, strict=True):
        limit = min(case.max_tokens, 48 if FULL else 32)
        choice = completion.choices[0]
        assert list(choice.token_ids[:limit]) == case.greedy_ids[:limit]
        assert [item.logprob for item in choice.logprobs or ()][:limit] == pytest.approx(
            case.logprobs[:limit], abs=1e-3
        )
    cached = [completion.cached_tokens for completion in done]
    if warm:
        assert cached == [case.cacheable(llm.ready.page_size) for case in cases]
    else:
        assert cached[0] == 0
    tokens = llm.stats.generation_tokens_total - before.generation_tokens_total
    assert tokens / (llm.stats.steps_total - before.steps_total) > 4, "they ran one after another"


def test_seeded_tokens_alone_and_in_company_differ_by_proven_ties_only(
    engines: Engines, golden: list[Case], cache_dir: str
):
    """10,000 tokens in make test-all; in make test 700, and 300 of other company in the test of the tight pool."""
    llm = engines.get(**CHUNK_64)
    length, compared = 64, 0
    for seed in range(10 if FULL else 1):
        prompts = [[*golden[n % 6].prompt_ids, 700 + n] for n in range(16)]
        options: dict[str, Any] = {"seed": seed, "max_tokens": length, **FREE}
        together = llm.generate(prompts, **options)
        for prompt, company in list(zip(prompts, together, strict=True))[: None if FULL else 11]:
            alone = llm.generate(prompt, **options)
            compared += same_but_for_a_tie(cache_dir, prompt, alone.token_ids, company.token_ids, options)
    assert compared >= (9_500 if FULL else 620)  # what follows a tie is not compared


@pytest.mark.parametrize("name", ["long-689", *LONGER])
def test_golden_tokens_in_chunks_of_512(engines: Engines, golden: list[Case], name: str):
    _alone_and_cold(engines.get(chunked_prefill_size=512), golden[NAMES.index(name)], 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long-1989", "long-5988"])
def test_long_golden_prompts_in_chunks_of_16(engines: Engines, golden: list[Case], name: str):
    _alone_and_cold(engines.get(chunked_prefill_size=16), golden[NAMES.index(name)], 16)
