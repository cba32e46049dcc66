"""From model, device and flags to sizes: what is chosen, what is refused, and that refusals name the flag."""

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.config import ConfigError, EngineConfig, ModelConfig
from jaxserve.engine.processor import prefers_bfloat16
from jaxserve.engine.sizing import GIB, DeviceFacts, Sizes, choose_dtype, resolve, weight_bytes
from jaxserve.scheduling.buckets import buckets
from kernels_pallas.cache import bytes_per_token

SMOLLM2 = ModelConfig(30, 576, 9, 3, 64, 1536, 49152, 8192, tie_embeddings=True)
LLAMA_8B = ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 131072)
CPU = DeviceFacts("cpu", 1, None)
H200 = DeviceFacts("gpu", 1, 141 * 10**9)
V5E = DeviceFacts("tpu", 1, 16 * GIB)


def sizes(model: ModelConfig, device: DeviceFacts, **config: Any) -> Sizes:
    return resolve(model, EngineConfig("model", "cache", **config), device)


def test_the_cpu_has_a_fixed_pool_that_holds_the_whole_context_of_the_default_model():
    chosen = sizes(SMOLLM2, CPU)
    assert chosen.dtype == "float32"
    assert (chosen.scheduler.max_model_len, chosen.scheduler.page_size, chosen.scheduler.max_running) == (8192, 16, 16)
    pool = chosen.scheduler.num_pages * 16 * bytes_per_token(30, 3, 64, "float32")
    assert 0.9 * GIB < pool <= 1.2 * GIB
    assert chosen.notes == ()
    assert not chosen.scheduler.mixed


def test_a_context_that_the_cpu_pool_cannot_hold_is_cut_with_a_note_that_names_the_flags():
    chosen = sizes(LLAMA_8B, CPU)
    assert chosen.scheduler.max_model_len == (chosen.scheduler.num_pages - 1) * 16 < 131072
    assert chosen.scheduler.num_pages * 16 * bytes_per_token(32, 8, 128, "float32") <= 4 * GIB
    (note,) = chosen.notes
    assert "context cut from 131072 to" in note and "--max-total-tokens" in note and "--max-model-len" in note


@pytest.mark.parametrize("device", [H200, V5E])
def test_an_accelerators_pool_is_what_its_total_memory_leaves(device):
    chosen = sizes(SMOLLM2, device)
    assert chosen.dtype == "bfloat16"
    assert chosen.scheduler.mixed
    assert chosen.scheduler.page_size == {"gpu": 64, "tpu": 128}[device.platform]
    page = chosen.scheduler.page_size * bytes_per_token(30, 3, 64, "bfloat16")
    used = weight_bytes(SMOLLM2, "bfloat16") + chosen.scheduler.num_pages * page
    assert device.memory is not None
    assert 0.75 * device.memory < used < 0.88 * device.memory - GIB / 2
    half = sizes(SMOLLM2, device, mem_fraction=0.44)
    assert half.scheduler.num_pages < 0.51 * chosen.scheduler.num_pages


def test_the_largest_step_has_room_beside_the_pool():
    """1.26 GiB of temporaries is what an H200's largest step of Llama 3.1 8B was seen to want."""
    chosen = sizes(LLAMA_8B, H200).scheduler
    pool = chosen.num_pages * chosen.page_size * bytes_per_token(32, 8, 128, "bfloat16")
    state = 8 * (chosen.max_running + 1) * LLAMA_8B.vocab_size
    assert H200.memory is not None
    assert pool + weight_bytes(LLAMA_8B, "bfloat16") + state + 1.26 * GIB < 0.88 * H200.memory
    more = sizes(LLAMA_8B, H200, max_running=1024).scheduler
    assert more.num_pages < chosen.num_pages - 2.5 * GIB // (64 * bytes_per_token(32, 8, 128, "bfloat16"))


