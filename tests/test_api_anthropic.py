"""/v1/messages through the real anthropic client and through raw HTTP, in front of a scripted engine."""

import json
import time
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from jaxserve.api.anthropic_events import MessageBuilder
from jaxserve.api.anthropic_request import REFUSED_IN_MESSAGES, as_chat_request, parse_messages_request
from jaxserve.api.schema import FieldLog
from jaxserve.text.message import MessageDelta, ToolCallDelta
from tests.api_server import MODEL, TOKENIZER, ApiServer
from tests.test_response_events import NOTHING, SAID, deltas

EVENT = TypeAdapter(RawMessageStreamEvent)
HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world") as server:
        yield server


def client_of(server: ApiServer, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, max_retries=0, http_client=httpx2.Client(trust_env=False), **{"api_key": "none"} | options
    )


def send(server: ApiServer, **fields: Any) -> httpx2.Response:
    return server.post("/v1/messages", {"model": MODEL, "messages": HI, "max_tokens": 64} | fields)


def message(server: ApiServer, **fields: Any) -> dict[str, Any]:
    reply = send(server, **fields)
    assert reply.status_code == 200, reply.text
    Message.model_validate_json(reply.content)
    return reply.json()


def failure(reply: httpx2.Response, status: int, kind: str = "invalid_request_error") -> str:
    """The message of an error in Anthropic's shape."""
    assert reply.status_code == status, (reply.status_code, reply.text[:500])
    body = reply.json()
    assert body["type"] == "error" and body["error"]["type"] == kind and body["error"]["message"]
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    return body["error"]["message"]


def prompt_of(server: ApiServer) -> str:
    return TOKENIZER.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def stream_events(reply: httpx2.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    found = []
    for part in reply.text.removesuffix("\n\n").split("\n\n"):
        name, _, data = part.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event)
        found.append(event)
    return found


def test_the_anthropic_client_gets_a_message(server):
    reply = client_of(server).messages.create(
        model=MODEL,
        max_tokens=64,
        system="Be kind.",
        messages=HI,
        metadata={"user_id": "u"},
        service_tier="auto",
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11},
    )
    (block,) = reply.content
    assert (block.type, block.text) == ("text", "hello world")
    assert (reply.stop_reason, reply.stop_sequence, reply.role) == ("end_turn", None, "assistant")
    assert reply.id.startswith("msg_") and reply.model == MODEL and reply._request_id
    assert reply.usage.input_tokens == len(server.engine.requests[-1].token_ids)
    assert reply.usage.output_tokens == len(TOKENIZER.encode("hello world", add_special_tokens=False)) + 1
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 7, 11, 64)
    assert prompt_of(server) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_has_anthropics_events_and_the_helper_adds_them_up(server):
    events = stream_events(send(server, stream=True))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    with client_of(server).messages.stream(model=MODEL, max_tokens=64, messages=HI) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == "hello world"
    whole = client_of(server).messages.create(model=MODEL, max_tokens=64, messages=HI)
    assert final.usage == whole.usage.model_copy(update={"output_tokens": final.usage.output_tokens})
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_every_reason_to_stop_is_told(server):
    assert message(server, max_tokens=2)["stop_reason"] == "max_tokens"
    stopped = message(server, stop_sequences=["lo wo", "never"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "lo wo")
    assert stopped["content"] == [{"type": "text", "text": "hel"}]
    assert message(server, stop_sequences=["hello"])["content"] == []


def test_cached_tokens_are_counted_apart():
    with ApiServer("ok", engine={"cached_tokens": lambda request: 5}) as server:
        usage = message(server)["usage"]
        assert usage["cache_read_input_tokens"] == 5
        assert usage["input_tokens"] == len(server.engine.requests[-1].token_ids) - 5


def test_more_tokens_than_the_context_has_end_with_the_context():
    with ApiServer("x", script=lambda request, index: 40, engine={"max_model_len": 64}) as server:
        reply = message(server, max_tokens=32_000)
        assert reply["stop_reason"] == "model_context_window_exceeded"
        assert reply["usage"]["input_tokens"] + reply["usage"]["output_tokens"] == 64
        long = [{"role": "user", "content": "y" * 100}]
        assert "prompt is too long" in failure(send(server, messages=long), 400)


def test_turns_of_one_role_are_combined_and_a_last_one_of_the_assistants_goes_on(server):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}, {"type": "redacted_thinking", "data": "x"}]},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    system = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    message(server, messages=messages, system=system)
    said = [part.removesuffix("<|im_end|>\n") for part in prompt_of(server).split("<|im_start|>")][1:]
    assert said == ["system\nOne.\nTwo.", "user\na\nb", "assistant\nc", "user\nd", "assistant\ne"]


