# %% [markdown]
# # Paged attention, page by page
#
# Which page of the KV cache belongs to whom, step by step, as the server's own scheduler decides it. The scheduler is
# plain Python and knows nothing of JAX; here a random number generator stands in for the model, so this runs anywhere
# and at once. At the end the server's attention reads such pages and is compared with attention over one dense array.
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
# ## A small server
#
# 24 pages of 4 tokens (page 0 is scratch for padding), up to 4 requests at once, prompts computed 8 tokens a step.

# %%
import matplotlib.pyplot as plt
import numpy as np

from jaxserve.scheduling.plan import StepResult
from jaxserve.scheduling.scheduler import Scheduler, SchedulerConfig
from jaxserve.types import Request, SamplingParams

PAGE, PAGES = 4, 25
config = SchedulerConfig(
    num_pages=PAGES,
    page_size=PAGE,
    max_model_len=64,
    max_running=4,
    decode_buckets=(4,),
    prefill_buckets=((8, 2),),
)
scheduler = Scheduler(config)
random = np.random.default_rng(0)

# %% [markdown]
# ## Requests
#
# A and B begin with the same 12 tokens, a system prompt say; B comes three steps later. C has a prompt of its own
# that is long, and D is A's conversation going on: its prompt is A's prompt and A's answer, and then some.

# %%
shared = tuple(random.integers(100, 200, 12).tolist())
prompts = {
    "A": (0, (*shared, 1, 2, 3), 6),
    "B": (3, (*shared, 4, 5, 6, 7), 8),
    "C": (5, tuple(random.integers(300, 400, 26).tolist()), 10),
}
ARRIVES_LAST = 16  # the step at which D comes


def request(number: int, tokens: tuple[int, ...], max_tokens: int) -> Request:
    return Request(id=number, token_ids=tokens, params=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0))


# %% [markdown]
# ## Steps
#
# Each turn of this loop is one step of the device. `schedule` says what is computed, the stand-in "samples" tokens,
# and `commit` learns them. What we keep for the picture is who holds which page after each step.

# %%
names, answers, history, events = {}, {}, [], []
step, waiting = 0, dict(prompts)
while waiting or scheduler.has_work or step <= ARRIVES_LAST:
    for name, (arrives, tokens, max_tokens) in list(waiting.items()):
        if arrives <= step:
            number = len(names)
            names[number], answers[number] = name, []
            scheduler.add(request(number, tokens, max_tokens), now=step)
            del waiting[name]
    if step == ARRIVES_LAST:
        tokens = prompts["A"][1] + tuple(answers[0]) + (8, 9)
        waiting["D"] = (step + 1, tokens, 6)

    plan = scheduler.schedule(now=step)
    owners = {page: [] for page in range(PAGES)}
    if plan is not None:
        for _, sequence in plan.sequences:
            for page in sequence.pages:
                owners[page].append(names[sequence.request.id])
        work = [
            f"{names[s.request.id]}{'' if row < plan.bucket.num_decode else ' (prompt)'}" for row, s in plan.sequences
        ]
        rows = plan.bucket.num_rows
        sampled = random.integers(0, 100, (rows, 1))
        nothing = np.zeros((rows, 1, 20))
        result = StepResult(sampled, np.ones(rows, int), np.zeros((rows, 1), np.float32), nothing.astype(int), nothing)
        done = scheduler.commit(plan, result)
        for number, token in zip(done.request_ids, done.token_ids, strict=True):
            answers[number] += [token] if isinstance(token, int) else list(token or ())
        events.append((step, ", ".join(work), plan.num_new_tokens, plan.num_cached_tokens))
    history.append(owners)
    step += 1

print(f"{'step':>4}  {'prompt tokens':>13}  {'cached':>6}  computed")
for number, work, new, cached in events:
    print(f"{number:>4}  {new:>13}  {cached:>6}  {work}")

# %% [markdown]
# "cached" counts prompt tokens that were not computed, because their pages were found in the prefix tree: B finds the
# three whole pages it shares with A, and D finds A's conversation.
#
# ## The pool over time
#
# One row for each step, one column for each page. Where two requests share a page both letters are shown. A pale cell
# is a page that a request has left behind: nobody holds it, but its content is still known and may be found again,
# until somebody needs the page. (A last page that never became full is free at once.)

