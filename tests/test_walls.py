"""The walls of the house, read from the syntax trees: which room may import which, and what each process never
loads."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxserve.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "kernels_pallas", "checkpoints")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
HEAVY = ("jax", "jaxlib", "flax", "orbax", "torch")


@dataclass(frozen=True)
class Room:
    """ours: rooms (or single modules) below this one. later: those it may import inside a function only, when they are
    needed. others: packages besides the standard library."""

    floor: int
    ours: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()


def room(floor: int, ours: str = "", others: str = "", later: str = "") -> Room:
    return Room(floor, frozenset(ours.split()), frozenset(others.split()), frozenset(later.split()))


# The table of docs/design.md. A module belongs to the longest name here that it starts with.
ROOMS = {
    "jaxserve.version": room(0),
    "jaxserve.types": room(1),
    "jaxserve.config": room(1),
    "jaxserve.flag_file": room(1, others="yaml"),
    "jaxserve.flag_values": room(1),
    "jaxserve.cluster_flags": room(2, "jaxserve.flag_file jaxserve.flag_values"),
    "jaxserve.cluster": room(2, "jaxserve.config"),
    "jaxserve.foreign_flags": room(1),
    "jaxserve.progress": room(2, "jaxserve.types"),
    "jaxserve.utils": room(1),
    "jaxserve.connection": room(1, others="uvicorn"),
    "jaxserve.store": room(1),
    "jaxserve.store.postgres": room(2, "jaxserve.store", "psycopg psycopg_pool"),
    "kernels_pallas": room(1, others="jax numpy ml_dtypes numba llvmlite"),
    "checkpoints": room(1, others="jax numpy ml_dtypes orbax tensorstore gguf tokenizers huggingface_hub tqdm"),
    "jaxserve.flags": room(
        3,
        "jaxserve.config jaxserve.cluster_flags jaxserve.flag_file jaxserve.flag_values jaxserve.foreign_flags "
        "jaxserve.version",
    ),
    "jaxserve.client": room(2, "jaxserve.types"),
    "jaxserve.model": room(2, "jaxserve.config kernels_pallas", "jax numpy flax"),
    "jaxserve.scheduling": room(2, "jaxserve.types jaxserve.config", "numpy llguidance"),
    "jaxserve.engine": room(
        3,
        "jaxserve.model jaxserve.scheduling jaxserve.types jaxserve.config jaxserve.progress kernels_pallas "
        "checkpoints",
        "jax numpy",
    ),
    "jaxserve.text": room(
        3,
        "jaxserve.client jaxserve.types jaxserve.config checkpoints.hub checkpoints.gguf",
        "transformers tokenizers jinja2 llguidance",
    ),
    "jaxserve.child": room(4, "jaxserve.config", later="jaxserve.engine"),
    "jaxserve.api": room(
        4,
        "jaxserve.text jaxserve.client jaxserve.store jaxserve.types jaxserve.config jaxserve.version",
        "fastapi starlette pydantic orjson prometheus_client",
    ),
    "jaxserve.follow": room(
        5,
        "jaxserve.child jaxserve.config jaxserve.flags jaxserve.progress jaxserve.types checkpoints.hub",
    ),
    "jaxserve.launch": room(
        6,
        "jaxserve.child jaxserve.service jaxserve.api jaxserve.text jaxserve.client jaxserve.store jaxserve.types "
        "jaxserve.cluster jaxserve.follow jaxserve.config jaxserve.flags jaxserve.progress checkpoints.hub",
        "uvicorn",
    ),
    "jaxserve.service": room(
        5, "jaxserve.api jaxserve.client jaxserve.connection jaxserve.store jaxserve.config", "uvicorn"
    ),
    "jaxserve.batch_flags": room(4, "jaxserve.flags jaxserve.cluster_flags"),
    "jaxserve.plan_flags": room(4, "jaxserve.flags jaxserve.cluster_flags"),
    "jaxserve.planner": room(
        5,
        "jaxserve.engine jaxserve.model jaxserve.scheduling jaxserve.config jaxserve.plan_flags checkpoints.gguf "
        "checkpoints.files",
        "jax numpy huggingface_hub",
    ),
    "jaxserve.offline": room(
        7,
        "jaxserve.launch jaxserve.service jaxserve.api jaxserve.client jaxserve.store jaxserve.config "
        "jaxserve.batch_flags",
        "orjson tqdm",
    ),
    "jaxserve.llm": room(
        5,
        "jaxserve.text jaxserve.client jaxserve.types jaxserve.config jaxserve.progress checkpoints.hub",
        later="jaxserve.engine",
    ),
    "jaxserve": room(6, "jaxserve.version", later="jaxserve.llm"),
    "jaxserve.terminal": room(4, "jaxserve.config jaxserve.flags jaxserve.flag_values jaxserve.utils", "tqdm"),
    "jaxserve.__main__": room(
        8,
        "jaxserve.flags",
        later="jaxserve.launch jaxserve.batch_flags jaxserve.offline jaxserve.terminal "
        "jaxserve.plan_flags jaxserve.planner",
    ),
}

SCHEDULING_NEVER = {
    *("jax", "os", "socket", "random", "logging"),
    *("time", "threading", "asyncio", "multiprocessing", "concurrent", "queue"),
}
FRONT_END = (
    "jaxserve.api",
    "jaxserve.text",
    "jaxserve.client",
    "jaxserve.launch",
    "jaxserve.follow",
    "jaxserve.cluster",
    "jaxserve.offline",
    "jaxserve.terminal",
    "jaxserve.__main__",
)
# Modules of checkpoints.
WITHOUT_JAX = ("hub", "files", "gguf", "gguf_tokenizer", "pip_index", "storage", "wheel_models")


@dataclass(frozen=True)
class Import:
    module: str  # the importing one
    line: int
    target: str
    inside: bool  # in a function, or for the type checker only

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files(*PACKAGES)}


def imports_of(module: str, path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno} is a relative import; name the room"
                base = child.module or ""
                names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in child.names]
            for name in names:
                yield Import(module, child.lineno, name, inside)
            deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            yield from walk(child, inside or deeper)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


IMPORTS = [each for module, path in MODULES.items() for each in imports_of(module, path)]


def room_of(module: str) -> str:
    return max((name for name in ROOMS if module == name or module.startswith(name + ".")), key=len)


def within(module: str, names: frozenset[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room_of_its_own():
    loose = [module for module in MODULES if room_of(module) == "jaxserve" and module != "jaxserve"]
    assert not loose, f"{loose} have no line in ROOMS"
    assert set(MODULES) >= set(ROOMS), "a room in the table does not exist"


def test_rooms_import_only_what_the_table_allows():
    wrong = []
    for each in IMPORTS:
        name = room_of(each.module)
        allowed = ROOMS[name]
        if top(each.target) in PACKAGES:
            own = room_of(each.target) == name
            may = own or within(each.target, allowed.ours) or (each.inside and within(each.target, allowed.later))
        else:
            may = top(each.target) in sys.stdlib_module_names or top(each.target) in allowed.others
        if not may:
            wrong.append(str(each))
    assert not wrong, "\n".join(wrong)


def test_imports_only_go_down_the_floors():
    for name, each in ROOMS.items():
        for target in each.ours | each.later:
            assert ROOMS[room_of(target)].floor < each.floor, f"{name} may import {target}, which is not below it"


def test_no_module_is_part_of_an_import_circle():
    below = {module: set() for module in MODULES}
    for each in IMPORTS:
        if not each.inside and each.target in MODULES and each.target != each.module:
            below[each.module].add(each.target)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for target in sorted(below[module]):
                visit(target, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_scheduling_knows_no_device_clock_or_thread():
    own = [i for i in IMPORTS if i.module.startswith("jaxserve.scheduling.")]
    wrong = [str(i) for i in own if top(i.target) in SCHEDULING_NEVER]
    assert own
    assert not wrong, "\n".join(wrong)


def test_the_front_end_never_names_jax():
    wrong = [str(i) for i in IMPORTS if i.module.startswith(FRONT_END) and top(i.target) in HEAVY]
    assert not wrong, "\n".join(wrong)


def test_reading_checkpoints_needs_no_jax():
    light = {f"checkpoints.{name}" for name in WITHOUT_JAX}
    assert light <= set(MODULES)
    wrong = [str(i) for i in IMPORTS if i.module in light and top(i.target) in HEAVY]
    wrong += [str(i) for i in IMPORTS if i.module in light and i.target in {"checkpoints.load", "checkpoints.convert"}]
    assert not wrong, "\n".join(wrong)
    assert not MODULES["checkpoints"].read_text().strip(), "checkpoints/__init__.py is empty, so that hub stays light"


def test_nobody_reaches_into_private_jax():
    paths = [*files(*PACKAGES), *(path for path in files("tests") if path != Path(__file__).resolve())]
    wrong = [str(path) for path in paths if "jax._src" in path.read_text(encoding="utf-8")]
    assert not wrong, wrong


def test_files_and_functions_stay_short():
    long = []
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_FILE_LINES:
            long.append(f"{module} has {len(lines)} lines; look for the second thing in it")
        if module.startswith("kernels_pallas"):
            continue
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{module}:{node.lineno} {node.name} has {length} lines")
    assert not long, "\n".join(long)


def loaded_by(code: str) -> set[str]:
    """Top-level names of what a fresh interpreter has loaded after `code`, besides what it starts with."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('LOADED', *(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return {top(name) for name in done.stdout.rpartition("LOADED")[2].split()} - set(sys.stdlib_module_names)


HELP = """
from jaxserve.__main__ import main
try:
    main([*{}, "--help"])
except SystemExit as end:
    assert end.code == 0
"""


@pytest.mark.parametrize("code", ["import jaxserve", "import jaxserve.utils"], ids=["package", "utils"])
def test_nothing_is_loaded_for(code):
    assert loaded_by(code) <= {"jaxserve"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_nothing_is_loaded_for_the_help_of(command):
    assert loaded_by(HELP.format(command.split())) <= {"jaxserve"}


def test_the_front_end_process_never_loads_jax():
    code = "import jaxserve.launch, jaxserve.text.tokenizer\nfrom transformers import AutoTokenizer"
    loaded = loaded_by(code)
    assert {"fastapi", "transformers"} <= loaded
    assert not loaded & set(HEAVY)


def test_checkpoint_readers_load_no_jax():
    assert not loaded_by("import " + ", ".join(f"checkpoints.{name}" for name in WITHOUT_JAX)) & set(HEAVY)


def test_the_wheel_holds_every_package():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert set(stated) == {module_of(path) for path in MODULES.values() if path.name == "__init__.py"}
