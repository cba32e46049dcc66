"""Flags of SGLang and vLLM that this server takes, warns of or refuses, but does not act on."""

import argparse
from typing import Any

# Names without an effect here: accepted with one warning. True: the flag takes a value.
_CUDA = "it is about CUDA or PyTorch; XLA decides"
NO_EFFECT: dict[str, tuple[bool, str]] = {
    "--base-gpu-id": (True, _CUDA),
    "--sampling-backend": (True, _CUDA),
    "--grammar-backend": (True, "there is one backend"),
    "--disable-cuda-graph": (False, _CUDA),
    "--disable-cuda-graph-padding": (False, _CUDA),
    "--cuda-graph-max-bs": (True, _CUDA),
    "--cuda-graph-bs": (True, _CUDA),
    "--disable-custom-all-reduce": (False, _CUDA),
    "--enable-p2p-check": (False, _CUDA),
    "--enable-torch-compile": (False, "every step is compiled by XLA"),
    "--torch-compile-max-bs": (True, _CUDA),
    "--torchao-config": (True, _CUDA),
    "--triton-attention-reduce-in-fp32": (False, _CUDA),
    "--enforce-eager": (False, "every step is compiled by XLA"),
    "--compilation-config": (True, _CUDA),
    "--swap-space": (True, "a preempted sequence is computed again, mostly from the prefix cache"),
    "--max-prefill-tokens": (True, "--chunked-prefill-size bounds the prompt tokens of a step"),
    "--schedule-conservativeness": (True, "the scheduler preempts instead of guessing lengths"),
    "--load-balance-method": (True, "there is one replica"),
    "--constrained-json-whitespace-pattern": (True, "it belongs to the outlines library"),
    "--disable-jump-forward": (False, "jump-forward decoding is not used"),
    "--disable-disk-cache": (False, "it belongs to the outlines library"),
    "--disable-outlines-disk-cache": (False, "it belongs to the outlines library"),
    "--show-time-cost": (False, "see /metrics"),
    "--enable-metrics": (False, "/metrics is always served"),
    "--enable-chunked-prefill": (False, "prompts are always computed in chunks"),
    "--disable-log-requests": (False, "requests are not logged unless --log-requests is given"),
    "--disable-log-stats": (False, "see --decode-log-interval"),
    "--delete-ckpt-after-loading": (False, "checkpoints are kept in --cache-dir"),
    "--skip-server-warmup": (False, "every program is compiled and run once before the server is ready"),
    "--enable-auto-tool-choice": (False, "tools are always on offer; --tool-call-parser says how they are called"),
    "--tokenizer-mode": (True, "the fast tokenizer is always used"),
    "--tokenizer-worker-num": (True, "long texts are tokenised in threads"),
    "--enable-reasoning": (False, "--reasoning-parser alone decides"),
    "--guided-decoding-backend": (True, "there is one backend"),
    "--log-requests-level": (True, "the text of requests is never logged"),
    "--max-log-len": (True, "the text of requests is never logged"),
    "--enable-request-id-headers": (False, "every reply has an x-request-id"),
    "--enable-server-load-tracking": (False, "GET /v1/loads is always served"),
    "--disable-frontend-multiprocessing": (False, "the engine always has a process of its own"),
    "--disable-precompile": (False, "every program is compiled before the server is ready"),
    "--precompile-token-paddings": (True, "see --chunked-prefill-size"),
    "--precompile-bs-paddings": (True, "see --max-running-requests"),
    "--limit-mm-per-prompt": (True, "only text is served"),
    "--trust-remote-code": (False, ""),  # refused below; here so that it parses
}

