"""Load on any OpenAI server, from a process of its own: latencies and throughput under closed- or open-loop traffic.

python -m bench.serve --base-url http://127.0.0.1:30000 --num-prompts 64 --max-concurrency 16
python -m bench.serve --request-rate 4 --num-prompts 100 --output bench/results/serve.json
python -m bench.serve --against-replay --max-concurrency 16 --server-args="--dtype float32"

Closed loop (--max-concurrency alone) starts the next request when one ends; open loop (--request-rate) starts them at
Poisson times whatever the server does. TTFT: request sent to first text. ITL: between two pieces of text. TPOT: (end -
first) / (output tokens - 1). E2E: request sent to end. --against-replay starts a server itself, records the plans of
its steps, and launches the very same plans again without a server (bench.replay): what of the device's tokens/s reaches
a client. Standard library only, on bare asyncio streams: the generator
shares the machine with the server it measures. The JSON has the key names of `vllm bench serve`.
"""

import argparse
import asyncio
import json
import random
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import floor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part  place case week company system program question work government number night point "
    "home water room mother area money  story fact month lot right study book eye job word business issue side "
    "kind head house service friend father power hour  game line end member law car city community name "
    "president team minute idea kid body information back parent face others  level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher  force education "
    "foot boy age policy music market sense nation plan college interest death experience effect use class "
    "control field development role effort rate heart drug show leader light voice wife police mind price "
    "report decision son  view relationship town road arm difference value building action season society tax "
    "director position player record paper "
)
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is sent, and how fast."""

    base_url: str
    model: str
    prompts: tuple[str, ...]
    output_len: int
    chat: bool = False
    max_concurrency: int | None = None  # requests in flight; None = no limit
    request_rate: float = float("inf")  # requests a second; inf = all at once
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    api_key: str | None = None
    timeout: float = 600.0  # seconds a request may take
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request


@dataclass
class Reply:
    """One request as the client saw it; times in seconds of time.perf_counter()."""

    start: float
    end: float = 0.0
    text_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def make_prompts(num: int, num_words: int, seed: int) -> tuple[str, ...]:
    """-> num prompts of num_words plain words, nearly a token each; the server's usage says how many it counted."""
    rng, words = random.Random(seed), WORDS.split()
    return tuple(" ".join(rng.choices(words, k=num_words)) for _ in range(num))


# HTTP/1.1, as much of it as this needs


