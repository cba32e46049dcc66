"""/v1/responses through the real openai client and through raw HTTP, in front of a scripted engine and a real store."""

import json
import time
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from jaxserve.api.response_items import checked_items
from jaxserve.api.response_request import REFUSED_IN_RESPONSES, as_chat_request, parse_response_request
from jaxserve.api.schema import FieldLog
from jaxserve.store.sqlite import SQLiteStore
from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of
from tests.stores import Faults, quick_store

EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = quick_store(tmp_path_factory.mktemp("responses") / "store", clock=time.time)
    with ApiServer("hello world", store=store) as server:
        yield server


def respond(server: ApiServer, **fields: Any) -> httpx2.Response:
    return server.post("/v1/responses", {"model": MODEL, "input": "hi", "temperature": 0} | fields)


def answer(server: ApiServer, **fields: Any) -> dict[str, Any]:
    reply = respond(server, **fields)
    assert reply.status_code == 200, reply.text
    Response.model_validate_json(reply.content)
    return reply.json()


def prompt_of(server: ApiServer) -> str:
    """What the engine was given last."""
    return TOKENIZER.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def typed_events(reply: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a finished stream, each valid by the SDK's types and called what its payload says."""
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    found = []
    for part in reply.text.removesuffix("\n\n").split("\n\n"):
        name, _, data = part.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    return found


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_response_has_all_of_openais_fields(server):
    reply = server.openai.responses.create(
        model=MODEL,
        input="hi",
        instructions="Be kind.",
        max_output_tokens=64,
        metadata={"a": "b"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="auto",
        max_tool_calls=3,
        text={"format": {"type": "text"}, "verbosity": "low"},
        reasoning={"effort": None, "summary": "auto"},
        temperature=0.5,
        top_p=0.9,
        extra_body={"top_k": 7, "seed": 11, "stop": ["\n\n"]},
    )
    assert (reply.output_text, reply.status, reply.error, reply.incomplete_details) == (
        "hello world",
        "completed",
        None,
        None,
    )
    assert reply.id.startswith("resp_") and reply.object == "response" and reply.completed_at >= reply.created_at
    assert (reply.temperature, reply.top_p, reply.max_output_tokens) == (0.5, 0.9, 64)
    assert (reply.instructions, reply.metadata, reply.user) == ("Be kind.", {"a": "b"}, "u")
    assert (reply.safety_identifier, reply.prompt_cache_key, reply.service_tier) == ("s", "k", "default")
    assert (reply.max_tool_calls, reply.text.verbosity, reply.reasoning.summary) == (3, "low", "auto")
    assert (reply.truncation, reply.tool_choice, reply.tools, reply.parallel_tool_calls) == (
        "disabled",
        "auto",
        [],
        True,
    )
    assert reply.usage.input_tokens == len(server.engine.requests[-1].token_ids)
    assert reply.usage.output_tokens == len(TOKENIZER.encode("hello world", add_special_tokens=False)) + 1
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 7, 11, 64)
    assert prompt_of(server).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_an_answer_that_is_cut_is_incomplete(server):
    reply = answer(server, max_output_tokens=2)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete" and reply["completed_at"] is None
    assert reply["usage"]["output_tokens"] == 2
    last = typed_events(respond(server, max_output_tokens=2, stream=True))[-1]
    assert last["type"] == "response.incomplete"


def test_every_form_of_input_reaches_the_template(server):
    answer(
        server,
        instructions="One.",
        input=[
            {"role": "developer", "content": "Two."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}], "id": "msg_1"},
            {"type": "message", "role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    said = [part.removesuffix("<|im_end|>\n") for part in prompt_of(server).split("<|im_start|>")]
    assert said == ["", "system\nOne.\n\nTwo.", "user\na", "assistant\nb", "assistant\nc", "user\nd", "assistant\n"]


def test_logprobs_come_where_include_asks_for_them(server):
    reply = answer(server, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = reply["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "hello world" and reply["top_logprobs"] == 2
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.1 for entry in entries)
    events = typed_events(respond(server, include=["message.output_text.logprobs"], top_logprobs=2, stream=True))
    streamed = [entry for e in events if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert streamed == entries
    assert answer(server)["output"][0]["content"][0]["logprobs"] == []


# Streams --------------------------------------------------------------------------------------------------------------


def test_a_stream_has_openais_events_in_order_and_no_done(server):
    events = typed_events(respond(server, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert server.http.get(f"/v1/responses/{events[0]['response']['id']}").json() == events[-1]["response"]


def test_the_sdks_stream_helper_ends_with_the_stored_response(server):
    with server.openai.responses.stream(model=MODEL, input="hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "hello world"
    assert server.openai.responses.retrieve(final.id).output_text == text


def test_obfuscation_pads_the_deltas(server):
    events = typed_events(respond(server, stream=True, stream_options={"include_obfuscation": True}))
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert deltas and all((len(e["delta"]) + len(e["obfuscation"])) % 16 == 0 for e in deltas)
    assert all("obfuscation" not in event for event in typed_events(respond(server, stream=True)))


def test_an_engine_that_dies_ends_the_stream_with_response_failed():
    def slowly(request, index) -> int:
        time.sleep(0.005)
        return 40 + index % 20

    with ApiServer("x", script=slowly) as server:
        body = {"model": MODEL, "input": "a", "stream": True, "ignore_eos": True, "max_output_tokens": 4000}
        lines = []
        with server.http.stream("POST", "/v1/responses", json=body) as reply:
            for line in reply.iter_lines():
                if len(lines) == 20:
                    server.engine.die()
                lines.append(line)
        last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
        EVENT.validate_python(last)
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] == "server_error" and last["response"]["output"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_stores_nothing(stream, tmp_path):
    def slowly(request, index) -> int:
        time.sleep(0.005)
        return 40 + index % 20

    store = quick_store(tmp_path / "store", clock=time.time)
    with ApiServer("x", script=slowly, store=store) as server:
        body = {"model": MODEL, "input": "a", "stream": stream, "ignore_eos": True, "max_output_tokens": 4000}
        with httpx2.Client(base_url=server.url, timeout=0.3, trust_env=False) as client:
            if stream:
                with client.stream("POST", "/v1/responses", json=body) as reply:
                    next(reply.iter_bytes())
            else:
                with pytest.raises(httpx2.TimeoutException):
                    client.post("/v1/responses", json=body)
        server.engine.wait_until(lambda: len(server.engine.aborted) == 1 and server.engine.num_running == 0)
        assert store._db.one("SELECT count(*) FROM responses") == (0,)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_response_without_its_instructions(server):
    first = server.openai.responses.create(model=MODEL, input="one", instructions="Be kind.")
    second = server.openai.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    third = server.openai.responses.create(model=MODEL, input="three", previous_response_id=second.id)
    said = [part.removesuffix("<|im_end|>\n") for part in prompt_of(server).split("<|im_start|>")][1:-1]
    assert said == ["user\none", "assistant\nhello world", "user\ntwo", "assistant\nhello world", "user\nthree"]
    assert third.previous_response_id == second.id
    items = server.openai.responses.input_items.list(third.id, limit=2)
    texts = [item.content[0].text for item in items]  # the SDK reads all pages
    assert texts == ["three", "hello world", "two", "hello world", "one"]
    oldest = server.http.get(f"/v1/responses/{third.id}/input_items?order=asc&limit=1").json()
    assert (oldest["data"][0]["content"][0]["text"], oldest["has_more"]) == ("one", True)
    server.openai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        server.openai.responses.retrieve(first.id)
    error = error_of(respond(server, previous_response_id=first.id), 400)
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert answer(server, previous_response_id=third.id)["output"], "it needs no response before it"


def test_a_reference_stands_for_the_item_it_names(server):
    first = answer(server, input="remember")
    answer(server, input=[{"type": "item_reference", "id": first["output"][0]["id"]}, {"role": "user", "content": "x"}])
    assert "<|im_start|>assistant\nhello world<|im_end|>\n<|im_start|>user\nx" in prompt_of(server)
    (given,) = server.http.get(f"/v1/responses/{first['id']}/input_items").json()["data"]
    answer(server, input=[{"id": given["id"]}])
    assert "<|im_start|>user\nremember<|im_end|>" in prompt_of(server)
    assert error_of(respond(server, input=[{"id": "msg_unknown"}]), 404)["param"] == "input"


def test_responses_survive_a_restart_of_the_server(tmp_path):
    store = SQLiteStore(tmp_path / "store")
    with ApiServer("hello world", store=store) as server:
        kept = answer(server, metadata={"key": "value"}, tools=None)
    store.close()
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    with ApiServer("again", store=store) as server:
        assert server.http.get(f"/v1/responses/{kept['id']}").json() == kept
        assert (
            server.openai.responses.create(model=MODEL, input="more", previous_response_id=kept["id"]).output_text
            == "again"
        )
        assert "assistant\nhello world<|im_end|>" in prompt_of(server)
    store.close()


def test_what_shall_not_be_stored_is_not(server):
    reply = answer(server, store=False)
    assert reply["store"] is False
    assert error_of(server.http.get(f"/v1/responses/{reply['id']}"), 404)["param"] == "response_id"


def test_responses_expire_after_thirty_days(tmp_path):
    now = [1_700_000_000.0]
    store = quick_store(tmp_path / "store", clock=lambda: now[0])
    with ApiServer("hello world", store=store) as server:
        server.serving.clock = lambda: now[0]
        reply = answer(server)
        assert reply["created_at"] == now[0]
        now[0] += 30 * 86_400 - 1
        assert server.http.get(f"/v1/responses/{reply['id']}").status_code == 200
        now[0] += 1
        assert server.http.get(f"/v1/responses/{reply['id']}").status_code == 404


def test_a_server_without_a_store_answers_and_says_that_nothing_is_kept():
    with ApiServer("hello world") as server:
        reply = answer(server)
        assert reply["store"] is False and reply["output"][0]["content"][0]["text"] == "hello world"
        for asked in (
            respond(server, store=True),
            respond(server, previous_response_id="resp_1"),
            server.http.get("/v1/responses/resp_1"),
        ):
            assert error_of(asked, 503)["code"] == "storage_unavailable"


def test_a_full_disk_costs_the_stored_copy_unless_it_was_asked_for(tmp_path):
    faults = Faults()
    store = quick_store(tmp_path / "store", faults, clock=time.time)
    store.recover()  # takes its reserve
    with ApiServer("hello world", store=store) as server:
        faults.mode, faults.at, faults.count = "full", 1, 0
        assert answer(server)["store"] is False
        assert error_of(respond(server, store=True), 507)["code"] == "storage_full"
        last = typed_events(respond(server, store=True, stream=True))[-1]
        assert (last["type"], last["response"]["store"]) == ("response.failed", False)
        assert typed_events(respond(server, stream=True))[-1]["response"]["store"] is False
        faults.at = 0
        assert answer(server, store=True)["store"] is True


# Limits ---------------------------------------------------------------------------------------------------------------


def test_truncation_auto_drops_the_oldest_items_that_do_not_fit(tmp_path):
    store = quick_store(tmp_path / "store", clock=time.time)
    with ApiServer("ok", store=store, engine={"max_model_len": 200}) as server:
        turns = [{"role": role, "content": f"{n}{'x' * 40}"} for n in range(6) for role in ("user", "assistant")]
        long = {"input": [*turns, {"role": "user", "content": "last"}], "max_output_tokens": 20}
        assert error_of(respond(server, **long), 400)["code"] == "context_length_exceeded"
        reply = answer(server, truncation="auto", instructions="Stay.", **long)
        prompt = prompt_of(server)
        assert prompt.startswith("<|im_start|>system\nStay.<|im_end|>\n<|im_start|>user\n") and "last" in prompt
        assert 200 - 20 - 130 < reply["usage"]["input_tokens"] <= 200 - 20, "no more is dropped than must be"
        kept = server.http.get(f"/v1/responses/{reply['id']}/input_items?limit=100").json()["data"]
        assert 1 < len(kept) < 13 and reply["truncation"] == "auto"
        huge = {"input": "y" * 300, "truncation": "auto"}
        assert error_of(respond(server, **huge), 400)["code"] == "context_length_exceeded"


def test_input_tokens_are_counted_as_a_response_would(server):
    counted = server.openai.responses.input_tokens.count(model=MODEL, input="hello", instructions="Be kind.")
    assert counted.input_tokens == answer(server, input="hello", instructions="Be kind.")["usage"]["input_tokens"]
    before = len(server.engine.requests)
    assert server.post("/v1/responses/input_tokens", {"input": "hello"}).json()["object"] == "response.input_tokens"
    assert len(server.engine.requests) == before


def test_nothing_can_be_cancelled_or_streamed_again(server):
    reply = answer(server)
    assert error_of(server.post(f"/v1/responses/{reply['id']}/cancel"), 400)["param"] == "response_id"
    assert error_of(server.post("/v1/responses/resp_unknown/cancel"), 404)["param"] == "response_id"
    assert error_of(server.http.get(f"/v1/responses/{reply['id']}?stream=true"), 400)["param"] == "stream"


REFUSALS: list[tuple[dict[str, Any], str | None]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
    ({"input": [{"type": 7}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [5]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": "x", "id": 5}]}, "input[0].id"),
    ({"input": [{"role": "user", "content": "x", "id": "y" * 300}]}, "input[0].id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary"),
    ({"input": [{"type": "reasoning", "summary": [], "content": [{"type": "image"}]}]}, "input[0].content[0]"),
    ({"instructions": ["x"]}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": "x"}, "top_p"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"include": ["everything"]}, "include[0]"),
    ({"include": "x"}, "include"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"metadata": "x"}, "metadata"),
    ({"text": {"format": "json"}}, "text.format"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"reasoning": "high"}, "reasoning"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"tools": "x"}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"truncation": "middle"}, "truncation"),
    ({"store": "yes"}, "store"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"lora_path": "x"}, "lora_path"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=[json.dumps(fields)[:60] for fields, _ in REFUSALS])
def test_what_is_wrong_is_a_400_that_names_the_field(server, fields, param):
    for stream in ({}, {"stream": True}) if "stream" not in fields and "stream_options" not in fields else ({},):
        assert error_of(respond(server, **stream, **fields), 400)["param"] == param


@pytest.mark.parametrize(("name", "rule"), REFUSED_IN_RESPONSES.items(), ids=list(REFUSED_IN_RESPONSES))
def test_what_chat_calls_otherwise_is_refused_and_says_why(server, name, rule):
    error = error_of(respond(server, **{name: {"something": "else"}}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter") and rule.why in error["message"]
    for neutral in (None, *rule.neutral):
        answer(server, **{name: neutral})


def test_what_asks_for_nothing_is_accepted(server):
    answer(server, truncation="disabled", tools=[], include=[], tool_choice="auto", parallel_tool_calls=False)
    answer(server, include=["reasoning.encrypted_content"], access_programs={"x": 1})


# What chat does for this route ----------------------------------------------------------------------------------------


def translated(fields: dict[str, Any]) -> dict[str, Any]:
    """The body that chat's schema is given."""
    seen: dict[str, Any] = {}

    def parse(kind, body, log):
        seen.update(body)

    body = {"model": MODEL, "input": "hi"} | fields
    request = parse_response_request(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxserve.api.response_request.parse_request", parse)
        as_chat_request(request, body, checked_items(body["input"]), FieldLog())
    return seen


TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def test_tools_are_handed_to_chat_in_its_own_form():
    body = translated({"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False})
    inner = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert body["tools"] == [{"type": "function", "function": inner}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    named = {"type": "function", "function": {"name": "f"}}
    assert translated({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}})["tool_choice"] == named
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    expected = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    assert translated({"tools": [TOOL], "tool_choice": allowed})["tool_choice"] == expected
    assert "tools" not in translated({}) and "tool_choice" not in translated({"tool_choice": "auto"})


def test_a_text_format_is_handed_to_chat_in_its_own_form():
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    inner = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert translated({"text": {"format": schema}})["response_format"] == {"type": "json_schema", "json_schema": inner}
    assert translated({"text": {"format": {"type": "json_object"}}})["response_format"] == {"type": "json_object"}
    assert translated({"reasoning": {"effort": "low"}})["reasoning_effort"] == "low"


def test_what_the_assistant_did_in_a_row_is_one_message():
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "assistant", "content": "Both."},
    ]
    user, asked, one, two, said = translated({"input": items})["messages"]
    assert user == {"role": "user", "content": "weather?"} and said == {"role": "assistant", "content": "Both."}
    assert (asked["content"], asked["reasoning_content"]) == ("I look.", "hm")
    assert [(call["id"], call["function"]["name"]) for call in asked["tool_calls"]] == [("c1", "f"), ("c2", "g")]
    assert one == {"role": "tool", "tool_call_id": "c1", "content": "sun"} and two["content"] == "rain"


def test_an_unknown_model_and_wrong_pages_are_refused(server):
    assert error_of(respond(server, model="other"), 404)["code"] == "model_not_found"
    response_id = answer(server)["id"]
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        url = f"/v1/responses/{response_id}/input_items?{query}"
        assert error_of(server.http.get(url), 400)["param"] == param
    assert error_of(server.http.get(f"/v1/responses/{response_id}/input_items?after=x"), 404)["param"] == "after"
    for method, path in (("GET", "resp_x"), ("DELETE", "resp_x"), ("GET", "resp_x/input_items")):
        assert error_of(server.http.request(method, f"/v1/responses/{path}"), 404)["param"] == "response_id"


def test_deeply_nested_fields_are_a_400(server):
    deep: Any = {}
    for _ in range(245):
        deep = {"a": deep}
    tool = {"type": "function", "name": "f", "parameters": deep}
    error_of(respond(server, tools=[tool]), 400)
    error_of(respond(server, text={"format": {"type": "text", "x": deep}}), 400)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_line_is_answered_as_online(server):
    bodies = [{"model": MODEL, "input": f"question {n}", "temperature": 0} for n in range(3)]
    lines = [
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/responses", "body": body}).encode()
        for n, body in enumerate(bodies)
    ]
    file = server.openai.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    batch = server.openai.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    deadline = time.monotonic() + 20
    while (batch := server.openai.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < deadline and batch.status not in ("failed", "expired"), batch
        time.sleep(0.05)
    results = [json.loads(line) for line in server.openai.files.content(batch.output_file_id).text.splitlines()]
    assert len(results) == 3

    def plain(body: dict[str, Any]) -> dict[str, Any]:
        output = [item | {"id": None} for item in body["output"]]
        return body | {"id": None, "created_at": None, "completed_at": None, "output": output}

    for result in results:
        body = bodies[int(result["custom_id"][1:])]
        assert plain(result["response"]["body"]) == plain(answer(server, **body))
    assert batch.usage.output_tokens == sum(result["response"]["body"]["usage"]["output_tokens"] for result in results)
