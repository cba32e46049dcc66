"""Other servers' flags as a page: python -m tools.coming_from_doc > docs/coming-from.md

What is said of a flag of vLLM or SGLang is what the command line itself says when it is given; for llama.cpp, which has
names of its own, the table below names ours, and those are looked up.
"""

from collections.abc import Sequence

from jaxserve.flags import FLAGS, FlagError, parse
from jaxserve.flags import Flag as OurFlag

HEAD = """\
# Coming from vLLM, SGLang or llama.cpp

Written by `make docs` from what the command line says of each flag; do not edit.

Clients change nothing but the address: the HTTP API is OpenAI's, with vLLM's and SGLang's additions where they have one
([api.md](api.md)). Command lines mostly work as they are, since flags have vLLM's and SGLang's names. A flag is never
ignored in silence: it means the same, or is said to have no effect in one warning, or is refused with the reason (exit
code 2).

"""
# (flag, a value to try it with). The usual ones of each server.
VLLM = (
    ("--model", "m"), ("--served-model-name", "n"), ("--host", "0.0.0.0"), ("--port", "8000"), ("--api-key", "k"),
    ("--dtype", "bfloat16"), ("--max-model-len", "2048"), ("--max-num-seqs", "8"), ("--max-num-batched-tokens", "512"),
    ("--gpu-memory-utilization", "0.9"), ("--block-size", "16"), ("--enable-prefix-caching", None),
    ("--no-enable-prefix-caching", None), ("--enable-chunked-prefill", None), ("--async-scheduling", None),
    ("--attention-backend", "FLASH_ATTN"), ("--tensor-parallel-size", "2"), ("--pipeline-parallel-size", "2"),
    ("--data-parallel-size", "2"), ("--kv-cache-dtype", "fp8"), ("--quantization", "awq"), ("--load-format", "dummy"),
    ("--download-dir", "d"), ("--revision", "main"), ("--tokenizer", "d"), ("--tokenizer-mode", "auto"),
    ("--chat-template", "f"), ("--tool-call-parser", "hermes"), ("--enable-auto-tool-choice", None),
    ("--reasoning-parser", "qwen3"), ("--enable-lora", None), ("--lora-modules", "a=b"),
    ("--speculative-config", "{}"), ("--generation-config", "vllm"), ("--hf-overrides", '{"a": 1}'),
    ("--enforce-eager", None), ("--compilation-config", "3"), ("--swap-space", "4"), ("--cpu-offload-gb", "4"),
    ("--trust-remote-code", None), ("--seed", "1"), ("--enable-log-requests", None), ("--disable-log-requests", None),
    ("--disable-log-stats", None), ("--allowed-origins", '["*"]'), ("--ssl-keyfile", "f"), ("--ssl-certfile", "f"),
    ("--uvicorn-log-level", "info"), ("--limit-mm-per-prompt", "{}"), ("--config", None),
)  # fmt: skip
SGLANG = (
    ("--model-path", "m"), ("--tokenizer-path", "d"), ("--served-model-name", "n"), ("--host", "0.0.0.0"),
    ("--port", "30000"), ("--api-key", "k"), ("--admin-api-key", "k"), ("--dtype", "bfloat16"),
    ("--context-length", "2048"), ("--mem-fraction-static", "0.8"), ("--max-running-requests", "8"),
    ("--max-total-tokens", "4096"), ("--chunked-prefill-size", "512"), ("--max-prefill-tokens", "512"),
    ("--page-size", "16"), ("--schedule-policy", "fcfs"), ("--schedule-conservativeness", "1"),
    ("--disable-radix-cache", None), ("--disable-overlap-schedule", None), ("--enable-mixed-chunk", None),
    ("--attention-backend", "flashinfer"), ("--sampling-backend", "flashinfer"), ("--grammar-backend", "xgrammar"),
    ("--tp-size", "2"), ("--dp-size", "2"), ("--nnodes", "2"), ("--kv-cache-dtype", "fp8_e5m2"),
    ("--quantization", "fp8"), ("--load-format", "dummy"), ("--download-dir", "d"), ("--revision", "main"),
    ("--is-embedding", None), ("--chat-template", "f"), ("--tool-call-parser", "llama3"),
    ("--reasoning-parser", "deepseek-r1"), ("--lora-paths", "d"), ("--speculative-algorithm", "EAGLE"),
    ("--json-model-override-args", '{"a": 1}'), ("--sampling-defaults", "openai"), ("--stream-interval", "2"),
    ("--enable-cache-report", None), ("--file-storage-path", "d"), ("--watchdog-timeout", "100"),
    ("--disable-cuda-graph", None), ("--enable-torch-compile", None), ("--trust-remote-code", None),
    ("--skip-server-warmup", None), ("--random-seed", "1"), ("--log-level", "info"), ("--log-level-http", "info"),
    ("--log-requests", None), ("--enable-metrics", None), ("--decode-log-interval", "10"),
    ("--enable-priority-scheduling", None), ("--disaggregation-mode", "null"), ("--device", "cpu"),
)  # fmt: skip
# (llama-server's flag, ours or None, what is different)
LLAMA_CPP: tuple[tuple[str, str | None, str], ...] = (
    (
        "-m, --model",
        "--model",
        "also a Hugging Face folder; a `.gguf` is computed in `--dtype`, not in its 4 or 8 bits",
    ),
    ("-hf, --hf-repo", "--model", "a hub name with safetensors"),
    ("-a, --alias", "--served-model-name", ""),
    ("-c, --ctx-size", "--max-model-len", "of one request; the cache all share is `--max-total-tokens`"),
    ("-np, --parallel", "--max-running-requests", "the context is not divided among them"),
    ("-b, --batch-size; -ub, --ubatch-size", "--chunked-prefill-size", "prompt tokens of one step"),
    ("-ngl, --n-gpu-layers", None, "all layers are on the device; the model must fit"),
    ("-t, --threads", None, "XLA takes the cores it may use; limit them with `taskset` or the container"),
    ("-fa, --flash-attn", None, "attention never holds a whole matrix of scores; see `--attention-backend`"),
    ("-ctk, -ctv", None, "`--kv-cache-dtype`, of K and V together: `int8` for `q8_0`, `bfloat16`, `fp8`"),
    ("-cb, --cont-batching", None, "always"),
    ("--cache-prompt, --cache-reuse", None, "always, for all requests together: [scheduling.md](scheduling.md)"),
    ("--slots, --slot-save-path", None, "there are no slots to address; a prefix is found by its tokens"),
    ("--host", "--host", ""),
    ("--port", "--port", "30000 by default, not 8080"),
    ("--api-key", "--api-key", ""),
    ("--ssl-key-file", "--ssl-keyfile", ""),
    ("--ssl-cert-file", "--ssl-certfile", ""),
    ("--jinja", None, "always: the model's own template"),
    ("--chat-template-file", "--chat-template", ""),
    ("--reasoning-format", "--reasoning-parser", ""),
    ("--embedding", "--is-embedding", "not needed to get embeddings; it refuses everything else"),
    ("--pooling", None, "as the model's own files say"),
    ("--temp, --top-k, --top-p, --min-p", None, "fields of the request, or `generation_config.json` of the model"),
    ("--grammar, --json-schema", None, "fields of the request: `ebnf`, `response_format`, `regex`"),
    ("--lora", None, "see `--lora-paths` above"),
    ("-md, --model-draft", None, "see `--speculative-config` above"),
    ("--mlock, --no-mmap", None, "weights are copied to the device, and not paged"),
    ("--metrics", None, "always, at `/metrics`"),
    ("--log-verbosity", "--log-level", ""),
    ("--timeout", None, "requests may take as long as they do; clients leave when they want to"),
)


