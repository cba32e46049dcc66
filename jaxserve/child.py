"""The engine process: how it is started and ended, and its first function. A spawned child imports the module that one
lives in, so this one imports next to nothing: from launch it would cost the engine a second of web frameworks."""

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess

from jaxserve.config import EngineConfig

# What an engine process is started with, where the user has said nothing else. Huge pages for large allocations: a CPU
# reads weights 18 to 28 % faster through them (docs/benchmarks.md). C libraries other than glibc pass over it.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run_engine(connection: Connection, config: EngineConfig) -> None:
    """The only place of the server that reaches for the engine, and it runs in the other process."""
    from jaxserve.engine.main import main

    main(connection, config)


def start_engine(
    context: SpawnContext,
    connection: Connection,
    config: EngineConfig,
    entry: Callable[[Connection, EngineConfig], None] = run_engine,
) -> SpawnProcess:
    """Runs entry in a process of its own. connection, the child's end of the pipe, is closed here, so that the end of
    the child is the end of the pipe."""
    for name, value in ENVIRONMENT.items():  # read at a process's start, so nothing changes in this one
        os.environ.setdefault(name, value)
    # Not a daemon: daemons are killed at exit without a word, and this one is asked to stop.
    process = context.Process(target=entry, args=(connection, config), name="jaxserve-engine", daemon=False)
    process.start()
    connection.close()
    return process


def end_engine(process: SpawnProcess, patience: float) -> None:
    """Waits for a process that was asked to end, patience seconds before the first harder means."""
    process.join(patience)
    for harder in (process.terminate, process.kill):
        if process.is_alive():
            harder()
            process.join(2)
