"""What machines tell each other: plans as words, authenticated frames, who may join, and that a follower's device is
led through the same steps. No device: the runner is the one that keeps token ids in its pages."""

import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import pytest

from jaxserve.config import Cluster, ConfigError
from jaxserve.engine import hosts
from jaxserve.engine.agreement import difference
from jaxserve.engine.channel import Channel, ChannelError, open_as_follower, open_as_leader
from jaxserve.engine.hosts import STEP, Follower, FollowerLoop, Leader, LeadingRunner
from jaxserve.engine.sizing import DeviceFacts
from jaxserve.scheduling.plan import Admission, Bucket, JointPlan, Plan, Readings, StepPlan, packed_size, unpack
from jaxserve.scheduling.scheduler import SchedulerConfig
from jaxserve.scheduling.wire import decode, encode
from jaxserve.types import Stop
from jaxserve.utils import _free_port
from tests.engines import Driver
from tests.fake_runner import FakeRunner, params

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Lost
SECRET = b"a secret for tests"
SIZES = SchedulerConfig(24, 4, 40, 4, (1, 4), ((8, 2), (16, 4)))
FACTS = {"version of jax": "1", "engine option dtype": "auto"}


# Plans as words


def random_plan(rng: random.Random, num_ranks: int) -> Plan:
    bucket = Bucket(rng.randint(0, 4), 4 * rng.randint(0, 3), rng.randint(0, 3))
    size = packed_size(bucket, SIZES.max_pages)
    whole = np.array([rng.randint(-(2**31), 2**31 - 1) for _ in range(size * num_ranks)], np.int32)
    parts = tuple(
        StepPlan(
            bucket,
            vector,
            unpack(vector, bucket, SIZES.max_pages),
            tuple(_admission(rng) for _ in range(rng.randint(0, 3))),
            ((0, "a sequence, which stays at home"),),
            7,
            _readings(rng) if rng.random() < 0.5 else None,
        )
        for vector in np.split(whole, num_ranks)
    )
    return parts[0] if num_ranks == 1 else JointPlan(parts, whole)


def _admission(rng: random.Random) -> Admission:
    tokens = tuple(rng.randint(0, 10**6) for _ in range(rng.randint(1, 9)))
    bias = tuple((rng.randint(0, 99), float(np.float32(rng.uniform(-100, 100)))) for _ in range(rng.randint(0, 3)))
    return Admission(rng.randint(0, 4), tokens, rng.randint(0, 9), bias, tuple(tokens[: rng.randint(0, 2)]))


def _readings(rng: random.Random) -> Readings:
    index = np.array([rng.randint(0, 15) for _ in range(rng.randint(0, 9))], np.int32)
    spans = tuple((at, at + rng.randint(1, 4)) for at in range(rng.randint(0, 3)))
    return Readings(index, index + 5, rng.randint(0, 20), spans, ("owners stay at home",))


def assert_same_plan(got: Plan, sent: Plan) -> None:
    assert got.bucket == sent.bucket and len(got.parts) == len(sent.parts)
    np.testing.assert_array_equal(got.packed, sent.packed)
    for ours, theirs in zip(got.parts, sent.parts, strict=True):
        assert ours.admissions == theirs.admissions
        assert ours.is_constrained == theirs.is_constrained and (ours.readings is None) == (theirs.readings is None)
        if ours.readings is not None and theirs.readings is not None:
            np.testing.assert_array_equal(ours.readings.index, theirs.readings.index)
            np.testing.assert_array_equal(ours.readings.targets, theirs.readings.targets)
            assert (ours.readings.num_top, ours.readings.spans) == (theirs.readings.num_top, theirs.readings.spans)
        for name, array in ours.arrays._asdict().items():
            np.testing.assert_array_equal(array, getattr(theirs.arrays, name))


def test_a_plan_survives_its_way_as_words():
    rng = random.Random(4711)
    for _ in range(200):
        plan = random_plan(rng, rng.choice((1, 1, 2, 3)))
        words = encode(plan)
        assert words.dtype == np.int32
        assert_same_plan(decode(np.frombuffer(words.tobytes(), "<i4"), SIZES.max_pages), plan)


def test_words_that_are_no_plan_are_refused():
    words = encode(random_plan(random.Random(3), 2))
    for wrong in (words[:3], words[:-1], words[:20], np.append(words, np.int32(1)), np.full(50, 2**31 - 1, np.int32)):
        with pytest.raises((ValueError, OverflowError)):
            decode(wrong, SIZES.max_pages)


# Frames


