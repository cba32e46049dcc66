"""Constrained rows in the scheduler and in the engine's loop, on a device that takes the first allowed token.

What a request answers follows from its own tokens alone, so every answer is checked against one that is computed with a
matcher of its own, and against re, which knows nothing of llguidance.
"""

import functools
import json
import queue
import random
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from fake_runner import VOCAB, FakeRunner, next_token, params
from test_scheduler import make_config, random_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxserve.engine.grammars import Grammars
from jaxserve.engine.loop import EngineLoop
from jaxserve.scheduling import plan as words
from jaxserve.scheduling.grammar import GrammarError, Matcher, Vocabulary
from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig
from jaxserve.scheduling.sequence import sampling_words
from jaxserve.text.grammar import choice, json_schema, regex
from jaxserve.types import AbortRequests, AddRequests, Request, StepEvents, Stop

EOS, OTHER_EOS = 0, 1
TEXT = [chr(code) for code in range(33, 127)]  # a token each, then one of two characters
TOKENS = ["<eos>", "<end>", *TEXT, "ab"]
assert len(TOKENS) == VOCAB

PATTERNS = ("[a-c]{2,9}(x|yy)?", "(0|[1-9][0-9]{0,12})", "(ab)*c", "[!-~]*", "a", "(foo|foobar)")
STOPS = (EOS, OTHER_EOS)


@functools.cache
def vocabulary() -> Vocabulary:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in TOKENS[:2]])
    return Vocabulary(backend.to_str(), VOCAB + 40, STOPS)  # the logits are wider than the vocabulary


@functools.cache
def matcher_of(grammar: str) -> Matcher:
    return vocabulary().compile(grammar)


def text_of(tokens: list[int | None]) -> str:
    return "".join(TOKENS[token] for token in tokens if token is not None and token not in STOPS)


