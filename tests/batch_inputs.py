"""Inputs of batches for tests, and the whole way of one through the real openai client."""

import json
import time
from collections.abc import Iterable
from typing import Any

import openai

FINAL = ("completed", "failed", "expired", "cancelled")


def chat_line(custom_id: str, content: str = "hi", url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    fields = {"model": "test-model", "messages": [{"role": "user", "content": content}], "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": fields}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: openai.OpenAI, content: bytes, name: str = "requests.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="batch")


def start(client: openai.OpenAI, content: bytes, endpoint: Any = "/v1/chat/completions", **options: Any) -> Any:
    file = upload(client, content)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


def finish(client: openai.OpenAI, batch: Any, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while batch.status not in FINAL:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