def opened(secret: bytes = SECRET, other: bytes | None = None) -> tuple[Channel, Channel, socket.socket, socket.socket]:
    """A leader's and a follower's channel, and their sockets. Raises what either side raised."""
    left, right = socket.socketpair()
    found: list[Any] = []

    def lead() -> None:
        try:
            found.append(open_as_leader(left, secret))
        except OSError as error:
            found.append(error)
            left.close()

    thread = threading.Thread(target=lead)
    thread.start()
    try:
        follower = open_as_follower(right, secret if other is None else other, 3)
    finally:
        thread.join()
    channel, rank = found[0]
    assert rank == 3
    return channel, follower, left, right


def recorded(count: int) -> tuple[Channel, socket.socket, list[bytes]]:
    """A follower's channel, the socket that feeds it, and the frames that its leader has sent, not yet delivered."""
    leader, follower, left, right = opened()
    frames = []
    for number in range(count):
        leader.send(STEP, np.arange(number + 1, dtype=np.int32))
        frames.append(right.recv(1 << 16))
    return follower, left, frames


def test_frames_arrive_in_order_both_ways():
    leader, follower, *_ = opened()
    leader.send(7, np.arange(4, dtype=np.int32))
    leader.send(1)
    follower.send(2, b"words")
    assert follower.receive() == (7, np.arange(4, dtype=np.int32).tobytes())
    assert follower.receive() == (1, b"") and leader.receive() == (2, b"words")
    leader.close()
    with pytest.raises(ChannelError, match="hung up"):
        follower.receive()


@pytest.mark.parametrize("tamper", ["payload", "kind", "tag", "repeated", "left out", "reordered", "foreign"])
def test_a_frame_that_was_tampered_with_ends_the_connection(tamper: str):
    follower, wire, frames = recorded(3)
    altered = bytearray(frames[0])
    altered[{"payload": 6, "kind": 4, "tag": -1}.get(tamper, 0)] ^= 1
    sent = {
        "repeated": [frames[0], frames[0]],
        "left out": [frames[1]],
        "reordered": [frames[1], frames[0]],
        "foreign": recorded(1)[2],  # of another connection under the same secret
    }.get(tamper, [bytes(altered)])
    wire.sendall(b"".join(sent))
    if tamper == "repeated":
        assert follower.receive()[0] == STEP
    with pytest.raises(ChannelError, match="forged, repeated or out of order"):
        follower.receive()


def test_a_frame_of_absurd_length_is_not_waited_for():
    follower, wire, _ = recorded(0)
    wire.sendall(b"\xff\xff\xff\xff\x02")
    with pytest.raises(ChannelError, match="was announced"):
        follower.receive()


def test_neither_side_takes_another_secret():
    with pytest.raises(ChannelError, match="another one"):
        opened(other=b"another secret!!")
    left, right = socket.socketpair()
    left.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: everything\r\n\r\n")
    with pytest.raises(ChannelError, match="does not speak"):
        open_as_leader(right, SECRET)
    left, right = socket.socketpair()  # a false leader, which repeats what it hears
    left.sendall(bytes(32) + bytes(32))
    with pytest.raises(ChannelError, match="does not know our secret"):
        open_as_follower(right, SECRET, 1)


# Joining


class Lost(Exception):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def brief_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GOODBYE_SECONDS", 0.1)


@dataclass
class Site:
    """A place for machines to meet; lost: what they would have ended with."""

    num_nodes: int = 2
    timeout: float = 10.0
    port: int = field(default_factory=_free_port)
    lost: "queue.SimpleQueue[str]" = field(default_factory=queue.SimpleQueue)

    def cluster(self, rank: int, secret: bytes = SECRET) -> Cluster:
        return Cluster(self.num_nodes, rank, "127.0.0.1", self.port - 1, secret, self.timeout)

    def fail(self, message: str) -> NoReturn:
        self.lost.put(message)
        raise Lost  # ends the thread that noticed

    def lead(self, facts: dict[str, str] = FACTS) -> Leader:
        return Leader(self.cluster(0), facts, self.fail, _quiet)

    def follow(self, rank: int = 1, facts: dict[str, str] = FACTS, secret: bytes = SECRET) -> tuple[Follower, Any]:
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        return Follower(self.cluster(rank, secret), facts, self.fail, _quiet, inbox), inbox


def _quiet(done: int, total: int, message: str) -> None:
    """Nobody watches."""


