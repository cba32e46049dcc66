"""Structured output through the real server, with OpenAI's own client: what comes is what was asked for, and nobody
else notices."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.real_engines import RealServer

ASK = "Paris has 2 million people and is in France. Describe Paris as JSON."
Name = Field(max_length=20)


class Country(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Name
    continent: Literal["Europe", "Asia", "Africa"]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Name
    population: int
    country: Country
    rivers: list[Literal["Seine", "Thames"]] = Field(max_length=2)
    mayor: str | None = Name


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: Literal[1, 2]
    left: "Tree | None"
    right: "Tree | None"


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    strict = {"name": kind.__name__, "strict": True, "schema": kind.model_json_schema()}
    return {"type": "json_schema", "json_schema": strict}


def test_a_schema_is_obeyed_streamed_or_not(live: RealServer):
    options: dict[str, Any] = {"response_format": schema_of(City), "max_tokens": 200}
    whole = live.chat(ASK, **options)
    assert whole.choices[0].finish_reason == "stop"
    city = City.model_validate_json(whole.choices[0].message.content)
    assert list(json.loads(whole.choices[0].message.content)) == list(City.model_fields)
    chunks = list(live.chat(ASK, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert City.model_validate_json(text) == city and text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openais_parse_helper_gives_the_object(live: RealServer):
    parsed = live.client.chat.completions.parse(
        model=live.model,
        messages=[{"role": "user", "content": ASK}],
        response_format=City,
        temperature=1.2,
        seed=5,
        max_tokens=150,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    with pytest.raises(openai.LengthFinishReasonError):
        live.client.chat.completions.parse(
            model=live.model, messages=[{"role": "user", "content": ASK}], response_format=City, max_tokens=3
        )


def test_hot_choices_of_a_recursive_schema_are_all_sentences_of_it(live: RealServer):
    reply = live.chat("A tree.", response_format=schema_of(Tree), n=4, temperature=1.5, seed=3, max_tokens=60)
    for choice in reply.choices:
        if choice.finish_reason == "stop":
            Tree.model_validate_json(choice.message.content)
        else:
            assert choice.finish_reason == "length" and choice.message.content.startswith('{"value":')
    assert len({choice.message.content for choice in reply.choices}) > 1


def test_patterns_choices_grammars_and_json_objects_on_both_routes(live: RealServer):
    asked: list[tuple[dict[str, Any], str]] = [
        ({"regex": r"\d{4}-(0[1-9]|1[0-2])-\d\d"}, r"\d{4}-(0[1-9]|1[0-2])-\d\d"),
        ({"structured_outputs": {"choice": ["positive", "negative"]}}, "positive|negative"),
        ({"ebnf": 'root ::= "Answer: " ("yes" | "no") "."'}, r"Answer: (yes|no)\."),
        ({"guided_grammar": 'start: "<" /[a-z]{2,5}/ ">"'}, "<[a-z]{2,5}>"),
    ]
    for extra, pattern in asked:
        said = live.chat("The date, please.", extra_body=extra, max_tokens=30).choices[0]
        assert re.fullmatch(pattern, said.message.content) and said.finish_reason == "stop"
        said = live.complete("It was on", extra_body=extra, max_tokens=30, temperature=1.3).choices[0]
        assert re.fullmatch(pattern, said.text) and said.finish_reason == "stop"
    body = {"type": "json_object"}
    said = live.chat(ASK, response_format=body, max_tokens=60, frequency_penalty=1.0).choices[0]
    if said.finish_reason == "stop":
        assert isinstance(json.loads(said.message.content), dict)
    assert said.message.content.startswith("{")


def test_it_combines_with_log_probabilities_stops_penalties_min_tokens_and_ignore_eos(live: RealServer):
    digits = {"regex": "[0-9]{2,40}"}
    plain = live.chat("Count.", extra_body=digits, max_tokens=8, logprobs=True, top_logprobs=5).choices[0]
    tokens = plain.logprobs.content
    assert "".join(token.token for token in tokens) == plain.message.content
    assert all(len(token.top_logprobs) == 5 for token in tokens)
    free = live.chat("Count.", max_tokens=1, logprobs=True, top_logprobs=5).choices[0].logprobs.content[0]
    assert [each.logprob for each in free.top_logprobs] == [each.logprob for each in tokens[0].top_logprobs]
    stopped = live.chat("Count.", extra_body={"regex": "[a-z]{3}(STOP)?[a-z]*"}, stop=["STOP"], max_tokens=9).choices[0]
    assert re.fullmatch("[a-z]+", stopped.message.content)
    long = live.chat("Count.", extra_body=digits | {"min_tokens": 12}, max_tokens=20, temperature=1.0, seed=1).choices[
        0
    ]
    assert re.fullmatch("[0-9]{12,20}", long.message.content)
    for extra in ({"ignore_eos": True}, {"min_tokens": 25}):
        reply = live.chat("Yes or no?", extra_body={"regex": "(yes|no)!"} | extra, max_tokens=30)
        assert re.fullmatch("(yes|no)!", reply.choices[0].message.content)
        assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < 9


def test_rows_beside_constrained_ones_say_what_they_say_alone_and_a_client_that_leaves_frees_its_row(live: RealServer):
    prompts = [f"Name {count} animals." for count in (2, 3, 5)]
    alone = [live.chat(prompt, max_tokens=24).choices[0].message.content for prompt in prompts]
    endless = live.chat("Go on.", extra_body={"regex": "(ab?)*c{2000}"}, max_tokens=2000, stream=True)
    next(iter(endless))
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(live.chat, ASK, response_format=schema_of(City), max_tokens=60) for _ in range(3)]
        beside = [pool.submit(live.chat, prompt, max_tokens=24) for prompt in prompts]
        assert [each.result().choices[0].message.content for each in beside] == alone
        assert len({each.result().choices[0].message.content for each in others}) == 1
    endless.close()
    live.wait_idle()


def test_what_cannot_be_enforced_is_a_400_in_openais_client(live: RealServer):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match='"not" is not supported') as caught:
        live.chat(ASK, response_format=schema)
    assert caught.value.param == "response_format"
