# %% [markdown]
# # Where a step's time goes
#
# A decode step is profiled with JAX's own profiler, its trace is read and drawn, and its speed is set against what
# the machine could do at best: a roofline. It works the same on CPU, GPU and TPU; the figures below are of the
# machine that ran this last.
#
# The first cell installs jaxserve from the checkout that this notebook lies in, where it is missing.

# %%
import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("jaxserve") is None:
    tpu = any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists()
    extras = ",".join(["notebooks"] + (["tpu"] if tpu else ["cuda12"] if shutil.which("nvidia-smi") else []))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"..[{extras}]"], check=True)

# %% [markdown]
# ## Profile a few steps
#
# `LLM` is the server's engine in this process, so `jax.profiler` sees its steps. (A running server does the same when
# asked by `POST /start_profile` and `/stop_profile`.) Everything was compiled before `LLM()` returned; one answer
# first, so that nothing cold is in the picture.

# %%
import collections
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxserve import LLM

llm = LLM(show_progress=False, max_running=16)
prompts = [f"Write about the number {number}." for number in range(16)]
ROWS, STEPS = 8, 12
options = {"temperature": 0, "ignore_eos": True}
llm.generate(prompts[:ROWS], max_tokens=STEPS, **options)

folder = tempfile.mkdtemp()
with jax.profiler.trace(folder):
    llm.generate(prompts[:ROWS], max_tokens=STEPS, **options)
(path,) = pathlib.Path(folder).rglob("*.xplane.pb")
print(path.name, path.stat().st_size, "bytes")

# %% [markdown]
# ## Read the trace
#
# A trace has planes (devices and the host), planes have lines (threads, streams), lines have events. On an
# accelerator the operations are on a line of the device's plane; XLA's CPU client runs them on threads of the host.
# Events nest (a loop holds its body), so what counts is an event's own time: its duration less that of the events
# inside it.


# %%
WAITING = ("end: ", "Thread", "Thunk", "Slinky")  # the threads' own affairs, which hold operations or wait for them


def lines_of_operations(profile: jax.profiler.ProfileData) -> list[list[tuple[str, float, float]]]:
    """(name, start, end) of each operation in milliseconds, a list for each line."""
    found = []
    for plane in profile.planes:
        for line in plane.lines:
            on_device = plane.name.startswith("/device:") and "Ops" in line.name
            on_host = plane.name == "/host:CPU" and line.name.startswith("tf_XLA")
            if on_device or on_host:
                events = [(e.name, e.start_ns / 1e6, (e.start_ns + e.duration_ns) / 1e6) for e in line.events]
                found.append(sorted(e for e in events if e[2] > e[1] and not e[0].startswith(WAITING)))
    return [events for events in found if events]


def own_times(events: list[tuple[str, float, float]]) -> list[tuple[str, float, float, float]]:
    """(name, start, end, own milliseconds)."""
    result, open_ones = [], []
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        while open_ones and result[open_ones[-1]][2] <= start:
            open_ones.pop()
        if open_ones:
            outer = result[open_ones[-1]]
            result[open_ones[-1]] = (*outer[:3], outer[3] - (min(end, outer[2]) - start))
        open_ones.append(len(result))
        result.append((name, start, end, end - start))
    return result


def kind_of(name: str) -> str:
    plain = name.lstrip("%").split(".")[0]
    if any(word in plain for word in ("dot", "ynn", "gemm", "matmul", "convolution")):
        return "products"
    if any(word in plain for word in ("while", "gather", "scatter", "dynamic", "attention", "custom-call")):
        return "attention and cache"
    if any(word in plain for word in ("reduce", "exponential", "softmax", "sort")):
        return "reductions"
    return "the rest"


profile = jax.profiler.ProfileData.from_file(str(path))
operations = [event for events in lines_of_operations(profile) for event in own_times(events)]
totals, counts = collections.Counter(), collections.Counter()
for name, _, _, own in operations:
    totals[name.split(".")[0]] += own
    counts[name.split(".")[0]] += 1
whole = sum(totals.values())
print(f"{'operation':<48}{'calls':>8}{'ms':>10}{'share':>8}")
for name, own in totals.most_common(12):
    print(f"{name[:46]:<48}{counts[name]:>8}{own:>10.1f}{own / whole:>8.1%}")

# %% [markdown]
# ## Draw it
#
# The last steps of the trace, one bar for each operation, coloured by what it does.

# %%
colours = {"products": "#5b8def", "attention and cache": "#f2a541", "reductions": "#57a773", "the rest": "#9aa5b1"}
end = max(event[2] for event in operations)
window = (end - 0.25 * (end - min(event[1] for event in operations)), end)
figure, axes = plt.subplots(figsize=(9, 2.4))
for row, events in enumerate(lines_of_operations(profile)):
    for kind, colour in colours.items():
        bars = [(s - window[0], e - s) for n, s, e in events if kind_of(n) == kind and s >= window[0]]
        axes.broken_barh(bars, (row + 0.1, 0.8), facecolors=colour, label=kind if row == 0 else None)
axes.set(xlabel="milliseconds", yticks=[], xlim=(0, window[1] - window[0]))
axes.set_ylabel("threads or streams")
figure.legend(loc="upper center", ncols=4, fontsize=8, frameon=False)
figure.tight_layout(rect=(0, 0, 1, 0.92))
plt.show()

