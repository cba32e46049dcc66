"""The CPU's own machine code: products against numpy, threads that come and go, and a server without it. Attention is
tested with the other backends in test_attention.py."""

import hashlib
import importlib.util
import os
import resource
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.model.llama import Layout, RMSNorm
from kernels_pallas import cpu, machine_attention, machine_products, machine_team, reference
from kernels_pallas.attention import DecodeRows, PrefillChunks
from kernels_pallas.cache import KVCache, empty
from kernels_pallas.kinds import FULL, LayerKind
from tests.engines import Driver, build_engine, greedy
from tests.tiny_llama import write_tiny_llama

SHAPES = [(1, 1), (3, 16), (5, 33), (64, 48), (131, 576), (2050, 100)]  # one row, tails of rows and of columns
KERNELS = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    values = rng.normal(size=shape) * (30 if dtype in ("int8", "float8_e4m3fn") else 1)
    return jnp.asarray(np.clip(values, -127, 127) if dtype == "int8" else values).astype(dtype)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


@pytest.mark.parametrize("kernel_dtype", KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 9, 16, cpu.MOST_TOKENS])
def test_a_product_is_numpys(rng, kernel_dtype, tokens):
    scaled = kernel_dtype in ("int8", "float8_e4m3fn")
    for num_out, num_in in SHAPES:
        kernel, x = drawn(rng, (num_out, num_in), kernel_dtype), drawn(rng, (num_in, tokens), "float32")
        scale = jnp.asarray(rng.uniform(0.01, 2, num_out), jnp.float32) if scaled else None
        out = jax.jit(cpu.product)(kernel, x, scale)
        factor = 1 if scale is None else wide(scale)[:, None]
        expected, size = wide(kernel) @ wide(x) * factor, np.abs(wide(kernel)) @ np.abs(wide(x)) * factor
        assert out.dtype == jnp.float32 and out.shape == expected.shape
        assert (np.abs(wide(out) - expected) <= 1e-5 * size + 1e-30).all(), (num_out, num_in)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_in", [72, 96])  # AMX multiplies 32 numbers at a time, or nothing
@pytest.mark.parametrize("tokens", [2, 7, 16, 20])
def test_a_product_in_bfloat16_rounds_once_and_may_be_asked_for_float32(rng, gated, num_in, tokens):
    """Where AMX multiplies, what comes out of a gate is rounded to bfloat16 before it does."""
    kernel, x = drawn(rng, (103, num_in), "bfloat16"), drawn(rng, (2 * num_in if gated else num_in, tokens), "bfloat16")
    gate, up = np.split(wide(x), 2) if gated else (wide(x), 1)
    factors = gate / (1 + np.exp(-gate)) * up if gated else gate
    expected, size = wide(kernel) @ factors, np.abs(wide(kernel)) @ np.abs(factors)
    exact = cpu.product(kernel, x, dtype=jnp.dtype("float32"), gated=gated)
    assert (np.abs(wide(exact) - expected) <= (2**-8 if gated and tokens > 4 else 1e-6) * size).all()
    rounded = cpu.product(kernel, x, gated=gated)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide(rounded), wide(exact.astype(jnp.bfloat16)))


