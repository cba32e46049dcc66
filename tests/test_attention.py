"""Every attention backend against the definition: one contract, one test; a new backend is one more entry in BACKENDS.

Pages that hold no token of a row, tails of pages and pages before a row's window are NaN before a step, and so are K
and V of padding tokens: whatever reads one of them answers NaN. After a step every page that no new token belongs to
must be as it was, bit for bit.
"""

import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import gpu, reference, tpu, xla
from kernels_pallas.attention import Attention, DecodeRows, PrefillChunks, choose
from kernels_pallas.cache import (
    KVCache,
    empty,
    is_quantised,
    numbers,
    pack,
    quantise,
    rows_per_page,
    split_scales,
    unpack,
)
from kernels_pallas.kinds import LayerKind

HAS_GPU_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")
GPU_CASES = "JAXSERVE_GPU_CASES"  # set where a process has threads enough for them


def interpreted_tpu(interpret: bool | pltpu.InterpretParams) -> Attention:
    return Attention("tpu", tpu.plan, functools.partial(tpu.attend, max_block_tokens=64, interpret=interpret))


def interpreted_gpu() -> Attention:
    """The Hopper kernels, interpreted: shared memory that starts as NaN, asynchronous copies, a race detector; few
    blocks of threads, so that each has several items."""
    options = {"num_blocks": 2}
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan") if HAS_GPU_INTERPRETER else None

    def plan(rows, chunks, page_size, kind):
        return gpu.plan(rows, chunks, page_size, kind, num_kv_heads=1, **options)

    return Attention("gpu", plan, functools.partial(gpu.attend, interpret=interpret, **options))


# Name -> the backend. The TPU's kernels run interpreted; small blocks make rows of several.
RACES = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
BACKENDS: dict[str, Attention] = {
    "xla": choose("cpu", "xla"),
    "numba": choose("cpu", "numba"),
    "tpu": interpreted_tpu(True),
    "tpu-races": interpreted_tpu(RACES),
    "gpu-races": interpreted_gpu(),
}

NUMBA = "numba (machine code of its own)"
NUM_LAYERS, LAYER = 3, 1
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 3e-2,
    "int8": 1e-5,
    "float8_e4m3fn": 1e-5,
}  # values reach 4; bfloat16 also rounds the weights
NUM_CHECKED = 48  # tokens of a step that are compared: the definition gathers a whole context for each


@dataclass(frozen=True)
class Shape:
    head_dim: int
    page_size: int
    num_heads: int
    num_kv_heads: int
    mode: str  # decode, prefill or mixed
    dtype: str = "float32"
    kind: str = "full"  # "window", "softcap" and "both" have numbers that each test draws

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        return f"d{self.head_dim}-page{self.page_size}-{heads}-{self.mode}-{self.dtype}-{self.kind}"

    @property
    def num_decode(self) -> int:
        return 0 if self.mode == "prefill" else 6

    @property
    def num_chunks(self) -> int:
        return 0 if self.mode == "decode" else 4

    @property
    def num_prefill(self) -> int:
        return 0 if self.mode == "decode" else 6 * self.page_size

    @property
    def max_pages(self) -> int:
        return 5 if self.page_size > 16 else 21  # more than one block of 128 and of 512 tokens, the last not full


@dataclass
class Case:
    """One step, in numpy. row_of[n] is the row of token n, -1 for padding."""

    page_table: np.ndarray  # [S + R, M]
    kv_lens: np.ndarray  # [S + R]
    positions: np.ndarray  # [S + T]
    row_of: np.ndarray  # [S + T]
    starts: np.ndarray  # [R + 1]
    num_pages: int


