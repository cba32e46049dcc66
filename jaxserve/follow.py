"""A machine that computes with others and serves nobody: its process brings the model, spawns the engine, and ends with
it. Rank 0 has the port, the scheduler and the log of requests.

Exit codes as launch's: 0 when rank 0 ended in order or this machine was asked to stop, 2 for what the user can mend, 1
for anything else, the loss of another machine among it.
"""

import logging
import multiprocessing
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from checkpoints.hub import HubError, resolve_model
from jaxserve.child import end_engine, start_engine
from jaxserve.config import Cluster, EngineConfig
from jaxserve.flags import Options
from jaxserve.progress import StageReporter
from jaxserve.types import EngineFailed, Progress, Ready

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LEAVE_SECONDS = 10.0  # beyond --shutdown-timeout: rank 0 says goodbye within them
END_SECONDS = 5.0  # between the end of the pipe and the first harder means
SIGNAL_PAUSE = 0.5


class Follower:
    """One run of a machine that is not rank 0."""

    def __init__(self, options: Options, cache_dir: str, hub_token: str | None) -> None:
        """options.engine holds the Cluster."""
        self._options: Options = options
        self._cluster: Cluster = options.engine["cluster"]
        self._cache_dir, self._hub_token = cache_dir, hub_token
        self._reporter = StageReporter(sys.stderr)
        self._leave_at: float | None = None
        self._signalled = 0.0
        self._spawned = self._ready = False

    def run(self) -> int:
        """Until the engine has ended; the process's exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        cluster = self._cluster
        log.info(
            "rank %d of %d machines: rank 0 at %s serves the clients, no port is opened here",
            cluster.rank,
            cluster.num_nodes,
            cluster.host,
        )
        try:
            config = self._engine_config()
        except (HubError, OSError, ValueError) as error:
            log.error("%s", error)
            return 2
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._spawned = True
        process = start_engine(context, theirs, config)
        try:
            return self._watch(ours, process)
        finally:
            self._reporter.finish()
            end_engine(process, END_SECONDS)

    def _engine_config(self) -> EngineConfig:
        """Brings the model. Raises HubError, OSError, ValueError."""
        options = self._options
        resolved = resolve_model(
            options.model,
            cache_dir=self._cache_dir,
            revision=options.revision,
            token=self._hub_token,
            progress=lambda done, total, message: self._reporter.show("download", done, total, message),
        )
        return EngineConfig(
            model_path=resolved.folder,
            cache_dir=self._cache_dir,
            gguf_path=resolved.gguf_path,
            orbax_path=resolved.orbax_path,
            **options.engine,
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        """The first signal waits for rank 0, which gets one too where all machines stop, and drains."""
        now = time.monotonic()
        if not self._spawned:
            raise SystemExit(0)
        if self._leave_at is None:
            grace = self._options.server.shutdown_timeout + LEAVE_SECONDS if self._ready else 0.0
            if grace:
                log.info("waiting for rank 0 to end, %.0f s at most; a second signal leaves now", grace)
            self._leave_at, self._signalled = now + grace, now
        elif now - self._signalled > SIGNAL_PAUSE:
            self._leave_at = now

    def _watch(self, pipe: Connection, process: Any) -> int:
        while True:
            if self._leave_at is not None and time.monotonic() >= self._leave_at:
                log.warning("leaving; the other machines of this server end too")
                pipe.close()  # which ends the engine, whatever it does
                return 0
            if not pipe.poll(POLL_SECONDS):
                continue
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                return self._code_of(process)
            match message:
                case Progress():
                    self._reporter.show(message.stage, message.done, message.total, message.message)
                case Ready():
                    self._ready = True
                    self._reporter.finish(complete=True)
                    log.info("rank %d is ready and computes with rank 0 (%.1f s)", self._cluster.rank, message.seconds)
                case EngineFailed():
                    if self._leave_at is not None:  # all were asked to stop, and rank 0 was the first
                        log.info("%s", message.message)
                        return 0
                    log.error("the engine failed: %s", message.message)
                    return message.exit_code

    def _code_of(self, process: Any) -> int:
        """Of an engine that has hung up."""
        process.join(END_SECONDS)
        code = process.exitcode
        if code == 0:
            log.info("rank 0 has ended; so does rank %d", self._cluster.rank)
            return 0
        how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        log.error("the engine of rank %d %s", self._cluster.rank, how)
        return 1
