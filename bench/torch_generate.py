"""Transformers' own generation on torch in float32, for bench/peers.py. Runs alone, in an environment of its own.

Reads one JSON object from standard input: {"model", "output_len", "threads", "warmup": [prompt], "runs": [{"streams":
n, "prompts": [...]}]}; writes [{"streams", "seconds", "input_tokens", "output_tokens"}] as the last line of standard
output. Prompts are taken in batches of `streams`, padded on the left; greedy, exactly output_len tokens each.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = json.load(sys.stdin)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    length = job["output_len"]

    def generate(prompts: list[str]) -> tuple[int, int]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(
                **batch,
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id,
            )
        return int(batch["attention_mask"].sum()), (out.shape[1] - batch["input_ids"].shape[1]) * len(prompts)

    answers = []
    for run in job["runs"]:
        streams, prompts = run["streams"], run["prompts"]
        generate((job["warmup"] * streams)[:streams])
        start = time.perf_counter()
        counts = [generate(prompts[i : i + streams]) for i in range(0, len(prompts), streams)]
        seconds = time.perf_counter() - start
        totals = {"input_tokens": sum(c[0] for c in counts), "output_tokens": sum(c[1] for c in counts)}
        answers.append({"streams": streams, "seconds": seconds, **totals})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
