"""Texts per second of /v1/embeddings against the published pipeline on torch, in turns in one run.

python -m bench.embed --base-url http://127.0.0.1:30000 --torch-python VENV/bin/python

The server must serve all-MiniLM-L6-v2; VENV holds torch and transformers. Both get the same texts, 32 at a time: the
server as one request over HTTP, torch as sentence-transformers does it (sorted by length, padded, mean, normalised).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time

import httpx2

WORDS = ("the", "of", "a", "in", "water", "house", "river", "people", "small", "question", "because", "between")
TORCH = """
import json, sys, time, torch
from transformers import AutoModel, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
for line in sys.stdin:
    texts = sorted(json.loads(line), key=len)
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(texts), 32):
            batch = tokenizer(texts[i : i + 32], return_tensors="pt", padding=True)
            mask = batch["attention_mask"].unsqueeze(-1)
            x = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            torch.nn.functional.normalize(x).tolist()
    print(time.perf_counter() - start, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--num-texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    draw = random.Random(0)
    http = httpx2.Client(base_url=options.base_url, timeout=300, trust_env=False)
    info = http.get("/get_model_info").json()
    command = [options.torch_python, "-c", TORCH, info["model_path"]]
    results = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as torch:
        assert torch.stdin is not None and torch.stdout is not None
        for name, low, high in (("queries, 4 to 12 words", 4, 12), ("passages, 60 to 180 words", 60, 180)):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(low, high))) for _ in range(options.num_texts)]
            ours, theirs = [], []
            for turn in range(options.rounds + 1):  # the first is a warm-up
                start = time.perf_counter()
                for i in range(0, len(texts), 32):
                    body = {"model": info["served_model_names"][0], "input": texts[i : i + 32]}
                    http.post("/v1/embeddings", json=body).raise_for_status()
                seconds = time.perf_counter() - start
                torch.stdin.write(json.dumps(texts) + "\n")
                torch.stdin.flush()
                line = torch.stdout.readline()
                if turn:
                    ours.append(seconds)
                    theirs.append(float(line))
            ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
            results[name] = {
                "texts_per_s": len(texts) / statistics.median(ours),
                "torch_texts_per_s": len(texts) / statistics.median(theirs),
                "ratio": statistics.median(ratios),
                "ratios": [round(ratio, 2) for ratio in ratios],
            }
        torch.stdin.close()
    json.dump(results, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
