"""Programs on disk: found without tracing, the same answers, and never trusted when damaged or someone else's."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.config import EngineConfig
from jaxserve.engine import compile as compile_module
from jaxserve.engine import executables
from jaxserve.engine.build import Engine, build
from jaxserve.engine.executables import MISS_EVENT, ExecutableStore
from tests.engines import SMALL, Driver, greedy, quiet, shared_folder


@pytest.fixture
def misses():
    """Programs compiled since the test began; JAX's own cache is out of the way."""
    kept, told = jax.config.jax_compilation_cache_dir, []
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(lambda event, **_: told.append(event) if event == MISS_EVENT else None)
    yield told
    jax.config.update("jax_compilation_cache_dir", kept)
    compilation_cache.reset_cache()


def _lowered(factor: float = 2.0):
    def function(x, unused, y):
        return {"sum": x * factor + y["a"], "y": y}

    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    return jax.jit(function, donate_argnums=2, keep_unused=True).lower(x, x, {"a": x})


def _run(program) -> np.ndarray:
    x = jnp.arange(8, dtype=jnp.float32)
    return np.asarray(program(x, x, {"a": jnp.ones(8)})["sum"])


def _store(folder: Path, description: str = "one") -> ExecutableStore:
    store = ExecutableStore(str(folder), jax.devices()[:1], description)
    store.open()
    return store


def _fill(folder: Path, **lowered) -> None:
    store = _store(folder)
    store.save({key: store.compile(key, low)[0] for key, low in lowered.items()})


def test_a_program_is_found_by_its_key_and_by_its_text(tmp_path, misses):
    _fill(tmp_path, f=_lowered())
    assert len(misses) == 1
    found = _store(tmp_path).load("f")
    assert found is not None and _run(found).tolist() == [2.0 * x + 1 for x in range(8)]
    with pytest.raises((TypeError, ValueError)):
        found(jnp.zeros(9), jnp.zeros(9), {"a": jnp.zeros(9)})
    other = _store(tmp_path, "another description")
    assert other.load("f") is None
    entry, again = other.compile("f", _lowered())
    assert len(misses) == 1 and (_run(again) == _run(found)).all()
    changed, _ = other.compile("f", _lowered(3.0))
    assert len(misses) == 2 and changed.name != entry.name


def _shared(x):
    return jnp.where(x > 2, x * 3, x + 1).at[2].set(7)


def test_a_second_folder_gets_a_program_that_runs(tmp_path, misses):
    """JAX gives the second one the executable of the first, and XLA would lose functions of it (docs/design.md)."""
    lowered = jax.jit(_shared).lower(jax.ShapeDtypeStruct((64,), jnp.float32))
    x = jnp.arange(64, dtype=jnp.float32)
    for name in ("one", "two", "three"):
        _fill(tmp_path / name, f=lowered)
        found = _store(tmp_path / name).load("f")
        assert found is not None and (np.asarray(found(x)) == np.asarray(_shared(x))).all()
    (tmp_path / "four").mkdir()
    next((tmp_path / "one").glob("program-*")).unlink()
    _fill(tmp_path / "four", f=lowered)
    assert _store(tmp_path / "four").load("f") is None, "compiled by the next start"


def test_a_first_start_says_nothing_of_an_index_that_never_was(tmp_path, caplog):
    with caplog.at_level("INFO"):
        _store(tmp_path / "new")
    assert not caplog.records


def test_a_donated_argument_is_still_donated(tmp_path, misses):
    _fill(tmp_path, f=_lowered())
    given = jnp.ones(8)
    where = given.unsafe_buffer_pointer()
    x = jnp.arange(8, dtype=jnp.float32)
    told = _store(tmp_path).load("f")(x, x, {"a": given})
    assert given.is_deleted() and where in {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(told)}


@pytest.mark.parametrize("kind", ["index-*", "program-*"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "foreign", "writable", "link", "folder"])
def test_what_is_damaged_or_could_be_anyones_is_made_again(tmp_path, misses, kind, harm):
    _fill(tmp_path, f=_lowered())
    (path,) = tmp_path.glob(kind)
    content = path.read_bytes()
    if harm == "writable":
        path.chmod(0o666)
    elif harm == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b"", "foreign": b"\x80\x04N."}[harm])
    store = _store(tmp_path)
    assert store.load("f") is None
    entry, program = store.compile("f", _lowered())
    assert _run(program)[3] == 7.0 and len(misses) == (1 if kind == "index-*" else 2)
    store.save({"f": entry})
    if harm != "folder":
        assert _store(tmp_path).load("f") is not None, "the next start pays again"


