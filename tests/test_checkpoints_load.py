import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tokenizers import Tokenizer

from checkpoints import load as loading
from checkpoints.convert import OrbaxSource, convert
from checkpoints.files import CheckpointError, SafetensorsSource
from checkpoints.gguf import GGUFSource
from checkpoints.hub import resolve_model
from checkpoints.llama import hf_name, tensor_names, tensor_shapes
from checkpoints.load import ALIGNMENT, DummySource, Part, Target, load
from jaxserve.utils import _free_port
from tests import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
ONE = SingleDeviceSharding(jax.devices("cpu")[0])
Q, K, V = (hf_name(0, part) for part in "qkv")
QKV = {Q: (64, 64), K: (32, 64), V: (32, 64)}  # of the tiny Llama


def quiet(done, total, message):
    pass


@pytest.fixture
def tiny(tmp_path):
    return tiny_llama.write_tiny_llama(tmp_path / "hf", shards=2)


class Recording:
    """A source that notes what is read of it."""

    def __init__(self, source):
        self.source, self.tensors, self.reads = source, source.tensors, []

    def read(self, name, index=None):
        self.reads.append((name, index))
        return self.source.read(name, index)


def test_names_and_shapes_are_those_of_the_checkpoint(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path, attention_bias=True, mlp_bias=True, tie=True)
    source = SafetensorsSource(folder)
    dims = {"L": 2, "E": 64, "H": 4, "K": 2, "D": 16, "F": 96, "V": source.tensors[hf_name(None, "embed")].shape[0]}
    shapes = tensor_shapes(dims, tie=True, attention_bias=True, mlp_bias=True)
    assert shapes == {name: info.shape for name, info in source.tensors.items()}
    assert tensor_names(2, tie=True, attention_bias=True, mlp_bias=True) == list(shapes)
    assert hf_name(1, "q", bias=True) in shapes and hf_name(None, "head") not in shapes


@pytest.mark.parametrize("much", [loading._MUCH, 1], ids=["by one thread", "by all cores"])
def test_loading_casts_turns_and_joins(tiny, much, monkeypatch):
    monkeypatch.setattr(loading, "_MUCH", much)
    monkeypatch.setattr(loading, "_ROWS", 8)
    source = SafetensorsSource(tiny)
    targets = {
        "plain": Target({Q: (64, 64)}, np.dtype(np.float32), ONE),
        "turned": Target({hf_name(0, "up"): (96, 64)}, np.dtype(np.float32), ONE, transpose=True),
        "qkv": Target(QKV, np.dtype(ml_dtypes.bfloat16), ONE, transpose=True),
        "norm": Target({hf_name(None, "norm"): (64,)}, np.dtype(np.float32), ONE),
    }
    steps = []
    found = load(source, targets, progress=lambda *step: steps.append(step))
    halves = DummySource({Q: (64, 64)}, 0, ml_dtypes.bfloat16)  # the same type on both sides
    same = {"same": Target({Q: (64, 64)}, np.dtype(ml_dtypes.bfloat16), ONE, transpose=True)}
    assert np.array_equal(load(halves, same, progress=quiet)["same"], halves.read(Q).T)
    assert list(found) == list(targets)
    assert np.array_equal(found["plain"], source.read(Q))
    assert np.array_equal(found["turned"], source.read(hf_name(0, "up")).T)
    joined = np.concatenate([source.read(name) for name in (Q, K, V)]).T.astype(ml_dtypes.bfloat16)
    assert found["qkv"].dtype == jnp.bfloat16 and np.array_equal(np.asarray(found["qkv"]), joined)
    total = sum(array.nbytes for array in found.values())
    assert steps[0][:2] == (0, total) and steps[-1][:2] == (total, total)
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)


def test_loaded_arrays_own_their_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    values = {"w": np.arange(4096, dtype=np.float32).reshape(64, 64)}
    tiny_llama.write_safetensors(path, values)
    array = load(SafetensorsSource(str(path)), {"w": Target({"w": (64, 64)}, np.float32, ONE)}, progress=quiet)["w"]
    with open(path, "r+b") as file:
        file.seek(-4096 * 4, os.SEEK_END)
        file.write(bytes(4096 * 4))
    assert np.array_equal(array, values["w"]) and array.unsafe_buffer_pointer() % ALIGNMENT == 0


def test_each_device_reads_only_its_own_slice(tiny):
    from tests.test_checkpoints_files import run_python

    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoints.files import SafetensorsSource
