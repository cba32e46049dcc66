# %% [markdown]
# # What lives on which device
#
# A model on several devices is the same program with its arrays cut up. This shows how: eight virtual devices on the
# CPU, the table that the server shards by, and what each device holds of each array. Nothing here needs an
# accelerator.
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
# Eight devices out of one processor. This must be said before jax is imported; `NPROC` gives XLA a thread pool that
# is large enough for eight devices that wait for each other, also on a small machine.

# %%
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

print(jax.devices())

# %% [markdown]
# ## The table
#
# Every parameter has one line: which axes the devices share out. A product that splits its *outputs* (q, k, v, gate,
# up) needs no communication; the one after it (o, down) splits its *inputs*, and its partial sums are added up over
# the devices, once for attention and once for the MLP of each layer. Vectors are small, and every device has them
# whole.
#
# Shapes here are those of Llama-3.2-1B, cut to two layers.

# %%
from jaxserve.config import ModelConfig
from jaxserve.model.sharding import describe, make_mesh

config = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
)
mesh = make_mesh(jax.devices())
structure, params = describe(config, jnp.bfloat16, mesh, "tpu")

print(f"{'parameter':<36}{'shape':<20}{'on one device':<20}{'MB':>8}{'there':>8}")
for leaf in [*params.embed, *params.layers[0], *params.head]:
    shard = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize / 1e6
    print(
        f"{leaf.path:<36}{leaf.shape!s:<20}{shard!s:<20}{np.prod(leaf.shape) * size:>8.2f}{np.prod(shard) * size:>8.2f}"
    )

# %% [markdown]
# ## Pictures of it
#
# `jax.debug.visualize_array_sharding` draws an array with the device of each part: a product that splits its outputs,
# one that splits its inputs, and the embedding, which splits the vocabulary.


# %%
def show(part: str) -> None:
    leaf = next(leaf for leaf in [*params.layers[0], *params.embed] if part in leaf.path and "kernel" in leaf.path)
    print(leaf.path, leaf.shape)
    jax.debug.visualize_array_sharding(jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding))


show("attn.qkv")

# %%
show("mlp.down")

# %%
show("embed")

# %% [markdown]
# ## The cache
#
# Pages are cut along their heads, so every device holds a part of every page, and the page table is the same
# everywhere. Here 8 kv heads on 8 devices: one head each.

# %%
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.cache import rows_per_page

rows = rows_per_page(config.num_kv_heads, config.head_dim)
shape = (config.num_layers, 64, rows, 64, 128)
pages = jax.device_put(jnp.zeros(shape, jnp.bfloat16), NamedSharding(mesh, PartitionSpec(None, None, "tp")))
print("pages:", shape, "= layers, pages, rows, tokens of a page, lanes")
for shard in pages.addressable_shards:
    held = shard.index[2]
    print(f"{shard.device!s:<12} rows {held.start or 0} to {held.stop}: {shard.data.nbytes / 1e6:.1f} MB")

# %% [markdown]
# ## Bytes on each device
#
# The whole model with its 16 layers, on 1 to 8 devices. What every device has whole does not get smaller, but that is
# little; the weights it shares out do.


# %%
def megabytes(num_devices: int) -> dict[str, float]:
    _, found = describe(config, jnp.bfloat16, make_mesh(jax.devices()[:num_devices]), "tpu")
    sizes = {"embedding and head": 0.0, "attention": 0.0, "MLP": 0.0, "norms": 0.0}
    for leaf, times in [(leaf, 1) for leaf in [*found.embed, *found.head]] + [(leaf, 16) for leaf in found.layers[0]]:
        kind = (
            "norms" if "norm" in leaf.path else "attention" if ".attn." in leaf.path else "MLP" if ".mlp." in leaf.path
            else "embedding and head"
        )  # fmt: skip
        sizes[kind] += times * np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize / 1e6
    return sizes


counts = (1, 2, 4, 8)
parts = {count: megabytes(count) for count in counts}
figure, axes = plt.subplots(figsize=(6.5, 3.4))
bottom = np.zeros(len(counts))
for kind, colour in zip(parts[1], ("#8a6fd1", "#5b8def", "#57a773", "#f2a541"), strict=True):
    heights = np.array([parts[count][kind] for count in counts])
    axes.bar(range(len(counts)), heights, bottom=bottom, label=kind, color=colour)
    bottom += heights
for index, total in enumerate(bottom):
    axes.text(index, total + 30, f"{total:.0f}", ha="center", fontsize=9)
axes.set_xticks(range(len(counts)), [str(count) for count in counts])
axes.set(xlabel="devices", ylabel="MB of weights on each", ylim=(0, 1.15 * bottom.max()))
axes.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The sum over devices
#
# The product that splits its inputs, written out: each device multiplies its part, and `psum` adds the parts up. The
# compiled program holds exactly one all-reduce.

# %%
x = jax.random.normal(jax.random.key(0), (4, 8192))
w = jax.random.normal(jax.random.key(1), (8192, 2048)) / 90

split = jax.shard_map(
    lambda x, w: jax.lax.psum(x @ w, "tp"),
    mesh=mesh,
    in_specs=(PartitionSpec(None, "tp"), PartitionSpec("tp")),
    out_specs=PartitionSpec(),
)
text = jax.jit(split).lower(x, w).compile().as_text()
print("all-reduces:", len(re.findall(r" all-reduce(?:-start)?\(", text)))
print("largest difference from one device:", float(jnp.abs(split(x, w) - x @ w).max()))