def together(*work: Callable[[], Any]) -> list[Any]:
    """Results of functions that run at the same time; of those that fail, their errors."""
    results: list[Any] = [None] * len(work)

    def run(index: int) -> None:
        try:
            results[index] = work[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.fixture
def pair() -> Iterator[tuple[Site, Leader, Follower, Any]]:
    site = Site()
    leader, followed = together(site.lead, site.follow)
    assert isinstance(leader, Leader), leader
    yield site, leader, *followed
    leader.close()


def test_three_machines_agree_on_what_all_of_them_have():
    site = Site(num_nodes=3)
    leader, (second, _), (third, _) = together(site.lead, lambda: site.follow(1), lambda: site.follow(2))
    mine = DeviceFacts("gpu", 8, 80, "9.0", 132)
    told = together(
        *(lambda node=node, facts=facts: node.agree(facts) for node, facts in (
            (leader, mine), (second, replace(mine, memory=79)), (third, replace(mine, num_devices=4)),
        ))
    )  # fmt: skip
    assert told == [DeviceFacts("gpu", 20, 79, "9.0", 132, num_nodes=3)] * 3
    told = together(*(lambda node=node: node.check({"pages": "64"}) for node in (leader, second, third)))
    assert told == [None] * 3
    told = together(
        *(
            lambda node=node, name=name: node.lacking([name])
            for node, name in zip((leader, second, third), "abb", strict=True)
        )
    )
    assert told == [{"a", "b"}] * 3
    leader.close()


@pytest.mark.parametrize(
    ("host", "resolved", "secret", "bound"),
    [
        ("127.0.0.1", "127.0.0.1", SECRET, "127.0.0.1"),
        ("localhost", "127.0.0.1", b"", "127.0.0.1"),
        ("node0", "127.0.1.1", SECRET, "any"),  # its own name, in /etc/hosts
        ("node0", "203.0.113.9", SECRET, "any"),  # an address in front of this machine
        ("node0", "203.0.113.9", b"", "refused"),
    ],
)
def test_rank_0_listens_where_the_others_reach_it(
    monkeypatch: pytest.MonkeyPatch, host: str, resolved: str, secret: bytes, bound: str
):
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolved, _free_port()))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [found])
    cluster = Cluster(2, 0, host, found[4][1] - 1, secret)
    if bound == "refused":
        with pytest.raises(ConfigError, match="cannot listen"):
            hosts._listen(cluster)
        return
    with hosts._listen(cluster) as listener:
        address = listener.getsockname()[0]
    assert address in ("::", "0.0.0.0") if bound == "any" else address == bound


def test_nobody_listens_when_all_are_there(pair: Any):
    site, *_ = pair
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", site.port), 2)


def test_devices_that_differ_are_named_on_every_machine(pair: Any):
    _, leader, follower, _ = pair
    mine = DeviceFacts("gpu", 8, 80, "9.0", 132)
    for error in together(lambda: leader.agree(mine), lambda: follower.agree(replace(mine, capability="8.0"))):
        assert isinstance(error, ConfigError) and "capability is 9.0 on rank 0, 8.0 on rank 1" in str(error)


def test_what_machines_build_must_be_the_same(pair: Any):
    _, leader, follower, _ = pair
    for error in together(lambda: leader.check({"sizes": "a"}), lambda: follower.check({"sizes": "b"})):
        assert isinstance(error, ConfigError) and "sizes is a on rank 0 and b on rank 1" in str(error)


def test_facts_that_differ_are_named_whoever_lacks_them():
    assert difference(FACTS, dict(FACTS), 1) is None
    assert "dtype is auto on rank 0 and float32 on rank 2" in str(
        difference(FACTS, FACTS | {"engine option dtype": "float32"}, 2)
    )
    assert "new is not told on rank 0 and 1 on rank 2" in str(difference(FACTS, FACTS | {"new": "1"}, 2))
    site = Site()
    for error in together(site.lead, lambda: site.follow(facts=FACTS | {"version of jax": "2"})):
        assert isinstance(error, ConfigError) and "version of jax is 1 on rank 0 and 2 on rank 1" in str(error)


def test_a_rank_that_is_taken_is_refused_and_the_others_go_on():
    site = Site(num_nodes=3)
    arrived = threading.Event()

    def late() -> Any:
        arrived.wait(10)
        return site.follow(2)

    def first_and_second() -> Any:
        try:
            return site.follow(1)
        finally:
            arrived.set()

    leader, one, two, three = together(site.lead, first_and_second, first_and_second, late)
    refused = [each for each in (one, two) if isinstance(each, ConfigError)]
    assert isinstance(leader, Leader) and not isinstance(three, Exception)
    assert len(refused) == 1 and "rank 1 is there already" in str(refused[0])
    leader.close()


def test_who_does_not_come_is_named_and_strangers_delay_nobody(monkeypatch: pytest.MonkeyPatch):
    site = Site(timeout=1.0)

    def stranger() -> None:
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", site.port)):
            time.sleep(1.5)

    began = time.monotonic()
    error, _ = together(site.lead, stranger)
    assert isinstance(error, ConfigError) and "rank 1 did not come within 1 s (--dist-timeout)" in str(error)
    assert time.monotonic() - began < 5
    with pytest.raises(ConfigError, match="was not reached within 1 s"):
        Site(timeout=1.0).follow()