from checkpoints.load import Target, load
from tests.test_checkpoints_load import Recording, Q, K, V, QKV, quiet
assert jax.device_count() == 4
source = Recording(SafetensorsSource(FOLDER))
mesh = Mesh(np.array(jax.devices()), ("tp",))
targets = {
    "qkv": Target(QKV, np.float32, NamedSharding(mesh, P(None, "tp")), True),
    "copies": Target({Q: (64, 64)}, np.float32, NamedSharding(mesh, P())),
}
found = load(source, targets, progress=quiet)
joined = np.concatenate([source.source.read(name) for name in (Q, K, V)]).T
assert np.array_equal(found["qkv"], joined) and np.array_equal(found["copies"], source.source.read(Q))
assert {shard.data.shape for shard in found["qkv"].addressable_shards} == {(64, 32)}
read = sum((i[0].stop - i[0].start) * (i[1].stop - i[1].start) for _, i in source.reads)
assert read == 128 * 64 + 64 * 64, read  # every byte once, the copies' too
"""
    run_python(code.replace("FOLDER", repr(tiny)), XLA_FLAGS="--xla_force_host_platform_device_count=4", NPROC="16")


def test_every_byte_that_a_mesh_owns_is_read_once_and_no_other(tiny):
    """By the engine's own table, on 2 ranks of 4 devices: two KV heads, each on two devices, so it is read for each."""
    from tests.test_checkpoints_files import run_python

    code = """
import jax, jax.numpy as jnp, numpy as np
from checkpoints.files import SafetensorsSource
from checkpoints.load import load
from jaxserve.config import EngineConfig
from jaxserve.engine.weights import _target, read_model_config
from jaxserve.model.sharding import describe, make_mesh
from tests.test_checkpoints_load import Recording, quiet
model = read_model_config(EngineConfig(FOLDER, FOLDER))
mesh = make_mesh(jax.devices(), dp=2)
source = Recording(SafetensorsSource(FOLDER))
for platform in ("cpu", "tpu"):
    source.reads.clear()
    _, description = describe(model, jnp.dtype("float32"), mesh, platform)
    parameters = jax.tree.leaves(description)
    names = {name: name for p in parameters for name in p.tensors}
    arrays = load(source, {p.path: _target(p, names) for p in parameters}, progress=quiet)
    read = 0
    for name, index in source.reads:
        shape = source.tensors[name].shape
        parts = [part.indices(size) for part, size in zip(index, shape, strict=True)]
        read += int(np.prod([stop - start for start, stop, _ in parts]))
    owned = 0
    for p in parameters:
        rest = int(np.prod(p.shape)) // (p.shape[::-1] if p.transpose else p.shape)[p.axis]
        owned += rest * sum(rows.count for rows in p.rows if rows.tensor is not None)
        held = {str(shard.index) for shard in arrays[p.path].addressable_shards}
        assert len(held) in (1, 4), p.path
    assert read == owned, (platform, read, owned)
"""
    run_python(code.replace("FOLDER", repr(tiny)), XLA_FLAGS="--xla_force_host_platform_device_count=8", NPROC="16")


def test_staging_waits_for_room_and_lets_a_large_one_pass_alone():
    room, running, most = loading._Room(10), [], []

    def hold(size):
        with room.taken(size):
            running.append(size)
            most.append(sum(running))
            threading.Event().wait(0.005)
            running.remove(size)

    threads = [threading.Thread(target=hold, args=(size,)) for size in (4, 4, 4, 25, 3, 9, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 7 and max(total for total in most if total != 25) <= 10


@pytest.mark.slow
def test_loading_two_gigabytes_takes_them_and_little_more(tmp_path):
    """Anonymous memory, which the file's own mapped pages are not part of. Linux."""
    from tests.test_checkpoints_files import run_python

    sparse_gigabytes(tmp_path, 2)
    code = """
import jax, numpy as np
from jax.sharding import SingleDeviceSharding
from checkpoints.files import SafetensorsSource
from checkpoints.load import Target, load
from tests.test_checkpoints_load import Watch
source = SafetensorsSource(FOLDER)
one = SingleDeviceSharding(jax.devices()[0])
targets = {
    name: Target({name: info.shape}, np.float32, one, transpose=name.endswith(("0", "2", "4", "6", "8")))
    for name, info in source.tensors.items()
}
with Watch() as watch:
    arrays = load(source, targets, progress=lambda *step: None)
result = sum(array.nbytes for array in arrays.values())
extra = watch.peak - result
print("EXTRA", extra, "of", result)
assert result == 2 << 30 and extra < max(array.nbytes for array in arrays.values()) + (64 << 20), extra
"""
    run_python(code.replace("FOLDER", repr(str(tmp_path))))


@pytest.mark.slow
def test_each_of_two_processes_reads_and_holds_its_own_half_and_little_more(tmp_path):
    """Two gigabytes over two processes of two devices; anonymous memory, as above. Linux."""
    names = sparse_gigabytes(tmp_path, 2)
    code = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoints.files import SafetensorsSource
from checkpoints.load import Target, load
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from tests.test_checkpoints_load import Recording, Watch  # which asks for devices
assert jax.device_count() == 4 and jax.local_device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("tp",))
source = Recording(SafetensorsSource(folder))
targets = {
    name: Target({name: info.shape}, np.float32, NamedSharding(mesh, P("tp", None) if i % 2 else P(None, "tp")))
    for i, (name, info) in enumerate(source.tensors.items())
}
with Watch() as watch:
    arrays = load(source, targets, progress=lambda *step: None)
owned = sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards)
read = 0
for name, index in source.reads:
    shape = source.tensors[name].shape
    read += 4 * int(np.prod([len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]))
