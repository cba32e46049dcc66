"""Several machines that serve one model. Every process of JAX must run the same programs in the same order, so rank 0,
which alone has a front end and a scheduler, tells the others what it launches just before it does; they replay it.

Whoever loses another ends at once, loudly and from a thread of its own: the main thread may hang in a collective that
the lost one will never join. A frame each second says that a machine is alive whose connection looks open.
"""

import ipaddress
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from jaxserve.config import Cluster, ConfigError
from jaxserve.engine.agreement import difference
from jaxserve.engine.channel import Channel, open_as_follower, open_as_leader
from jaxserve.engine.loop import Pending, Runner
from jaxserve.engine.sizing import DeviceFacts
from jaxserve.scheduling.plan import Plan, StepResult
from jaxserve.scheduling.wire import decode, encode
from jaxserve.types import Stop

logger = logging.getLogger(__name__)

ALIVE, TEXT, STEP, MASKS, STOP = range(5)  # kinds of frames
BEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one: the other machine is gone
STARTING_SILENCE = 120.0  # until it is ready: making a backend may hold the GIL for long
HANDSHAKE_SECONDS = 10.0
RETRY_SECONDS = 0.5
GOODBYE_SECONDS = 5.0
GRACE = 0.5
REMINDER_SECONDS = 15.0

Fail = Callable[[str], NoReturn]
Waiting = Callable[[int, int, str], None]  # machines that are here, of how many, a line for people


@dataclass(frozen=True)
class Frame:
    """What a follower finds in its inbox, besides Stop."""

    kind: int  # STEP or MASKS
    words: np.ndarray  # int32


class Peer:
    """The machine at the other end of a channel, and the threads that hear and watch it. on_frame: called by one."""

    def __init__(self, channel: Channel, name: str, fail: Fail, on_frame: Callable[[int, bytes], None]):
        self.channel, self.name = channel, name
        self.starting, self.leaving = True, False  # leaving: it may hang up
        self.gone = threading.Event()
        self._fail, self._on_frame = fail, on_frame
        self._heard = time.monotonic()
        self._texts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for work in (self._read, self._beat, self._watch):
            threading.Thread(target=work, name=f"{work.__name__[1:]} {name}", daemon=True).start()

    def send(self, kind: int, payload: Any = b"") -> None:
        """Ends the process when the peer is gone."""
        try:
            self.channel.send(kind, payload)
        except OSError as error:
            self._lost(str(error))

    def tell(self, text: Any) -> None:
        """What hear() gives at the other end; anything that JSON can hold."""
        self.send(TEXT, json.dumps(text).encode())

    def hear(self) -> Any:
        return self._texts.get()

    def _read(self) -> None:
        try:
            while True:
                kind, body = self.channel.receive()
                self._heard = time.monotonic()
                if kind == TEXT:
                    self._texts.put(json.loads(body))
                elif kind != ALIVE:
                    self._on_frame(kind, body)
        except (OSError, ValueError) as error:
            self.gone.set()
            self.channel.close()
            self._lost(str(error))

    def _beat(self) -> None:
        while not self.leaving:
            self.send(ALIVE)
            time.sleep(BEAT)

    def _watch(self) -> None:
        """A thread of its own, since a peer that reads nothing blocks whoever sends."""
        while not self.leaving:
            silent = time.monotonic() - self._heard
            if silent > (STARTING_SILENCE if self.starting else SILENCE):
                self._lost(f"nothing was heard of it for {silent:.0f} s")
            time.sleep(BEAT)

    def _lost(self, why: str) -> None:
        if self.starting:
            time.sleep(GRACE)  # what ended both machines may be known here too, and says more
        if not self.leaving:
            self._fail(f"{self.name} is gone ({why}); the machines of a server end together")