async def _open(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return await asyncio.open_connection(
        parts.hostname, port, ssl=ssl.create_default_context() if secure else None, limit=2**20
    )


def _request_bytes(method: str, url: str, api_key: str | None, body: bytes = b"") -> bytes:
    parts = urlsplit(url)
    lines = [f"{method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if api_key:
        lines.append(f"Authorization: Bearer {api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = await reader.readline()
    if not status:
        raise ConnectionError("the server closed the connection without an answer")
    headers = {}
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(status.split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Pieces of the body as they arrive, without the chunk framing (RFC 9112 §7.1). A body cut short raises."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"", 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece


async def get_json(url: str, api_key: str | None = None) -> Any:
    """GET url -> its JSON. Raises ConnectionError unless the status is 200."""
    reader, writer = await _open(url)
    try:
        writer.write(_request_bytes("GET", url, api_key))
        status, headers = await _head(reader)
        text = b"".join([piece async for piece in _body(reader, headers)])
        if status != 200:
            raise ConnectionError(f"{url} answered {status}: {text[:200].decode(errors='replace')}")
        return json.loads(text)
    finally:
        writer.close()


# One request


def _payload(load: Load, prompt: str) -> bytes:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if load.chat else {"prompt": prompt}
    limit = "max_completion_tokens" if load.chat else "max_tokens"
    said |= {"model": load.model, limit: load.output_len, "temperature": load.temperature, "seed": load.seed}
    said |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.ignore_eos:
        said["ignore_eos"] = True
    return json.dumps(said | dict(load.extra)).encode()


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Body -> the data of each server-sent event, up to [DONE]."""
    buffer = b""
    async for piece in pieces:
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data
    raise ConnectionError("the stream ended without [DONE]")


async def _stream(load: Load, url: str, prompt: str, reply: Reply) -> None:
    reader, writer = await _open(url)
    try:
        writer.write(_request_bytes("POST", url, load.api_key, _payload(load, prompt)))
        status, headers = await _head(reader)
        if status != 200:
            text = b"".join([piece async for piece in _body(reader, headers)])
            raise ConnectionError(f"status {status}: {text[:300].decode(errors='replace')}")
        async for data in _events(_body(reader, headers)):
            now = time.perf_counter()
            event = json.loads(data)
            if "error" in event:
                raise ConnectionError(f"error in the stream: {event['error']}")
            for choice in event.get("choices") or ():
                if choice.get("text") or (choice.get("delta") or {}).get("content"):
                    reply.text_times.append(now)
            if usage := event.get("usage"):
                reply.prompt_tokens, reply.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    finally:
        writer.close()


async def _one(load: Load, prompt: str) -> Reply:
    route = "/v1/chat/completions" if load.chat else "/v1/completions"
    reply = Reply(start=time.perf_counter())
    try:
        async with asyncio.timeout(load.timeout):
            await _stream(load, load.base_url.rstrip("/") + route, prompt, reply)
        if not reply.output_tokens:  # a server that does not know include_usage
            reply.output_tokens = len(reply.text_times)
        if not reply.text_times:
            raise ConnectionError("the answer held no text")
    except (OSError, ValueError, KeyError, EOFError, TimeoutError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    reply.end = time.perf_counter()
    return reply


async def run(load: Load) -> tuple[list[Reply], float]:
    """-> the replies in the order of the prompts, and the seconds from the first request to the last answer."""
    gate = asyncio.Semaphore(load.max_concurrency or len(load.prompts) or 1)
    rng = random.Random(load.seed)

    async def gated(prompt: str) -> Reply:
        async with gate:
            return await _one(load, prompt)

    start, due, tasks = time.perf_counter(), 0.0, []
    for prompt in load.prompts:
        if load.request_rate != float("inf"):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            due += rng.expovariate(load.request_rate)
        tasks.append(asyncio.create_task(gated(prompt)))
    replies = await asyncio.gather(*tasks)
    return replies, time.perf_counter() - start


# What it shows


def percentile(values: Sequence[float], percent: float) -> float:
    """values -> linear interpolation between the two nearest ranks, as numpy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = [1000 * s for s in seconds]
    mean = sum(values) / len(values) if values else 0.0
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 if values else 0.0
    shown = {f"mean_{name}_ms": mean, f"median_{name}_ms": percentile(values, 50), f"std_{name}_ms": deviation}
    return shown | {f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES}


def summarise(load: Load, replies: Sequence[Reply], duration: float) -> dict[str, Any]:
    """-> the result with the key names of `vllm bench serve`; throughputs per second, latencies in ms, failures left
    out.
    """
    good = [r for r in replies if r.error is None]
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    rate = load.request_rate
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if load.chat else "openai",
        "model_id": load.model,
        "num_prompts": len(replies),
        "request_rate": "inf" if rate == float("inf") else rate,
        "max_concurrency": load.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(replies) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
    }
    result |= _spread("ttft", [r.text_times[0] - r.start for r in good])
    tpot = [(r.text_times[-1] - r.text_times[0]) / (r.output_tokens - 1) for r in good if r.output_tokens > 1]
    result |= _spread("tpot", tpot)
    result |= _spread("itl", [b - a for r in good for a, b in zip(r.text_times, r.text_times[1:], strict=False)])
    result |= _spread("e2el", [r.end - r.start for r in good])
    result["errors"] = sorted({r.error for r in replies if r.error})
    return result


def table(result: dict[str, Any]) -> str:
    """-> a table that fits 80 columns."""
    counts = [
        ("completed / failed", f"{result['completed']} / {result['failed']}"),
        ("seconds", f"{result['duration']:.2f}"),
        ("input / output tokens", f"{result['total_input_tokens']} / {result['total_output_tokens']}"),
        ("requests/s", f"{result['request_throughput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        ("all tokens/s", f"{result['total_token_throughput']:.1f}"),
    ]
    lines = [f"{name:<24}{value:>20}" for name, value in counts]
    lines += ["", f"{'ms':<24}" + "".join(f"{head:>11}" for head in ("mean", "p50", "p90", "p99"))]
    for key, name in (
        ("ttft", "first token"),
        ("tpot", "per later token"),
        ("itl", "between"),
        ("e2el", "whole answer"),
    ):
        values = [result[f"{stat}_{key}_ms"] for stat in ("mean", "median", "p90", "p99")]
        lines.append(f"{name + ' (' + key.upper() + ')':<24}" + "".join(f"{value:>11.2f}" for value in values))
    lines += [f"error: {error}"[:80] for error in result["errors"][:5]]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not allowed; give 1 or more")
    return value


def _rate(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give requests per second above 0, or inf")
    return value


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="without /v1")
    parser.add_argument("--model", help="default: the first that /v1/models names")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    parser.add_argument("--num-prompts", type=_positive, default=64)
    parser.add_argument("--max-concurrency", type=_positive, help="requests in flight at most; default: no limit")
    parser.add_argument("--request-rate", type=_rate, default=float("inf"), help="requests/s; default: all at once")
    parser.add_argument("--input-len", type=_positive, default=94, help="words of a prompt, about a token each")
    parser.add_argument("--output-len", type=_positive, default=64, help="tokens")
    parser.add_argument("--prompts", type=Path, help="JSON list of prompts, used instead of generated ones")
    parser.add_argument("--warmup", type=int, default=2, help="requests before the measured ones (other prompts)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of prompts, arrival times and sampling")
    parser.add_argument("--no-ignore-eos", action="store_true", help="for servers that refuse ignore_eos")
    parser.add_argument("--api-key")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--against-replay", action="store_true", help="start a server, then replay its very steps")
    parser.add_argument("--server-args", default="", help="flags of that server, in one quoted string")
    return parser


async def _main(args: argparse.Namespace) -> tuple[dict[str, Any], tuple[float, float]]:
    """-> the result, and from when to when it was measured, by time.monotonic()."""
    model = args.model
    if model is None:
        listed = await get_json(args.base_url.rstrip("/") + "/v1/models", args.api_key)
        model = listed["data"][0]["id"]
    generated = make_prompts(args.num_prompts, args.input_len, args.seed)
    prompts = tuple(json.loads(args.prompts.read_text())) if args.prompts else generated
    shared: dict[str, Any] = {
        name: getattr(args, name) for name in ("base_url", "output_len", "chat", "max_concurrency")
    }
    shared |= {name: getattr(args, name) for name in ("temperature", "seed", "api_key", "timeout")}
    shared |= {"model": model, "ignore_eos": not args.no_ignore_eos}
    if args.warmup:  # never a prefix of what is measured, so that no cache is warmed by it
        await run(Load(prompts=make_prompts(args.warmup, args.input_len, args.seed + 1_000_003), **shared))
    load = Load(prompts=prompts, request_rate=args.request_rate, **shared)
    start = time.monotonic()
    measured = await run(load)
    return summarise(load, *measured), (start, time.monotonic())


# Against a replay


def _against_replay(args: argparse.Namespace) -> dict[str, Any]:
    """A recorded run over HTTP, this process being the load generator, then the replay in a process of its own."""
    root = Path(__file__).parents[1]
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()  # the server takes the port over
        args.base_url, plans = f"http://127.0.0.1:{port}", str(Path(folder) / "plans.npz")
        flags = ["--port", str(port), "--record-plans", plans, *shlex.split(args.server_args)]
        server = subprocess.Popen([sys.executable, "-m", "jaxserve", *flags], cwd=root, stdout=sys.stderr)
        try:
            asyncio.run(_wait_ready(args, server))
            result, (start, end) = asyncio.run(_main(args))
        finally:
            server.terminate()  # it writes the plans, then ends
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
        command = [sys.executable, "-m", "bench.replay", plans, "--start", str(start), "--end", str(end)]
        replayed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True, text=True)
    return result | {"replay": json.loads(replayed.stdout)}


async def _wait_ready(args: argparse.Namespace, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            await get_json(args.base_url + "/v1/models", args.api_key)
            return
        except OSError:
            await asyncio.sleep(0.5)
    raise ConnectionError(f"the server ended with exit code {server.returncode} before it was ready")


def _replay_table(result: dict[str, Any]) -> str:
    replay, tokens = result["replay"], result["total_output_tokens"]
    served, alone = tokens / replay["recorded_seconds"], tokens / replay["replayed_seconds"]
    lines = [
        ("steps (with prefill)", f"{replay['steps']} ({replay['prefill_steps']})"),
        ("tokens/s over HTTP", f"{served:.1f}"),
        ("tokens/s of the replay", f"{alone:.1f}"),
        ("HTTP / replay", f"{replay['ratio']:.1%}"),
        ("different tokens", f"{replay['different_tokens']}"),
    ]
    return "\n".join(["", *(f"{name:<24}{value:>20}" for name, value in lines)])


def main() -> int:
    args = _arguments().parse_args()
    try:
        result = _against_replay(args) if args.against_replay else asyncio.run(_main(args))[0]
    except subprocess.CalledProcessError as error:
        print(f"the replay failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"{args.base_url}: {error}; start a server there or name another with --base-url", file=sys.stderr)
        return 2
    print(table(result) + (_replay_table(result) if args.against_replay else ""))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
