"""The front-end process: binds the port, brings the model, spawns the engine, serves HTTP, and ends in order.

Exit codes: 0 asked to stop, 2 what the user can mend (flags, files, a taken port), 1 anything else. The environment is
read here only: JAXSERVE_CACHE_DIR, XDG_CACHE_HOME, XDG_DATA_HOME, JAXSERVE_API_KEY, JAXSERVE_STORE, HF_TOKEN, and what
jaxserve.cluster looks for.
"""

import asyncio
import logging
import logging.config
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import uvicorn

from checkpoints.hub import HubError, ResolvedModel, resolve_model
from jaxserve.child import end_engine, run_engine, start_engine
from jaxserve.client import EngineClient, EngineUnavailable
from jaxserve.cluster import find_cluster, google_metadata
from jaxserve.config import ConfigError, EngineConfig, ServerConfig, default_cache_dir, default_storage_path
from jaxserve.flags import Options
from jaxserve.follow import Follower
from jaxserve.progress import CLEAR_LINE, StageReporter
from jaxserve.service import HttpService, Service, bind, open_store, raise_file_limit, tls_options
from jaxserve.store import StoreError
from jaxserve.text.dialect import dialect_of
from jaxserve.text.embed import matryoshka_sizes
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import EngineFailed, Progress, Ready

log = logging.getLogger(__name__)
T = TypeVar("T")
EngineEntry = Callable[[Connection, EngineConfig], None]

ENGINE_EXIT_TIMEOUT = 10.0  # seconds between Stop and the first harder means
FAILURE_GRACE = 5.0  # seconds to tell open requests that the engine is gone
POLL_SECONDS = 0.1
SIGNAL_PAUSE = 0.5  # seconds within which signals are one: timeout(1) and process groups send two at once


def launch(options: Options, engine: EngineEntry | None = None) -> int:
    """Serves until a signal or a failure; the process's exit code.

    engine: what the child runs (tests bring their own).
    """
    config = with_environment(options, os.environ)
    configure_logging(config)
    for warning in options.warnings:
        log.warning("%s", warning)
    try:
        tls_options(config)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    try:
        cluster = find_cluster(options.cluster, os.environ, google_metadata)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    if cluster is not None:
        if not cluster.secret:
            log.warning("there is no --dist-secret-file: every user of this machine may join in or listen")
        options = replace(options, engine={**options.engine, "cluster": cluster})
        if cluster.rank:
            cache_dir = options.cache_dir or default_cache_dir(os.environ, os.path.expanduser("~"))
            return Follower(options, cache_dir, os.environ.get("HF_TOKEN")).run()
    raise_file_limit()
    try:
        listener = bind(config.host, config.port)
    except OSError as error:
        log.error(
            "cannot listen on %s:%d: %s. Choose another --host or --port.", config.host, config.port, error.strerror
        )
        return 2
    config = replace(config, port=listener.getsockname()[1])
    try:
        store, missing = open_store(config, default_storage_path(os.environ, os.path.expanduser("~")))
    except StoreError as error:
        log.error("%s", error)
        return 2
    try:
        return run(replace(options, server=config), HttpService(config, listener, store, missing), engine)
    finally:
        if store is not None:
            store.close()


def run(options: Options, service: Service, engine: EngineEntry | None = None) -> int:
    """Brings up the engine for a service and stays until one of the two ends; the process's exit code."""
    cache_dir = options.cache_dir or default_cache_dir(os.environ, os.path.expanduser("~"))
    loop_factory = uvicorn.Config(app="", loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        options = replace(options, cache_dir=cache_dir)
        front_end = FrontEnd(options, os.environ.get("HF_TOKEN"), service, engine or run_engine)
        return runner.run(front_end.run())


def with_environment(options: Options, environ: Mapping[str, str]) -> ServerConfig:
    config = options.server
    key = config.api_key or environ.get("JAXSERVE_API_KEY") or None
    admin = config.admin_api_key or environ.get("JAXSERVE_ADMIN_API_KEY") or None
    store = config.store or environ.get("JAXSERVE_STORE") or None
    names = config.served_model_names or (options.model,)
    return replace(config, api_key=key, admin_api_key=admin, store=store, served_model_names=names)


def configure_logging(config: ServerConfig) -> None:
    """Lines like `[2024-10-27 23:44:03] INFO:     127.0.0.1:33852 - "GET / HTTP/1.1" 200 OK`, all to stderr."""
    level = config.log_level.upper()
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    access = clear + '[%(asctime)s] %(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s'
    times = "%Y-%m-%d %H:%M:%S"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "plain": {"()": "jaxserve.launch.LogFormatter", "datefmt": times, "clear": clear},
                "access": {
                    "()": "uvicorn.logging.AccessFormatter",
                    "fmt": access,
                    "datefmt": times,
                    "use_colors": False,
                },
            },
            "filters": {"probes": {"()": "jaxserve.launch.ProbeFilter"}},
            "handlers": {
                "plain": {"class": "logging.StreamHandler", "formatter": "plain"},
                "access": {"class": "logging.StreamHandler", "formatter": "access"},
            },
            "root": {"handlers": ["plain"], "level": "WARNING"},
            "loggers": {
                "jaxserve": {"level": level},
                "checkpoints": {"level": level},
                "uvicorn.error": {"level": "WARNING"},
                "uvicorn.access": {
                    "handlers": ["access"],
                    "filters": ["probes"],
                    "level": (config.log_level_http or config.log_level).upper(),
                    "propagate": False,
                },
            },
        }
    )


