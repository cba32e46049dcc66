"""The engine process's first function. A spawned child imports the module it lives in, so this one imports nothing:
from launch it would cost the engine a second of web frameworks."""

from multiprocessing.connection import Connection

from jaxserve.config import EngineConfig

# What an engine process is started with, where the user has said nothing else. Huge pages for large allocations: a CPU
# reads weights 18 to 28 % faster through them (docs/benchmarks.md). C libraries other than glibc pass over it.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run_engine(connection: Connection, config: EngineConfig) -> None:
    """The only place of the server that reaches for the engine, and it runs in the other process."""
    from jaxserve.engine.main import main

    main(connection, config)