def test_whoever_is_lost_is_noticed_on_both_sides(pair: Any):
    site, _, follower, _ = pair
    follower._leader.channel.close()
    messages = {site.lost.get(timeout=5), site.lost.get(timeout=5)}
    assert any("rank 1 is gone" in message for message in messages)
    assert any("rank 0 (127.0.0.1) is gone" in message for message in messages)


def test_a_silent_machine_is_lost_too(pair: Any, monkeypatch: pytest.MonkeyPatch):
    site, leader, follower, _ = pair
    monkeypatch.setattr(hosts, "STARTING_SILENCE", 2.0)
    follower._leader.leaving = True  # its signs of life end, its connection stays
    with leader._peers[1].channel._lock:  # as where it reads nothing, and a step that is sent to it has filled the wire
        assert "rank 1 is gone (nothing was heard of it for" in site.lost.get(timeout=10)


# Replay


class Follow(FakeRunner):
    """A device that is led: plans come without their sequences, which only the checks of padding look at."""

    def _check_padding(self, plan: StepPlan, arrays: Any, spans: Any) -> None:
        assert not plan.sequences


@dataclass
class Steps:
    """FakeRunner as the loop's runner."""

    runner: FakeRunner
    masked: list[np.ndarray] = field(default_factory=list)

    def launch(self, plan: Any) -> Any:
        result, masked = self.runner.launch(plan), self.masked

        class Handle:
            def sample(self, masks: np.ndarray) -> None:
                masked.append(masks)

            def result(self) -> Any:
                return result

        return Handle()


def test_a_follower_is_led_through_every_step(pair: Any):
    """Prefixes, preemptions, penalties, stop tokens and readings: its pages and slots end as the leader's."""
    _, leader, follower, inbox = pair
    sizes = replace(SIZES, num_pages=14)  # few: some are preempted
    limits = (sizes.num_pages, sizes.page_size, sizes.max_running, sizes.max_pages)
    ours, theirs = FakeRunner(*limits), Follow(*limits)
    loop = FollowerLoop(Steps(theirs), SIZES.max_pages, inbox)
    thread = threading.Thread(target=loop.run)
    thread.start()
    follower.ready()
    rng = random.Random(7)
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 20))] for _ in range(12)]
    wanted: list[Any] = []
    for prompt in prompts * 3:
        changed = {"presence_penalty": 0.5} if rng.random() < 0.4 else {}
        wanted.append((prompt, params(max_tokens=rng.randint(1, 20), stop_token_ids=(3, 5), **changed)))
        wanted.append((prompt, rng.choice([None, params(max_tokens=0, num_prompt_logprobs=2)])))
    driver = Driver(leader.leading(Steps(ours)), sizes)
    answers = driver.run(wanted)
    leader.close()
    thread.join(10)
    assert not thread.is_alive() and len(answers) == len(wanted)
    assert driver.stats.preemptions_total and driver.stats.cached_tokens_total
    assert ours.counts["admissions"] and ours.counts["readings"] and ours.counts["take_last"]
    np.testing.assert_array_equal(theirs.kv, ours.kv)
    np.testing.assert_array_equal(theirs.last, ours.last)
    assert (theirs.history, theirs.stops, theirs.seen) == (ours.history, ours.stops, ours.seen)
    assert theirs.counts["readings"] == ours.counts["readings"]


def constrained_plan() -> StepPlan:
    bucket = Bucket(2, 0, 0)
    vector = np.zeros(packed_size(bucket, SIZES.max_pages), np.int32)
    arrays = unpack(vector, bucket, SIZES.max_pages)
    arrays.flags[:] = 128  # GRAMMAR
    arrays.slots[:] = SIZES.max_running
    arrays.chunk_starts[:] = 0
    return StepPlan(bucket, vector, arrays, (), (), 0)


class Still:
    """A device that does nothing."""

    def launch(self, plan: Any) -> Any:
        return None


def test_masks_follow_their_step():
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    runner = Follow(SIZES.num_pages, SIZES.page_size, SIZES.max_running, SIZES.max_pages)
    told = Steps(runner)
    leading = LeadingRunner(Steps(runner), lambda kind, words: inbox.put(hosts.Frame(kind, words.ravel())))
    masks = np.arange(6, dtype=np.int32).reshape(2, 3)
    for _ in range(2):
        leading.launch(constrained_plan()).sample(masks)
    inbox.put(Stop())
    FollowerLoop(told, SIZES.max_pages, inbox).run()
    assert len(told.masked) == 2
    np.testing.assert_array_equal(told.masked[0], masks)


def test_what_is_out_of_turn_ends_a_follower():
    step = hosts.Frame(STEP, encode(constrained_plan()))
    for frames, words in (([step, step], "before the last one"), ([hosts.Frame(hosts.MASKS, step.words)], "no step")):
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for frame in frames:
            inbox.put(frame)
        with pytest.raises(ValueError, match=words):
            FollowerLoop(Still(), SIZES.max_pages, inbox).run()