print("RANK", rank, "READ", read, "OWNED", owned, "EXTRA", watch.peak - owned)
assert read == owned == 1 << 30, (read, owned)
assert watch.peak - owned < max(array.nbytes for array in arrays.values()) + (64 << 20), watch.peak - owned
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    command = [sys.executable, "-c", code]
    port = str(_free_port())
    processes = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path)], cwd=ROOT, env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    print(*outputs, sep="\n")
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-1500:] + outputs[1][-1500:]
    assert len(names) == 16


class Watch:
    """The most anonymous memory while it lasts, above what there was before, in bytes. Linux."""

    def __enter__(self):
        self._before, self.peak, self._ended = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, _anonymous() - self._before)

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, _anonymous() - self._before)


def _anonymous():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\s+(\d+)", file.read())[1]) * 1024


def sparse_gigabytes(folder, count):
    """A checkpoint of zeros that takes no room on the disk: 8 tensors [8192, 4096] in float32 a gigabyte."""
    rows, names = 8192, [f"t{i}" for i in range(8 * count)]
    size = rows * 4096 * 4
    entries = {
        name: {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size * len(names))
    return names


def test_tensors_are_read_side_by_side_and_progress_counts_every_byte(tiny):
    """A read returns only while another one waits, so one thread alone would wait for ever."""
    both, steps = threading.Barrier(2), []

    class Pairs(Recording):
        def read(self, name, index=None):
            both.wait(20)
            return super().read(name, index)

    targets = {
        name: Target({name: info.shape}, np.float32, ONE) for name, info in SafetensorsSource(tiny).tensors.items()
    }
    targets.pop(hf_name(None, "norm"))  # an even number is left
    assert len(targets) % 2 == 0
    load(Pairs(SafetensorsSource(tiny)), targets, progress=lambda *step: steps.append(step), workers=2)
    total = sum(int(np.prod(target.shape)) * 4 for target in targets.values())
    assert steps[0][:2] == (0, total) and steps[-1][:2] == (total, total) and len(steps) == len(targets) + 1
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)


def test_a_missing_tensor_and_a_wrong_shape_stop_before_anything_is_read(tiny):
    source = Recording(SafetensorsSource(tiny))
    good = Target({Q: (64, 64)}, np.dtype(np.float32), ONE)

    def fails(match, **tensors):
        with pytest.raises(CheckpointError, match=match):
            load(source, {"good": good, "bad": Target(tensors, np.dtype(np.float32), ONE)}, progress=quiet)
        assert source.reads == []

    fails("no tensor 'lm_tail.weight'", **{"lm_tail.weight": (1, 1)})
    fails(r"'bad' expects tensor .*q_proj.weight' \[64, 65\], found \[64, 64\]", **{Q: (64, 65)})
    fails(r"expects .* \[64, 96\], found \[96, 64\]", **{hf_name(0, "up"): (64, 96)})