def test_the_pool_is_rounded_so_that_a_little_memory_more_or_less_misses_no_compiled_program():
    pages = {
        sizes(SMOLLM2, replace(H200, memory=141 * 10**9 + extra)).scheduler.num_pages
        for extra in range(0, 2**22, 2**20)
    }
    assert len(pages) == 1
    assert pages.pop() % 64 == 0


@pytest.mark.parametrize(
    ("model", "device", "config", "words"),
    [
        (SMOLLM2, CPU, {"max_model_len": 8193}, ["--max-model-len 8193", "8192 positions"]),
        (SMOLLM2, CPU, {"max_model_len": 4096, "max_total_tokens": 1000}, ["4096", "1008", "--max-total-tokens"]),
        (LLAMA_8B, V5E, {}, ["--mem-fraction-static 0.88", "16.0 GiB", "smaller model"]),
    ],
)
def test_what_does_not_fit_is_refused_in_words_that_name_the_flag(model, device, config, words):
    with pytest.raises(ConfigError) as refused:
        sizes(model, device, **config)
    assert all(word in str(refused.value) for word in words), refused.value


def test_flags_win_over_what_the_device_would_choose():
    asked = {"max_running": 5, "page_size": 32, "max_total_tokens": 1000, "mixed_chunk": True, "dtype": "bfloat16"}
    chosen = sizes(SMOLLM2, CPU, **asked, max_model_len=512, schedule_policy="fcfs", disable_radix_cache=True)
    scheduler = chosen.scheduler
    assert (scheduler.max_running, scheduler.page_size, scheduler.num_pages) == (5, 32, 33)  # page 0 is scratch
    assert (scheduler.max_model_len, scheduler.mixed, chosen.dtype) == (512, True, "bfloat16")
    assert (scheduler.policy, scheduler.radix_cache) == ("fcfs", False)
    assert scheduler.decode_buckets == (2, 4, 5)
    assert sizes(SMOLLM2, CPU, **asked | {"dtype": "float32"}).scheduler.decode_buckets == (1, 2, 4, 5)


def test_a_chunk_is_rounded_up_to_pages_with_a_note_and_down_to_the_context_without():
    chosen = sizes(SMOLLM2, CPU, chunked_prefill_size=100)
    assert chosen.scheduler.chunk_size == 112
    assert any("--chunked-prefill-size 100 rounded up to 112" in note for note in chosen.notes)
    assert sizes(SMOLLM2, CPU, max_model_len=60).scheduler.chunk_size == 64


def test_every_device_stays_within_its_program_budget():
    assert len(buckets(sizes(SMOLLM2, CPU).scheduler)) <= 16
    assert len(buckets(sizes(LLAMA_8B, H200).scheduler)) <= 32
    assert len(buckets(sizes(SMOLLM2, V5E).scheduler)) <= 32


AMX = replace(CPU, prefers_bfloat16=True)


@pytest.mark.parametrize(
    ("device", "dtype"), [(CPU, "float32"), (AMX, "bfloat16"), (H200, "bfloat16"), (V5E, "bfloat16")]
)
def test_dtype_follows_the_device_unless_asked_for(device, dtype):
    assert choose_dtype(EngineConfig("model", "cache"), device) == dtype
    assert choose_dtype(EngineConfig("model", "cache", dtype="float32"), device) == "float32"


def test_bfloat16_on_a_cpu_is_said_unless_it_was_asked_for():
    (note,) = sizes(SMOLLM2, AMX).notes
    assert "bfloat16" in note and "--dtype float32" in note
    assert sizes(SMOLLM2, AMX, dtype="bfloat16").notes == ()


@pytest.mark.parametrize(
    ("features", "version", "quick"),
    [
        ("fma amx_bf16 amx_tile", (0, 11, 2), True),
        ("fma amx_bf16", (0, 10, 2), False),
        ("fma avx512_bf16", (0, 12), False),
    ],
)
def test_a_cpu_prefers_bfloat16_where_it_and_jax_have_amx(features, version, quick):
    assert prefers_bfloat16(features, version) is quick