def allowed_by(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def first_allowed(token: int, allowed: list[int], suppressed: frozenset[int] = frozenset()) -> int:
    """The nearest token at or after this one, going round."""
    left = [each for each in allowed if each not in suppressed]
    assert left, "nothing is allowed"
    return min(left, key=lambda each: (each - token) % VOCAB)


class MaskedRunner(FakeRunner):
    """A step with constrained rows has no result before it was told the masks, and nothing may be launched between."""

    waiting = False

    def launch(self, plan: StepPlan) -> Any:
        assert not self.waiting, "launched before the step before it was sampled"
        self.waiting = plan.is_constrained
        result = super().launch(plan)
        return Pending(self, plan, result)

    def mask(self, plan: StepPlan, result: StepResult, masks: np.ndarray) -> None:
        assert self.waiting and masks.dtype == np.int32 and masks.flags.c_contiguous
        assert masks.shape == (plan.bucket.num_rows, words.num_words(VOCAB + 40))
        self.waiting = False
        flags = plan.arrays.flags
        for row in range(plan.bucket.num_rows):
            if not flags[row] & words.GRAMMAR:
                assert (masks[row] == -1).all(), "a row without a grammar is masked"
                continue
            slot, token = int(plan.arrays.slots[row]), int(result.token_ids[row, 0])
            suppressed = self.stops[slot] if flags[row] & words.SUPPRESS_STOP else frozenset()
            chosen = first_allowed(token, allowed_by(masks[row]), suppressed)
            self.last[slot] = result.token_ids[row, 0] = chosen
            if flags[row] & words.PENALTIES:
                self.history[slot] += chosen - token


@dataclass
class Pending:
    runner: MaskedRunner
    plan: StepPlan
    answer: StepResult

    sampled: bool = False

    def sample(self, masks: np.ndarray) -> None:
        assert self.plan.is_constrained and not self.sampled
        self.runner.mask(self.plan, self.answer, masks)
        self.sampled = True

    def result(self) -> StepResult:
        assert self.sampled or not self.plan.is_constrained, "read before it was sampled"
        return self.answer


def expected(request: Request, max_model_len: int) -> tuple[list[int | None], str]:
    """What the request must answer in any company: its tokens, None for an end without one, and why it ends."""
    params, tokens, output = request.params, list(request.token_ids), []
    sampling = sampling_words(params).tolist()[1:]
    fresh = None if request.grammar is None else vocabulary().compile(request.grammar)
    while True:
        early = len(output) < params.min_tokens
        suppressed = frozenset(params.stop_token_ids if early else ())
        token = next_token(tokens, sampling, suppressed, sum(tokens) if params.needs_penalties else None)
        if fresh is not None:
            allowed = set(allowed_by(vocabulary().fill([(fresh, 0)], 1)[0]))
            allowed -= suppressed | (set(STOPS) - set(params.stop_token_ids))
            if not allowed:
                return [*output, None], "stop" if fresh.inner.is_accepting() else "length"
            token = first_allowed(token, sorted(allowed))
        tokens.append(token)
        output.append(token)
        if token in params.stop_token_ids and not early:
            return output, "stop"
        if fresh is not None:
            fresh.accept(token)
            if fresh.inner.is_stopped():
                return [*output, None], "stop"
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output, "length"


class Company:
    """The loop's turn without threads, checking everything."""

    def __init__(self, config: SchedulerConfig, overlap: bool) -> None:
        self.scheduler, self.config, self.overlap = Scheduler(config), config, overlap
        self.runner = MaskedRunner(config.num_pages, config.page_size, config.max_running, config.max_pages)
        self.answers: dict[int, list[int | None]] = {}
        self.reasons: dict[int, str] = {}
        self.flight: deque = deque()
        self.turns = 0

    def add(self, request: Request) -> None:
        self.answers[request.id] = []
        matcher = None if request.grammar is None else matcher_of(request.grammar).copy()
        self.scheduler.add(request, self.turns / 100, matcher)

    def abort(self, request_id: int) -> None:
        self.read(self.scheduler.abort([request_id]))

    def read(self, events: StepEvents) -> None:
        for id_, token, reason in zip(events.request_ids, events.token_ids, events.finish_reasons, strict=True):
            assert id_ not in self.reasons, "an event after the end"
            if reason != "abort":
                self.answers[id_].append(token)
            if reason is not None:
                self.reasons[id_] = reason

    def commit(self) -> None:
        plan, pending = self.flight.popleft()
        self.read(self.scheduler.commit(plan, pending.result()))

    def turn(self) -> None:
        self.turns += 1
        if not self.overlap and self.flight:
            self.commit()
        plan = self.scheduler.schedule(self.turns / 100)
        launched = None if plan is None else (plan, self.runner.launch(plan))
        if self.flight:
            self.commit()
        if launched is not None:
            self.flight.append(launched)
            if launched[0].is_constrained:
                masks, events = self.scheduler.constrain(launched[0])
                launched[1].sample(masks)
                self.read(events)
        self.scheduler.check_invariants()

    def finish(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_work and not self.flight:
                break
            self.turn()
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == stats.num_held_pages == 0


def check_text(request: Request, pattern: str | None, answer: list[int | None], reason: str) -> None:
    """By re alone: a text that ended by itself is a whole sentence, and one that was cut stays inside the alphabet."""
    if pattern is None or reason == "abort":
        return
    if reason == "stop" and not set(request.params.stop_token_ids) - set(STOPS):
        assert re.fullmatch(pattern, text_of(answer)), (pattern, text_of(answer))


def random_requests(rng: random.Random, count: int, max_model_len: int) -> list[tuple[Request, str | None]]:
    bases = [[rng.randrange(VOCAB) for _ in range(rng.choice((4, 8, 20)))] for _ in range(3)]
    found: list[tuple[Request, str | None]] = []
    for index in range(count):
        tokens = (*rng.choice(bases), *(rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))))
        pattern = rng.choice((None, *PATTERNS))
        stop = rng.choice((STOPS, STOPS, (), (OTHER_EOS,), (*STOPS, TOKENS.index("c"))))
        drawn = params(
            max_tokens=rng.randint(1, min(20, max_model_len - len(tokens))),
            seed=rng.getrandbits(64),
            temperature=rng.choice((0.0, 0.8)),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)),
            min_tokens=rng.choice((0, 0, 2, 12)),
            stop_token_ids=stop,
        )
        drawn = replace(drawn, min_tokens=min(drawn.min_tokens, drawn.max_tokens))
        grammar = None if pattern is None else regex(pattern)
        found.append((Request(index, tokens, drawn, rng.choice((0, 0, 1)), grammar=grammar), pattern))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_constrained_answer_is_the_same_alone_in_company_overlapped_and_after_preemption(seed):
    rng = random.Random(seed)
    print("seed", seed)
    company = Company(random_config(rng), overlap=rng.random() < 0.75)
    asked = random_requests(rng, 16, company.config.max_model_len)
    left = deque(asked)
    aborted = set()
    while left or company.flight or company.scheduler.has_work:
        for _ in range(rng.choice((0, 1, 4))):
            if left:
                company.add(left.popleft()[0])
        if rng.random() < 0.03 and company.answers:
            aborted.add(victim := rng.choice(list(company.answers)))
            company.abort(victim)
        company.turn()
    company.finish()
    for request, pattern in asked:
        answer, reason = company.answers[request.id], company.reasons[request.id]
        whole, why = expected(request, company.config.max_model_len)
        if reason == "abort":
            assert request.id in aborted and answer == whole[: len(answer)]
        else:
            assert (answer, reason) == (whole, why)
        check_text(request, pattern, answer, reason)


