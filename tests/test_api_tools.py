"""Tools and thinking on /v1/chat/completions, through the real openai client, with models that say what they are
told."""

import json
import re

import pydantic
import pytest
from openai import pydantic_function_tool

from jaxserve.text.tokenizer import Tokenizer
from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of, events
from tests.fakes import say, write_byte_level

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {
        "type": "function",
        "function": {"name": name, "description": f"What {name} does", "parameters": parameters},
    }


TOOLS = [tool("get_weather", city={"type": "string"}), tool("get_time")]


@pytest.fixture(scope="module")
def server():
    with ApiServer(f"Let me see.\n{CALL}\n{TIME}", f"{CALL}", "hello") as server:
        yield server


def prompt_of(server) -> str:
    return server.tokenizer.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def test_calls_are_told_from_text(server):
    reply = server.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, n=3)
    first, second, third = reply.choices
    assert first.message.content == "Let me see." and first.finish_reason == "tool_calls"
    assert [call.function.name for call in first.message.tool_calls] == ["get_weather", "get_time"]
    assert json.loads(first.message.tool_calls[0].function.arguments) == {"city": "Zürich"}
    ids = [call.id for choice in (first, second) for call in choice.message.tool_calls]
    assert len(set(ids)) == 3 and all(re.fullmatch("call_[0-9a-f]{24}", id_) for id_ in ids)
    assert second.message.content is None
    assert (third.message.content, third.message.tool_calls, third.finish_reason) == ("hello", None, "stop")


def test_streamed_calls_are_the_whole_ones_and_well_formed(server):
    whole = server.chat(tools=TOOLS, n=3, seed=1).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(server.chat(tools=TOOLS, n=3, seed=1, stream=True))]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(chunk["delta"].get("content") or "" for chunk in mine) == (choice["message"]["content"] or "")
        assert [chunk["finish_reason"] for chunk in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        parts = [part for chunk in mine for part in chunk["delta"].get("tool_calls", [])]
        calls = choice["message"].get("tool_calls", [])
        for index, call in enumerate(calls):
            first, *others = [part for part in parts if part["index"] == index]
            assert set(first) == {"index", "id", "type", "function"} and first["type"] == "function"
            assert first["function"] == {"name": call["function"]["name"], "arguments": ""}
            assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in others)
            text = "".join(part["function"]["arguments"] for part in others)
            assert text == call["function"]["arguments"]
        assert {part["index"] for part in parts} == set(range(len(calls)))


def test_the_clients_stream_helper_builds_the_calls(server):
    with server.openai.chat.completions.stream(model=MODEL, messages=HI, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Zürich"}


class GetWeather(pydantic.BaseModel):
    """Weather of a city."""

    city: str


def test_a_pydantic_tool_comes_back_parsed(server):
    tools = [
        pydantic_function_tool(GetWeather, name="get_weather"),
        pydantic_function_tool(GetWeather, name="get_time"),
    ]
    reply = server.openai.chat.completions.parse(model=MODEL, messages=HI, tools=tools[:1])
    assert reply.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Zürich")
    assert TIME.splitlines()[1] in reply.choices[0].message.content, "get_time was not offered"


def test_a_template_without_tools_explains_them_in_the_system_message(server):
    server.chat(tools=TOOLS, messages=[{"role": "developer", "content": "Be brief."}, *HI])
    prompt = prompt_of(server)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '"name": "get_weather", "description": "What get_weather does"' in prompt and "<tool_call>" in prompt


def test_a_conversation_with_results_reaches_the_model(server):
    client = server.openai.chat.completions
    messages = [*HI]
    message = client.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    messages += [message]
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"of {call.function.name}"} for call in message.tool_calls
    ]
    client.create(model=MODEL, messages=messages, tools=TOOLS)
    prompt = prompt_of(server)
    assert f"<|im_start|>assistant\nLet me see.\n{CALL}\n{TIME}<|im_end|>\n" in prompt
    results = "<tool_response>\nof get_weather\n</tool_response>\n<tool_response>\nof get_time\n</tool_response>"
    assert prompt.endswith(f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n")


def test_the_older_form_of_calls_and_results_is_read_too(server):
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [*HI, {"role": "assistant", "content": None, "function_call": call}]
    assert server.chat(messages=[*messages, {"role": "function", "name": "f", "content": "42"}]).status_code == 200
    assert '{"name": "f", "arguments": {"a": 1}}' in prompt_of(server) and "42" in prompt_of(server)


def test_tool_choice_none_and_allowed_tools_limit_what_the_model_is_told(server):
    message = server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]["message"]
    assert "# Tools" not in prompt_of(server)
    assert message == {"role": "assistant", "content": f"Let me see.\n{CALL}\n{TIME}", "refusal": None}
    wanted = [{"type": "function", "function": {"name": "get_time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": wanted}}
    message = server.chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]["message"]
    assert "get_time" in prompt_of(server) and "get_weather" not in prompt_of(server)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"] and CALL in message["content"]


