"""Converted (Orbax) checkpoints: the same tensors, on any mesh, whole or not at all."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints import convert as converting
from checkpoints.convert import OrbaxSource, convert, convert_path, open_source
from checkpoints.files import CheckpointError, SafetensorsSource, TensorInfo
from checkpoints.gguf import GGUFSource
from checkpoints.llama import hf_name
from checkpoints.storage import read_checkpoint_file
from tests import tiny_llama
from tests.test_checkpoints_files import run_python
from tests.test_checkpoints_load import ROOT, Q, Recording, quiet, sparse_gigabytes


@pytest.fixture
def tiny(tmp_path):
    return tiny_llama.write_tiny_llama(tmp_path / "hf", shards=2)


def test_a_converted_checkpoint_holds_the_same_tensors(tiny, tmp_path):
    source, dst = SafetensorsSource(tiny), str(tmp_path / "out")
    steps = []
    convert(source, dst, extra_files=tiny, metadata={"note": "x"}, progress=lambda *step: steps.append(step))
    found = open_source(dst)
    assert isinstance(found, OrbaxSource) and found.tensors == source.tensors and found.metadata["note"] == "x"
    for name in source.tensors:
        assert np.array_equal(found.read(name), source.read(name)), name
    assert np.array_equal(found.read(Q, (slice(3, 9), slice(10, 64))), source.read(Q)[3:9, 10:64])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (Path(dst) / name).read_bytes() == (Path(tiny) / name).read_bytes()
    total = sum(info.num_bytes for info in source.tensors.values())
    assert steps[0][:2] == (0, total) and "MB" in steps[0][2] and steps[-1][:2] == (total, total)


def test_orbax_itself_reads_what_was_written(tiny, tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    monkeypatch.setattr(converting, "_BATCH_BYTES", 20_000)
    monkeypatch.setattr(converting, "_CHUNK_BYTES", 4_000)
    source, dst = SafetensorsSource(tiny), tmp_path / "out"
    convert(source, str(dst), extra_files=tiny, progress=quiet)
    tree = ocp.load(dst / "orbax")
    assert set(tree) == set(source.tensors)
    assert all(np.array_equal(np.asarray(tree[name]), source.read(name)) for name in source.tensors)
    found = OrbaxSource(str(dst))
    assert ocp.metadata(dst / "orbax").custom_metadata == found.metadata
    assert all(np.array_equal(found.read(name), source.read(name)) for name in source.tensors)


def test_bfloat16_stays_bfloat16_and_tied_stays_tied(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path / "hf", dtype="bfloat16", tie=True)
    convert_path(folder, str(tmp_path / "out"), progress=quiet)
    found, source = OrbaxSource(str(tmp_path / "out")), SafetensorsSource(folder)
    assert found.tensors[Q] == TensorInfo((64, 64), np.dtype(ml_dtypes.bfloat16))
    assert found.read(Q).tobytes() == source.read(Q).tobytes() and hf_name(None, "head") not in found.tensors


def test_a_gguf_converts_to_float32_with_its_own_config_files(tiny, tmp_path):
    path = str(tmp_path / "tiny.gguf")
    tiny_llama.write_tiny_gguf(tiny, path, quantise="Q8_0")
    assert converting.main([path, str(tmp_path / "out")]) == 0
    found, source = OrbaxSource(str(tmp_path / "out")), GGUFSource(path)
    assert found.tensors == source.tensors and found.tensors[Q].dtype == np.float32
    assert all(np.array_equal(found.read(name), source.read(name)) for name in source.tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_an_interrupted_conversion_left_is_replaced(tiny, tmp_path, monkeypatch):
    dst = tmp_path / "out"
    (tmp_path / ".out.partial-old").mkdir()
    (tmp_path / ".out.partial-old" / "junk").write_text("x")

    class Breaking(Recording):
        def read(self, name, index=None):
            if len(self.reads) == 5:
                raise KeyboardInterrupt
            return super().read(name, index)

    with pytest.raises(KeyboardInterrupt):
        convert(Breaking(SafetensorsSource(tiny)), str(dst), progress=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out.lock"]
    convert(SafetensorsSource(tiny), str(dst), extra_files=tiny, progress=quiet)
    assert OrbaxSource(str(dst)).tensors


def test_a_conversion_that_is_killed_leaves_nothing_to_load_and_the_next_one_is_whole(tiny, tmp_path):
    """SIGKILL after some batches are on the disk: no handler of ours runs."""
    dst = tmp_path / "out"
    code = """
import sys
from checkpoints import convert as converting
converting._BATCH_BYTES = 20_000
def progress(done, total, message):
    print(done, total, flush=True)
    if done * 2 > total:
        sys.stdin.read()  # until it is killed