# %%
colours = {"A": "#5b8def", "B": "#f2a541", "C": "#57a773", "D": "#c05780", "both": "#8a6fd1"}
figure, axes = plt.subplots(figsize=(9, 6.5))
last = {}
for row, owners in enumerate(history):
    for page in range(PAGES):
        held = owners[page]
        if held:
            last[page] = held[-1]
            colour, label, alpha = colours[held[0]] if len(held) == 1 else colours["both"], "".join(held), 1.0
        elif page in last:
            colour, label, alpha = colours[last[page]], "", 0.18
        else:
            colour, label, alpha = ("#d9dde2" if page == 0 else "white"), "", 1.0
        axes.add_patch(plt.Rectangle((page, row), 1, 1, facecolor=colour, alpha=alpha, edgecolor="#c6ccd2", lw=0.5))
        axes.text(page + 0.5, row + 0.53, label, ha="center", va="center", fontsize=7, color="white", weight="bold")
axes.set(xlim=(0, PAGES), ylim=(len(history), 0), xlabel="page (0 is scratch)", ylabel="step")
axes.set_xticks(np.arange(PAGES) + 0.5, range(PAGES), fontsize=7)
axes.set_yticks(np.arange(0, len(history), 2) + 0.5, range(0, len(history), 2), fontsize=8)
axes.set_title("who holds which page")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## One request's pages
#
# The page table of a request maps positions to pages. Here is C's, every few steps: a cell is a token's place, dark
# once it is written. The pages are not in order, and need not be.

# %%
scheduler = Scheduler(config)
for number, (_, tokens, max_tokens) in enumerate(prompts.values()):
    scheduler.add(request(number, tokens, max_tokens), now=0)
frames = []
while scheduler.has_work:
    plan = scheduler.schedule(now=0)
    for _, sequence in plan.sequences:
        if sequence.request.id == 2:
            frames.append((list(sequence.pages), sequence.num_computed))
    rows = plan.bucket.num_rows
    nothing = np.zeros((rows, 1, 20))
    scheduler.commit(
        plan, StepResult(nothing[..., 0].astype(int), np.ones(rows, int), nothing[..., 0], nothing.astype(int), nothing)
    )

shown = frames[:: max(1, len(frames) // 6)]
figure, axes = plt.subplots(len(shown), 1, figsize=(9, 0.75 * len(shown) + 0.6), sharex=True)
for axis, (pages, computed) in zip(axes, shown, strict=True):
    for index, page in enumerate(pages):
        for offset in range(PAGE):
            written = index * PAGE + offset < computed
            axis.add_patch(
                plt.Rectangle(
                    (index * PAGE + offset, 0),
                    1,
                    1,
                    facecolor=colours["C"] if written else "white",
                    edgecolor="#c6ccd2",
                    lw=0.5,
                )
            )
        axis.add_patch(plt.Rectangle((index * PAGE, 0), PAGE, 1, fill=False, edgecolor="#1f2933", lw=1.2))
        axis.text(index * PAGE + PAGE / 2, 1.12, f"page {page}", ha="center", va="bottom", fontsize=7)
    axis.set(xlim=(-0.2, 44), ylim=(-0.1, 1.9), yticks=[], ylabel=f"{computed}")
    axis.set_frame_on(False)
axes[-1].set_xlabel("position in the sequence (left: tokens written so far)")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The device reads through the table
#
# Keys and values are scattered over pages as above; attention gathers them by the table. The result is that of
# attention over one dense array, to rounding.

# %%
import jax
import jax.numpy as jnp

from kernels_pallas import cache as kv_cache
from kernels_pallas import reference

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 64, 30
pages, _ = frames[-1]
key = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(key[0], (1, HEADS, DIM))
k = jax.random.normal(key[1], (LENGTH, KV_HEADS, DIM))
v = jax.random.normal(key[2], (LENGTH, KV_HEADS, DIM))

cache = kv_cache.empty(1, PAGES, KV_HEADS, DIM, PAGE, jnp.float32)
positions = np.arange(LENGTH)
table = np.array(pages[: -(-LENGTH // PAGE)])
cache = reference.write(cache, 0, k, v, jnp.array(table[positions // PAGE]), jnp.array(positions % PAGE))
paged = reference.attend(q, cache, 0, jnp.array(table[None]), jnp.array([LENGTH - 1]), KV_HEADS)

dense = jax.nn.dot_product_attention(q[:, None].astype(jnp.float32), k[None], v[None])[:, 0]
print("cache:", cache.pages.shape, "= layers, pages, rows, tokens of a page, lanes")
print("table:", table)
print("largest difference from dense attention:", float(jnp.abs(paged - dense).max()))