def test_another_users_files_are_not_read(tmp_path, misses, monkeypatch):
    _fill(tmp_path, f=_lowered())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert _store(tmp_path).load("f") is None


def test_a_disk_that_takes_nothing_is_no_error(tmp_path, misses, monkeypatch, caplog):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executables.tempfile, "mkstemp", full)
    _fill(tmp_path, f=_lowered())
    assert "No space left" in caplog.text and list(tmp_path.iterdir()) == []


def test_the_files_not_used_for_longest_go_first(tmp_path, misses, monkeypatch):
    monkeypatch.setattr(executables, "MAX_BYTES", 0)
    _fill(tmp_path, f=_lowered())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    _fill(tmp_path, f=_lowered(), g=_lowered(3.0))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    old = tmp_path / "program-old"
    old.write_bytes(b"x" * 100)
    os.utime(old, (1, 1))
    monkeypatch.setattr(executables, "MAX_BYTES", size + 50)
    _fill(tmp_path, h=_lowered(2.0))
    assert not old.exists()


def test_what_the_compiler_is_told_changes_the_environment(monkeypatch):
    device = jax.devices()[0]
    before = executables.environment_of(device, 1)
    assert before == executables.environment_of(device, 1) and " at 0x" not in before
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert executables.environment_of(device, 1) != before
    monkeypatch.undo()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert executables.environment_of(device, 1) != before
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    assert executables.environment_of(device, 1) != before


def test_every_source_that_is_traced_counts():
    root = Path(executables.__file__).parents[2]
    told = {os.path.relpath(path, root) for path in executables._source_files(str(root))}
    assert {"jaxserve/types.py", "jaxserve/model/sampling.py", "kernels_pallas/xla.py"} <= told
    assert {"jaxserve/engine/step.py", "jaxserve/scheduling/plan.py", "jaxserve/config.py"} <= told


def _tokens(engine: Engine) -> list[list[int]]:
    wanted = [(range(5, 45), greedy(6)), (range(50, 60), greedy(6, temperature=1.0, seed=4))]
    return [answer.token_ids for answer in Driver(engine.runner, engine.sizes.scheduler).run(wanted)]


def test_the_second_build_traces_nothing_and_a_changed_source_compiles_nothing(tmp_path, misses, monkeypatch):
    config = EngineConfig(shared_folder("tied"), str(tmp_path), **SMALL)
    jax.clear_caches()
    first = build(config, quiet)
    assert first.counter.cache_misses >= first.runner.num_programs
    assert any((tmp_path / "programs" / "xla").iterdir())
    jax.clear_caches()

    def traced(*_args, **_kwargs):
        raise AssertionError("a program was traced")

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(compile_module._Builder, "_lower", traced)
        patch.setattr(compile_module, "_lower_admit", traced)
        second = build(config, lambda *stage: told.append(stage))
    assert second.counter.cache_misses == 0
    assert [done for stage, done, *_ in told if stage == "compile"][-1] == second.runner.num_programs
    assert _tokens(second) == _tokens(first)
    with monkeypatch.context() as patch:
        patch.setattr(executables, "sources_digest", lambda: "changed")
        third = build(config, quiet)
    assert third.counter.cache_misses == 0 and _tokens(third) == _tokens(first)


def test_what_another_machine_lacks_is_compiled_here_too(tmp_path, misses):
    lowerings = {"f": _lowered, "g": lambda: _lowered(3.0)}

    def compiled(lacking=None) -> int:
        before = len(misses)
        done = compile_module.compile_all(lowerings, lambda done, total: None, _store(tmp_path), lacking)
        assert _run(done["f"])[1] == 3.0 and _run(done["g"])[1] == 4.0
        return len(misses) - before

    assert compiled() == 2 and compiled() == 0
    told: list[list[str]] = []
    assert compiled(lambda names: [told.append(list(names)), {"'g'"}][1]) == 1 and told == [[]]
    assert compiled() == 0
