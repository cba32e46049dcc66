import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from checkpoints.files import CheckpointError, SafetensorsSource
from tests import tiny_llama


def tensors():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 8))
    kinds = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    return {kind: values.astype(tiny_llama.np_dtype(kind)) for kind in kinds} | {"ids": np.arange(7, dtype=np.int64)}


@pytest.mark.parametrize("module", ["hub", "files", "gguf", "llama", "storage", "pip_index"])
def test_front_end_modules_import_no_jax(module):
    run_python(f"import sys, checkpoints.{module}; assert not {{'jax', 'gguf', 'orbax'}} & set(sys.modules)")


def run_python(code, **environment):
    """Run code in a fresh interpreter at the root of the repository; it must end well."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    tiny_llama.write_safetensors(tmp_path / "model.safetensors", tensors())
    source = SafetensorsSource(str(tmp_path))
    for name, expected in tensors().items():
        assert source.tensors[name].shape == expected.shape and source.tensors[name].dtype == expected.dtype
        assert source.read(name).tobytes() == expected.tobytes()


def test_a_slice_is_a_view_of_the_file(tmp_path):
    path = tmp_path / "one.safetensors"
    tiny_llama.write_safetensors(path, tensors())
    part = SafetensorsSource(str(path)).read("bfloat16", (slice(2, 5), slice(1, 4)))
    assert part.dtype == ml_dtypes.bfloat16 and not part.flags.owndata and not part.flags.writeable
    assert np.array_equal(part, tensors()["bfloat16"][2:5, 1:4])


def test_it_reads_what_the_safetensors_package_writes(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    values = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "scalar": np.array(2.5, np.float32)}
    save_file(values, tmp_path / "model.safetensors")
    source = SafetensorsSource(str(tmp_path))
    assert all(np.array_equal(source.read(name), value) for name, value in values.items())


def test_shards_are_read_through_their_index(tmp_path):
    tiny_llama.write_tiny_llama(tmp_path / "whole")
    tiny_llama.write_tiny_llama(tmp_path / "parts", shards=3)
    whole, parts = SafetensorsSource(str(tmp_path / "whole")), SafetensorsSource(str(tmp_path / "parts"))
    assert len(parts.files) == 3 and set(whole.tensors) == set(parts.tensors)
    assert all(np.array_equal(whole.read(name), parts.read(name)) for name in whole.tensors)


def fails(path, *words):
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(str(path))
    for word in words:
        assert word in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    tiny_llama.write_tiny_llama(tmp_path, shards=2)
    os.unlink(tmp_path / "model-00002-of-00002.safetensors")
    fails(tmp_path, "model-00002-of-00002.safetensors is missing")


def test_a_tensor_in_two_shards_is_named(tmp_path):
    tiny_llama.write_tiny_llama(tmp_path, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    tiny_llama.write_safetensors(second, tiny_llama.read_safetensors(tmp_path))
    fails(tmp_path, "model.embed_tokens.weight", "00001-of-00002", "and again in", "00002-of-00002")


def test_a_tensor_the_index_puts_elsewhere_is_named(tmp_path):
    tiny_llama.write_tiny_llama(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.bias"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    fails(tmp_path, "lm_head.bias", "model-00001-of-00002.safetensors", "no shard")
    index["weight_map"]["lm_head.bias"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    fails(tmp_path, "../other.safetensors", "plain file names")


def test_truncated_files_say_where(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny_llama.write_safetensors(path, tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    fails(path, "truncated", "'ids'")
    path.write_bytes(whole[:40])
    fails(path, "truncated", "header")
    path.write_bytes(b"abc")
    fails(path, "3 bytes")
    path.write_bytes(b"")
    fails(path, "cannot be read")


def test_a_header_that_contradicts_itself_is_named(tmp_path):
    path = tmp_path / "model.safetensors"

    def write(header: bytes):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        return path

    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 16]}
    fails(write(json.dumps({"w": entry}).encode()), "'w'", "takes 32 bytes", "16")
    fails(write(json.dumps({"w": entry | {"dtype": "F3"}}).encode()), "'w'", "'F3'")
    fails(write(json.dumps({"w": {"dtype": "F32"}}).encode()), "'w'", "malformed")
    fails(write(b"{nonsense}"), "not JSON")
    path.write_bytes(b"\x89PNG" * 100)
    fails(path, "not a safetensors file")


def test_a_folder_without_weights_and_a_missing_path_are_named(tmp_path):
    fails(tmp_path, "no *.safetensors", "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    fails(tmp_path, "pytorch_model.bin")
    fails(tmp_path / "absent", "does not exist")


def test_a_missing_tensor_is_named_with_its_neighbours(tmp_path):
    tiny_llama.write_tiny_llama(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.9.mlp.up_proj.weight'.*layers.0.mlp.up_proj"):
        SafetensorsSource(str(tmp_path)).read("model.layers.9.mlp.up_proj.weight")