class ProbeFilter(logging.Filter):
    """Access lines of /health and of the page's own files are of level DEBUG: probes ask every second or so, for
    ever."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        if str(path).partition("?")[0] != "/health" and not str(path).startswith("/ui/"):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


class LogFormatter(logging.Formatter):
    """`[time] message`, with the level's name from WARNING on; clear is written before it."""

    def __init__(self, datefmt: str, clear: str = "") -> None:
        super().__init__(clear + "[%(asctime)s] %(message)s", datefmt)
        self.loud = logging.Formatter(clear + "[%(asctime)s] %(levelname)s: %(message)s", datefmt)

    def format(self, record: logging.LogRecord) -> str:
        return self.loud.format(record) if record.levelno >= logging.WARNING else super().format(record)


class FrontEnd:
    """One run: a service, its engine process, and what has become of both."""

    def __init__(self, options: Options, hub_token: str | None, service: Service, engine: EngineEntry) -> None:
        self.options, self.hub_token, self.service, self.engine = options, hub_token, service, engine
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None
        self.started = time.monotonic()
        self.signalled = 0.0

    async def run(self) -> int:
        """Serves until a signal, a failed start or the engine's end; the exit code."""
        ours, self.theirs = self.context.Pipe()
        self.client = EngineClient(ours)
        self.serving = self.service.attach(self.client)
        self.client.start()
        self.stop = asyncio.Event()
        self._install_signal_handlers()
        service = asyncio.ensure_future(self.service.run())
        try:
            return await self._watch(service)
        finally:
            await self._shut_down(service)

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self.stop.is_set() and now - self.signalled < SIGNAL_PAUSE:
            return
        self.signalled = now
        if self.stop.is_set():
            log.warning("stopping now; open requests are dropped")
            self.service.hurry()
        self.stop.set()

    async def _watch(self, service: "asyncio.Future[int]") -> int:
        """Waits for the first thing that ends the server."""
        starting = asyncio.ensure_future(self._start())
        stopped = asyncio.ensure_future(self.stop.wait())
        failed = asyncio.ensure_future(self.client.wait_failed())
        reporting = asyncio.ensure_future(self._report_stages())
        waiting: set[asyncio.Future[Any]] = {starting, stopped, failed, service}
        try:
            while True:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    return 0
                if failed.done():
                    return await self._report_failure(failed.result())
                if service.done():
                    return service.result()
                code = self._start_result(starting)
                if code is not None:
                    return code
                waiting.discard(starting)
        finally:
            for task in (starting, stopped, failed, reporting):
                task.cancel()

    def _start_result(self, starting: "asyncio.Future[None]") -> int | None:
        """None when the start succeeded, else the exit code for its error."""
        error = starting.exception()
        if error is None:
            return None
        self.serving.failure = str(error)
        if isinstance(error, EngineUnavailable) and self.client.failure is not None:
            log.error("%s", self.client.failure.message)
            return self.client.failure.exit_code
        if isinstance(error, HubError | ConfigError | ValueError | OSError):
            log.error("%s", error)
            return 2
        log.error("the server could not start", exc_info=error)
        return 1

    async def _start(self) -> None:
        """Model -> engine process and tokenizer -> ready."""
        resolved = await _in_thread(self._resolve)
        options, config = self.options, self.serving.config
        if not options.server.served_model_names[1:] and options.server.served_model_names == (options.model,):
            names = tuple(dict.fromkeys((options.model, resolved.name)))
            config = replace(config, served_model_names=names)
        profiles = config.profile_dir or os.path.join(options.cache_dir or "", "profiles")
        self.serving.config = replace(config, model_path=resolved.folder, profile_dir=profiles)
        self.serving.matryoshka = matryoshka_sizes(resolved.folder)
        engine_config = EngineConfig(
            model_path=resolved.folder,
            cache_dir=options.cache_dir or "",
            tokenizer_path=config.tokenizer_path,
            gguf_path=resolved.gguf_path,
            orbax_path=resolved.orbax_path,
            **options.engine,
        )
        self.process = start_engine(self.context, self.theirs, engine_config, self.engine)
        self.serving.tokenizer = await _in_thread(lambda: load_tokenizer(resolved.folder, config))
        ready = await self.client.wait_ready()
        if config.max_queued_requests is not None:
            self.client.max_open_requests = ready.max_running + config.max_queued_requests
        self._announce(ready)

    def _resolve(self) -> ResolvedModel:
        def progress(done: int, total: int, message: str) -> None:
            self.serving.progress = Progress("download", done, total, message)

        options = self.options
        return resolve_model(
            options.model,
            cache_dir=options.cache_dir or "",
            revision=options.revision,
            token=self.hub_token,
            progress=progress,
        )

    async def _report_stages(self) -> None:
        reporter = StageReporter(sys.stderr)
        try:
            while (stage := self.serving.stage()) is not None and stage["status"] == "starting":
                reporter.show(stage["stage"], stage["done"], stage["total"], stage["message"])
                await asyncio.sleep(POLL_SECONDS)
        finally:
            reporter.finish(self.client.progress, complete=self.client.ready is not None)

    def _announce(self, ready: Ready) -> None:
        config = self.serving.config
        log.info(
            "model %s on %d %s (%s), %s, context %d tokens, %s, %d programs, #cache_miss: %d",
            config.served_model_names[0],
            ready.num_devices,
            ready.platform,
            ready.device_kind,
            ready.dtype,
            ready.max_model_len,
            f"KV cache {ready.num_pages * ready.page_size} tokens" if ready.generates else "embeddings only",
            ready.num_programs,
            ready.cache_misses,
        )
        self.service.on_ready(time.monotonic() - self.started)

    async def _report_failure(self, failure: EngineFailed) -> int:
        message = failure.message
        if self.process is not None:
            await _in_thread(lambda: self.process.join(2))
            code = self.process.exitcode
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                message += f"; it was ended by {name}{hint}"
        log.error("the engine failed: %s", message)
        return failure.exit_code

    async def _shut_down(self, service: "asyncio.Future[int]") -> None:
        """Stops accepting, lets open requests finish for a while, stops the engine."""
        self.serving.stopping = True
        if not service.done():
            await self.service.stop(
                self.serving.config.shutdown_timeout if self.client.failure is None else FAILURE_GRACE
            )
            await asyncio.wait({service})
            if not service.cancelled() and (error := service.exception()) is not None:
                log.error("the service failed while it stopped", exc_info=error)
        await self.client.close()
        if self.process is not None:
            await _in_thread(lambda: end_engine(self.process, ENGINE_EXIT_TIMEOUT))


