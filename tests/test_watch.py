"""What people who watch are shown is the scheduler's own state, whatever happens to the requests."""

import queue
import random
from collections import Counter

import numpy as np
import pytest
from fake_runner import FakeRunner, params

from jaxserve.engine.encoder import EncoderLoop
from jaxserve.engine.history import NUM_REQUESTS, NUM_STEPS, History
from jaxserve.engine.loop import EngineLoop
from jaxserve.scheduling.encoder import EncoderBucket
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig
from jaxserve.scheduling.snapshot import CACHED, FIRST_SLOT, FREE, MAX_WAITING, SHARED
from jaxserve.types import AbortRequests, AddRequests, Request, Snapshot, StepEvents, Stop, TakeSnapshot

CONFIG = SchedulerConfig(
    num_pages=33,
    page_size=4,
    max_model_len=64,
    max_running=6,
    decode_buckets=(2, 4, 6),
    prefill_buckets=((8, 1), (16, 3)),
)


class Turns:
    """EngineLoop's turn, one at a time, with a clock that ticks once a turn."""

    def __init__(self) -> None:
        self.scheduler, self.history, self.now = Scheduler(CONFIG), History(), 0.0
        self.runner = FakeRunner(CONFIG.num_pages, CONFIG.page_size, CONFIG.max_running, CONFIG.max_pages)
        self.flight: tuple | None = None

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.history.arrived(request.id, request.priority, self.now)
            self.scheduler.add(request, self.now)

    def abort(self, *ids: int) -> None:
        self.history.told(self.scheduler.abort(ids), self.now)

    def turn(self) -> None:
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        launched = None if plan is None else (plan, self.runner.launch(plan))
        if plan is not None:
            self.history.planned(plan, self.now)
        if self.flight is not None:
            before, result = self.flight
            self.history.committed(before, self.scheduler.commit(before, result), self.now)
        self.flight = launched

    def snapshot(self) -> Snapshot:
        return self.history.snapshot(*self.scheduler.snapshot(), self.scheduler.stats(), self.now)


def draw(random_: random.Random, id_: int) -> Request:
    """Half of the prompts begin alike."""
    shared = random_.random() < 0.5
    prompt = tuple(range(16)) if shared else ()
    prompt += tuple(random_.randrange(97) for _ in range(random_.randint(1, 20)))
    return Request(id_, prompt, params(max_tokens=random_.randint(1, 24)), priority=random_.randrange(2))


@pytest.mark.parametrize("seed", range(6))
def test_a_snapshot_is_the_schedulers_state_page_by_page_and_step_by_step(seed: int):
    print("seed", seed)
    random_, turns, states_seen = random.Random(seed), Turns(), Counter()
    for id_ in range(40):
        turns.add(draw(random_, id_))
        if random_.random() < 0.1:
            turns.abort(random_.randrange(id_ + 1))
        for _ in range(random_.randrange(4)):
            turns.turn()
            states_seen += check(turns)
    while turns.scheduler.has_work or turns.flight is not None:
        turns.turn()
        states_seen += check(turns)
    last = turns.snapshot()
    assert {FREE, CACHED, SHARED, FIRST_SLOT} <= set(states_seen)
    assert last.requests == () and last.stats.preemptions_total > 0, "the pool is small enough for that"
    assert len(last.lifelines) == 40 and all(line.reason for line in last.lifelines)
    waits = [sum(state == "waiting" for state, _ in line.marks) for line in last.lifelines]
    assert sum(waits) == 40 + last.stats.preemptions_total, "each preemption is a wait"


def check(turns: Turns) -> Counter[int]:
    """-> how many pages are in each state."""
    shown, scheduler = turns.snapshot(), turns.scheduler
    states = np.frombuffer(shown.page_states, "<u2")
    running = scheduler._decoding + scheduler._prefilling
    holders = Counter(page for sequence in running for page in sequence.pages)
    for page, state in enumerate(states.tolist(), 1):
        owners = [s for s in running if page in s.pages]
        if holders[page] > 1:
            assert state == SHARED
        elif owners:
            assert state == FIRST_SLOT + owners[0].slot
        else:
            assert state == (CACHED if scheduler._pool.is_in_tree(page) else FREE)
    stats = shown.stats
    assert (states == CACHED).sum() == stats.num_cached_pages and (states >= SHARED).sum() == stats.num_held_pages
    by_state = Counter(view.state for view in shown.requests)
    assert by_state["decode"] + by_state["prefill"] == stats.num_running and by_state["waiting"] == stats.num_waiting
    assert all((view.slot == -1 and not view.num_pages) == (view.state == "waiting") for view in shown.requests)
    assert all(0 <= view.output_tokens <= view.max_output_tokens for view in shown.requests)
    in_flight = turns.flight is not None
    assert sum(bucket.steps for bucket in shown.buckets) == stats.steps_total - in_flight
    waste = sum(b.steps * (b.decode_rows + b.prefill_tokens) - b.tokens for b in shown.buckets)
    planned = turns.flight[0] if turns.flight is not None else None
    pending = 0 if planned is None else planned.bucket.num_tokens - planned.num_tokens
    assert waste == stats.padding_tokens_total - pending
    for line in shown.lifelines:
        times = [at for _, at in line.marks] + ([] if line.ended is None else [line.ended])
        assert line.marks[0][0] == "waiting" and times == sorted(times)
        assert all(a[0] != b[0] for a, b in zip(line.marks, line.marks[1:], strict=False))
    open_lines = [line.id for line in shown.lifelines if line.ended is None]
    assert open_lines == [view.id for view in shown.requests]
    return Counter(min(state, FIRST_SLOT) for state in states.tolist())


