"""The ways in which models write tool calls: how each is read, how it is written back, and how it is explained."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from jaxserve.text.tool_calls import CallParser, HermesCalls, LlamaCalls, PythonicCalls

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description"?, "parameters"}}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """markers: texts that begin or end a call; where they are special tokens they must reach the parser all the same.

    write turns (name, arguments) pairs into the text a model would have written. explain is for templates that do not
    mention tools: a paragraph for the system message.
    """

    name: str
    markers: tuple[str, ...]
    hidden: str  # the marker that is not shown where it begins no call, if it is a special token
    parser: Callable[[Collection[str], str], CallParser]
    write: Callable[[Sequence[tuple[str, Any]]], str]
    explain: Callable[[Sequence[Tool]], str]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_hermes(calls: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": {_json(name)}, "arguments": {_json(value)}}}\n</tool_call>' for name, value in calls
    )


def _write_llama(calls: Sequence[tuple[str, Any]]) -> str:
    return "; ".join(f'{{"name": {_json(name)}, "parameters": {_json(value)}}}' for name, value in calls)


def _write_pythonic(calls: Sequence[tuple[str, Any]]) -> str:
    return "[" + ", ".join(f"{name}({_keywords(value)})" for name, value in calls) + "]"


def _keywords(value: Any) -> str:
    if isinstance(value, dict) and all(key.isidentifier() and not iskeyword(key) for key in value):
        return ", ".join(f"{key}={item!r}" for key, item in value.items())
    return f"**{value!r}"


def _explain_hermes(tools: Sequence[Tool]) -> str:
    """The words of Hermes 2 Pro and Qwen 2.5, which many models have seen."""
    listed = "\n".join(_json(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def _explain_llama(tools: Sequence[Tool]) -> str:
    listed = "\n\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
    return (
        "You have access to the following functions. To call a function, please respond with JSON for a function call. "
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{listed}"
    )


def _explain_pythonic(tools: Sequence[Tool]) -> str:
    listed = "\n".join(_json(tool["function"]) for tool in tools)
    return (
        "You have access to the following functions. To call functions, respond with nothing but a list of calls "
        f"in the format [name1(argument1=value1, argument2=value2), name2(argument=value)].\n\n{listed}"
    )


FORMATS: Mapping[str, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat(
            "hermes", (HermesCalls.OPEN, HermesCalls.CLOSE), HermesCalls.OPEN, HermesCalls, _write_hermes,
            _explain_hermes,
        ),
        ToolFormat("llama3", (LlamaCalls.MARKER,), LlamaCalls.MARKER, LlamaCalls, _write_llama, _explain_llama),
        ToolFormat("pythonic", (), "", PythonicCalls, _write_pythonic, _explain_pythonic),
    )
}  # fmt: skip
