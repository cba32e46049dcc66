# %% [markdown]
# # The OpenAI API, from a notebook
#
# A server is started here, asked by the client that OpenAI publishes, and ended again: chat, streaming, structured
# output, tools, completions with log-probabilities, a batch, and embeddings. The model is the small default one, so
# what it
# *says* is not the point.
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
    extras = ",".join(["test", "notebooks"] + (["tpu"] if tpu else ["cuda12"] if shutil.which("nvidia-smi") else []))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"..[{extras}]"], check=True)

# %% [markdown]
# ## A server
#
# `launch_server_cmd` runs the command line in a process of its own, on a free port. `wait_for_server` returns when
# everything is compiled. With `JAXSERVE_URL` set, a server that is already there is used instead.

# %%
import json
import os
import time

from openai import OpenAI

from jaxserve.utils import launch_server_cmd, terminate_process, wait_for_server

url, server = os.environ.get("JAXSERVE_URL"), None
if url is None:
    server, port = launch_server_cmd("python -m jaxserve --log-level warning")
    url = f"http://127.0.0.1:{port}"
wait_for_server(url, timeout=600, process=server)

client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
print(model)

# %% [markdown]
# ## Chat

# %%
answer = client.chat.completions.create(
    model=model,
    messages=[
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    temperature=0,
    max_tokens=40,
)
print(answer.choices[0].message.content)
print(answer.usage)

# %% [markdown]
# A conversation is the list of its messages, and the server keeps nothing of it. It need not: what it computed for
# the first turns is in the prefix cache, and `cached_tokens` says how much of the prompt was found there.

# %%
messages = [{"role": "user", "content": "Name three rivers in Europe, separated by commas."}]
for follow_up in ("Which of them is the longest?", "And which one flows through Paris?"):
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40)
    text = reply.choices[0].message.content
    usage = reply.usage
    print(f"{usage.prompt_tokens} tokens, {usage.prompt_tokens_details.cached_tokens} of them cached: {text!r}")
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": follow_up}]

# %% [markdown]
# ### Streaming
#
# The time to the first piece is what a reader waits for; the rest comes at the pace of decode steps.

# %%
started, times = time.perf_counter(), []
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me about the sea."}],
    temperature=0.7,
    seed=7,
    max_tokens=60,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        times.append(time.perf_counter() - started)
        print(chunk.choices[0].delta.content, end="", flush=True)
print(f"\n\nfirst after {times[0]:.2f} s, then {(len(times) - 1) / (times[-1] - times[0]):.0f} pieces a second")

# %% [markdown]
# ### Sampling
#
# `seed` makes a text repeatable, whatever else the server is doing. `n` asks for several choices at once; the prompt
# is computed once.

# %%
for seed in (1, 1, 2):
    choices = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Invent a name for a boat."}],
        temperature=1.0,
        top_p=0.9,
        seed=seed,
        n=2,
        max_tokens=16,
        stop=["\n"],
    ).choices
    print(seed, [choice.message.content for choice in choices])

# %% [markdown]
# ### Structured output
#
# The schema is enforced while tokens are sampled, so even a small model gives JSON that parses.

# %%
schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer"},
        "coastal": {"type": "boolean"},
    },
    "required": ["city", "country", "inhabitants", "coastal"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Describe Lisbon as JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    temperature=0,
    max_tokens=100,
)
json.loads(answer.choices[0].message.content)

# %% [markdown]
# ### Tools
#
# `tool_choice` forces a call here, and its arguments follow the parameters' schema.

# %%
weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
    tools=[weather],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    temperature=0,
    max_tokens=80,
)
call = answer.choices[0].message.tool_calls[0]
print(call.function.name, json.loads(call.function.arguments))

# %% [markdown]
# ## Completions
#
# Bare text is continued, without a chat template. `logprobs` says how sure the model was of each token.

# %%
done = client.completions.create(
    model=model, prompt="The first five prime numbers are", max_tokens=16, temperature=0, logprobs=3
)
print(done.choices[0].text)
for token, logprob, top in zip(
    done.choices[0].logprobs.tokens,
    done.choices[0].logprobs.token_logprobs,
    done.choices[0].logprobs.top_logprobs,
    strict=True,
):
    others = ", ".join(f"{other!r} {value:.2f}" for other, value in top.items() if other != token)
    print(f"{token!r:>10} {logprob:7.3f}   instead of {others}")

# %% [markdown]
# ## Batches
#
# A file with one request a line, answered when there is nothing more urgent. Files and batches survive a restart of
# the server; interactive requests go first.

# %%
questions = ["Two and two are", "The opposite of hot is", "The sun rises in the", "A triangle has"]
lines = [
    {
        "custom_id": f"question-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": model, "prompt": question, "max_tokens": 6, "temperature": 0},
    }
    for number, question in enumerate(questions)
]
content = "\n".join(json.dumps(line) for line in lines).encode()
file = client.files.create(file=("questions.jsonl", content), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
while batch.status not in ("completed", "failed", "cancelled", "expired"):
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts)

# %%
results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
for result in sorted(results, key=lambda each: each["custom_id"]):
    question = questions[int(result["custom_id"].rpartition("-")[2])]
    print(f"{question} ...{result['response']['body']['choices'][0]['text']!r}")

# %% [markdown]
# ## Embeddings
#
# Any chat model gives vectors; an encoder made for it (`--model all-MiniLM-L6-v2`) gives better ones. Vectors have
# length 1, so a product of two is their similarity.

# %%
import matplotlib.pyplot as plt
import numpy as np

texts = ["a cat on a sofa", "a kitten on the couch", "interest rates rose", "the bank raised its rates"]
vectors = np.array([each.embedding for each in client.embeddings.create(model=model, input=texts).data])
similarity = vectors @ vectors.T

figure, axes = plt.subplots(figsize=(5.5, 4))
image = axes.imshow(similarity, cmap="viridis", vmin=similarity.min(), vmax=1)
axes.set_xticks(range(len(texts)), texts, rotation=30, ha="right")
axes.set_yticks(range(len(texts)), texts)
for row in range(len(texts)):
    for column in range(len(texts)):
        dark = similarity[row, column] < (1 + similarity.min()) / 2
        axes.text(
            column, row, f"{similarity[row, column]:.2f}", ha="center", va="center", color="white" if dark else "black"
        )
axes.set_title("similarity of four sentences")
figure.colorbar(image)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The end

# %%
if server is not None:
    terminate_process(server)
