"""Tools and thinking on /v1/responses and /v1/messages, through both makers' clients, with a model that says what it
is told."""

import json
import time
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest

from jaxserve.text.tokenizer import Tokenizer
from tests.api_server import MODEL, ApiServer, error_of
from tests.fakes import Script, say, write_byte_level
from tests.stores import quick_store
from tests.test_api_responses import answer, respond, typed_events

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLS = (
    "<think>hm</think>Let me see."
    '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Z\u00fcrich"}}\n</tool_call>'
    '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "d", "parameters": WEATHER, "strict": False},
    {"type": "function", "name": "get_time", "parameters": None, "strict": None},
]
CLAUDE_TOOLS: list[Any] = [
    {"name": "get_weather", "description": "d", "input_schema": WEATHER},
    {"name": "get_time", "input_schema": {"type": "object"}},
]
HI: list[Any] = [{"role": "user", "content": "hi"}]


def calls_then_talks(tokenizer: Tokenizer) -> Script:
    """Calls two tools, and talks once there is a result in the prompt."""
    calls, talks = say(tokenizer, CALLS), say(tokenizer, "It is sunny.")
    known: dict[int, Script] = {}

    def script(request, index) -> int:
        if request.id not in known:
            answered = "<tool_response>" in tokenizer.decode(request.token_ids, skip_special_tokens=False)
            known[request.id] = talks if answered else calls
        return known[request.id](request, index)

    return script


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_byte_level(tmp_path_factory.mktemp("thinker"), chat_template=THINKING, special=("</think>",))
    tokenizer = Tokenizer.from_folder(folder)
    store = quick_store(tmp_path_factory.mktemp("store") / "store", clock=time.time)
    with ApiServer(script=calls_then_talks(tokenizer), tokenizer=tokenizer, store=store) as server:
        yield server


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="x", http_client=httpx2.Client(trust_env=False)) as client:
        yield client


def prompt_of(server: ApiServer) -> str:
    return server.tokenizer.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def test_a_response_calls_tools_and_goes_on_with_their_results(server):
    reply = server.openai.responses.create(model=MODEL, input="hi", tools=TOOLS)
    thought, said, first, second = reply.output
    assert thought.type == "reasoning" and thought.content[0].text == "hm" and said.content[0].text == "Let me see."
    assert (first.name, json.loads(first.arguments), first.status) == (
        "get_weather",
        {"city": "Z\u00fcrich"},
        "completed",
    )
    assert second.name == "get_time" and first.call_id != second.call_id and first.id.startswith("fc_")
    assert reply.status == "completed" and reply.usage.output_tokens_details.reasoning_tokens > 0
    assert [tool.name for tool in reply.tools] == ["get_weather", "get_time"]
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": output}
        for call, output in ((first, "sun"), (second, "noon"))
    ]
    end = server.openai.responses.create(model=MODEL, input=results, tools=TOOLS, previous_response_id=reply.id)
    assert end.output_text == "It is sunny."
    stored = prompt_of(server)
    assert '{"name": "get_weather", "arguments": {"city": "Z\u00fcrich"}}' in stored
    assert "sun\n</tool_response>" in stored and "noon\n</tool_response>" in stored
    whole: list[Any] = [*HI, *(item.to_dict() for item in reply.output), *results]
    again = server.openai.responses.create(model=MODEL, input=whole, tools=TOOLS, store=False)
    assert again.output_text == end.output_text and prompt_of(server) == stored


def test_streamed_calls_are_the_whole_ones(server):
    whole = answer(server, tools=TOOLS)
    events = typed_events(respond(server, tools=TOOLS, stream=True))
    streamed = events[-1]["response"]

    def plain(response: dict[str, Any]) -> list[dict[str, Any]]:
        return [item | {"id": None, "call_id": None} for item in response["output"]]

    assert plain(streamed) == plain(whole) and streamed["usage"] == whole["usage"]
    for index, item in enumerate(streamed["output"]):
        deltas = [event["delta"] for event in events if event.get("output_index") == index and "delta" in event]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(deltas) == text
    with server.openai.responses.stream(model=MODEL, input="hi", tools=TOOLS) as stream:
        final = stream.until_done().get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]


def test_wrong_tools_are_named_as_this_route_calls_them(server):
    tool = TOOLS[0]
    for tools, param in (
        ([tool | {"name": "no spaces"}], "tools[0].name"),
        ([tool | {"parameters": {"type": "nonsense"}}], "tools[0].parameters"),
        ([tool, tool], "tools[1].name"),
    ):
        assert error_of(respond(server, tools=tools), 400)["param"].startswith(param)
    named = {"type": "function", "name": "nobody"}
    assert error_of(respond(server, tools=TOOLS, tool_choice=named), 400)["param"].startswith("tool_choice")


def test_claudes_client_calls_tools_and_goes_on_with_their_results(server, claude):
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 900, "tools": CLAUDE_TOOLS}
    options["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    reply = claude.messages.create(messages=HI, **options)
    thought, said, first, second = reply.content
    assert (thought.thinking, said.text, reply.stop_reason) == ("hm", "Let me see.", "tool_use")
    assert thought.signature and (first.name, first.input) == ("get_weather", {"city": "Z\u00fcrich"})
    assert (second.name, second.input) == ("get_time", {}) and first.id.startswith("toolu_")
    results = [
        {"type": "tool_result", "tool_use_id": first.id, "content": "sun"},
        {"type": "tool_result", "tool_use_id": second.id, "content": [{"type": "text", "text": "noon"}]},
    ]
    talk: list[Any] = [*HI, {"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    with claude.messages.stream(messages=talk, **options) as stream:
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == ("It is sunny.", "end_turn")
    prompt = prompt_of(server)
    assert "sun\n</tool_response>" in prompt and "noon\n</tool_response>" in prompt and prompt.endswith("assistant\n")
    with claude.messages.stream(messages=HI, **options) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert streamed.content[2].input == first.input and streamed.content[0].signature == thought.signature


def test_claude_does_not_think_unless_it_is_asked_to(server, claude):
    reply = claude.messages.create(messages=HI, model=MODEL, max_tokens=900)
    assert [block.type for block in reply.content] == ["text"] and prompt_of(server).endswith("</think>\n\n")


class Answer(pydantic.BaseModel):
    city: str
    sunny: bool


def test_a_typed_answer_is_parsed_by_both_clients():
    text = '{"city": "Paris", "sunny": true}'
    with ApiServer(text) as server:
        parsed = server.openai.responses.parse(model=MODEL, input="hi", text_format=Answer)
        assert parsed.output_parsed == Answer(city="Paris", sunny=True)
        assert parsed.text.format.type == "json_schema" and parsed.text.format.name == "Answer"
        with anthropic.Anthropic(
            base_url=server.url, api_key="x", http_client=httpx2.Client(trust_env=False)
        ) as client:
            message = client.messages.parse(model=MODEL, max_tokens=99, messages=HI, output_format=Answer)
        assert message.parsed_output == parsed.output_parsed
        assert [request.grammar is not None for request in server.engine.requests] == [True, True]
        wrong = {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}
        assert error_of(respond(server, text={"format": wrong}), 400)["param"].startswith("text.format")
