"""One server and, at a time, one in-process engine for the whole session: to start one costs more than most tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from jaxserve.config import default_cache_dir
from tests.golden import Case, load_cases
from tests.real_engines import Engines, RealServer

if TYPE_CHECKING:
    from tests.postgres import PostgresServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=["model", "rest"], help="what the default model is up for, or the rest")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run with JAXSERVE_SLOW=1 (make test-all) only; --part takes one of two halves."""
    part = config.getoption("--part")
    if part is not None:
        left_out = [item for item in items if _needs_model(item) != (part == "model")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _needs_model(item) == (part == "model")]
    if not os.environ.get("JAXSERVE_SLOW"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-all runs it"))


def _needs_model(item: pytest.Item) -> bool:
    return not {"live", "engines"}.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture
def rng() -> np.random.Generator:
    """New numbers in every run; a failed test shows the SEED that brings them back."""
    seed = int(os.environ.get("SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def cache_dir() -> str:
    """Models and compiled programs stay there from one session to the next: JAXSERVE_TEST_CACHE, or the user's own."""
    return os.environ.get("JAXSERVE_TEST_CACHE") or default_cache_dir(os.environ, os.path.expanduser("~"))


@pytest.fixture(scope="session")
def golden() -> list[Case]:
    return load_cases()


@pytest.fixture(scope="session")
def live(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """The default model served with the default flags, by the names that the notebook of the API uses too."""
    log: Path = tmp_path_factory.mktemp("live") / "server.log"
    names = ("SmolLM2-135M-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct")
    flags = ("--cache-dir", cache_dir, "--dtype", "float32", "--served-model-name", *names)
    with RealServer(*flags, log=log) as server:
        yield server.wait()
        server.wait_idle()
        assert server.metrics()["compilations_total:serving"] == 0, "something was compiled after ready"
        missed = [line for line in server.output().splitlines() if "batch." in line and "#cache_miss: 0" not in line]
        assert not missed, missed


@pytest.fixture(scope="session")
def postgres() -> Iterator["PostgresServer"]:
    """A PostgreSQL server, as Debian's package has it."""
    pytest.importorskip("psycopg_pool", reason="psycopg is not installed (pip install 'jaxserve[postgres]')")
    from tests.postgres import PostgresServer, binaries

    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    with PostgresServer(folder) as server:
        yield server


@pytest.fixture(scope="session")
def engines(cache_dir: str) -> Iterator[Engines]:
    engines = Engines(cache_dir)
    yield engines
    engines.close()