class Leader:
    """Rank 0's side, once all others are there."""

    def __init__(self, cluster: Cluster, facts: Mapping[str, str], fail: Fail, waiting: Waiting):
        """Waits for the others. facts: see engine.agreement. Raises ConfigError when they do not come, or differ."""
        self._cluster, self._facts, self._fail = cluster, facts, fail
        self._peers: dict[int, Peer] = {}
        self.address: str  # that this machine listens on
        self._gather(waiting)
        self._answer(None)

    def _gather(self, waiting: Waiting) -> None:
        """Until every other rank is there; then nobody listens any more."""
        cluster, arrivals = self._cluster, queue.SimpleQueue[tuple[int, Channel]]()
        deadline = time.monotonic() + cluster.join_timeout
        with _listen(cluster) as listener:
            self.address = listener.getsockname()[0]
            threading.Thread(target=_accept, args=(listener, cluster, arrivals), name="accept", daemon=True).start()
            while missing := [rank for rank in range(1, cluster.num_nodes) if rank not in self._peers]:
                names = ", ".join(map(str, missing))
                waiting(1 + len(self._peers), cluster.num_nodes, f"waiting for rank {names}")
                left = max(deadline - time.monotonic(), 0.0)
                try:
                    self._take(*arrivals.get(timeout=min(REMINDER_SECONDS, left)))
                except queue.Empty:
                    if left < REMINDER_SECONDS:
                        problem = f"rank {names} did not come within {cluster.join_timeout:.0f} s (--dist-timeout)"
                        self._answer(problem)
                    logger.info("waiting for rank %s of %d machines", names, cluster.num_nodes)
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake accept() on Linux
        waiting(cluster.num_nodes, cluster.num_nodes, "")

    def _take(self, rank: int, channel: Channel) -> None:
        peer = Peer(channel, f"rank {rank}", self._fail, self._on_frame)
        problem = difference(self._facts, peer.hear(), rank)
        if problem is None and rank in self._peers:
            logger.error("a second machine says it is rank %d; it is refused", rank)
            peer.leaving = True
            peer.tell(f"rank {rank} is there already; every machine needs a --node-rank of its own")
            return
        self._peers[rank] = peer
        if problem is not None:
            self._answer(problem)

    def agree(self, facts: DeviceFacts) -> DeviceFacts:
        """This machine's devices -> all machines', as every rank is to see them. Raises ConfigError."""
        told = {0: facts} | {rank: DeviceFacts(**peer.hear()) for rank, peer in self._peers.items()}
        problem = next((why for rank, each in told.items() if (why := _unlike(facts, each, rank))), None)
        self._answer(problem)
        memory = None if facts.memory is None else min(each.memory or 0 for each in told.values())
        joint = DeviceFacts(
            facts.platform,
            sum(each.num_devices for each in told.values()),
            memory,
            facts.capability,
            facts.num_multiprocessors,
            num_nodes=len(told),
            prefers_bfloat16=all(each.prefers_bfloat16 for each in told.values()),
            machine_code=all(each.machine_code for each in told.values()),
        )
        for peer in self._peers.values():
            peer.tell(asdict(joint))
        return joint

    def check(self, what: Mapping[str, str]) -> None:
        """Raises ConfigError, on every rank, when another one says something else."""
        told = {rank: peer.hear() for rank, peer in self._peers.items()}
        self._answer(next((why for rank, each in told.items() if (why := difference(what, each, rank))), None))

    def lacking(self, names: Iterable[str]) -> set[str]:
        """What one machine lacks -> what any machine lacks."""
        joint = set(names).union(*(peer.hear() for peer in self._peers.values()))
        for peer in self._peers.values():
            peer.tell(sorted(joint))
        return joint

    def leading(self, runner: Runner) -> "LeadingRunner":
        """Once every machine has said that it is ready."""
        for peer in self._peers.values():
            peer.hear()
            peer.starting = False
        return LeadingRunner(runner, self.broadcast)

    def broadcast(self, kind: int, words: np.ndarray) -> None:
        for peer in self._peers.values():
            peer.send(kind, words)

    def close(self) -> None:
        """The others end, and this one waits until they did: JAX's coordinator must not be missed by anybody."""
        deadline = time.monotonic() + GOODBYE_SECONDS
        for peer in self._peers.values():
            peer.leaving = True
            with suppress(OSError):
                peer.channel.send(STOP)
        for peer in self._peers.values():
            peer.gone.wait(max(0.0, deadline - time.monotonic()))

    def _answer(self, problem: str | None) -> None:
        """Everybody hears the same, and ends with it if it is one."""
        for peer in self._peers.values():
            peer.leaving = problem is not None
            peer.tell(problem)
        if problem is not None:
            raise ConfigError(problem)

    def _on_frame(self, kind: int, body: bytes) -> None:
        raise ValueError(f"it sent a frame of kind {kind}")


