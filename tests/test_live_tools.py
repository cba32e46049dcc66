"""Calls by the real default model, which is too small to be trusted with them: the grammar is what makes them right."""

import json

NAME = "SmolLM2-135M-Instruct"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time now."}}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
FIELDS = {"model": NAME, "tools": [WEATHER, TIME], "temperature": 0, "max_tokens": 100}


def test_a_named_call_is_a_call_with_sound_arguments_streamed_too(live):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    fields = {**FIELDS, "messages": ASK, "tool_choice": choice}
    reply = live.client.chat.completions.create(**fields).choices[0]
    (call,) = reply.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "fahrenheit") and reply.finish_reason == "stop"
    with live.client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments


def test_a_required_call_comes_and_its_result_goes_back(live):
    fields = {**FIELDS, "parallel_tool_calls": False}
    reply = live.client.chat.completions.create(**fields, messages=ASK, tool_choice="required").choices[0]
    (call,) = reply.message.tool_calls
    assert call.function.name in ("get_weather", "get_time") and isinstance(json.loads(call.function.arguments), dict)
    assert reply.message.content is None and reply.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}
    answer = live.client.chat.completions.create(
        **FIELDS, messages=[*ASK, reply.message, result], tool_choice="none"
    ).choices[0]
    assert answer.message.content and not answer.message.tool_calls
