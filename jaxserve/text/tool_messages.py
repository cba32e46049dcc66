"""Conversations with tools, made to fit a chat template: what it does not know is written out in words, so that nothing
is lost in silence."""

import json
from collections.abc import Sequence
from typing import Any

from jaxserve.text.dialect import Dialect
from jaxserve.text.template_traits import TemplateTraits
from jaxserve.text.tool_formats import FORMATS, Tool

Message = dict[str, Any]


def fit(
    dialect: Dialect, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], list[Tool] | None]:
    """messages in OpenAI's form (arguments as text, content of a reply str or None) -> those for the template, and the
    tools that it is to describe.

    Calls the template does not know become the text a model would have written, results a user message with
    <tool_response>; tools it does not describe are explained in the system message.
    """
    native = not dialect.explained
    traits = dialect.with_tools if tools else dialect.without_tools
    fitted = list(messages)
    if native and traits.calls:
        if not traits.many_calls:
            fitted = _one_call_each(fitted)
        fitted = [_native_call(traits, message) for message in fitted]
    else:
        fitted = [_written_call(dialect, message) for message in fitted]
    if not (native and traits.results):
        fitted = _written_results(fitted)
    if tools and dialect.explained and dialect.format is not None:
        return _explained(fitted, dialect.format.explain(tools)), None
    return fitted, list(tools) or None


def _native_call(traits: TemplateTraits, message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if traits.arguments == "object":
        calls = [{**call, "function": {**call["function"], "arguments": _value(call)}} for call in calls]
    return {**message, "content": message["content"] or traits.empty_content, "tool_calls": calls}


def _value(call: dict[str, Any]) -> Any:
    """Arguments as an object; as the text they are where a model wrote something else."""
    arguments = call["function"]["arguments"]
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _written_call(dialect: Dialect, message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    write = (dialect.format or FORMATS["hermes"]).write
    text = write([(call["function"]["name"], _value(call)) for call in message["tool_calls"]])
    content = f"{message['content']}\n{text}" if message["content"] else text
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _written_results(messages: Sequence[Message]) -> list[Message]:
    """Results that follow each other become one user message."""
    written: list[Message] = []
    open_ = False
    for message in messages:
        if message["role"] != "tool":
            written.append(message)
            open_ = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if open_:
            written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{text}"}
        else:
            written.append({"role": "user", "content": text})
        open_ = True
    return written


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """[calls a and b] [result a] [result b] -> [call a] [result a] [call b] [result b]."""
    split: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            split.append(message)
            continue
        results = []
        while index < len(messages) and messages[index]["role"] == "tool":
            results.append(messages[index])
            index += 1
        for position, call in enumerate(calls):
            split.append({**message, "content": message["content"] if position == 0 else None, "tool_calls": [call]})
            mine = [item for item in results if item.get("tool_call_id") == call["id"]]
            split += mine
            results = [item for item in results if item not in mine]
        split += results
    return split


def _explained(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        content = f"{first['content']}\n\n{text}" if first["content"] else text
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