def test_tokens_are_counted_as_a_message_would(server):
    counted = client_of(server).messages.count_tokens(model=MODEL, messages=HI, system="Be kind.")
    assert counted.input_tokens == message(server, system="Be kind.")["usage"]["input_tokens"]
    reply = server.post("/v1/messages/count_tokens", {"model": MODEL})
    assert "messages" in failure(reply, 400)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_however_the_deltas_are_cut_the_blocks_are_the_same_and_the_events_add_up(cuts):
    def run(parts) -> tuple[list[dict], list[dict]]:
        builder = MessageBuilder(show_thinking=True)
        events = [event for part in parts for event in builder.add(part)] + builder.close()
        return builder.content, events

    whole, _ = run(deltas(SAID, [1000]))
    content, events = run(deltas(SAID, cuts))
    assert content == whole
    texts: list[str] = []
    for event in events:
        EVENT.validate_python(event)
        if event["type"] == "content_block_start":
            assert event["index"] == len(texts)
            texts.append("")
        elif event["type"] == "content_block_delta" and event["delta"]["type"] != "signature_delta":
            texts[event["index"]] += next(text for kind, text in event["delta"].items() if kind != "type")
    assert texts == [text for _, text in SAID]
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "tool_use"]
    assert content[0]["thinking"] == "let me see" and content[0]["signature"]
    assert content[2] == {"type": "tool_use", "id": "toolu_0", "name": "f0", "input": {"a": 1}}


def test_the_rest_of_a_call_comes_before_what_was_said_after_it():
    builder = MessageBuilder(show_thinking=True)
    builder.add(MessageDelta(NOTHING, tool_calls=(ToolCallDelta(0, '{"a":', "call_0", "f"),)))
    builder.add(MessageDelta(NOTHING, content="and", tool_calls=(ToolCallDelta(0, " 1}"),)))
    builder.close()
    assert [block.get("input", "text") for block in builder.content] == [{"a": 1}, "text"]


def test_thinking_is_shown_only_where_it_was_asked_for():
    builder = MessageBuilder(show_thinking=False)
    for part in deltas(SAID, [4]):
        builder.add(part)
    builder.close()
    assert [block["type"] for block in builder.content] == ["text", "tool_use", "tool_use"]
    shown = {None: False, "enabled": True, "adaptive": True, "disabled": False}
    for kind, expected in shown.items():
        thinking = None if kind is None else {"type": kind, "budget_tokens": 2000}
        body = {"model": MODEL, "messages": HI, "max_tokens": 9, "thinking": thinking}
        assert parse_messages_request(body).shows_thinking is expected
        chat = as_chat_request(parse_messages_request(body), body, 9, FieldLog())
        assert chat.chat_template_kwargs == {"enable_thinking": expected}
    omitted = {"type": "adaptive", "display": "omitted"}
    body = {"model": MODEL, "messages": HI, "max_tokens": 9, "thinking": omitted}
    assert not parse_messages_request(body).shows_thinking


# What chat does for this route ----------------------------------------------------------------------------------------


def translated(fields: dict[str, Any]) -> dict[str, Any]:
    """The body that chat's schema is given."""
    seen: dict[str, Any] = {}

    def parse(kind, body, log):
        seen.update(body)

    body = {"model": MODEL, "messages": HI, "max_tokens": 9} | fields
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxserve.api.anthropic_request.parse_request", parse)
        as_chat_request(parse_messages_request(body), body, 9, FieldLog())
    return seen


def test_tools_and_choices_are_handed_to_chat_in_its_own_form():
    function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}
    named = {"type": "function", "function": {"name": "f"}}
    for choice, expected in (
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "f"}, named),
    ):
        body = translated({"tools": [TOOL], "tool_choice": choice})
        assert body["tools"] == [{"type": "function", "function": function}] and body["tool_choice"] == expected
        assert "parallel_tool_calls" not in body
    single = {"type": "any", "disable_parallel_tool_use": True}
    assert translated({"tools": [TOOL], "tool_choice": single})["parallel_tool_calls"] is False