class Follower:
    """The side of every other rank."""

    def __init__(
        self,
        cluster: Cluster,
        facts: Mapping[str, str],
        fail: Fail,
        waiting: Waiting,
        inbox: "queue.SimpleQueue[Any]",
    ):
        self._inbox = inbox
        channel = _reach(cluster, waiting)
        self._leader = Peer(channel, f"rank 0 ({cluster.host})", fail, self._on_frame)
        self._leader.tell(dict(facts))
        self._hear_answer()

    def agree(self, facts: DeviceFacts) -> DeviceFacts:
        """As Leader's."""
        self._leader.tell(asdict(facts))
        self._hear_answer()
        return DeviceFacts(**self._leader.hear())

    def check(self, what: Mapping[str, str]) -> None:
        """As Leader's."""
        self._leader.tell(dict(what))
        self._hear_answer()

    def lacking(self, names: Iterable[str]) -> set[str]:
        """As Leader's."""
        self._leader.tell(sorted(names))
        return set(self._leader.hear())

    def ready(self) -> None:
        """Every program was run once."""
        self._leader.tell("ready")
        self._leader.starting = False

    def close(self) -> None:
        self._leader.leaving = True
        self._leader.channel.close()

    def _hear_answer(self) -> None:
        if (problem := self._leader.hear()) is not None:
            self._leader.leaving = True
            raise ConfigError(problem)

    def _on_frame(self, kind: int, body: bytes) -> None:
        if kind == STOP:
            self._leader.leaving = True
            self._inbox.put(Stop())
        elif kind in (STEP, MASKS):
            self._inbox.put(Frame(kind, np.frombuffer(body, "<i4")))
        else:
            raise ValueError(f"it sent a frame of kind {kind}")


class LeadingRunner:
    """Stands in for a runner on rank 0."""

    def __init__(self, runner: Runner, broadcast: Callable[[int, np.ndarray], None]):
        self._runner, self._broadcast = runner, broadcast

    def launch(self, plan: Plan) -> Pending:
        self._broadcast(STEP, encode(plan))
        handle = self._runner.launch(plan)
        return LeadingHandle(handle, self._broadcast) if plan.is_constrained else handle


@dataclass(frozen=True)
class LeadingHandle:
    """A step in flight that still waits for its masks."""

    handle: Pending
    broadcast: Callable[[int, np.ndarray], None]

    def sample(self, masks: np.ndarray) -> None:
        self.broadcast(MASKS, masks)
        self.handle.sample(masks)

    def result(self) -> StepResult:
        return self.handle.result()


