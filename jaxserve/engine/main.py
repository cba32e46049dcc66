"""The engine process: from a config to ready, then the loop. JAX is imported inside functions only, after the
environment says which devices and how much memory it may take."""

import ctypes
import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from jaxserve.config import Cluster, ConfigError, EngineConfig
from jaxserve.engine.profile import Profiler
from jaxserve.progress import CLEAR_LINE
from jaxserve.types import EngineFailed, FromEngine, Progress, Ready, StartProfile, Stop, StopProfile, ToEngine

if TYPE_CHECKING:
    from jaxserve.config import EncoderConfig
    from jaxserve.engine.build import Engine
    from jaxserve.engine.encoder import EncoderLoop
    from jaxserve.engine.hosts import Follower, FollowerLoop, Leader
    from jaxserve.engine.loop import EngineLoop

    Machines = Leader | Follower
    Loop = EngineLoop | FollowerLoop | EncoderLoop

logger = logging.getLogger("jaxserve.engine")

LOST_SECONDS = 2.0  # in which the loss of another machine is noticed, and this process ended for it
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def main(connection: Connection, config: EngineConfig) -> None:
    """Entry of the spawned child. Never outlives its parent, and leaves signals to it: only the pipe says stop."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _configure_logging(config.log_level, config.cluster.rank if config.cluster else 0)
    if config.device != "auto":
        os.environ["JAX_PLATFORMS"] = _PLATFORMS[config.device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{config.allocator_fraction:.3f}")
    code = run(connection, config, on_disconnect=lambda: os._exit(0))
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # threads of XLA and of the reader need no goodbye


def run(connection: Connection, config: EngineConfig, on_disconnect: Callable[[], None] | None = None) -> int:
    """Serve the other end of connection until it says Stop or goes away; the exit code. Used as it is by llm.LLM.

    on_disconnect runs in the reader's thread as soon as the other end is gone, also while the main thread compiles.
    """
    from checkpoints.files import CheckpointError

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # ToEngine, and what the loop sends itself
    send = _sender(connection)
    profiler = Profiler(send)
    threading.Thread(target=_read, args=(connection, inbox, profiler, on_disconnect), name="inbox", daemon=True).start()
    try:
        started = _start(config, inbox, profiler.send)
        try:
            started.loop.run()
            started.stop()
        finally:
            started.save()
        return 0
    except (ConfigError, CheckpointError, OSError) as error:
        logger.debug("the engine could not start", exc_info=True)
        send(EngineFailed(str(error), exit_code=2))
        return 2
    except Exception as error:
        if config.cluster is not None:
            time.sleep(LOST_SECONDS)  # a machine that is gone is seen by the step too, which cannot say so
        logger.exception("the engine failed")
        send(EngineFailed(f"{type(error).__name__}: {error}", exit_code=1))
        return 1


def _nothing() -> None:
    """There is nothing to do."""


@dataclass(frozen=True)
class Started:
    """A loop that may run, and what is to be called: first of all; after it has ended in order; at any end."""

    loop: "Loop"
    first: Callable[[], object] = _nothing
    stop: Callable[[], None] = _nothing
    save: Callable[[], None] = _nothing


def _start(config: EngineConfig, inbox: "queue.SimpleQueue[Any]", send: Callable[[FromEngine], None]) -> Started:
    """Sizes, then weights and programs side by side, then one run of each program."""
    from jaxserve.engine.weights import read_encoder_config

    if (encoder := read_encoder_config(config)) is not None:
        if config.cluster is not None:
            raise ConfigError(f"--nnodes {config.cluster.num_nodes}: encoders are served by one machine each")
        return Started(_start_encoder(config, encoder, inbox, send))
    from jaxserve.engine.build import build

    began = time.monotonic()
    machines = None if config.cluster is None else _join(config, config.cluster, inbox, send)
    engine = build(config, lambda *stage: send(Progress(*stage)), machines)
    for note in engine.sizes.notes:
        logger.warning("%s", note)
    engine.counter.start_counting_this_thread()
    if config.cluster is not None and config.cluster.rank:
        started = _start_follower(engine, machines, inbox)
    else:
        started = _start_loop(config, engine, machines, inbox, send)
    _settle(config, started.loop)
    send(_ready(engine, time.monotonic() - began))
    started.first()
    return started


def _join(
    config: EngineConfig, cluster: Cluster, inbox: "queue.SimpleQueue[Any]", send: Callable[[FromEngine], None]
) -> "Machines":
    """The other machines, once all of them are there and agree."""
    from jaxserve.engine.agreement import facts_of
    from jaxserve.engine.executables import sources_digest
    from jaxserve.engine.hosts import Follower, Leader, start_jax

    def fail(message: str) -> NoReturn:
        logger.critical("%s", message)
        send(EngineFailed(message, exit_code=1))
        logging.shutdown()
        os._exit(1)  # the main thread may wait for ever for the machine that is gone

    def waiting(done: int, total: int, message: str) -> None:
        send(Progress("nodes", done, total, message))

    facts = facts_of(config, sources_digest())
    machines = (
        Leader(cluster, facts, fail, waiting) if not cluster.rank else Follower(cluster, facts, fail, waiting, inbox)
    )
    start_jax(cluster, machines.address if isinstance(machines, Leader) else None)
    return machines


def _start_follower(engine: "Engine", machines: "Machines | None", inbox: "queue.SimpleQueue[Any]") -> Started:
    from jaxserve.engine.hosts import Follower, FollowerLoop

    assert isinstance(machines, Follower)
    machines.ready()
    return Started(FollowerLoop(engine.runner, engine.sizes.scheduler.max_pages, inbox), stop=machines.close)


def _start_loop(
    config: EngineConfig,
    engine: "Engine",
    machines: "Machines | None",
    inbox: "queue.SimpleQueue[Any]",
    send: Callable[[FromEngine], None],
) -> Started:
    """Scheduler and loop around the runner."""
    from jaxserve.engine.grammars import Grammars, load_vocabulary
    from jaxserve.engine.hosts import Leader
    from jaxserve.engine.loop import EngineLoop
    from jaxserve.engine.record import RecordingRunner
    from jaxserve.scheduling.ranks import make_scheduler

    scheduler = make_scheduler(engine.sizes.scheduler, engine.sizes.dp)
    vocabulary = (config.tokenizer_path or config.model_path, engine.model.vocab_size, engine.model.eos_token_ids)
    grammars = Grammars(lambda: load_vocabulary(*vocabulary), inbox.put)
    runner = machines.leading(engine.runner) if isinstance(machines, Leader) else engine.runner
    recorder = RecordingRunner(runner, config) if config.record_plans else None
    loop = EngineLoop(
        scheduler,
        recorder or runner,
        inbox,
        send,
        grammars=grammars,
        compilations=lambda: engine.counter.after_ready,
        overlap=not config.disable_overlap,
        decode_log_interval=config.decode_log_interval,
    )
    path = config.record_plans
    return Started(
        loop,
        first=grammars.load,  # while the first requests come in
        stop=_nothing if machines is None else machines.close,
        save=lambda: recorder.save(path) if recorder is not None and path is not None else None,
    )


def _ready(engine: "Engine", seconds: float) -> Ready:
    sizes = engine.sizes.scheduler
    return Ready(
        max_model_len=sizes.max_model_len,
        page_size=sizes.page_size,
        num_pages=(sizes.num_pages - 1) * engine.sizes.dp,
        max_running=sizes.max_running * engine.sizes.dp,
        vocab_size=engine.model.vocab_size,
        platform=engine.platform,
        device_kind=engine.device_kind,
        num_devices=engine.num_devices,
        dtype=engine.sizes.dtype,
        num_programs=engine.runner.num_programs,
        cache_misses=engine.counter.cache_misses,
        seconds=seconds,
        embedding_size=engine.model.embed_dim,
        generates=engine.model.generates,
        quantization=engine.model.quantization,
        kv_cache_dtype=engine.sizes.kv_dtype,
    )


def _start_encoder(
    config: EngineConfig,
    model: "EncoderConfig",
    inbox: "queue.SimpleQueue[ToEngine]",
    send: Callable[[FromEngine], None],
) -> "EncoderLoop":
    """The same for a model that makes vectors only."""
    from jaxserve.engine.encoder import EncoderLoop, build_encoder

    started = time.monotonic()
    engine = build_encoder(config, model, lambda *stage: send(Progress(*stage)))
    for note in engine.notes:
        logger.warning("%s", note)
    engine.counter.start_counting_this_thread()
    loop = EncoderLoop(
        engine.buckets,
        engine.runner,
        inbox,
        send,
        compilations=lambda: engine.counter.after_ready,
        overlap=not config.disable_overlap,
    )
    _settle(config, loop)
    send(
        Ready(
            max_model_len=engine.max_len,
            page_size=0,
            num_pages=0,
            max_running=max(bucket.num_rows for bucket in engine.buckets),
            vocab_size=model.vocab_size,
            platform=engine.platform,
            device_kind=engine.device_kind,
            num_devices=engine.num_devices,
            dtype=engine.dtype,
            num_programs=engine.runner.num_programs,
            cache_misses=engine.counter.cache_misses,
            seconds=time.monotonic() - started,
            embedding_size=model.embed_dim,
            generates=False,
        )
    )
    return loop


def _settle(config: EngineConfig, loop: "Loop") -> None:
    """The last thing before ready."""
    from jaxserve.engine.loop import start_watchdog

    if config.watchdog_timeout > 0:
        start_watchdog(loop, config.watchdog_timeout)
    gc.collect()
    gc.freeze()  # what start-up made stays; collections in the loop need not walk it


def _read(
    connection: Connection,
    inbox: "queue.SimpleQueue[Any]",
    profiler: Profiler,
    on_disconnect: Callable[[], None] | None,
) -> None:
    try:
        while True:
            message = connection.recv()
            if isinstance(message, StartProfile | StopProfile):
                profiler.handle(message)
            else:
                inbox.put(message)
    except (EOFError, OSError):
        if on_disconnect is not None:
            on_disconnect()
        inbox.put(Stop())


def _sender(connection: Connection) -> Callable[[FromEngine], None]:
    """Loading and compiling report from several threads; a message must not be torn."""
    lock = threading.Lock()

    def send(message: FromEngine) -> None:
        with lock:
            try:
                connection.send(message)
            except OSError:
                logger.debug("the front end is gone")  # the reader's thread ends us

    return send


def _die_with_parent() -> None:
    """Linux: be killed when the parent dies, even if it is killed itself. Elsewhere the end of the pipe does it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(0)


def _configure_logging(level: str, rank: int) -> None:
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    logging.basicConfig(
        level=logging.WARNING,
        format=clear + f"[%(asctime)s TP{rank}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    for name in ("jaxserve", "checkpoints"):
        logging.getLogger(name).setLevel(level.upper())
