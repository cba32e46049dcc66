"""Requests with anything anywhere: 4xx or an answer, never a 5xx."""

import copy
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest

from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of
from tests.stores import quick_store

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
RESPONSE: dict[str, Any] = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "item_reference", "id": "msg_1"},
    ],
    "previous_response_id": "resp_1",
    "instructions": "i",
    "max_output_tokens": 20,
    "temperature": 0.5,
    "top_logprobs": 2,
    "include": ["message.output_text.logprobs"],
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
    "parallel_tool_calls": True,
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"a": "b"},
    "store": True,
    "truncation": "auto",
    "stream": False,
    "seed": 1,
    "stop": ["x"],
    "chat_template_kwargs": {"a": 1},
}
MESSAGE: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 20,
    "messages": [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]},
                {"type": "text", "text": "q"},
            ],
        },
    ],
    "system": [{"type": "text", "text": "s"}],
    "temperature": 0.5,
    "stop_sequences": ["x"],
    "stream": False,
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "omitted"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
}
KEPT = ("model", "input", "messages", "max_tokens")
JUNK: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**30, 1.5, 1e308, "", "x", "\u0000", "\U0001f600", [], {}, [None], [[]], [{}],
    {"type": "x"}, {"type": None}, "auto", "required", {"type": "function"}, {"a": {"b": [1, {"c": None}]}}, "user",
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*place, key))


def mutated(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Some fields left out, and junk in up to three places."""
    body = copy.deepcopy({name: value for name, value in body.items() if name in KEPT or draw.random() > 0.5})
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        *way, last = draw.choice([place for place in places(body) if place])
        target: Any = body
        for key in way:
            target = target[key]
        if isinstance(target, dict) and draw.random() < 0.2:
            del target[last]
        else:
            target[last] = copy.deepcopy(draw.choice(JUNK))
    return body


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/responses", RESPONSE), ("/v1/responses/input_tokens", RESPONSE), ("/v1/messages", MESSAGE)],
    ids=["responses", "input_tokens", "messages"],
)
def test_no_body_is_an_error_of_the_servers(path, body, tmp_path):
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    draw, seen = random.Random(seed), set()
    store = quick_store(tmp_path / "store", clock=time.time)
    with ApiServer('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', store=store) as server:
        first = server.post("/v1/responses", {"model": MODEL, "input": "a"}).json()
        known = {"resp_1": first["id"], "msg_1": first["output"][0]["id"]}
        for _ in range(150):
            text = json.dumps(mutated(body, draw))
            for name, real in known.items():
                text = text.replace(name, real)
            reply = server.post(path, text.encode())
            seen.add(reply.status_code)
            assert reply.status_code < 500, (reply.text, text)
            assert '"failed"' not in reply.text, (reply.text, text)
        assert {200, 400} <= seen


def test_a_request_that_is_far_too_large_does_not_keep_the_others_waiting():
    """Tokenising and rendering go on beside the event loop: while they do, others are answered."""
    with ApiServer("hello world") as server, ThreadPoolExecutor(1) as thread:
        real, begun, go_on = server.tokenizer.encode_all, threading.Event(), threading.Event()

        def slow(texts, **options):
            begun.set()
            assert go_on.wait(20)
            return real(texts, **options)

        messages = [{"role": "user", "content": "w"}] * 200
        for path, fields in (
            ("/v1/completions", {"prompt": "w " * 3000}),
            ("/v1/completions", {"prompt": ["w " * 100] * 50}),
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/embeddings", {"input": ["w " * 1000] * 4}),
            ("/generate", {"text": ["w " * 1000] * 4}),
        ):
            begun.clear(), go_on.clear()
            with patch.object(server.tokenizer, "encode_all", slow):
                asked = thread.submit(server.post, path, {"model": MODEL, **fields})
                assert begun.wait(20), path
                assert server.http.get("/health").status_code == 200, path
                go_on.set()
                assert asked.result(20).status_code in (200, 400), path


def test_what_cannot_fit_is_refused_before_it_is_tokenised():
    no_need = patch.object(TOKENIZER, "encode_all", side_effect=AssertionError("it was tokenised"))
    with ApiServer("hello world", engine={"max_model_len": 64}) as server, no_need:
        for path, fields in (
            ("/v1/completions", {"prompt": "w" * 100_000}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w" * 100_000}]}),
            ("/v1/responses", {"input": "w" * 100_000}),
            ("/generate", {"text": "w" * 100_000}),
        ):
            error = error_of(server.post(path, {"model": MODEL, **fields}), 400)
            assert error["code"] == "context_length_exceeded" and "100" in error["message"], error
