"""Batches beside people: what a running batch costs an interactive client, what that client costs the batch, and how
fast a batch is compared with the same requests sent by closed-loop clients. One run on one server; the ratios count.

python -m bench.batch --base-url http://127.0.0.1:30000 --output bench/results/batch.json
python -m bench.batch --parts politeness                                   # under two minutes; likewise --parts speed
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.terminal.figures import summarise
from jaxserve.terminal.load import Load, get_json, make_prompts, run

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
POLL_SECONDS = 0.5
FINAL = ("completed", "failed", "expired", "cancelled")


class Api:
    """The few calls of files and batches that this needs."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(self.base_url + path, body, {"Content-Type": kind}, method=method)
        with _DIRECT.open(request, timeout=600) as reply:
            return json.loads(reply.read() or b"null")

    def start(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        boundary = uuid.uuid4().hex
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        head = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
        body = f"--{boundary}\r\n{head.format('purpose', '')}batch\r\n--{boundary}\r\n".encode()
        body += head.format("file", '; filename="bench.jsonl"').encode() + content + f"\r\n--{boundary}--\r\n".encode()
        file = self.call("POST", "/v1/files", body, f"multipart/form-data; boundary={boundary}")
        job = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        return self.call("POST", "/v1/batches", json.dumps(job).encode())

    def get(self, batch_id: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/batches/{batch_id}")

    def cancel(self, batch_id: str) -> None:
        self.call("POST", f"/v1/batches/{batch_id}/cancel")
        while self.get(batch_id)["status"] not in FINAL:
            time.sleep(POLL_SECONDS)


def lines_of(prompts: Sequence[str], model: str, output_len: int) -> list[dict[str, Any]]:
    """The requests that bench.serve would send, as lines of a batch."""
    fixed = {"model": model, "max_tokens": output_len, "temperature": 0.0, "seed": 0, "ignore_eos": True}
    return [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": fixed | {"prompt": prompt}}
        for i, prompt in enumerate(prompts)
    ]


def generated(api: Api) -> float:
    """Tokens sampled since the server's start, whoever asked for them."""
    with _DIRECT.open(api.base_url + "/metrics", timeout=60) as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith("jaxserve:generation_tokens_total{"):
                return float(line.rsplit(" ", 1)[1])
    raise ValueError("/metrics names no generation tokens")


async def politeness(api: Api, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """One interactive client alone; then a large batch alone; then both at once."""
    prompts = make_prompts(3 * args.interactive, args.input_len, 1)
    load = {"base_url": api.base_url, "model": model, "output_len": args.interactive_len, "max_concurrency": 1}

    async def interactive(some: Sequence[str]) -> tuple[dict[str, Any], float]:
        replies, seconds = await run(Load(prompts=tuple(some), **load))
        return summarise(Load(prompts=tuple(some), **load), replies, seconds), seconds

    await interactive(prompts[2 * args.interactive :])  # warm-up
    alone, _ = await interactive(prompts[: args.interactive])
    batch = api.start(lines_of(make_prompts(args.lines, args.input_len, 2), model, args.output_len))
    while api.get(batch["id"])["request_counts"]["completed"] < args.settle:
        await asyncio.sleep(POLL_SECONDS)
    before, started = generated(api), time.monotonic()
    await asyncio.sleep(args.window)
    pace_alone = (generated(api) - before) / (time.monotonic() - started)
    before = generated(api)
    beside, seconds = await interactive(prompts[args.interactive : 2 * args.interactive])
    pace_beside = (generated(api) - before - beside["total_output_tokens"]) / seconds
    counts = api.get(batch["id"])["request_counts"]
    api.cancel(batch["id"])
    return {
        "lines": args.lines,
        "interactive_alone": alone,
        "interactive_beside_batch": beside,
        "ttft_p50_ratio": beside["median_ttft_ms"] / alone["median_ttft_ms"],
        "itl_p50_ratio": beside["median_itl_ms"] / alone["median_itl_ms"],
        "batch_tokens_per_second_alone": pace_alone,
        "batch_tokens_per_second_beside_interactive": pace_beside,
        "batch_pace_ratio": pace_beside / pace_alone,
        "request_counts": counts,
    }


async def speed(api: Api, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The same requests as a batch and from closed-loop clients, in turns; the prefix cache is emptied before each."""
    prompts = make_prompts(args.requests, args.input_len, 3)
    lines = lines_of(prompts, model, args.output_len)
    batches, clients = [], []
    for _ in range(args.repeats):
        await asyncio.sleep(args.rest)  # until nobody interactive has been there for --batch-linger
        _flush(api)
        started = time.monotonic()
        batch = api.start(lines)
        while (batch := api.get(batch["id"]))["status"] not in FINAL:
            await asyncio.sleep(POLL_SECONDS)
        batches.append(batch["usage"]["output_tokens"] / (time.monotonic() - started))
        for concurrency in args.concurrency:
            _flush(api)
            load = Load(api.base_url, model, prompts, args.output_len, max_concurrency=concurrency)
            result = summarise(load, *await run(load))
            clients.append({"concurrency": concurrency, "tokens_per_second": result["output_throughput"]})
    best = max(each["tokens_per_second"] for each in clients)
    return {
        "requests": args.requests,
        "batch_tokens_per_second": batches,
        "closed_loop": clients,
        "batch_to_best_closed_loop": max(batches) / best,
    }


def _flush(api: Api) -> None:
    with _DIRECT.open(urllib.request.Request(api.base_url + "/flush_cache", method="POST"), timeout=60):
        pass


PARTS = {"politeness": politeness, "speed": speed}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__.split(".", 1)[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="without /v1")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--lines", type=int, default=5000, help="of the batch that runs beside the interactive client")
    parser.add_argument("--settle", type=int, default=16, help="lines of it that are done before anything is measured")
    parser.add_argument("--window", type=float, default=20.0, help="seconds over which its pace alone is measured")
    parser.add_argument("--interactive", type=int, default=10, help="streams of the interactive client, one at a time")
    parser.add_argument("--interactive-len", type=int, default=64, help="tokens of each")
    parser.add_argument("--requests", type=int, default=96, help="of the comparison with closed-loop clients")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 32], help="of those clients")
    parser.add_argument("--repeats", type=int, default=1, help="of the comparison")
    parser.add_argument("--rest", type=float, default=3.0, help="seconds before each batch of it")
    parser.add_argument("--input-len", type=int, default=94, help="words of a prompt, about a token each")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    return parser


async def _main(args: argparse.Namespace) -> dict[str, Any]:
    api = Api(args.base_url)
    info = await get_json(api.base_url + "/get_server_info")
    model = info["server"]["served_model_names"][0]
    engine = {name: info["engine"][name] for name in ("platform", "device_kind", "dtype", "max_running")}
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
        "model_id": model,
        "engine": engine,
    }
    for name in args.parts:
        result[name] = await PARTS[name](api, args, model)
        if args.output:  # each part as soon as it is there
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    args = _arguments().parse_args()
    try:
        result = asyncio.run(_main(args))
    except (OSError, ValueError) as error:
        print(f"{args.base_url}: {error}; start a server there or name another with --base-url", file=sys.stderr)
        return 2
    if polite := result.get("politeness"):
        print(f"interactive TTFT p50 beside a batch: {polite['ttft_p50_ratio']:.2f} of alone (aim 2 or less)")
        print(f"interactive ITL p50 beside a batch:  {polite['itl_p50_ratio']:.2f} of alone (aim 1.5 or less)")
        print(f"batch pace beside the client:        {polite['batch_pace_ratio']:.2f} of alone (aim 0.25 or more)")
    if fast := result.get("speed"):
        print(f"batch against the best closed loop:  {fast['batch_to_best_closed_loop']:.2f} (aim 0.95 or more)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
