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
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.profile import Profiler
from jaxserve.progress import CLEAR_LINE
from jaxserve.types import EngineFailed, FromEngine, Progress, Ready, StartProfile, Stop, StopProfile, ToEngine

if TYPE_CHECKING:
    from jaxserve.config import EncoderConfig
    from jaxserve.engine.encoder import EncoderLoop
    from jaxserve.engine.loop import EngineLoop

logger = logging.getLogger("jaxserve.engine")

_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def main(connection: Connection, config: EngineConfig) -> None:
    """Entry of the spawned child. Never outlives its parent, and leaves signals to it: only the pipe says stop."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _configure_logging(config.log_level)
    if config.device != "auto":
        os.environ["JAX_PLATFORMS"] = _PLATFORMS[config.device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.mem_fraction))
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
        loop, save_plans = _start(config, inbox, profiler.send)
        try:
            loop.run()
        finally:
            save_plans()
        return 0
    except (ConfigError, CheckpointError, OSError) as error:
        logger.debug("the engine could not start", exc_info=True)
        send(EngineFailed(str(error), exit_code=2))
        return 2
    except Exception as error:
        logger.exception("the engine failed")
        send(EngineFailed(f"{type(error).__name__}: {error}", exit_code=1))
        return 1


def _start(
    config: EngineConfig, inbox: "queue.SimpleQueue[Any]", send: Callable[[FromEngine], None]
) -> "tuple[EngineLoop | EncoderLoop, Callable[[], None]]":
    """Sizes, then weights and programs side by side, then one run of each program. -> the loop, and what to call after
    it."""
    from jaxserve.engine.weights import read_encoder_config

    if (encoder := read_encoder_config(config)) is not None:
        return _start_encoder(config, encoder, inbox, send), lambda: None
    from jaxserve.engine.build import build
    from jaxserve.engine.grammars import Grammars, load_vocabulary
    from jaxserve.engine.loop import EngineLoop
    from jaxserve.engine.record import RecordingRunner
    from jaxserve.scheduling.ranks import make_scheduler

    started = time.monotonic()
    engine = build(config, lambda *stage: send(Progress(*stage)))
    for note in engine.sizes.notes:
        logger.warning("%s", note)
    scheduler = make_scheduler(engine.sizes.scheduler, engine.sizes.dp)
    engine.counter.start_counting_this_thread()
    vocabulary = (config.tokenizer_path or config.model_path, engine.model.vocab_size, engine.model.eos_token_ids)
    grammars = Grammars(lambda: load_vocabulary(*vocabulary), inbox.put)
    recorder = RecordingRunner(engine.runner, config) if config.record_plans else None
    loop = EngineLoop(
        scheduler,
        recorder or engine.runner,
        inbox,
        send,
        grammars=grammars,
        compilations=lambda: engine.counter.after_ready,
        overlap=not config.disable_overlap,
        decode_log_interval=config.decode_log_interval,
    )
    _settle(config, loop)
    sizes = engine.sizes.scheduler
    send(
        Ready(
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
            seconds=time.monotonic() - started,
            embedding_size=engine.model.embed_dim,
            generates=engine.model.generates,
        )
    )
    grammars.load()  # while the first requests come in
    path = config.record_plans
    return loop, lambda: recorder.save(path) if recorder is not None and path is not None else None


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


def _settle(config: EngineConfig, loop: "EngineLoop | EncoderLoop") -> None:
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


def _configure_logging(level: str) -> None:
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    logging.basicConfig(
        level=logging.WARNING, format=clear + "[%(asctime)s TP0] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", force=True
    )
    for name in ("jaxserve", "checkpoints"):
        logging.getLogger(name).setLevel(level.upper())
