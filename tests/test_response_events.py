"""Message deltas -> a Response and its events: the same Response however the deltas are cut, and events that add up."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from jaxserve.api.response_events import ResponseBuilder
from jaxserve.text.generate import Delta
from jaxserve.text.message import MessageDelta, ToolCallDelta

HEAD = {
    "id": "resp_1", "object": "response", "created_at": 1, "completed_at": None, "error": None, "model": "m",
    "incomplete_details": None, "instructions": None, "tools": [], "tool_choice": "auto", "usage": None,
    "parallel_tool_calls": True, "temperature": 1.0, "top_p": 1.0, "metadata": {},
}  # fmt: skip
USAGE = {
    "input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "output_tokens_details": {"reasoning_tokens": 0},
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
}  # fmt: skip
SAID = [("reasoning", "let me see"), ("content", "I call two"), ("call", '{"a": 1}'), ("call", "{}")]
EVENT = TypeAdapter(ResponseStreamEvent)
NOTHING = Delta("", (), None, 1)


def deltas(said, cuts: list[int]) -> list[MessageDelta]:
    """Every text cut into pieces of these lengths, over and over."""
    found, calls, turn = [], 0, 0
    for kind, text in said:
        first = True
        while text or (first and kind == "call"):
            size = cuts[turn % len(cuts)]
            piece, text, turn = text[:size], text[size:], turn + 1
            if kind == "call":
                name = {"id": f"call_{calls}", "name": f"f{calls}"} if first else {}
                found.append(MessageDelta(NOTHING, tool_calls=(ToolCallDelta(calls, piece, **name),)))
            else:
                found.append(MessageDelta(NOTHING, **{kind: piece}))
            first = False
        calls += kind == "call"
    return found


def run(parts: list[MessageDelta], finish_reason: str = "stop", **options: Any):
    builder = ResponseBuilder(HEAD, **options)
    events = builder.begin()
    for part in parts:
        events += builder.add(part)
    events += builder.finish(finish_reason, USAGE)
    events += builder.end()
    return builder.response, events


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """Without ids and times."""
    found = copy.deepcopy(response) | {"completed_at": None}
    for item in found["output"]:
        item.pop("id")
    return found


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.sampled_from(["stop", "length", "tool_calls"]))
@settings(max_examples=60, deadline=None)
def test_however_the_deltas_are_cut_the_response_is_the_same_and_the_events_add_up(cuts, reason):
    whole, _ = run(deltas(SAID, [1000]), reason)
    response, events = run(deltas(SAID, cuts), reason)
    assert plain(response) == plain(whole)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: dict[int, dict] = {}
    texts: dict[int, str] = {}
    for event in events:
        EVENT.validate_python(event)
        index = event.get("output_index")
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert index == len(items) and event["item"]["status"] == "in_progress"
                items[index], texts[index] = event["item"], ""
            case "reasoning_text.delta" | "output_text.delta" | "function_call_arguments.delta":
                assert event["item_id"] == items[index]["id"] and index == len(items) - 1
                texts[index] += event["delta"]
            case "reasoning_text.done" | "output_text.done":
                assert event["text"] == texts[index]
            case "function_call_arguments.done":
                assert event["arguments"] == texts[index]
            case "output_item.done":
                assert event["item"] == response["output"][index] and event["item"]["id"] == items[index]["id"]
    assert list(texts.values()) == [text for _, text in SAID]
    assert events[-1]["type"] == ("response.incomplete" if reason == "length" else "response.completed")
    assert events[-1]["response"] == response


def test_the_rest_of_a_call_comes_before_what_was_said_after_it():
    begun = MessageDelta(NOTHING, tool_calls=(ToolCallDelta(0, '{"a":', "call_0", "f"),))
    rest = (ToolCallDelta(0, " 1}"), ToolCallDelta(1, "{}", "call_1", "g"))
    response, _ = run([begun, MessageDelta(NOTHING, content="and", tool_calls=rest)])
    assert [item.get("arguments", "text") for item in response["output"]] == ['{"a": 1}', "text", "{}"]


def test_the_response_has_openais_types_and_items_in_order():
    response, _ = run(deltas(SAID, [3]), "tool_calls")
    parsed = Response.model_validate(response, strict=False)
    assert [item.type for item in parsed.output] == ["reasoning", "message", "function_call", "function_call"]
    assert parsed.output[0].content[0].text == "let me see" and parsed.output_text == "I call two"
    assert [(item.call_id, item.name, item.arguments) for item in parsed.output[2:]] == [
        ("call_0", "f0", '{"a": 1}'),
        ("call_1", "f1", "{}"),
    ]
    assert parsed.status == "completed" and parsed.usage.total_tokens == 3


def test_what_is_cut_off_is_incomplete_and_what_was_complete_is_not():
    response, events = run(deltas(SAID[1:3], [4]), "length")
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"} and response["completed_at"] is None
    assert events[-1]["type"] == "response.incomplete"


def test_an_empty_answer_is_an_empty_message():
    response, events = run([])
    assert response["output"][0]["content"][0]["text"] == ""
    assert [event["type"] for event in events][2:4] == ["response.output_item.added", "response.content_part.added"]


def test_a_failure_keeps_what_there_is():
    builder = ResponseBuilder(HEAD)
    builder.begin()
    builder.add(MessageDelta(NOTHING, content="half"))
    builder.fail("server_error", "it broke")
    (event,) = builder.end()
    EVENT.validate_python(event)
    assert event["type"] == "response.failed" and event["response"]["error"]["message"] == "it broke"
    assert event["response"]["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("texts", [["abc"], ["a" * 16, "b" * 17], ["x", "yz"]])
def test_padded_deltas_come_in_blocks(texts):
    _, events = run([MessageDelta(NOTHING, content=text) for text in texts], obfuscate=True)
    sizes = [len(e["delta"]) + len(e["obfuscation"]) for e in events if e["type"].endswith("text.delta")]
    assert len(sizes) == len(texts) and all(size % 16 == 0 for size in sizes)


def test_logprobs_follow_the_message_and_not_what_else_was_said():
    names = {"reasoning": "r", "content": "c", "held": "h"}

    def entries(delta: MessageDelta) -> list[dict[str, Any]]:
        kind = "reasoning" if delta.reasoning else "content" if delta.content else "held"
        return [{"token": names[kind], "logprob": -1.0, "bytes": [], "top_logprobs": []}]

    parts = [
        MessageDelta(NOTHING),
        MessageDelta(NOTHING, reasoning="hm"),
        MessageDelta(NOTHING),
        MessageDelta(NOTHING, content="ab"),
        MessageDelta(NOTHING, content="c"),
        MessageDelta(NOTHING),
    ]
    response, events = run(parts, entries=entries)
    kept = [entry["token"] for entry in response["output"][1]["content"][0]["logprobs"]]
    assert kept == ["h", "c", "c", "h"]
    streamed = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in each] for each in streamed] == [["h", "c"], ["c"]]
