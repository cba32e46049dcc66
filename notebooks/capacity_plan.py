# %% [markdown]
# # Before you rent the machine
#
# `jaxserve plan` says whether a model fits a slice of accelerators, how many users of a given context it would hold,
# and how fast it could be at best. It reads no weights and needs no accelerator. Sizes are exact, since they are
# those that the engine itself would choose; **times are a roofline from published figures of the hardware, and not
# measured**: read them as what cannot be beaten.
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
# ## One model, every slice
#
# What the terminal shows. `--no-compile` leaves out what takes minutes: compiling the engine's own steps for the
# slice, which is the proof that they fit, temporaries included.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np


def jaxserve_plan(*flags: str) -> str:
    command = [sys.executable, "-m", "jaxserve", "plan", "--no-compile", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr)
    return done.stdout


def plans(*flags: str) -> list[dict]:
    found = json.loads(jaxserve_plan("--json", *flags))
    return found if isinstance(found, list) else [found]


MODEL, CONTEXT = "Llama-3.1-8B", 8192
print(jaxserve_plan("--model", MODEL, "--context", str(CONTEXT)))

# %% [markdown]
# ## What fills a device
#
# Weights are shared out over the devices of a slice, and what they leave is cache. A slice that is too small for the
# weights alone is left out.

# %%
compared = plans("--model", MODEL, "--context", str(CONTEXT))
fitting = [plan for plan in compared if plan["fits"]]
names = [plan["topology"] for plan in fitting]
parts = {"weights": "#8a6fd1", "kv_cache": "#5b8def", "state": "#57a773", "left for temporaries": "#d9dde2"}
figure, axes = plt.subplots(figsize=(9, 4))
bottom = np.zeros(len(fitting))
for part, colour in parts.items():
    heights = [
        plan["memory"][part] if part in plan["memory"] else plan["memory"]["available"] - total
        for plan, total in zip(fitting, bottom, strict=True)
    ]
    axes.bar(names, np.array(heights) / 2**30, bottom=bottom / 2**30, color=colour, label=part.replace("_", " "))
    bottom += heights
axes.set_ylabel("GiB of each device")
axes.tick_params(axis="x", rotation=45)
axes.legend(fontsize=8)
axes.set_title(f"{MODEL}, bfloat16", fontsize=11)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## How many users, how fast
#
# Users who decode together with a context of 8,192 tokens each (at most 256, the engine's default), and the tokens a
# second that all of them, or one alone, could get at best.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
rows = np.arange(len(fitting))
left.barh(rows, [plan["users"] for plan in fitting], color="#5b8def")
for row, plan in zip(rows, fitting, strict=True):
    left.text(plan["users"] + 3, row, str(plan["users"]), va="center", fontsize=8)
left.set(xlabel=f"users of {CONTEXT:,} tokens", xlim=(0, 300))
left.set_yticks(rows, names, fontsize=9)
left.invert_yaxis()
right.barh(rows - 0.2, [plan["full"]["tokens_per_second"] for plan in fitting], 0.4, color="#57a773", label="all users")
right.barh(rows + 0.2, [plan["alone"]["tokens_per_second"] for plan in fitting], 0.4, color="#f2a541", label="one user")
right.set(xscale="log", xlabel="tokens a second at best (not measured)")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Context against users
#
# The cache holds a number of tokens. Few users may have long contexts, or many users short ones.

# %%
slices, contexts = ("v6e:2x2", "v5p:2x2x1", "h100:1", "h200:1"), (1024, 2048, 4096, 8192, 16384, 32768, 65536)
figure, axes = plt.subplots(figsize=(7, 3.8))
for plan in (plan for plan in compared if plan["topology"] in slices):
    users = [plan["kv_tokens"] // context for context in contexts]
    axes.plot(contexts, users, "o-", label=f"{plan['topology']}: {plan['kv_tokens']:,} tokens")
axes.set(xscale="log", yscale="log", xlabel="tokens of each user", ylabel="users that fit together")
axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
axes.grid(alpha=0.3, which="both")
axes.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The smallest slice
#
# Of each family, the smallest that holds a model with one user of 8,192 tokens.

# %%
for model in ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.3-70B"):
    found = {}
    for plan in plans("--model", model, "--context", str(CONTEXT)):
        family = plan["topology"].partition(":")[0]
        if plan["fits"]:
            found.setdefault(family, plan["topology"])
    print(f"{model:<16}" + ("  ".join(found.values()) or "more than one host"))