class FollowerLoop:
    """Launches what rank 0 launches. A step is read when the next one is launched, as rank 0 does: a step that failed
    is noticed, and no machine runs ahead of its devices."""

    def __init__(
        self,
        runner: Runner,
        max_pages: int,
        inbox: "queue.SimpleQueue[Any]",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._runner, self._max_pages, self._inbox, self._clock = runner, max_pages, inbox, clock
        self.busy_since: float | None = None  # read by the watchdog's thread

    def run(self) -> None:
        """Until Stop."""
        flight: Pending | None = None
        launched: tuple[Plan, Pending] | None = None  # it waits for its masks
        while isinstance(frame := self._inbox.get(), Frame):
            self.busy_since = self._clock()
            if frame.kind == STEP:
                if launched is not None:
                    raise ValueError("rank 0 launched a step before the last one had its masks")
                plan = decode(frame.words, self._max_pages)
                launched = plan, self._runner.launch(plan)
            elif launched is None:
                raise ValueError("rank 0 sent masks that no step waits for")
            else:
                launched[1].sample(frame.words.reshape(plan.bucket.num_rows * len(plan.parts), -1))
            if frame.kind == MASKS or not plan.is_constrained:
                if flight is not None:
                    flight.result()
                flight, launched = launched[1], None
            self.busy_since = None
        if not isinstance(frame, Stop):
            raise ValueError(f"a follower takes no {type(frame).__name__}")


def _unlike(ours: DeviceFacts, theirs: DeviceFacts, rank: int) -> str | None:
    for name in ("platform", "capability", "num_multiprocessors"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"devices differ: {name} is {getattr(ours, name)} on rank 0, {getattr(theirs, name)} on rank {rank}"
    return None


def _listen(cluster: Cluster) -> socket.socket:
    """On the address that the others reach, where it is one of this machine's own; else on all, which needs a secret.
    Raises ConfigError."""
    port = cluster.port + 1
    try:
        try:
            family, *_, address = socket.getaddrinfo(cluster.host, port, type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(address[0]).is_loopback and cluster.host not in (address[0], "localhost"):
                raise OSError(f"{cluster.host} is {address[0]} here, as /etc/hosts often has it")
            return socket.create_server(address[:2], family=family)
        except OSError:
            if not cluster.secret:
                raise
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(f"cannot listen on port {port}, the one after --dist-init-addr's: {error}") from error


def _accept(listener: socket.socket, cluster: Cluster, arrivals: "queue.SimpleQueue[tuple[int, Channel]]") -> None:
    """Each stranger in a thread of its own: one that is slow or silent holds up nobody."""

    def open_one(connection: socket.socket, address: Any) -> None:
        try:
            _prepare(connection)
            channel, rank = open_as_leader(connection, cluster.secret)
            connection.settimeout(None)
            arrivals.put((rank, channel))
        except OSError as error:
            logger.warning("a connection from %s was refused: %s", address[0], error)
            connection.close()

    with suppress(OSError):  # the listener was closed
        while True:
            threading.Thread(target=open_one, args=listener.accept(), name="handshake", daemon=True).start()


def _reach(cluster: Cluster, waiting: Waiting) -> Channel:
    """Connects to rank 0, which may start later. Raises ConfigError."""
    where = f"rank 0 at {cluster.host}:{cluster.port + 1}"
    deadline, reminded, why = time.monotonic() + cluster.join_timeout, time.monotonic(), "no answer"
    waiting(1, cluster.num_nodes, f"waiting for {where}")
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((cluster.host, cluster.port + 1), HANDSHAKE_SECONDS)
        except OSError as error:
            why = str(error)
            if time.monotonic() - reminded > REMINDER_SECONDS:
                reminded = time.monotonic()
                logger.info("waiting for %s: %s", where, why)
            time.sleep(RETRY_SECONDS)
            continue
        try:
            _prepare(connection)
            channel = open_as_follower(connection, cluster.secret, cluster.rank)
        except OSError as error:
            connection.close()
            raise ConfigError(f"{where}: {error} (--dist-secret-file, JAXSERVE_DIST_SECRET)") from error
        connection.settimeout(None)
        waiting(cluster.num_nodes, cluster.num_nodes, "")
        return channel
    raise ConfigError(f"{where} was not reached within {cluster.join_timeout:.0f} s (--dist-timeout): {why}")


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(HANDSHAKE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def start_jax(cluster: Cluster, address: str | None) -> None:
    """JAX's own side of it: every process learns of every device. Before any device is asked for. address: that rank 0
    listens on."""

    def joined(host: str) -> str:
        return f"[{host}]:{cluster.port}" if ":" in host else f"{host}:{cluster.port}"

    jax.distributed.initialize(
        joined(cluster.host),
        num_processes=cluster.num_nodes,
        process_id=cluster.rank,
        cluster_detection_method="deactivate",
        coordinator_bind_address=None if address is None else joined(address),
        initialization_timeout=max(1, int(cluster.join_timeout)),
    )