def test_one_call_at_most_where_parallel_ones_are_not_wanted(server):
    fields = {"tools": TOOLS, "parallel_tool_calls": False}
    message = server.chat(**fields).json()["choices"][0]["message"]
    assert message["content"] == "Let me see."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
    chunks = events(server.chat(**fields, stream=True))
    assert {part["index"] for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])} == {0}


def test_a_forced_call_is_enforced_by_a_grammar(server):
    """tests/test_tool_grammar.py says what such grammars let through."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named, {"type": ALLOWED, ALLOWED: {"mode": "required", "tools": [named]}}):
        reply = server.chat(tools=TOOLS, tool_choice=choice, n=2).json()["choices"][1]
        grammar = server.engine.requests[-1].grammar
        assert "get_weather" in grammar and ("get_time" in grammar) == (choice == "required")
        assert reply["finish_reason"] == ("stop" if choice is named else "tool_calls"), "as OpenAI's"
    server.chat(tools=TOOLS)
    assert server.engine.requests[-1].grammar is None


def test_an_answer_in_a_form_or_calls(server):
    server.chat(tools=TOOLS, response_format={"type": "json_object"})
    grammars = json.loads(server.engine.requests[-1].grammar)["grammars"]
    assert grammars[0]["lark_grammar"].startswith("start: (calls | answer)") and grammars[1]["name"] == "answer"
    server.chat(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"})
    assert "calls" not in server.engine.requests[-1].grammar


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_would_be(server):
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": True}}]
    for fields in ({"tool_choice": "required"}, {}):
        error = error_of(server.chat(tools=tools, **fields), 400)
        assert error["param"] == "tools.[1].function.parameters" and "odd" in error["message"]
    tools[1]["function"]["strict"] = False
    assert server.chat(tools=tools).status_code == 200


def test_deep_schemas_are_no_error_of_the_servers(server):
    deep: dict = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    for choice in ("auto", "required"):
        tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
        assert server.chat(tools=tools, tool_choice=choice).status_code in (200, 400)


def test_a_call_cut_off_by_max_tokens_ends_with_length(server):
    reply = server.chat(
        tools=TOOLS, max_tokens=len(TOKENIZER.encode(f"Let me see.\n{CALL}", add_special_tokens=False)) - 24
    )
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == "Let me see."
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Zürich"}'.startswith(arguments)


def test_log_probabilities_of_calls_stand_with_those_of_the_text(server):
    whole = server.chat(tools=TOOLS, logprobs=True).json()["choices"][0]
    assert bytes(byte for item in whole["logprobs"]["content"] for byte in item["bytes"]).decode().endswith(TIME)
    chunks = events(server.chat(tools=TOOLS, logprobs=True, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [item for part in parts if part for item in part["content"]] == whole["logprobs"]["content"]


def test_markers_that_are_special_tokens_are_read_and_never_shown(tmp_path):
    special = ("<tool_call>", "</tool_call>", "<|python_tag|>")
    tokenizer = Tokenizer.from_folder(write_byte_level(tmp_path, special=special))
    script = say(tokenizer, CALL, "<tool_call>no call", "plain<|python_tag|>")
    with ApiServer(script=script, tokenizer=tokenizer) as server:
        first, second, third = server.chat(tools=TOOLS, n=3).json()["choices"]
        assert first["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        assert (second["message"]["content"], third["message"]["content"]) == ("no call", "plain")
        shown = server.chat(tools=TOOLS, n=3, skip_special_tokens=False).json()["choices"][1]["message"]["content"]
        assert shown == "<tool_call>no call"


def function(**fields):
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def called(**fields):
    return {"messages": [*HI, {"role": "assistant"} | fields]}


F, C = "tools.[0].function", "messages.[1].tool_calls"
ALLOWED = "allowed_tools"
WRONG = [
    ({"tools": 1}, "tools"),
    ({"tools": [1]}, "tools.[0]"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.[0].type"),
    ({"tools": [{"type": ["function"]}]}, "tools.[0].type"),
    ({"tools": [{"type": "function"}]}, F),
    (function(name="a b"), f"{F}.name"),
    (function(name="a\n"), f"{F}.name"),
    (function(name="a" * 65), f"{F}.name"),
    (function(parameters=[]), f"{F}.parameters"),
    (function(parameters={"type": "array"}), f"{F}.parameters.type"),
    (function(strict=1), f"{F}.strict"),
    (function(description=1), f"{F}.description"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools.[1].function.name"),
    ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": []}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": ALLOWED}}, f"tool_choice.{ALLOWED}"),
    ({"tools": TOOLS, "tool_choice": {"type": ALLOWED, ALLOWED: {"tools": [1]}}}, f"tool_choice.{ALLOWED}.mode"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"separate_reasoning": "no"}, "separate_reasoning"),
    ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages.[1].tool_call_id"),
    ({"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages.[1].tool_call_id"),
    ({"messages": [*HI, {"role": "function", "content": "x"}]}, "messages.[1].name"),
    (called(tool_calls=3), C),
    (called(tool_calls=[3]), f"{C}.[0]"),
    (called(tool_calls=[{"id": "1"}]), f"{C}.[0].function"),
    (called(tool_calls=[{"id": 1, "function": {"name": "f"}}]), f"{C}.[0].id"),
    (called(tool_calls=[{"id": "1", "type": "x"}]), f"{C}.[0].type"),
    (called(tool_calls=[{"id": "1", "function": {"arguments": ""}}]), f"{C}.[0].function.name"),
    (called(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}]), f"{C}.[0].function.arguments"),
    (called(reasoning_content=1), "messages.[1].reasoning_content"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=str)
def test_a_wrong_tool_or_message_is_a_400_that_names_it(server, fields, param):
    assert error_of(server.chat(**fields), 400)["param"] == param


def test_broken_arguments_of_an_earlier_call_go_back_as_they_were(server):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": tru'}}
    assert server.chat(messages=[*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]).status_code == 200
    assert "tru" in prompt_of(server)


def test_without_a_parser_tools_are_refused():
    with ApiServer(CALL, tool_call_parser="none") as server:
        assert error_of(server.chat(tools=TOOLS), 400)["param"] == "tools"
        assert server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]["message"]["content"] == CALL


def test_the_parser_is_what_the_flag_says():
    with ApiServer('[get_weather(city="x")]', tool_call_parser="pythonic") as server:
        call = server.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"][0]["function"]
        assert call == {"name": "get_weather", "arguments": '{"city": "x"}'}
        assert "[name1(argument1=value1" in prompt_of(server)


THOUGHT = "<think>\nhm, let me see\n</think>\n\nyes"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    folder = write_byte_level(tmp_path_factory.mktemp("thinker"), chat_template=THINKING, special=("</think>",))
    tokenizer = Tokenizer.from_folder(folder)
    with ApiServer(script=say(tokenizer, THOUGHT, f"<think>x</think>{CALL}"), tokenizer=tokenizer) as server:
        yield server


def test_thinking_is_told_from_the_answer(thinker):
    reply = thinker.openai.chat.completions.create(model=MODEL, messages=HI, n=2, tools=TOOLS)
    first, second = [choice.message for choice in reply.choices]
    assert (first.content, first.reasoning_content) == ("yes", "hm, let me see")
    assert (second.content, second.reasoning_content) == (None, "x") and len(second.tool_calls) == 1
    thought = [thinker.tokenizer.encode(text, add_special_tokens=False) for text in (THOUGHT[:-5], "<think>x</think>")]
    assert reply.usage.completion_tokens_details.reasoning_tokens == sum(map(len, thought))
    chunks = events(thinker.chat(stream=True, stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm, let me see"
    assert "".join(delta.get("content") or "" for delta in deltas) == "yes"
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(thought[0])


def test_a_client_chooses_where_the_thinking_goes(thinker):
    assert thinker.chat(separate_reasoning=False).json()["choices"][0]["message"]["content"] == THOUGHT
    message = thinker.chat(include_reasoning=False).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "yes", "refusal": None}
    chunks = events(thinker.chat(stream=True, stream_reasoning=False))
    parts = [chunk["choices"][0]["delta"].get("reasoning_content") for chunk in chunks]
    assert [part for part in parts if part] == ["hm, let me see"]


def test_effort_none_turns_thinking_off_in_the_template(thinker):
    thinker.chat(reasoning_effort="none")
    assert prompt_of(thinker).endswith("<think>\n\n</think>\n\n")
    thinker.chat(reasoning_effort="high")
    assert prompt_of(thinker).endswith("assistant\n")
    for off in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"enable_thinking": False, "thinking": {"type": "enabled"}},
    ):
        thinker.chat(reasoning_effort="high", **off)
        assert prompt_of(thinker).endswith("</think>\n\n"), off
        assert thinker.chat(reasoning_effort="none", thinking={"type": "enabled"}).status_code == 200
        assert prompt_of(thinker).endswith("assistant\n")
    assert error_of(thinker.chat(thinking={"type": "maybe"}), 400)["param"] == "thinking.type"


def test_a_prompt_that_opens_the_thinking_is_heeded(thinker):
    """Also where the client wrote the beginning of it."""
    messages = [*HI, {"role": "assistant", "content": "<think>\nWell, "}]
    fields = {"messages": messages, "continue_final_message": True}
    with ApiServer(script=say(thinker.tokenizer, "right</think>yes"), tokenizer=thinker.tokenizer) as server:
        message = server.chat(**fields).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("yes", "right")