# %%
by_kind = collections.Counter()
for name, _, _, own in operations:
    by_kind[kind_of(name)] += own
figure, axes = plt.subplots(figsize=(7, 1.7))
left = 0.0
for kind, colour in colours.items():
    share = by_kind[kind] / whole
    axes.barh([0], [share], left=left, color=colour, label=f"{kind} {share:.0%}")
    left += share
axes.set(yticks=[], xlim=(0, 1), xlabel="share of the operations' own time")
figure.legend(loc="upper center", ncols=4, fontsize=8, frameon=False)
figure.tight_layout(rect=(0, 0, 1, 0.88))
plt.show()

# %% [markdown]
# ## The machine at its best
#
# (On a machine with nothing else to do; otherwise these figures say little.) Two numbers: bytes read a second (row
# sums of a large array) and operations a second (a large product), each the best of several, in the dtype of the
# model.

# %%
dtype = jnp.dtype(llm.ready.dtype)


def best(run) -> float:
    run().block_until_ready()
    times = []
    for _ in range(9):
        started = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times)


large = jnp.ones((4096, 2**28 // 4096 // dtype.itemsize), dtype)
vector = jnp.ones(large.shape[1], dtype)
size = 2048 if jax.devices()[0].platform == "cpu" else 8192
square = jnp.ones((size, size), dtype)
product = jax.jit(lambda x, y: x @ y)
sums = jax.jit(lambda x: x.sum(axis=1))
bandwidth = large.nbytes / min(best(lambda: product(large, vector)), best(lambda: sums(large)))
rate = 2 * size**3 / best(lambda: product(square, square))
print(f"{bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s in {dtype}")

# %% [markdown]
# ## Steps on the roofline
#
# A decode step reads all weights once, whatever the number of rows, and does two operations for each weight and row.
# So its *intensity* (operations for each byte read) grows with the rows, and its ceiling with it, until the machine's
# rate is the ceiling. A prompt of a few hundred tokens is far on the right.
#
# A step's time is the difference between answers of 1 and of 9 tokens, over 8.

# %%
from jaxserve.config import ModelConfig

shape = {  # SmolLM2-135M
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
model = ModelConfig.from_hf(shape)
per_layer = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
per_layer += 3 * model.embed_dim * model.mlp_dim
layers, head = model.num_layers * per_layer, model.vocab_size * model.embed_dim
print(f"{layers / 1e6:.0f} million weights in layers, {head / 1e6:.0f} million in the head")


def seconds(texts: list[str], max_tokens: int) -> float:
    """The quickest of several."""
    times = []
    for _ in range(5):
        llm.flush_cache()
        started = time.perf_counter()
        llm.generate(texts, max_tokens=max_tokens, **options)
        times.append(time.perf_counter() - started)
    return min(times)


points = {}  # label -> (operations, bytes, seconds)
for rows in (1, 2, 4, 8, 16):
    texts = prompts[:rows]
    step = (seconds(texts, 9) - seconds(texts, 1)) / 8
    points[f"decode, {rows} row{'s' if rows > 1 else ''}"] = (
        2 * rows * (layers + head),
        (layers + head) * dtype.itemsize,
        step,
    )
long = "word " * 250
tokens = len(llm.tokenizer.encode(long, add_special_tokens=True))
prefill = seconds([long], 1)
points[f"prefill, {tokens} tokens"] = (2 * (tokens * layers + head), (layers + head) * dtype.itemsize, prefill)

print(f"{'step':<22}{'ms':>9}{'floor':>9}{'of the floor':>14}   bound by")
for name, (work, read, took) in points.items():
    floors = {"reading": read / bandwidth, "arithmetic": work / rate}
    bound = max(floors, key=floors.get)
    print(f"{name:<22}{1000 * took:>9.1f}{1000 * floors[bound]:>9.1f}{floors[bound] / took:>14.0%}   {bound}")

# %%
figure, axes = plt.subplots(figsize=(7.5, 4.4))
intensity = np.logspace(-1, 3, 200)
axes.plot(intensity, np.minimum(intensity * bandwidth, rate) / 1e9, color="#1f2933", label="what the machine can do")
axes.axvline(rate / bandwidth, color="#9aa5b1", ls=":", lw=1)
for index, (name, (work, read, took)) in enumerate(points.items()):
    colour = "#f2a541" if "prefill" in name else plt.get_cmap("Blues")(0.4 + 0.12 * index)
    axes.plot(work / read, work / took / 1e9, "o", color=colour, ms=8, label=name)
axes.set(
    xscale="log", yscale="log", xlabel="operations for each byte that is read", ylabel="billion operations a second"
)
axes.grid(alpha=0.3, which="both")
axes.legend(fontsize=8)
axes.set_title(f"{jax.devices()[0].device_kind}, {dtype}", fontsize=10)
figure.tight_layout()
plt.show()

# %% [markdown]
# A point's distance below the line is what could still be won. Attention and cache are not in these floors, so with
# long contexts a step is further below; `bench/step.py` counts them too, for every compiled shape.

# %%
llm.close()