def test_rings_stay_short_and_a_long_queue_is_cut():
    turns = Turns()
    for id_ in range(NUM_REQUESTS + 40):
        turns.add(Request(id_, (1, 2, 3), params(max_tokens=1)))
    waiting = [view for view in turns.snapshot().requests if view.state == "waiting"]
    assert len(waiting) == MAX_WAITING and [view.id for view in waiting] == list(range(MAX_WAITING))
    turns.add(*(Request(1000 + n, (1, 2, 3), params(max_tokens=40)) for n in range(NUM_STEPS // 8)))
    while turns.scheduler.has_work or turns.flight is not None:
        turns.turn()
    last = turns.snapshot()
    assert len(last.lifelines) == NUM_REQUESTS and len(last.steps) <= NUM_STEPS
    numbers = [step.number for step in last.steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[-1] == last.stats.steps_total - 1 and all(step.launched <= step.read for step in last.steps)


def run_loop(loop: EngineLoop | EncoderLoop, sent: "queue.SimpleQueue") -> list:
    """Until the Stop that was put in; -> what it sent."""
    loop.run()
    return [sent.get() for _ in range(sent.qsize())]


class AtOnce(FakeRunner):
    def launch(self, plan):
        self.done = super().launch(plan)
        return self

    def result(self):
        return self.done


def test_a_loop_answers_a_snapshot_between_steps_and_sends_none_unasked():
    inbox, sent = queue.SimpleQueue(), queue.SimpleQueue()
    runner = AtOnce(CONFIG.num_pages, CONFIG.page_size, CONFIG.max_running, CONFIG.max_pages)
    loop = EngineLoop(Scheduler(CONFIG), runner, inbox, sent.put, compilations=lambda: 0, overlap=False)
    for message in (AddRequests((Request(7, (1, 2, 3), params(max_tokens=3)),)), AbortRequests((7,)), Stop()):
        inbox.put(message)
    assert not [each for each in run_loop(loop, sent) if isinstance(each, Snapshot)]
    for message in (AddRequests((Request(8, (1, 2, 3), params(max_tokens=3)),)), TakeSnapshot(), Stop()):
        inbox.put(message)
    (shown,) = [each for each in run_loop(loop, sent) if isinstance(each, Snapshot)]
    assert [(view.id, view.state, view.prompt_tokens) for view in shown.requests] == [(8, "waiting", 3)]
    assert [(line.id, line.reason) for line in shown.lifelines] == [(7, "abort"), (8, None)]
    assert len(shown.page_states) == 2 * shown.stats.num_pages


def test_an_encoder_shows_its_texts_and_its_padding():
    inbox, sent = queue.SimpleQueue(), queue.SimpleQueue()

    class Runner:
        def launch(self, batch):
            inbox.put(TakeSnapshot())
            return self

        def result(self):
            return np.zeros((2, 4), np.float32)  # as many rows as any batch has

    def text(id_: int, length: int) -> Request:
        return Request(id_, tuple(range(length)), params(max_tokens=0), task="embed")

    loop = EncoderLoop([EncoderBucket(1, 16), EncoderBucket(2, 16)], Runner(), inbox, sent.put, compilations=lambda: 0)
    inbox.put(AddRequests((text(1, 5), text(2, 9), text(3, 16))))

    class Ending(queue.SimpleQueue):
        """Asks once more after the last vector, then stops."""

        def put(self, message, *rest):
            super().put(message, *rest)
            if isinstance(message, StepEvents) and 3 in message.request_ids:
                inbox.put(TakeSnapshot())
                inbox.put(Stop())

    told = Ending()
    loop._send = told.put
    loop.run()
    shown = [each for each in (told.get() for _ in range(told.qsize())) if isinstance(each, Snapshot)]
    assert [(view.id, view.state) for view in shown[0].requests] == [(1, "prefill"), (2, "prefill"), (3, "waiting")]
    last = shown[-1]
    assert last.requests == () and last.page_states == b"" and {line.reason for line in last.lifelines} == {"stop"}
    assert [tuple(bucket) for bucket in last.buckets] == [(0, 16, 1, 1, 16), (0, 32, 2, 1, 14)]