converting.convert_path(*sys.argv[1:], progress=progress)
"""
    command = [sys.executable, "-c", code, tiny, str(dst)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            done, total = map(int, line.split())
            if done * 2 > total:
                break
        assert 0 < done < total
        process.kill()
    assert not dst.exists()
    assert [path for path in tmp_path.glob(".out.partial-*/**/*") if path.is_file()], "it had begun to write"
    with pytest.raises(CheckpointError):
        open_source(str(dst))
    convert_path(tiny, str(dst), progress=quiet)
    found, source = OrbaxSource(str(dst)), SafetensorsSource(tiny)
    assert all(np.array_equal(found.read(name), source.read(name)) for name in source.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "out.lock"]


def test_a_converted_checkpoint_loads_onto_any_mesh(tiny, tmp_path):
    """Written once, without a mesh in it; every layout of the engine's own table gets what safetensors give."""
    convert_path(tiny, str(tmp_path / "out"), progress=quiet)
    code = """
import jax, jax.numpy as jnp, numpy as np
from checkpoints.convert import open_source
from checkpoints.load import load
from jaxserve.config import EngineConfig
from jaxserve.engine.weights import _target, read_model_config
from jaxserve.model.sharding import describe, make_mesh
from tests.test_checkpoints_load import quiet
model = read_model_config(EngineConfig(FOLDER, FOLDER))
devices = jax.devices()
for count, dp in ((1, 1), (2, 1), (4, 2), (8, 1), (8, 2), (8, 8)):
    _, description = describe(model, jnp.dtype("float32"), make_mesh(devices[:count], dp=dp), "tpu")
    parameters = jax.tree.leaves(description)
    names = {name: name for p in parameters for name in p.tensors}
    targets = {p.path: _target(p, names) for p in parameters}
    found, expected = (load(open_source(path), targets, progress=quiet) for path in (CONVERTED, FOLDER))
    for path, array in expected.items():
        assert found[path].sharding == array.sharding, path
        assert np.array_equal(np.asarray(found[path]), np.asarray(array)), (count, dp, path)
"""
    code = code.replace("FOLDER", repr(tiny)).replace("CONVERTED", repr(str(tmp_path / "out")))
    run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8", NPROC="16")


def test_two_conversions_at_once_write_once(tiny, tmp_path):
    dst, lines, failures = str(tmp_path / "out"), [], []

    def work():
        try:
            convert(SafetensorsSource(tiny), dst, extra_files=tiny, progress=lambda *step: lines.append(step[2]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and sum("is there already" in line for line in lines) == 2
    assert len(OrbaxSource(dst).tensors) == len(SafetensorsSource(tiny).tensors)


def test_another_model_or_a_foreign_folder_is_never_overwritten(tiny, tmp_path, capsys):
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "precious").write_text("x")
    assert converting.main([tiny, str(dst)]) == 2
    assert "is no converted checkpoint; remove it" in capsys.readouterr().err and (dst / "precious").exists()
    other = tiny_llama.write_tiny_llama(tmp_path / "other", seed=9)
    convert_path(tiny, str(tmp_path / "a"), progress=quiet)
    with pytest.raises(CheckpointError, match="converted from another source"):
        convert_path(other, str(tmp_path / "a"), progress=quiet)
    assert converting.main([str(tmp_path / "absent"), str(tmp_path / "b")]) == 2


def test_a_disk_too_small_is_refused_before_writing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match="0 MB are free"):
        convert(SafetensorsSource(tiny), str(tmp_path / "out"), extra_files=tiny, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_says_so(tiny, tmp_path):
    dst = tmp_path / "out"
    convert_path(tiny, str(dst), progress=quiet)
    document = json.loads((dst / "checkpoint.json").read_text())
    (dst / "checkpoint.json").write_text(json.dumps(document | {"version": 99}))
    with pytest.raises(CheckpointError, match="version 99; expected 'jaxserve-checkpoint' version 1"):
        read_checkpoint_file(str(dst))
    document["tensors"]["ghost.weight"] = ["float32", 2]
    document["tensors"][Q] = ["float32", 3, 64]
    (dst / "checkpoint.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="'ghost.weight' cannot be read"):
        OrbaxSource(str(dst)).read("ghost.weight")
    with pytest.raises(CheckpointError, match=r"float32 \[64, 64\]; expected float32 \[3, 64\]"):
        OrbaxSource(str(dst)).read(Q)
    shutil.rmtree(dst / "orbax")
    with pytest.raises(CheckpointError, match="damaged"):
        OrbaxSource(str(dst))
    with pytest.raises(CheckpointError, match="no converted checkpoint"):
        OrbaxSource(str(tmp_path))


@pytest.mark.slow
def test_converting_two_gigabytes_holds_a_few_tensors_of_them(tmp_path):
    """16 tensors of 128 MB; anonymous memory. Linux."""
    code = """
from pathlib import Path
from orbax.checkpoint import v1
from checkpoints.convert import convert
from checkpoints.files import SafetensorsSource
from tests.test_checkpoints_load import Watch, quiet
folder = Path(FOLDER)
with Watch() as watch:
    convert(SafetensorsSource(str(folder)), str(folder / "out"), progress=quiet)
print("EXTRA", watch.peak)
assert watch.peak < 5 * (128 << 20), watch.peak
"""
    sparse_gigabytes(tmp_path, 2)
    run_python(code.replace("FOLDER", repr(str(tmp_path))))
    shutil.rmtree(tmp_path / "out")
