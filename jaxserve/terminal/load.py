"""Load on any OpenAI server, on bare asyncio streams: the generator shares the machine with the server it measures.

Closed loop (max_concurrency alone) starts the next request when one ends; open loop (request_rate) starts them at
Poisson times whatever the server does. Standard library only.
"""

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
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
                delta = choice.get("delta") or {}
                if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
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


async def run(load: Load, on_reply: Callable[[Reply], None] = lambda reply: None) -> tuple[list[Reply], float]:
    """-> the replies in the order of the prompts, and the seconds from the first request to the last answer.

    on_reply is called with each as it ends.
    """
    gate = asyncio.Semaphore(load.max_concurrency or len(load.prompts) or 1)
    rng = random.Random(load.seed)

    async def gated(prompt: str) -> Reply:
        async with gate:
            reply = await _one(load, prompt)
        on_reply(reply)
        return reply

    start, due, tasks = time.perf_counter(), 0.0, []
    for prompt in load.prompts:
        if load.request_rate != float("inf"):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            due += rng.expovariate(load.request_rate)
        tasks.append(asyncio.create_task(gated(prompt)))
    replies = await asyncio.gather(*tasks)
    return replies, time.perf_counter() - start