GROUPS = {16: (4, 2), 64: (9, 3), 80: (2, 2), 128: (8, 1), 256: (4, 2)}
MODES = ("decode", "prefill", "mixed")
KINDS = ("full", "window", "both", "softcap")
FULL = bool(os.environ.get("JAXSERVE_SLOW"))  # make test-all; make test takes a Latin square of them
SHAPES = [
    Shape(head_dim, page_size, *GROUPS[head_dim], mode, kind=KINDS[(row + 2 * column + index) % 4])
    for row, head_dim in enumerate(GROUPS)
    for column, page_size in enumerate((8, 16, 64))
    for index, mode in enumerate(MODES)
    if FULL or index == (row + column) % 3
]
SHAPES += [Shape(64, 16, 9, 3, "mixed", "bfloat16"), Shape(128, 64, 4, 4, "mixed", "bfloat16")]
SHAPES += [
    Shape(head_dim, page_size, *GROUPS[head_dim], "mixed", dtype, kind)
    for head_dim, page_size, kind in ((64, 16, "full"), (128, 8, "window"), (256, 16, "both"), (80, 64, "softcap"))
    for dtype in ("int8", "float8_e4m3fn")
    if FULL or (dtype == "int8" and head_dim != 80) or head_dim == 64
]
# Interpreted kernels take seconds to compile: a few shapes, each another way through them.
TPU_SHAPES = [
    Shape(64, 16, 9, 3, "mixed"),  # K and V share lanes; blocks of 4 pages
    Shape(128, 64, 8, 1, "mixed", "bfloat16", "window"),  # blocks of one page
    Shape(256, 16, 2, 1, "mixed", kind="both"),  # two rows for K and for V
]
CASES = [("xla", shape) for shape in SHAPES]
NUMBA_SHAPES = SHAPES
CASES += [("numba", shape) for shape in (NUMBA_SHAPES if FULL else NUMBA_SHAPES[1::2])]
CASES += [("tpu", shape) for shape in (SHAPES if FULL else TPU_SHAPES) if not is_quantised(shape.dtype)]
CASES += [("tpu-races", Shape(64, 16, 2, 1, "mixed", kind="window"))]
# An interpreted GPU block takes about a second: fewer heads, pages and tokens.
GPU_SHAPES = [
    Shape(64, 64, 2, 1, "mixed", "bfloat16", "window"),  # K and V share lanes
    Shape(128, 64, 1, 1, "mixed", "bfloat16", "both"),
    Shape(256, 128, 2, 1, "decode", "bfloat16", "window"),  # two rows for K and for V, pages of two parts
]
if os.environ.get(GPU_CASES):
    CASES += [("gpu-races", shape) for shape in GPU_SHAPES]
CASES += [("tpu-races", Shape(128, 32, 2, 2, "decode", "bfloat16"))]


def decode_lengths(rng: np.random.Generator, shape: Shape) -> list[int]:
    """An idle row, a first token, a full page, the first token of a page, a full table and one between."""
    size, limit = shape.page_size, shape.max_pages * shape.page_size
    lengths = [0, 1, size, size * int(rng.integers(1, shape.max_pages)) + 1, limit, int(rng.integers(2, limit))]
    return rng.permutation(lengths[: shape.num_decode]).tolist()


def chunk_lengths(rng: np.random.Generator, shape: Shape) -> list[tuple[int, int]]:
    """(cached tokens, new tokens) of 2 or 3 used chunks: a fresh one, one behind a cached prefix, one that ends on a
    page border; together at most T tokens."""
    size = shape.page_size
    chunks = [
        (0, int(rng.integers(1, size + 1))),
        (size * int(rng.integers(1, shape.max_pages - 2)), size + int(rng.integers(1, size))),
        (size * int(rng.integers(0, 3)), 2 * size),
    ]
    return [chunks[i] for i in rng.permutation(3)[: int(rng.integers(2, 4))]]