def test_parts_of_tensors_and_zeros_lie_along_either_axis(tiny):
    source = SafetensorsSource(tiny)
    down = hf_name(0, "down")
    parts = (Part(K, 16, 16), Part(None, 0, 3), Part(Q, 0, 8), Part(K, 0, 5))
    columns = (Part(down, 90, 6), Part(None, 0, 2), Part(down, 0, 4))
    targets = {
        f"{axis} {transpose}": Target(tensors, np.float32, ONE, transpose=transpose, axis=axis, parts=each)
        for axis, tensors, each in ((0, {Q: (64, 64), K: (32, 64)}, parts), (1, {down: (64, 96)}, columns))
        for transpose in (False, True)
    }
    found = load(source, targets, progress=quiet)
    q, k, d = source.read(Q), source.read(K), source.read(down)
    rows = np.concatenate([k[16:32], np.zeros((3, 64)), q[:8], k[:5]])
    joined = np.concatenate([d[:, 90:], np.zeros((64, 2)), d[:, :4]], axis=1)
    for key, want in {"0 False": rows, "0 True": rows.T, "1 False": joined, "1 True": joined.T}.items():
        assert targets[key].shape == want.shape and np.array_equal(found[key], want), key


def test_scaled_integer_and_fp8_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny_llama.write_safetensors(path, {"w": np.ones((2, 2), ml_dtypes.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="'w' is float8_e4m3fn; expected float32"):
        load(SafetensorsSource(str(path)), {"w": Target({"w": (2, 2)}, np.dtype(np.float32), ONE)}, progress=quiet)


def test_dummy_weights_depend_on_the_seed_alone_and_slices_agree():
    shapes = tensor_shapes({"L": 1, "E": 64, "H": 4, "K": 2, "D": 16, "F": 96, "V": 70000}, tie=True)
    first, same, other = DummySource(shapes, 3), DummySource(shapes, 3), DummySource(shapes, 4)
    embed = first.read(hf_name(None, "embed"))
    assert embed.shape == (70000, 64) and abs(embed.std() - 0.02) < 1e-4
    assert np.array_equal(embed, same.read(hf_name(None, "embed")))
    assert not np.array_equal(embed, other.read(hf_name(None, "embed")))
    assert np.array_equal(
        first.read(hf_name(None, "embed"), (slice(65000, 69999), slice(5, 9))), embed[65000:69999, 5:9]
    )
    assert (first.read(hf_name(0, "attn_norm")) == 1).all()
    assert not np.array_equal(first.read(Q), first.read(hf_name(0, "o")))


# the default model


@pytest.fixture(scope="module")
def default_model():
    cache = os.environ.get("JAXSERVE_TEST_CACHE") or os.path.expanduser("~/.cache/jaxserve")
    return resolve_model("SmolLM2-135M-Instruct", cache_dir=cache, progress=quiet)


def test_the_default_model_is_what_it_should_be(default_model):
    source = GGUFSource(default_model.gguf_path)
    config = json.loads((Path(default_model.folder) / "config.json").read_text())
    dims = {"L": 30, "E": 576, "H": 9, "K": 3, "D": 64, "F": 1536, "V": 49152}
    assert {name: info.shape for name, info in source.tensors.items()} == tensor_shapes(dims, tie=True)
    assert (config["rope_theta"], config["rms_norm_eps"], config["eos_token_id"]) == (100000.0, 1e-05, 2)
    assert config["tie_word_embeddings"] and config["max_position_embeddings"] == 8192


def test_the_default_models_chat_is_tokenised_as_its_authors_do(default_model):
    config = json.loads((Path(default_model.folder) / "tokenizer_config.json").read_text())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = jinja2.Template(config["chat_template"]).render(messages=chat, add_generation_prompt=True)
    tokenizer = Tokenizer.from_file(os.path.join(default_model.folder, "tokenizer.json"))
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    question = [2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.encode(text).ids == system + question
    assert tokenizer.decode([504, 3575, 282, 4649, 314, 7042, 30, 2]) == "The capital of France is Paris."
    assert len(tokenizer.encode("2026½").ids) == 4 + len(tokenizer.encode("½").ids)


def test_the_default_model_loads_from_its_converted_checkpoint(default_model):
    source = GGUFSource(default_model.gguf_path)
    convert(source, default_model.orbax_path, extra_files=default_model.folder, progress=quiet)
    found = OrbaxSource(default_model.orbax_path)
    targets = {
        name: Target({name: info.shape}, np.dtype(np.float32), ONE, transpose=len(info.shape) == 2)
        for name, info in found.tensors.items()
        if "layers." not in name or "layers.17." in name
    }
    for name, array in load(found, targets, progress=quiet).items():
        assert np.array_equal(array, source.read(name).T), name