def test_every_float8_number_is_read_as_itself():
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    kernel = jnp.asarray(np.where(np.isnan(numbers.astype(np.float32)), 0, numbers.astype(np.float32)))
    out = cpu.product(jnp.diag(kernel).astype(jnp.float8_e4m3fn), jnp.ones((256, 1)), jnp.ones(256))
    np.testing.assert_array_equal(np.asarray(out)[:, 0], np.asarray(kernel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_norm_is_the_models(rng, dtype, tokens):
    x, scale = drawn(rng, (100, tokens), dtype) * 7, drawn(rng, (100,), dtype)
    norm = RMSNorm(100, 1e-5, jnp.dtype(dtype), Layout(feature_major=True))
    norm.scale[...] = scale
    np.testing.assert_allclose(
        wide(cpu.norm(x, scale, 1e-5)), wide(norm(x)), rtol=1e-6 if dtype == "float32" else 2**-7
    )


WORK = """
import hashlib
from tests.test_machine_code import answers
print("ANSWER", hashlib.sha256(answers()).hexdigest())
"""


def answers() -> bytes:
    """Bytes of products and of an attention that many pieces make up."""
    rng = np.random.default_rng(7)
    parts: list[Any] = []
    for tokens in (1, 2, 4, 16):
        x = drawn(rng, (576, tokens), "bfloat16")
        for num_out in (1, 500, 3072):
            kernel = drawn(rng, (num_out, 576), "bfloat16")
            parts += [cpu.product(kernel, x, dtype=jnp.dtype("float32")) for _ in range(20)]
    cache = empty(1, 64, 3, 64, 16, jnp.dtype("float32"))
    cache = type(cache)(drawn(rng, cache.pages.shape, "float32"))
    rows = DecodeRows(jnp.asarray(rng.permutation(64).reshape(8, 8), jnp.int32), jnp.arange(0, 128, 16, jnp.int32))
    parts.append(
        cpu.attend_pages(drawn(rng, (8, 9, 64), "float32"), cache, 3, 0, cpu.plan(rows, None, 16).decode, FULL)
    )
    return b"".join(np.asarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [FULL, LayerKind(window=700, softcap=20.0)], ids=["full", "window"])
def test_long_contexts_are_cut_into_parts_and_a_token_is_the_same_in_a_row_or_in_a_chunk(rng, kind, dtype):
    """Contexts of one to three parts, the last of which end on a border, before it and behind it; the rest of every
    page holds nothing. The last token of each chunk is asked for once more as a decode row: the same bits."""
    part = machine_attention.BLOCK * machine_attention.PART_BLOCKS
    lengths = [part - 1, part, part + 1, 2 * part + 17, 3 * part, 3 * part + 1]
    page_size, num_new = 16, 48
    max_pages = -(-max(lengths) // page_size)
    table = np.zeros((len(lengths), max_pages), np.int32)
    pages = np.full((1, 1 + len(lengths) * max_pages, 3, page_size, 128), np.nan, np.float32)
    starts, positions = [0], []
    for row, length in enumerate(lengths):
        table[row] = 1 + row * max_pages + rng.permutation(max_pages)
        for position in range(length):
            pages[0, table[row, position // page_size], :, position % page_size] = rng.normal(size=(3, 128))
        first = max(length - num_new, 0) // page_size * page_size
        positions += range(first, first + num_new + page_size)
        starts.append(len(positions))
    cache = KVCache(jnp.asarray(pages).astype(dtype))
    rows = DecodeRows(jnp.asarray(table), jnp.asarray(lengths, jnp.int32))
    chunks = PrefillChunks(*rows.__dict__.values(), jnp.asarray(starts, jnp.int32), jnp.asarray(positions, jnp.int32))
    q = drawn(rng, (len(positions), 9, 64), dtype)
    real = np.asarray(positions) < np.repeat(lengths, np.diff(starts))
    plan = cpu.plan(None, chunks, page_size, kind).decode
    out = cpu.attend_pages(q, cache, 3, 0, plan, kind)
    where = np.repeat(np.arange(len(lengths)), np.diff(starts))
    shown = jnp.asarray(np.where(real, positions, -1))
    expected = reference.attend(q, cache, 0, jnp.asarray(table[where]), shown, 3, kind)
    np.testing.assert_allclose(wide(out), wide(expected), atol=1e-5 if dtype == "float32" else 2e-2)
    last = [start + length - positions[start] - 1 for start, length in zip(starts, lengths, strict=False)]
    alone = cpu.attend_pages(q[np.asarray(last)], cache, 3, 0, cpu.plan(rows, None, page_size, kind).decode, kind)
    np.testing.assert_array_equal(wide(alone), wide(out[np.asarray(last)]))


@pytest.mark.parametrize("threads", ["1", "5"])
def test_answers_do_not_depend_on_the_number_of_threads(threads):
    """More of them than processors, too: they take pieces from each other at any moment."""
    environment = os.environ | {"NPROC": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("ANSWER ")[1].strip() == hashlib.sha256(answers()).hexdigest()


def test_calls_at_the_same_time_do_not_meet(rng):
    x = drawn(rng, (576, 1), "float32")
    kernels = [drawn(rng, (2000 + 10 * n, 576), "float32") for n in range(4)]
    product = jax.jit(cpu.product)
    expected = [np.asarray(product(kernel, x)) for kernel in kernels]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(100):
            if not np.array_equal(np.asarray(product(kernels[n], x)), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(kernels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_who_has_nothing_to_do_sleeps(rng):
    cpu.product(drawn(rng, (3072, 576), "float32"), drawn(rng, (576, 1), "float32")).block_until_ready()
    time.sleep(0.1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.25


def test_why_there_is_no_machine_code_is_said(monkeypatch):
    assert cpu.why_not() is None and Layout.of("cpu").few_tokens == cpu.MOST_TOKENS
    assert Layout.of("tpu").few_tokens == Layout.of("gpu").few_tokens == 0
    assert "this is float16" in (cpu.why_not(jnp.dtype("float16")) or "")
    assert "this is float16" in (cpu.why_not(None, jnp.dtype("float16")) or "")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert cpu.why_not() == "NUMBA_DISABLE_JIT is set" and Layout.of("cpu").few_tokens == 0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cpu.why_not() == "Numba is not installed"


def test_without_a_folder_for_compiled_code_it_is_compiled_in_every_process(monkeypatch):
    def refuses(**options: Any) -> Any:
        raise RuntimeError("cannot cache function: no locator available")

    assert machine_team._may_keep()
    monkeypatch.setattr(machine_team.numba, "njit", refuses)
    assert not machine_team._may_keep()
    monkeypatch.setitem(machine_team.OPTIONS, "cache", False)
    code, piece = machine_products.compile_product(np.float32, np.float32, np.float32, 1, False, False, 255)
    assert code.address and piece.address


def test_an_engine_without_it_gives_the_same_tokens(monkeypatch, tmp_path):
    folder = write_tiny_llama(tmp_path / "model")
    prompt = [5, 9, 2, 14, 3]
    told = []
    for switched_off in ("0", "1"):
        monkeypatch.setenv("NUMBA_DISABLE_JIT", switched_off)
        engine = build_engine(folder, max_total_tokens=1024, max_running=2, chunked_prefill_size=16)
        (answer,) = Driver(engine.runner, engine.sizes.scheduler).run([(prompt, greedy(12))])
        told.append(answer.token_ids)
    assert told[0] == told[1]