def test_the_random_runs_reach_preemptions_and_every_kind_of_end():
    reached, preemptions = set(), 0
    for seed in range(30):
        rng = random.Random(1000 + seed)
        company = Company(make_config(num_pages=17), overlap=True)
        asked = random_requests(rng, 12, 64)
        for request, _ in asked:
            company.add(request)
        company.finish()
        preemptions += company.scheduler.stats().preemptions_total
        for request, pattern in asked:
            answer, reason = company.answers[request.id], company.reasons[request.id]
            assert (answer, reason) == expected(request, 64)
            if pattern is not None:
                reached.add((reason, answer[-1] is None))
    assert preemptions > 20
    assert reached >= {("stop", True), ("stop", False), ("length", False)}


def answer_alone(grammar: str, **changed: Any) -> tuple[list[int | None], str]:
    company = Company(make_config(), overlap=True)
    company.add(
        Request(0, (5, 6, 7), params(**({"max_tokens": 30, "stop_token_ids": STOPS} | changed)), grammar=grammar)
    )
    company.finish()
    return company.answers[0], company.reasons[0]


def test_a_grammar_that_is_complete_ends_the_answer_without_a_further_token():
    for changed in ({}, {"stop_token_ids": ()}, {"min_tokens": 9}, {"max_tokens": 1}):  # () is ignore_eos
        assert answer_alone(regex("a"), **changed) == ([TOKENS.index("a"), None], "stop")


def test_max_tokens_cuts_a_grammar_that_is_not_complete():
    answer, reason = answer_alone(regex("[a-z]{9}!"), max_tokens=4)
    assert (len(answer), reason) == (4, "length")


def test_end_of_sequence_tokens_end_an_accepting_grammar_and_min_tokens_holds_them_back():
    lengths = []
    for least in (0, 1, 5, 29):
        answer, reason = answer_alone(regex("[!-~]*"), min_tokens=least, seed=3, temperature=0.5)
        assert len(answer) > least or reason == "length"
        assert not set(answer[:least]) & set(STOPS)
        lengths.append(len(answer))
    ignoring, reason = answer_alone(regex("[!-~]*"), stop_token_ids=())
    assert (len(ignoring), reason, set(ignoring) & set(STOPS)) == (30, "length", set())


def test_a_row_whose_only_tokens_are_held_back_ends_instead_of_sampling_another():
    """min_tokens holds back a stop token of the client's that the grammar demands."""
    stop = (*STOPS, TOKENS.index("c"))
    assert answer_alone(regex("c{3}"), stop_token_ids=stop, min_tokens=2) == ([None], "length")
    assert answer_alone(regex("ac{3}"), stop_token_ids=stop, min_tokens=1) == (
        [TOKENS.index("a"), TOKENS.index("c")],
        "stop",
    )


def test_json_of_a_schema_is_json():
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    compact = json_schema({**schema, "additionalProperties": False}, compact=True)
    answer, reason = answer_alone(compact, max_tokens=40)
    assert reason == "stop" and set(json.loads(text_of(answer))) == {"a", "b"}


def test_tokens_past_the_vocabulary_are_never_allowed_and_rows_without_a_grammar_are_open():
    masks = vocabulary().fill([(matcher_of(regex("(?s:.)*")), 1)], 3)
    assert masks.shape == (3, words.num_words(VOCAB + 40))
    assert (masks[[0, 2]] == -1).all()
    assert max(allowed_by(masks[1])) < VOCAB and set(STOPS) < set(allowed_by(masks[1]))


