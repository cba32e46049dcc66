# %% [markdown]
# # The engine in this process
#
# `LLM` is the server's engine without the server: the same scheduler, cache and compiled steps, called from Python.
# It is for notebooks, evaluations and jobs that hold their data in memory. (For files of requests there is `jaxserve
# batch`.)
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

# %%
import json
import math
import time

import matplotlib.pyplot as plt

from jaxserve import LLM

llm = LLM(show_progress=False)
print(llm.model)
print(llm.ready)

# %% [markdown]
# ## One answer
#
# A string is one message of the user; a list of messages is a conversation.

# %%
done = llm.chat("What is the capital of Italy?", temperature=0, max_tokens=30)
print(done.text)
print(
    f"{len(done.prompt_token_ids)} prompt tokens, {done.choices[0].num_tokens} sampled, ended by {done.finish_reason}"
)

# %%
for piece in llm.stream([{"role": "user", "content": "Count to five."}], temperature=0, max_tokens=30):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Many at once
#
# A list is answered together. A decode step reads all weights whether it serves one row or sixteen, so sixteen
# answers cost far less than sixteen times one.

# %%
prompts = [f"Write a sentence about the number {number}." for number in range(16)]
options = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}

rates = {}
for rows in (1, 2, 4, 8, 16):
    llm.flush_cache()
    started = time.perf_counter()
    answers = llm.generate(prompts[:rows], **options)
    rates[rows] = sum(answer.choices[0].num_tokens for answer in answers) / (time.perf_counter() - started)

figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot(list(rates), list(rates.values()), "o-", label="measured here")
axes.plot(list(rates), [rates[1] * rows for rows in rates], "--", color="grey", label="rows times the first")
axes.set_xscale("log", base=2)
axes.set_xticks(list(rates), [str(rows) for rows in rates])
axes.set_xlabel("prompts at once")
axes.set_ylabel("output tokens a second")
axes.set_ylim(bottom=0, top=1.25 * max(rates.values()))
axes.legend()
axes.grid(alpha=0.3)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## How sure was it?
#
# `num_logprobs` gives the likeliest tokens at each place, of the distribution before temperature and top-p.

# %%
done = llm.generate("The opposite of cold is", temperature=0, max_tokens=4, num_logprobs=5)
first = done.logprobs[0]
names = [llm.tokenizer.decode([token_id], skip_special_tokens=False) for token_id in first.top_ids]
shares = [math.exp(value) for value in first.top_logprobs]

figure, axes = plt.subplots(figsize=(6, 2.6))
axes.barh(range(len(names)), shares, color="#5b8def")
axes.set_yticks(range(len(names)), [repr(name) for name in names])
axes.invert_yaxis()
axes.set_xlabel("probability of the next token")
axes.set_title("The opposite of cold is ...", fontsize=11)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Seeds and choices
#
# A seed gives the same text whatever is computed beside it; `n` choices share the work for the prompt.

# %%
for seed in (1, 1, 2):
    done = llm.generate("My favourite animal is", n=3, seed=seed, temperature=1.0, max_tokens=6)
    print(seed, [choice.text for choice in done.choices])

# %% [markdown]
# ## Output that parses

# %%
schema = {
    "type": "object",
    "properties": {"animal": {"type": "string", "maxLength": 15}, "legs": {"type": "integer", "maximum": 100}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
done = llm.chat("Describe a spider.", json_schema=schema, temperature=0, max_tokens=60)
print(json.loads(done.text))
print(llm.chat("Is the sea salty?", regex="(yes|no)", temperature=0).text)

# %% [markdown]
# ## The prefix cache
#
# A second question about the same long text starts where the first one left off.

# %%
text = "The quick brown fox jumps over the lazy dog. " * 40
for question in ("What does the fox do?", "What colour is the fox?"):
    started = time.perf_counter()
    done = llm.chat([{"role": "user", "content": f"{text}\n{question}"}], temperature=0, max_tokens=1)
    seconds = time.perf_counter() - started
    print(
        f"{len(done.prompt_token_ids)} prompt tokens, {done.cached_tokens} cached, {1000 * seconds:.0f} ms to one token"
    )

# %%
llm.close()