# Names whose only accepted values are the ones here: the rest belongs to versions to come. () with a switch: refused.
_ONE = ("1",)
NOT_YET: dict[str, tuple[tuple[str, ...], str]] = {
    "--allowed-methods": (('["*"]',), "--allowed-origins may use every method"),
    "--allowed-headers": (('["*"]',), "--allowed-origins may send every header"),
    "--pipeline-parallel-size": (_ONE, "layers are not shared out; use --tp-size"),
    "--pp-size": (_ONE, "layers are not shared out; use --tp-size"),
    "--cpu-offload-gb": (("0",), "weights stay on the device"),
    "--num-continuous-decode-steps": (_ONE, "one step is scheduled at a time"),
    "--speculative-algorithm": ((), "speculative decoding is not there"),
    "--speculative-config": ((), "speculative decoding is not there"),
    "--lora-paths": ((), "adapters are not there"),
    "--lora-modules": ((), "adapters are not there"),
    "--api-server-count": (_ONE, "one front end is run"),
    "--task": (("auto", "generate"), "use --is-embedding for embeddings alone"),
    "--runner": (("auto", "generate"), "use --is-embedding for embeddings alone"),
    "--response-role": (("assistant",), "replies are the assistant's"),
    "--chat-template-content-format": (("auto", "string"), "templates are given text"),
    "--hf-chat-template-name": ((), "give the template as a file with --chat-template"),
    "--json-model-override-args": (("{}",), "edit a copy of config.json instead"),
    "--hf-overrides": (("{}",), "edit a copy of config.json instead"),
    "--generation-config": (("auto",), "use --sampling-defaults openai to leave the model's defaults out"),
}
NOT_YET_SWITCHES: dict[str, str] = {
    "--allow-credentials": "keys are sent as headers, not as cookies",
    "--skip-tokenizer-init": "replies are text; /v1/completions and /generate take token ids",
    "--enable-lora": "adapters are not there",
    "--enable-priority-scheduling": "requests have one priority",
    "--allow-auto-truncate": "prompts are never cut",
    "--enable-dp-attention": "--dp-size gives every rank all weights",
    "--enable-nan-detection": "logits are not checked",
}
REMOTE_CODE = (
    "--trust-remote-code is refused: this server runs its own implementation of each model and never executes code "
    "that comes with a checkpoint. Leave the flag out."
)

# Values of --attention-backend elsewhere, in any case: accepted with one warning, as if the flag were not there.
_FOREIGN_BACKENDS = {
    *("flashinfer", "flash_attn", "fa", "fa3", "fa4", "triton", "triton_attn", "torch_native", "torch_sdpa", "native"),
    *("xformers", "flex_attention", "flashmla", "cutlass_mla", "trtllm_mla", "trtllm_mha", "aiter", "wave", "ascend"),
    *("dual_chunk_flash_attn", "intel_amx"),
}
_OUR_BACKENDS = ("auto", "pallas", "numba", "xla")

# Other servers' names for ways of writing that are served here.
_TOOL_PARSERS = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "llama3_json": "llama3",
    "llama4_pythonic": "pythonic",
}
_REASONING_PARSERS = {"deepseek_r1": "deepseek-r1", "qwen3-thinking": "deepseek-r1"}


def tool_call_parser(text: str) -> str:
    """A value of --tool-call-parser, by the name it has here."""
    return _TOOL_PARSERS.get(text, text)


def reasoning_parser(text: str) -> str:
    """A value of --reasoning-parser, by the name it has here."""
    return _REASONING_PARSERS.get(text, text)


def quantization(text: str) -> str:
    """A value of --quantization. vLLM names the checkpoint's format there; it is read from config.json."""
    value = {"compressed-tensors": "auto"}.get(text.lower(), text.lower())
    if value not in _QUANTIZATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not served; {', '.join(_QUANTIZATIONS)} are, and float8_e4m3 is the number of fp8"
        )
    return value


def kv_cache_dtype(text: str) -> str:
    """A value of --kv-cache-dtype, by the name it has here."""
    value = {"bf16": "bfloat16", "fp8_e4m3": "fp8"}.get(text.lower(), text.lower())
    if value not in _KV_CACHE_DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not served; {', '.join(_KV_CACHE_DTYPES)} are, and fp8 is float8_e4m3 with scales"
        )
    return value


_QUANTIZATIONS = ("auto", "none", "int8", "fp8")
_KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "fp8")
quantization.__name__ = ", ".join(f"`{value}`" for value in _QUANTIZATIONS)  # as argparse and docs/flags.md print it
kv_cache_dtype.__name__ = ", ".join(f"`{value}`" for value in _KV_CACHE_DTYPES)


def attention_backend(text: str) -> str:
    """A value of --attention-backend, in lower case; ours, or one that drop_foreign_backend drops."""
    value = text.lower()
    if value not in _FOREIGN_BACKENDS and value not in _OUR_BACKENDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; {', '.join(_OUR_BACKENDS)} are")
    return value


attention_backend.__name__ = ", ".join(
    f"`{value}`" for value in _OUR_BACKENDS
)  # as argparse and docs/flags.md print it


def drop_foreign_backend(engine: dict[str, Any]) -> tuple[str, ...]:
    """Takes another server's attention backend out of the engine's options. -> the warning, if it did."""
    value = engine.get("attention_backend")
    if value not in _FOREIGN_BACKENDS:
        return ()
    del engine["attention_backend"]
    return (f"--attention-backend {value} has no effect: it belongs to other servers; the choice here is auto",)