def test_a_tokenizer_with_more_tokens_than_the_model_has_logits_is_cut_to_them():
    narrow = Vocabulary(vocabulary_json(), VOCAB - 10, STOPS)
    masks = narrow.fill([(narrow.compile(regex("[!-~]*")), 0)], 1)
    assert masks.shape == (1, words.num_words(VOCAB - 10)) and max(allowed_by(masks[0])) == VOCAB - 11


def vocabulary_json() -> str:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in TOKENS[:2]])
    return backend.to_str()


def test_a_grammar_that_does_not_compile_is_an_error():
    with pytest.raises(GrammarError):
        vocabulary().compile(json.dumps({"grammars": [{"lark_grammar": "start: missing"}]}))


# The loop


@dataclass
class Loop:
    """EngineLoop in a thread; load decides when, and whether, the vocabulary is there."""

    load: Any = vocabulary
    inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    sent: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        sizes = make_config()
        self.scheduler = Scheduler(sizes)
        self.runner = MaskedRunner(sizes.num_pages, sizes.page_size, sizes.max_running, sizes.max_pages)
        self.grammars = Grammars(self.load, self.inbox.put)
        self.loop = EngineLoop(
            self.scheduler, self.runner, self.inbox, self.sent.put, grammars=self.grammars, compilations=lambda: 0
        )
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()
        self.tokens: dict[int, list[int | None]] = {}
        self.reasons: dict[int, str] = {}

    def wait_for(self, *ids: int) -> None:
        deadline = time.monotonic() + 30
        while not self.reasons.keys() >= set(ids):
            events = self.sent.get(timeout=max(deadline - time.monotonic(), 0.01))
            for id_, token, reason in zip(events.request_ids, events.token_ids, events.finish_reasons, strict=True):
                self.tokens.setdefault(id_, []).append(token)
                if reason is not None:
                    assert id_ not in self.reasons
                    self.reasons[id_] = reason

    def stop(self) -> None:
        self.inbox.put(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert not self.scheduler.has_work and self.scheduler.stats().num_held_pages == 0


def request(id_: int, grammar: str | None) -> Request:
    return Request(id_, (id_ + 3, 4, 5), params(max_tokens=12, stop_token_ids=STOPS), grammar=grammar)


def test_the_loop_answers_constrained_and_other_requests_together():
    loop = Loop()
    asked = [request(i, None if i % 3 == 0 else regex(PATTERNS[i % 6])) for i in range(12)]
    loop.inbox.put(AddRequests(tuple(asked[:7])))
    loop.inbox.put(AddRequests(tuple(asked[7:])))
    loop.wait_for(*range(12))
    loop.stop()
    for each in asked:
        assert (loop.tokens[each.id], loop.reasons[each.id]) == expected(each, 64)


def test_others_are_answered_while_a_grammar_is_compiled_and_an_abort_reaches_one_that_waits():
    ready = threading.Event()

    def load() -> Vocabulary:
        assert ready.wait(20)
        return vocabulary()

    loop = Loop(load)
    asked = [request(0, choice(["foo", "bar"])), request(1, None), request(2, choice(["foo", "bar"]))]
    loop.inbox.put(AddRequests(tuple(asked)))
    loop.wait_for(1)
    loop.inbox.put(AbortRequests((0, 99)))
    loop.wait_for(0)
    assert loop.reasons == {0: "abort", 1: expected(asked[1], 64)[1]} and loop.tokens[0] == [None]
    ready.set()
    loop.wait_for(2)
    loop.stop()
    assert text_of(loop.tokens[2]) in ("foo", "bar")
    assert 0 not in loop.scheduler._known


def test_a_request_whose_matcher_cannot_be_had_is_given_up_and_the_others_go_on(caplog):
    def load() -> Vocabulary:
        raise FileNotFoundError("tokenizer.json")

    loop = Loop(load)
    loop.inbox.put(AddRequests((request(0, choice(["foo"])), request(1, None))))
    loop.wait_for(0, 1)
    loop.stop()
    assert loop.reasons == {0: "abort", 1: expected(request(1, None), 64)[1]}
    assert "tokenizer.json" in caplog.text
