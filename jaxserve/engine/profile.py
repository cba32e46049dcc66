"""Profiles of a running engine, by jax.profiler. A thread of its own starts and stops them: writing one takes seconds,
and neither the loop nor the reader of the pipe should wait for it. Steps are counted by the messages they send."""

import logging
import os
import queue
import threading
from collections.abc import Callable

from jaxserve.types import FromEngine, ProfileReport, StartProfile, StepEvents, StopProfile

logger = logging.getLogger(__name__)
_Command = StartProfile | StopProfile | str  # a folder: the steps that were asked for are in it


class Profiler:
    """At most one profile at a time. send: to the front end; each command is answered by one ProfileReport, in
    order."""

    def __init__(self, send: Callable[[FromEngine], None]) -> None:
        self._send = send
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._folder: str | None = None
        self._steps_left: int | None = None
        self._thread: threading.Thread | None = None

    def handle(self, command: StartProfile | StopProfile) -> None:
        """Returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="profiler", daemon=True)
            self._thread.start()
        self._commands.put(command)

    def send(self, message: FromEngine) -> None:
        """What the loop sends through, so that steps are seen."""
        self._send(message)
        folder, left = self._folder, self._steps_left
        if folder is not None and left is not None and isinstance(message, StepEvents):
            self._steps_left = left - 1 if left > 1 else None
            if left <= 1:
                self._commands.put(folder)

    def _work(self) -> None:
        while True:
            command = self._commands.get()
            if isinstance(command, str) and command != self._folder:
                continue  # it was stopped, and perhaps another begun, in the meantime
            try:
                report = self._start(command) if isinstance(command, StartProfile) else self._stop()
            except Exception as error:  # of the profiler or the disk: the engine goes on
                logger.exception("profiling failed")
                report = ProfileReport(None, f"{type(error).__name__}: {error}")
            if not isinstance(command, str):
                self._send(report)

    def _start(self, command: StartProfile) -> ProfileReport:
        import jax.profiler

        if self._folder is not None:
            return ProfileReport(self._folder, None, conflict=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 1 if command.python_stack else 0
        os.makedirs(command.folder, exist_ok=True)
        jax.profiler.start_trace(command.folder, profiler_options=options)
        self._folder, self._steps_left = command.folder, command.num_steps
        logger.info("profiling into %s", command.folder)
        return ProfileReport(command.folder, None)

    def _stop(self) -> ProfileReport:
        import jax.profiler

        if self._folder is None:
            return ProfileReport(None, None, conflict=True)
        folder, self._folder, self._steps_left = self._folder, None, None
        jax.profiler.stop_trace()
        logger.info("wrote a profile into %s", folder)
        return ProfileReport(folder, None)
