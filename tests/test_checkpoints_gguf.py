import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints.files import CheckpointError, SafetensorsSource
from checkpoints.gguf import GGUFSource, generation_config, has_hf_files, model_config, read_header, write_hf_files
from checkpoints.gguf_tokenizer import build_tokenizer, tokenizer_config
from tests import tiny_llama

IDS = [1, 260, 35, 90, 270, 2]


@pytest.fixture
def tiny(tmp_path):
    folder = tiny_llama.write_tiny_llama(
        tmp_path / "hf",
        embed=96,
        heads=3,
        kv_heads=1,
        head_dim=32,
        rope_theta=500000.0,
        rope_scaling=tiny_llama.LLAMA3_SCALING,
        attention_bias=False,
    )
    return Path(folder)


def write(folder, tmp_path, **options):
    path = tmp_path / "tiny.gguf"
    tiny_llama.write_tiny_gguf(folder, path, **options)
    return str(path)


def write_metadata(path, values, tensors=()):
    """A GGUF with plain metadata; values map keys to (add_ function suffix, value)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_float32_tensors_come_back_bit_for_bit_under_their_names(tiny, tmp_path):
    source, original = GGUFSource(write(tiny, tmp_path)), SafetensorsSource(str(tiny))
    assert set(source.tensors) == set(original.tensors)
    for name in original.tensors:
        assert np.array_equal(source.read(name), original.read(name)), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_every_slice_equals_the_slice_of_the_whole(tiny, tmp_path, kind):
    source = GGUFSource(write(tiny, tmp_path, quantise=kind))
    for name in ("q", "k", "v"):
        name = f"model.layers.1.self_attn.{name}_proj.weight"
        whole = source.read(name)
        assert whole.shape == source.tensors[name].shape and whole.dtype == source.tensors[name].dtype
        for rows, columns in (
            (slice(3, 20), slice(0, 96)),
            (slice(None), slice(33, 70)),
            (slice(31, 32), slice(95, 96)),
        ):
            assert np.array_equal(source.read(name, (rows, columns)), whole[rows, columns])
    assert np.array_equal(source.read("model.norm.weight", (slice(5, 9),)), source.read("model.norm.weight")[5:9])


def test_quantised_weights_equal_the_packages_own_dequantisation_and_permutation(tiny, tmp_path):
    path = write(tiny, tmp_path, quantise="Q4_1")
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    expected = values.reshape(3, 16, 2, 96).swapaxes(1, 2).reshape(96, 96)
    assert np.array_equal(GGUFSource(path).read("model.layers.0.self_attn.q_proj.weight"), expected)


TYPES = {kind.name: (kind, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
INTEGERS = ("I8", "I16", "I32", "I64")
REFUSED = ("Q8_1", "Q8_K", "Q1_0")


def write_types(path, names):
    """v_proj and k_proj of one layer for every type, 4 x 2 blocks of random bits each; one head."""
    writer, bits = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(3)
    writer.add_head_count(1)
    for layer, name in enumerate(names):
        kind, _, size = TYPES[name]
        for part in "vk":
            raw = bits.integers(0, 256, (4, 2 * size), dtype=np.uint8)
            writer.add_tensor(f"blk.{layer}.attn_{part}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@np.errstate(all="ignore")  # random scales are infinite or none now and then
def test_every_type_that_gguf_can_dequantise_is_read_whole_and_in_slices(tmp_path):
    names = [name for name in TYPES if name not in REFUSED]
    path = write_types(tmp_path / "types.gguf", names)
    source, stored = GGUFSource(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer, name in enumerate(names):
        kind, block, _ = TYPES[name]
        for part, order in (("v", [0, 1, 2, 3]), ("k", [0, 2, 1, 3])):
            data = stored[f"blk.{layer}.attn_{part}.weight"].data
            plain = name in INTEGERS or name == "F64"
            expected = (data if plain else gguf.quants.dequantize(data, kind)).reshape(4, 2 * block)[order]
            key = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            whole = source.read(key)
            assert whole.shape == source.tensors[key].shape == (4, 2 * block), name
            assert np.array_equal(whole.astype(expected.dtype), expected, equal_nan=True), name
            columns = slice(block // 3, block + block // 2 + 1)
            assert np.array_equal(source.read(key, (slice(1, 3), columns)), whole[1:3, columns], equal_nan=True), name


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_gguf_cannot_dequantise_is_refused_at_once_by_name(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"'blk.0.attn_v.weight' has ggml type {name}, which gguf cannot"):
        GGUFSource(write_types(tmp_path / "types.gguf", [name]))


def test_biases_of_q_and_k_are_unpermuted_too(tmp_path):
    folder = tiny_llama.write_tiny_llama(tmp_path / "hf", attention_bias=True, tie=True)
    source, original = GGUFSource(write(folder, tmp_path)), SafetensorsSource(folder)
    for name in original.tensors:
        assert np.array_equal(source.read(name), original.read(name)), name
    name = "model.layers.0.self_attn.q_proj.bias"
    assert np.array_equal(source.read(name, (slice(7, 30),)), original.read(name)[7:30])


def test_the_written_files_describe_the_same_model(tiny, tmp_path):
    out = tmp_path / "out"
    path = write(tiny, tmp_path)
    assert not has_hf_files(str(out))
    write_hf_files(path, str(out))
    assert has_hf_files(str(out))
    assert json.loads((out / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())
    for name in ("generation_config.json",):
        assert json.loads((out / name).read_text()) == json.loads((tiny / name).read_text())
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tiny_llama.CHAT_TEMPLATE and config["eos_token"] == "<|im_end|>"
    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (out, tiny))
    for text in ("Hello world, the sea is 42½ é 🙂\n\n  x", "<|im_start|>system\nhello<|im_end|>"):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    weights = {name: GGUFSource(path).read(name) for name in GGUFSource(path).tensors}
    difference = tiny_llama.numpy_forward(out, IDS, weights) - tiny_llama.numpy_forward(tiny, IDS)
    assert np.abs(difference).max() == 0


@pytest.mark.parametrize(("factor", "context", "head_dim"), [(8.0, 8192, 128), (32.0, 8192, 64), (4.0, 4096, 64)])
def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path, factor, context, head_dim):
    scaling = tiny_llama.LLAMA3_SCALING | {"factor": factor, "original_max_position_embeddings": context}
    folder = tiny_llama.write_tiny_llama(
        tmp_path / "hf", head_dim=head_dim, rope_theta=500000.0, rope_scaling=scaling, layers=1
    )
    assert model_config(read_header(write(folder, tmp_path)))["rope_scaling"] == scaling


def test_transformers_reads_the_written_folder(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_hf_files(write(tiny, tmp_path), str(tmp_path / "out"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.num_key_value_heads, config.head_dim) == ("llama", 1, 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Hello the sea"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    own = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert ids == own.encode("<|im_start|>user\nHello the sea<|im_end|>\n<|im_start|>assistant\n").ids


def test_truncated_and_foreign_files_are_named(tiny, tmp_path):
    path = Path(write(tiny, tmp_path))
    whole = path.read_bytes()
    for data, word in ((whole[:-1000], "truncated: tensor"), (whole[:500], "truncated"), (b"", "cannot be read")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=word):
            GGUFSource(str(path))
    for data, word in ((b"GGML" + whole[4:], "not a GGUF"), (b"GGUF" + bytes([9, 0, 0, 0]) + whole[8:], "version 9")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=word):
            read_header(str(path))


def test_what_is_no_llama_is_refused(tmp_path):
    path = write_metadata(tmp_path / "a.gguf", {}, [("v.patch_embd.weight", np.zeros((4, 4), np.float32))])
    with pytest.raises(CheckpointError, match=r"'v.patch_embd.weight' belongs to no Llama"):
        GGUFSource(path)
    writer = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"architecture 'gemma'; 'llama', 'qwen2'"):
        GGUFSource(str(tmp_path / "b.gguf"))
    with pytest.raises(CheckpointError, match="lacks the metadata key 'llama.attention.head_count'"):
        model_config(read_header(path))
    path = write_metadata(tmp_path / "c.gguf", {"llama.expert_count": ("uint32", 8)})
    with pytest.raises(CheckpointError, match="8 experts"):
        GGUFSource(path)


def gpt2_metadata(**changes):
    tokens, merges = tiny_llama.tiny_vocabulary()
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": [" ".join(merge) for merge in merges],
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def test_unknown_tokenizers_say_what_is_known():
    with pytest.raises(CheckpointError, match=r"pre-tokenizer 'viking'.*llama-bpe.*smollm.*Hugging Face folder"):
        build_tokenizer("x.gguf", gpt2_metadata(pre="viking"))
    with pytest.raises(CheckpointError, match="model 'bert'; 'gpt2' and 'llama'"):
        build_tokenizer("x.gguf", gpt2_metadata(model="bert"))
    with pytest.raises(CheckpointError, match="no vocabulary"):
        build_tokenizer("x.gguf", {})
    with pytest.raises(CheckpointError, match="without tokenizer.ggml.merges"):
        build_tokenizer("x.gguf", gpt2_metadata(merges=None))
    with pytest.raises(CheckpointError, match="eos_token_id is 99999"):
        tokenizer_config("x.gguf", gpt2_metadata(eos_token_id=99999))


def test_digits_are_cut_one_by_one_for_smollm_and_in_threes_for_llama3():
    tokens, merges = tiny_llama.tiny_vocabulary()
    vocabulary = {"tokens": [*tokens, "12", "123"], "merges": [" ".join(m) for m in merges] + ["1 2", "12 3"]}
    vocabulary["token_type"] = [3] * 3 + [1] * (len(tokens) - 1)
    for pre, expected in (("smollm", ["1", "2", "3", "1"]), ("llama-bpe", ["123", "1"])):
        tokenizer = build_tokenizer("x.gguf", gpt2_metadata(pre=pre, add_bos_token=False, **vocabulary))
        assert tokenizer.encode("1231").tokens == expected


def test_llama3_begins_with_bos_unless_told_otherwise():
    assert build_tokenizer("x.gguf", gpt2_metadata(pre="llama-bpe")).encode("a").ids[0] == 1
    assert build_tokenizer("x.gguf", gpt2_metadata(pre="llama-bpe", add_bos_token=False)).encode("a").ids[0] != 1
    both = build_tokenizer("x.gguf", gpt2_metadata(add_bos_token=True, add_eos_token=True)).encode("a").ids
    assert both[0] == 1 and both[-1] == 2 and len(both) == 3


def spm_metadata(**changes):
    pieces = {"<unk>": (0, 2), "<s>": (0, 3), "</s>": (0, 3)} | {f"<0x{byte:02X}>": (0, 6) for byte in range(256)}
    pieces |= {"▁h": (-1, 1), "el": (-2, 1), "lo": (-3, 1), "▁hel": (-4, 1), "▁hello": (-5, 1)}
    pieces |= {piece: (-10 - i, 1) for i, piece in enumerate("▁helowrd")}
    values = {
        "model": "llama",
        "tokens": list(pieces),
        "scores": [float(score) for score, _ in pieces.values()],
        "token_type": [kind for _, kind in pieces.values()],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    tokenizer = build_tokenizer("x.gguf", spm_metadata())
    assert tokenizer.encode("hello é").tokens == ["<s>", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("  h", add_special_tokens=False).tokens == ["▁", "▁", "▁h"]
    for text in ("hello world é 🙂", "  two spaces", "</s>"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ") == text.removeprefix(" ")
    plain = build_tokenizer("x.gguf", spm_metadata(add_space_prefix=False, add_bos_token=False))
    assert plain.encode("hello").tokens == ["h", "el", "lo"]
    with pytest.raises(CheckpointError, match="none scores"):
        build_tokenizer("x.gguf", spm_metadata(scores=None))


def test_all_ends_of_an_answer_and_sampling_defaults_are_kept(tmp_path):
    metadata = {
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.eot_token_id": ("uint32", 7),
        "general.sampling.temp": ("float32", 0.6),
        "general.sampling.top_k": ("int32", 20),
    }
    found = generation_config(read_header(write_metadata(tmp_path / "a.gguf", metadata)))
    assert found == {"eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20}


def test_named_chat_templates_are_all_kept():
    metadata = gpt2_metadata() | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    assert tokenizer_config("x.gguf", metadata)["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