def ours(name: str) -> OurFlag | None:
    """The flag of that name; --no-x is the opposite of the switch --x."""
    positive = "--" + name.removeprefix("--no-")
    return next((flag for flag in FLAGS if name in flag.names or positive in flag.names), None)


def said_of(name: str, value: str | None) -> str:
    """What becomes of a flag of vLLM or SGLang: the same, no effect, or an error, in the words of the command line."""
    if name == "--config":
        return "the same: a YAML file of flags"
    try:
        warnings = parse([name] if value is None else [name, value]).warnings
    except FlagError as error:
        text = str(error).removesuffix(" Leave the flag out.")
        if text.startswith("unknown flag"):
            return "**not known**: an error"
        for before_the_reason in ("is not supported yet: ", f"{name} is refused: "):
            text = text.partition(before_the_reason)[2] or text
        return f"**refused**: {text}"
    if warnings:
        return "no effect: " + warnings[0].partition(": ")[2]
    flag = ours(name)
    if flag is None:
        return "accepted: it asks for nothing that is not so"
    first = flag.names[0]
    if name not in flag.names:
        return f"the same: the opposite of `{first}`"
    return f"the same: {flag.help}" if name == first else f"the same as `{first}`: {flag.help}"


def table(rows: Sequence[tuple[str, str | None]]) -> str:
    text = "| flag | here |\n|---|---|\n"
    for name, value in rows:
        shown = name if value is None else f"{name} {value}"
        text += f"| `{shown}` | {said_of(name, value)} |\n"
    return text


def page() -> str:
    text = HEAD
    text += "## vLLM\n\n`vllm serve MODEL` is `jaxserve serve MODEL`; `vllm bench serve` is `jaxserve bench`, "
    text += "`vllm chat` is `jaxserve chat`, `vllm run-batch -i -o` is `jaxserve batch -i -o`. The port is 30000, "
    text += "not 8000.\n\n" + table(VLLM)
    text += "\n## SGLang\n\n`python -m sglang.launch_server` is `python -m jaxserve`; `sglang.utils` has its "
    text += "counterpart in `jaxserve.utils`, and `sgl.Engine` in `jaxserve.LLM`.\n\n" + table(SGLANG)
    text += "\n## llama.cpp\n\n`llama-server` is `jaxserve serve`, `llama-cli` is `jaxserve chat`, `llama-bench` is "
    text += "`jaxserve bench`. Most of its flags have other names, which are not understood here.\n\n"
    text += "| flag | here |\n|---|---|\n"
    for theirs, flag, note in LLAMA_CPP:
        assert flag is None or ours(flag) is not None, flag
        names = ", ".join(f"`{name.strip()}`" for name in theirs.replace(";", ",").split(","))
        here = "; ".join(part for part in (f"`{flag}`" if flag else "", note) if part)
        text += f"| {names} | {here} |\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
