"""The engine process's first function. A spawned child imports the module it lives in, so this one imports nothing:
from launch it would cost the engine a second of web frameworks."""

from multiprocessing.connection import Connection

from jaxserve.config import EngineConfig


def run_engine(connection: Connection, config: EngineConfig) -> None:
    """The only place of the server that reaches for the engine, and it runs in the other process."""
    from jaxserve.engine.main import main

    main(connection, config)