def load_tokenizer(model_folder: str, config: ServerConfig) -> Tokenizer:
    """The tokenizer, with the template and the sampling defaults that the flags ask for. Raises ValueError."""
    folder = config.tokenizer_path or model_folder
    if not os.path.isdir(folder):
        raise ValueError(f"--tokenizer-path {folder} is not a folder; give one that holds tokenizer.json")
    tokenizer = Tokenizer.from_folder(folder, chat_template=config.chat_template)
    if config.sampling_defaults == "openai":
        tokenizer.sampling_defaults = {}
    # The first rendering imports transformers, which takes seconds.
    dialect = dialect_of(tokenizer, config.tool_call_parser, config.reasoning_parser)
    if config.tool_call_parser == "auto" and dialect.explained and dialect.with_tools.calls:
        log.warning(
            "The chat template describes tools in a format that is not known here; they are explained in Hermes' format"
            " instead. --tool-call-parser names the format of a model that uses a known one."
        )
    return tokenizer


def _in_thread(function: Callable[[], T]) -> "Coroutine[Any, Any, T]":
    """Runs the function in a daemon thread, which does not keep the process alive as asyncio.to_thread's would."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if result.done():
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def work() -> None:
        value, failure = None, None
        try:
            value = function()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, daemon=True).start()

    async def wait() -> T:
        return await result

    return wait()
