"""The real server and the default model by way of /v1/responses and /v1/messages, with both makers' own clients."""

import json
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest

from tests.real_engines import RealServer

ASK = "What is the capital of France?"


@pytest.fixture(scope="module")
def claude(live: RealServer):
    with anthropic.Anthropic(
        base_url=str(live.client.base_url).removesuffix("/").removesuffix("/v1"),
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(trust_env=False),
    ) as client:
        yield client


def test_three_apis_say_the_same(live: RealServer, claude: anthropic.Anthropic):
    chat = live.chat(ASK, max_tokens=24, temperature=0)
    name = chat.model
    options: dict[str, Any] = {"model": name, "input": ASK, "max_output_tokens": 24, "temperature": 0}
    response = live.client.responses.create(**options)
    with live.client.responses.stream(**options) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response() if chat.choices[0].finish_reason == "stop" else None
    ask: Any = [{"role": "user", "content": ASK}]
    message = claude.messages.create(model=name, messages=ask, max_tokens=24, extra_body={"temperature": 0})
    text = chat.choices[0].message.content
    assert text == response.output_text == streamed == message.content[0].text
    assert final is None or final.output_text == text
    assert response.usage.output_tokens == message.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    counted = claude.messages.count_tokens(model=name, messages=ask)
    assert counted.input_tokens == chat.usage.prompt_tokens
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == chat.usage.prompt_tokens


def test_a_conversation_goes_on_and_its_beginning_is_cached(live: RealServer):
    options: dict[str, Any] = {"model": live.model, "max_output_tokens": 16, "temperature": 0}
    first = live.client.responses.create(input=ASK, **options)
    second = live.client.responses.create(input="And of Italy?", previous_response_id=first.id, **options)
    said = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    again = live.client.chat.completions.create(model=options["model"], messages=said, max_tokens=16, temperature=0)
    assert second.output_text == again.choices[0].message.content
    assert second.usage.input_tokens == again.usage.prompt_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= 16, "whole pages of the first turn"
    live.client.responses.delete(first.id)
    live.client.responses.delete(second.id)


class City(pydantic.BaseModel):
    name: str
    capital: bool


def test_a_typed_answer_is_what_its_schema_says(live: RealServer, claude: anthropic.Anthropic):
    say = "Name a city, in JSON."
    parsed = live.client.responses.parse(
        model=live.model, input=say, text_format=City, temperature=0, max_output_tokens=60
    )
    assert isinstance(parsed.output_parsed, City) and parsed.status == "completed"
    message = claude.messages.parse(
        model=live.model, messages=[{"role": "user", "content": say}], max_tokens=60, output_format=City
    )
    assert isinstance(message.parsed_output, City) and message.stop_reason == "end_turn"


def test_a_forced_call_is_a_call_of_that_tool(live: RealServer, claude: anthropic.Anthropic):
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    parameters["additionalProperties"] = False
    ask = "What is the weather in Paris?"
    response = live.client.responses.create(
        model=live.model,
        input=ask,
        tools=[{"type": "function", "name": "weather", "parameters": parameters, "strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=80,
    )
    (call,) = response.output
    assert call.type == "function_call" and call.name == "weather" and list(json.loads(call.arguments)) == ["city"]
    message = claude.messages.create(
        model=live.model,
        messages=[{"role": "user", "content": ask}],
        tools=[{"name": "weather", "input_schema": parameters}],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        max_tokens=80,
        extra_body={"temperature": 0},
    )
    (block,) = message.content
    assert block.type == "tool_use" and list(block.input) == ["city"] and message.stop_reason == "tool_use"