def test_calls_and_their_results_become_chat_messages():
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "\u00e9"}},
                {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no"}],
                 "is_error": True},
                {"type": "text", "text": "well?"},
            ],
        },
    ]  # fmt: skip
    _, asked, one, two, said = translated({"messages": messages})["messages"]
    assert (asked["content"], asked["reasoning_content"]) == ("I look.", "hm")
    assert [(call["id"], call["function"]) for call in asked["tool_calls"]] == [
        ("toolu_1", {"name": "f", "arguments": '{"a":"\u00e9"}'}),
        ("toolu_2", {"name": "g", "arguments": "{}"}),
    ]
    assert one == {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"}
    assert two["content"] == "Error: no" and said == {"role": "user", "content": "well?"}


def test_an_output_format_is_handed_to_chat_in_its_own_form():
    schema = {"type": "object"}
    body = translated({"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": schema}}})
    assert body["reasoning_effort"] == "low"
    inner = {"name": "output", "strict": True, "schema": schema}
    assert body["response_format"] == {"type": "json_schema", "json_schema": inner}


# Errors ---------------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages.0"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "magic"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "messages.0.content.0.tool_use_id",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": "{}"}]}]},
        "messages.0.content.0.input",
    ),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system.0"),
    ({"temperature": 1.5}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": "x"}, "top_k"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
    ({"metadata": "x"}, "metadata"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"tools": [5]}, "tools.0"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": 1}}, "tool_choice"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"output_config": {"effort": "heroic"}}, "output_config.effort"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ({"lora_path": "x"}, "lora_path"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSALS, ids=[json.dumps(fields)[:60] for fields, _ in REFUSALS])
def test_what_is_wrong_is_an_invalid_request_that_names_the_field(server, fields, name):
    for stream in ({}, {"stream": True}) if "stream" not in fields else ({},):
        assert name in failure(send(server, **stream, **fields), 400)


@pytest.mark.parametrize(("name", "rule"), REFUSED_IN_MESSAGES.items(), ids=list(REFUSED_IN_MESSAGES))
def test_what_anthropic_has_beyond_this_server_is_refused_and_says_why(server, name, rule):
    text = failure(send(server, **{name: {"something": "else"}}), 400)
    assert text.startswith(name) and rule.why in text
    for neutral in (None, *rule.neutral):
        message(server, **{name: neutral})


def test_a_deeply_nested_input_is_a_400(server):
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    block = {"type": "tool_use", "id": "x", "name": "f", "input": deep}
    failure(send(server, messages=[*HI, {"role": "assistant", "content": [block]}]), 400)


def test_errors_have_anthropics_shape_on_its_routes_only(server):
    failure(send(server, model="other"), 404, "not_found_error")
    failure(server.post("/v1/messages", b"{"), 400)
    failure(server.http.get("/v1/messages"), 405)
    failure(server.http.get("/v1/messages/batches"), 404, "not_found_error")
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client_of(server).messages.create(model="other", max_tokens=1, messages=HI)
    assert "error" in server.chat(model="other").json() and "type" not in server.chat(model="other").json()


def test_the_key_comes_in_either_header():
    with ApiServer("ok", api_key="secret") as server:
        body = {"model": MODEL, "messages": HI, "max_tokens": 9}
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert server.post("/v1/messages", body, headers=headers).status_code == 200
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Basic secret"}, {"x-api-key": "s\u00e9"}):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            failure(server.post("/v1/messages", body, headers=encoded), 401, "authentication_error")
        assert client_of(server, api_key="secret").messages.create(**body).content[0].text == "ok"
        with pytest.raises(anthropic.AuthenticationError):
            client_of(server, api_key="wrong").messages.create(**body)


def slowly(request, index) -> int:
    time.sleep(0.005)
    return 40 + index % 20


ENDLESS = {"max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    with ApiServer("x", script=slowly) as server:
        body = {"model": MODEL, "messages": HI, "stream": stream, **ENDLESS}
        with httpx2.Client(base_url=server.url, timeout=0.3, trust_env=False) as client:
            if stream:
                with client.stream("POST", "/v1/messages", json=body) as reply:
                    next(reply.iter_bytes())
            else:
                with pytest.raises(httpx2.TimeoutException):
                    client.post("/v1/messages", json=body)
        server.engine.wait_until(lambda: len(server.engine.aborted) == 1 and server.engine.num_running == 0)


def test_overload_and_an_engine_that_dies_are_told_in_anthropics_words():
    with ApiServer("x", script=slowly) as server:
        server.client.max_open_requests = 1
        body = {"model": MODEL, "messages": HI, "stream": True, **ENDLESS}
        lines = []
        with (
            httpx2.Client(base_url=server.url, timeout=20, trust_env=False) as holder,
            holder.stream("POST", "/v1/messages", json=body) as reply,
        ):
            for line in reply.iter_lines():
                if len(lines) == 10:
                    failure(send(server), 529, "overloaded_error")
                    server.engine.die()
                lines.append(line)
        assert "event: error" in lines
        last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
        assert last["type"] == "error" and last["error"]["type"] == "overloaded_error"
        failure(send(server), 503, "overloaded_error")