def make_case(rng: np.random.Generator, shape: Shape) -> Case:
    """Rows own pages of their own in random order, but that chunks behind a cached prefix share its first page."""
    size, num_decode, num_prefill = shape.page_size, shape.num_decode, shape.num_prefill
    rows = num_decode + shape.num_chunks
    num_pages = 2 + rows * shape.max_pages
    free = iter(rng.permutation(np.arange(1, num_pages)).tolist())
    table = np.zeros((rows, shape.max_pages), np.int32)
    kv_lens = np.zeros(rows, np.int32)
    positions = np.zeros(num_decode + num_prefill, np.int32)
    row_of = np.full(num_decode + num_prefill, -1)
    starts = np.full(shape.num_chunks + 1, num_prefill, np.int32)
    behind = np.zeros(rows, bool)

    def give(row: int, length: int) -> None:
        kv_lens[row] = length
        count = -(-length // size)
        table[row, :count] = [next(free) for _ in range(count)]

    for row, length in enumerate(decode_lengths(rng, shape)):
        if length:
            give(row, length)
            positions[row], row_of[row] = length - 1, row
    at = 0
    for chunk, (cached, new) in enumerate(chunk_lengths(rng, shape) if shape.num_chunks else ()):
        row, token = num_decode + chunk, num_decode + at
        give(row, cached + new)
        starts[chunk] = at
        positions[token:] = cached + np.arange(len(positions) - token)  # runs on through the padding
        row_of[token : token + new] = row
        if cached and (others := np.flatnonzero(behind[num_decode:row])).size:
            table[row, 0] = table[num_decode + others[0], 0]
        behind[row] = cached > 0
        at += -(-new // size) * size
    return Case(table, kv_lens, positions, row_of, starts, num_pages)


def draw_kind(rng: np.random.Generator, shape: Shape) -> LayerKind:
    """Windows of one token, about a page, some pages, and more than there is."""
    size = shape.page_size
    windows = [1, 2, size - 1, size, size + 1, int(rng.integers(2, shape.max_pages * size)), 2**20]
    return LayerKind(
        window=int(rng.choice(windows)) if shape.kind in ("window", "both") else None,
        softcap=float(rng.uniform(1, 10)) if shape.kind in ("softcap", "both") else None,
        scale=float(rng.uniform(0.1, 0.5)) if shape.kind == "both" else None,
    )


def forget_what_no_token_sees(shape: Shape, case: Case, kind: LayerKind) -> None:
    """Entries of the page table before a row's window name page 0, which nobody owns."""
    for row in range(len(case.kv_lens)):
        if (tokens := np.flatnonzero(case.row_of == row)).size and kind.window is not None:
            first = max(case.positions[tokens[0]] - kind.window + 1, 0) // shape.page_size
            case.page_table[row, :first] = 0


def make_cache(rng: np.random.Generator, shape: Shape, case: Case) -> np.ndarray:
    """[L, P, R, page_size, 128] NaN, but for the tokens that each row has computed before this step, and page 0."""
    cache = empty(NUM_LAYERS, case.num_pages, shape.num_kv_heads, shape.head_dim, shape.page_size, jnp.float32)
    pages = np.full(cache.pages.shape, np.nan, np.float32)
    new = np.bincount(case.row_of[case.row_of >= 0], minlength=len(case.kv_lens))
    for row, length in enumerate(case.kv_lens - new):
        position = np.arange(length)
        where = (case.page_table[row, position // shape.page_size], slice(None), position % shape.page_size)
        full = (2, shape.max_pages * shape.page_size, shape.num_kv_heads, shape.head_dim)
        pages[LAYER][where] = np.asarray(pack(*map(jnp.asarray, rng.standard_normal(full, np.float32))))[:length]
    pages[:, 0] = np.nan
    return pages


def as_stored(shape: Shape, pages: np.ndarray) -> KVCache:
    """The cache of make_cache in the shape's dtype; in 8 bits a place that nobody may read has a scale that is NaN."""
    if not is_quantised(shape.dtype):
        return KVCache(jnp.asarray(pages, shape.dtype))
    k, v = unpack(jnp.asarray(pages), shape.num_kv_heads, shape.head_dim)  # [L, P, K, page_size, D]
    k, v = (jnp.moveaxis(x, 3, 2) for x in (k, v))
    rows, scales = quantise(jnp.nan_to_num(k), jnp.nan_to_num(v), jnp.dtype(shape.dtype))
    scales = jnp.where(jnp.isnan(k[..., :1, 0]), jnp.nan, scales)
    return KVCache(jnp.moveaxis(rows, 2, 3), jnp.moveaxis(scales, 2, 3))


def arguments(shape: Shape, case: Case) -> tuple[DecodeRows | None, PrefillChunks | None]:
    num_decode = shape.num_decode
    rows = DecodeRows(case.page_table[:num_decode], case.kv_lens[:num_decode]) if num_decode else None
    if not shape.num_chunks:
        return rows, None
    table, lens = case.page_table[num_decode:], case.kv_lens[num_decode:]
    return rows, PrefillChunks(table, lens, case.starts, case.positions[num_decode:])


@functools.cache
def compiled(backend: str, page_size: int, kind: LayerKind) -> Callable:
    attention = BACKENDS[backend]

    @jax.jit
    def run(q, k, v, cache, layer, rows, chunks):
        return attention.attend(q, k, v, cache, layer, attention.plan(rows, chunks, page_size, kind))

    return run


@functools.partial(jax.jit, static_argnames=("num_kv_heads", "kind"))
def oracle(q, k, v, cache, layer, pages, offsets, checked, table, positions, num_kv_heads, kind):
    written = reference.write(cache, layer, k, v, pages, offsets)
    return reference.attend(q[checked], written, layer, table, positions, num_kv_heads, kind), written


def expect(
    shape: Shape, case: Case, kind: LayerKind, checked: np.ndarray, q, k, v, cache: KVCache
) -> tuple[np.ndarray, KVCache]:
    """What the definition says: out [checked, H, D] and the cache afterwards; padding writes to a page past the end."""
    real = case.row_of >= 0
    table = case.page_table[np.where(real, case.row_of, 0)]
    page = np.take_along_axis(table, np.clip(case.positions // shape.page_size, 0, shape.max_pages - 1)[:, None], 1)
    out, written = oracle(
        *(q, k, v, cache, LAYER),
        np.where(real, page[:, 0], case.num_pages),
        case.positions % shape.page_size,
        checked,
        table[checked],
        np.where(real, case.positions, -1)[checked],
        num_kv_heads=shape.num_kv_heads,
        kind=kind,
    )
    return np.asarray(out, np.float32), written


def choose_checked(rng: np.random.Generator, case: Case) -> np.ndarray:
    """[NUM_CHECKED] real tokens: decode rows, first and last tokens of chunks, and any others."""
    real = np.flatnonzero(case.row_of >= 0)
    borders = real[np.diff(case.row_of[real], prepend=-1, append=-1)[1:] != 0]
    borders = np.union1d(borders, real[np.diff(case.row_of[real], prepend=-1) != 0])
    return np.concatenate([borders, rng.choice(real, NUM_CHECKED - len(borders))])


def own_tails(shape: Shape, case: Case) -> np.ndarray:
    """[P, page_size] True behind the last token of a chunk, in its last page: may hold anything, nobody reads it."""
    tails = np.zeros((case.num_pages, shape.page_size), bool)
    for row in range(shape.num_decode, len(case.kv_lens)):
        if (used := int(case.kv_lens[row])) % shape.page_size:
            tails[case.page_table[row, used // shape.page_size], used % shape.page_size :] = True
    return tails


@pytest.mark.parametrize(("backend", "shape"), CASES, ids=str)
def test_a_backend_computes_the_definition_and_writes_only_its_new_tokens(backend, shape, rng, capfd):
    dtype, tolerance = jnp.dtype("float32" if is_quantised(shape.dtype) else shape.dtype), TOLERANCE[shape.dtype]
    kind = draw_kind(rng, shape)
    print(kind)
    for _ in range(2):
        case = make_case(rng, shape)
        forget_what_no_token_sees(shape, case, kind)
        tokens, real = len(case.positions), case.row_of >= 0
        q = rng.standard_normal((tokens, shape.num_heads, shape.head_dim), np.float32) * 2
        k, v = rng.standard_normal((2, tokens, shape.num_kv_heads, shape.head_dim), np.float32)
        k[~real] = v[~real] = np.nan
        q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
        cache = as_stored(shape, make_cache(rng, shape, case))
        run = compiled(backend, shape.page_size, kind)
        out, after = run(q, k, v, cache, jnp.int32(LAYER), *arguments(shape, case))
        checked = choose_checked(rng, case)
        want, wanted = expect(shape, case, kind, checked, q, k, v, cache)
        out = np.asarray(out, np.float32)
        assert after.pages.dtype == wanted.pages.dtype and out.shape == q.shape
        assert np.isfinite(out).all(), (
            f"rows {np.unique(case.row_of[~np.isfinite(out).all((1, 2))])} read a poisoned place"
        )
        np.testing.assert_allclose(out[checked], want, rtol=0, atol=tolerance)
        kept = ~own_tails(shape, case)[None, :, None, :] | (np.arange(NUM_LAYERS) != LAYER)[:, None, None, None]
        assert_equal_where(kept[..., None], after.pages, wanted.pages)
        if is_quantised(shape.dtype):
            assert_equal_where(kept, after.scales, wanted.scales)
    assert "RACE DETECTED" not in capfd.readouterr().out  # what Pallas's interpreter prints


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16", "float32"])
def test_no_step_converts_the_whole_cache(dtype):
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA:CPU of JAX 0.10 does; bfloat16 is not what a CPU computes in there unless it is asked for")
    cache = empty(5, 7, 3, 64, 16, jnp.dtype(dtype))
    q, kv = jnp.zeros((2, 9, 64)), jnp.zeros((2, 3, 64))

    def step(cache, q, kv, table, lens):
        work = xla.plan(DecodeRows(table, lens), None, 16)
        return xla.attend(q, kv, kv, cache, 1, work)

    rows = (jnp.zeros((2, 4), jnp.int32), jnp.ones(2, jnp.int32))
    text = jax.jit(step, donate_argnums=0).lower(cache, q, kv, *rows).compile().as_text()
    held = {
        kind
        for kind, dims in re.findall(r"\b([a-z]\w+)\[([\d,]+)\]", text)
        if math.prod(map(int, dims.split(","))) == cache.pages.size
    }
    assert len(held) == 1, held


def assert_equal_where(kept: np.ndarray, found: jax.Array, wanted: jax.Array) -> None:
    found, wanted = (np.where(kept, np.asarray(x, np.float32), 0) for x in (found, wanted))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 64), (2, 80), (1, 128), (2, 256)])
def test_8_bits_of_k_and_v_are_within_a_rounding_of_what_they_were(num_kv_heads, head_dim, dtype, rng):
    """K is a hundred times V, which keeps its own steps. Zeros stay zeros."""
    k, v = rng.standard_normal((2, 7, num_kv_heads, head_dim), np.float32) * rng.lognormal(0, 3, (2, 7, 1, 1))
    k, v = (100 * k).astype(np.float32), v.astype(np.float32)
    k[3], v[4] = 0, 0
    rows, scales = quantise(jnp.asarray(k), jnp.asarray(v), jnp.dtype(dtype))
    assert numbers(rows).dtype == dtype and scales.shape == (7, 2 * num_kv_heads)
    small = unpack(jnp.swapaxes(numbers(rows), 0, 1).astype(jnp.float32), num_kv_heads, head_dim)
    for x, stored, scale in zip((k, v), small, split_scales(scales, axis=1), strict=True):
        got = np.swapaxes(np.asarray(stored), 0, 1) * np.asarray(scale)[..., None]
        largest = np.abs(x).max(-1, keepdims=True)
        allowed = largest / 254 if dtype == "int8" else np.maximum(np.abs(x) / 16, largest / 458752)
        assert (np.abs(got - x) <= allowed * 1.0001).all()
        assert (got[(x == 0).all(-1)] == 0).all()


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "int8"), (64, "float8_e4m3fn"), (128, "float8_e4m3fn"), (256, "int8")]
)
def test_the_reference_reads_8_bit_pages_as_the_floats_they_stand_for(head_dim, dtype, rng):
    shape = Shape(head_dim, 8, *GROUPS[head_dim], "mixed", dtype)
    case = make_case(rng, shape)
    tokens, checked = len(case.positions), choose_checked(rng, case)
    q = jnp.asarray(rng.standard_normal((tokens, shape.num_heads, head_dim), np.float32))
    k, v = (jnp.asarray(x) for x in rng.standard_normal((2, tokens, shape.num_kv_heads, head_dim), np.float32))
    pages = make_cache(rng, shape, case)
    out, written = expect(shape, case, LayerKind(), checked, q, k, v, as_stored(shape, pages))
    wide = unpack(numbers(written.pages).astype(jnp.float32), shape.num_kv_heads, head_dim)
    assert written.scales is not None
    wide = [x * scale[..., None] for x, scale in zip(wide, split_scales(written.scales, axis=2), strict=True)]
    floats = jnp.moveaxis(pack(*(jnp.moveaxis(x, 3, 2) for x in wide)), 2, 3)
    table = case.page_table[np.where(case.row_of >= 0, case.row_of, 0)]
    positions = np.where(case.row_of >= 0, case.positions, -1)
    want = reference.attend(q[checked], KVCache(floats), LAYER, table[checked], positions[checked], shape.num_kv_heads)
    np.testing.assert_allclose(out, want, atol=1e-6)
    exact, _ = expect(shape, case, LayerKind(), checked, q, k, v, KVCache(jnp.asarray(pages)))
    assert 1e-4 < np.abs(exact - out).max() < (0.1 if dtype == "int8" else 0.5), "quantised, and near"


@pytest.mark.skipif(not HAS_GPU_INTERPRETER, reason="the GPU interpreter came with JAX 0.11")
def test_the_hopper_kernels_compute_the_definition_without_races():
    """A block's three warpgroups wait for each other in callbacks, each of which holds a thread of XLA's pool: on two
    cores that has too few, so a process of its own is told of more."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "gpu-races"]
    environment = os.environ | {GPU_CASES: "1", "NPROC": "16"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0 and f"{len(GPU_SHAPES)} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("head_dim", "wanted"), [(16, "full"), (64, "both"), (80, "window"), (128, "softcap"), (256, "both")]
)
def test_the_reference_is_softmax_attention_in_float64(head_dim, wanted, rng):
    shape = Shape(head_dim, 8, *GROUPS[head_dim], "mixed", kind=wanted)
    kind = draw_kind(rng, shape)
    print(kind)
    case = make_case(rng, shape)
    tokens, checked = len(case.positions), choose_checked(rng, case)
    q = rng.standard_normal((tokens, shape.num_heads, head_dim), np.float32)
    k, v = rng.standard_normal((2, tokens, shape.num_kv_heads, head_dim), np.float32)
    cache = KVCache(jnp.asarray(make_cache(rng, shape, case)))
    out, written = expect(shape, case, kind, checked, *map(jnp.asarray, (q, k, v)), cache)
    keys, values = (np.asarray(x, np.float64) for x in unpack(written.pages[LAYER], shape.num_kv_heads, head_dim))
    group = shape.num_heads // shape.num_kv_heads
    for index, token in enumerate(checked):
        position = case.positions[token]
        seen = np.arange(0 if kind.window is None else max(position - kind.window + 1, 0), position + 1)
        place = (case.page_table[case.row_of[token], seen // 8], slice(None), seen % 8)
        for head in range(shape.num_heads):
            scores = keys[place][:, head // group] @ q[token, head].astype(np.float64)
            scores *= head_dim**-0.5 if kind.scale is None else kind.scale
            if kind.softcap is not None:
                scores = kind.softcap * np.tanh(scores / kind.softcap)
            weights = np.exp(scores - scores.max())
            want = weights @ values[place][:, head // group] / weights.sum()
            np.testing.assert_allclose(out[index, head], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 16), (2, 64), (3, 80), (1, 128), (2, 192), (2, 256)])
def test_packed_rows_unpack_to_the_same_k_and_v(num_kv_heads, head_dim, rng):
    k, v = rng.standard_normal((2, 5, num_kv_heads, head_dim), np.float32)
    rows = pack(jnp.asarray(k), jnp.asarray(v))
    assert rows.shape == (5, rows_per_page(num_kv_heads, head_dim), 128)
    got_k, got_v = unpack(jnp.swapaxes(rows, 0, 1), num_kv_heads, head_dim)
    np.testing.assert_array_equal(np.swapaxes(got_k, 0, 1), k)
    np.testing.assert_array_equal(np.swapaxes(got_v, 0, 1), v)


@pytest.mark.parametrize(
    ("platform", "wanted", "facts", "name"),
    [
        ("cpu", "auto", {}, NUMBA),
        ("cpu", "xla", {}, "xla"),
        ("tpu", "auto", {}, "pallas (the TPU kernels)"),
        ("tpu", "xla", {}, "xla"),
        ("gpu", "xla", {"capability": "9.0"}, "xla"),
        (
            "gpu",
            "auto",
            {"capability": "8.9"},
            "xla (the GPU kernels need compute capability 9.0 (Hopper); this is 8.9)",
        ),
        ("gpu", "auto", {}, "xla (the GPU kernels need compute capability 9.0 (Hopper); this is unknown)"),
        ("METAL", "auto", {}, "xla (there are no kernels for METAL)"),
        ("cpu", "auto", {"dtype": jnp.int8, "activations": jnp.float32}, NUMBA),
        ("tpu", "auto", {"dtype": jnp.int8}, "xla (the TPU kernels need a float cache; this is int8)"),
        (
            "tpu",
            "auto",
            {"dtype": jnp.float32, "activations": jnp.bfloat16},
            "xla (the TPU kernels need a cache of q's dtype; this is float32, and q bfloat16)",
        ),
    ],
)
def test_the_choice_of_a_backend_says_what_it_is_and_why(platform, wanted, facts, name):
    if platform == "gpu" and wanted == "auto" and not HAS_GPU_INTERPRETER:
        name = f"xla (the Hopper kernels need JAX 0.11 or newer; this is {jax.__version__})"
    assert choose(platform, wanted, **facts).name == name


@pytest.mark.skipif(not HAS_GPU_INTERPRETER, reason="the Hopper kernels need JAX 0.11")
def test_hopper_has_kernels_for_a_bfloat16_cache_and_pages_of_64_tokens():
    chosen = choose("gpu", capability="9.0", num_kv_heads=8)
    assert (chosen.name, chosen.page_multiple) == ("pallas (the Hopper kernels)", 64)
    wide = choose("gpu", capability="9.0", dtype=jnp.float32)
    assert wide.name == "xla (the Hopper kernels need a bfloat16 cache; this is float32)"
    small = choose("gpu", capability="9.0", dtype=jnp.int8, activations=jnp.bfloat16)
    assert small.name == "xla (the Hopper kernels need a bfloat16 cache; this is int8)"
    with pytest.raises(ValueError, match="q's dtype; this is bfloat16, and q float32"):
        choose("gpu", "pallas", capability="9.0", dtype=jnp.bfloat16, activations=jnp.float32)


@pytest.mark.parametrize(
    ("platform", "wanted", "facts", "said"),
    [
        ("gpu", "pallas", {"capability": "8.0"}, "this is 8.0|need JAX 0.11"),
        ("METAL", "pallas", {}, "no kernels for METAL"),
        (
            "tpu",
            "pallas",
            {"dtype": jnp.float8_e4m3fn, "activations": jnp.bfloat16},
            "this is float8_e4m3fn; 'xla' runs",
        ),
        ("cpu", "pallas", {"dtype": jnp.int8, "activations": jnp.float32}, "float cache; this is int8"),
        ("cpu", "triton", {}, "there are auto, pallas, xla, and numba"),
    ],
)
def test_a_backend_that_is_not_there_is_an_error_that_says_what_is(platform, wanted, facts, said):
    with pytest.raises(ValueError, match=said):
        choose(platform, wanted, **facts)
