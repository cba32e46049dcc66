"""What bench/gpu.sh runs: the kernels, a server under load, and the device step, into one JSON.

python -m bench.gpu [--output bench/results/gpu-DEVICE.json] [--small] [--seconds 540]

Each part is a process of its own, so that one that fails or takes too long leaves the others their figures and the
device's memory; the file is written after each. The model has Llama 3.1 8B's shapes, random weights, and a tokenizer of
bytes and words: speed does not depend on what they are. --small: a tiny model, and the Hopper kernels interpreted, on a
CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "bench" / "results" / "plan-h200-llama-8b.json"  # jaxserve plan --topology h200 --json of LLAMA_8B
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY = LLAMA_8B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """config.json and a tokenizer that knows bytes, and a word for every other token that random weights may choose."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{number}" for number in range(len(words), config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


SECONDS = {"kernels": 110, "server": 150, "step": 90, "step-int8": 95, "step-fp8": 95}  # of 540


def parts(model: Path, small: bool, folder: Path) -> dict[str, list[str]]:
    """Name -> the arguments of python -m; each writes folder/NAME.json."""

    def output(name: str) -> list[str]:
        return ["--output", str(folder / f"{name}.json")]

    shape = ["--small", "--backend", "interpreted", "--shapes", "smollm2", "--kinds", "window"] if small else []
    step = ["--batch", "1", "4"] if small else ["--batch", "8", "64", "256", "--prefill", "2048", "--kernels", "6"]
    step += ["--context", "128"] if small else ["--context", "128", "4096", "--plan", str(PLAN)]
    load = ["--num-prompts", "4", "--input-len", "20", "--output-len", "8", "--max-concurrency", "2"]
    if not small:  # a word is some six bytes, which are the toy tokenizer's tokens
        load = ["--num-prompts", "128", "--input-len", "160", "--output-len", "128", "--max-concurrency", "8", "64"]
    server = ["--model", str(model), "--load-format", "dummy"]
    server += ["--max-running-requests", "4", "--max-model-len", "512"] if small else []
    config, dtype = str(model / "config.json"), "float32" if small else "bfloat16"

    def in_8_bits(method: str) -> list[str]:
        few = ["--batch", "4"] if small else ["--batch", "8", "64", "--prefill", "2048"]
        few += ["--context", "128" if small else "4096", "--config", config, "--dtype", dtype, "--seconds", "1"]
        return [*few, "--quantization", method, "--kv-cache-dtype", method]

    return {
        "kernels": ["bench.kernels", *shape, *output("kernels")],
        "server": ["jaxserve", "bench", *server, *load, *output("server")],
        "step": ["bench.step", "--config", config, "--dtype", dtype, "--sampled", *step, *output("step")],
        **{
            f"step-{method}": ["bench.step", *in_8_bits(method), *output(f"step-{method}")]
            for method in ("int8", "fp8")
        },
    }


def run(arguments: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """How a part ended, with the end of what it said where that was not well. Its children end with it."""
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"NPROC": str(max(os.cpu_count() or 1, 16))},  # threads: interpreted warpgroups hold some
        )
        try:
            code: int | None = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 15)
            process.wait()
    said = log.read_text(errors="replace")
    print(said, flush=True)
    ended = {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}
    return ended if code == 0 else ended | {"said": said[-3000:]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument("--small", action="store_true", help="a trial of all of it on a CPU")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it (default: 540)")
    parser.add_argument("--only", nargs="+", choices=tuple(SECONDS), help="these parts")
    args = parser.parse_args()
    start = time.monotonic()
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "small": args.small, "parts": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", TINY if args.small else LLAMA_8B)
        chosen = parts(folder / "model", args.small, folder)
        for part in args.only or chosen:
            print(f"==> {part}", flush=True)
            left = args.seconds - (time.monotonic() - start)
            share = SECONDS[part] * args.seconds / 540
            ended = run(chosen[part], min(share, left), folder / f"{part}.log")
            figures = folder / f"{part}.json"
            result["parts"][part] = ended | ({"figures": json.loads(figures.read_text())} if figures.exists() else {})
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.output}")
    return 0 if all(each["exit_code"] == 0 for each in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
