"""What a chat template makes of tools, found out by showing it some: templates ignore in silence what they do not
know."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.text.chat_template import ChatTemplate, TemplateError

_NAME, _VALUE, _RESULT = "probe_weather", "probe-city-4711", "probe-result-0815"


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """calls, results: whether the template shows those of earlier turns. arguments: what it wants a call's arguments to
    be. empty_content: what it wants the content of a message to be that has calls only. many_calls: whether it takes
    more than one call in a message.
    """

    calls: bool = False
    results: bool = False
    many_calls: bool = True
    arguments: Literal["object", "text"] = "object"
    empty_content: str | None = ""


_USER = {"role": "user", "content": "What is the weather?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name"}}},
    },
}


def shows_tools(template: ChatTemplate) -> bool:
    return _shows(template, [_USER], True, _NAME)


def traits_of(template: ChatTemplate, given_tools: bool) -> TemplateTraits:
    """Of conversations where tools are given, or are not. Raises nothing: a template that refuses does not know."""
    for arguments, content in (("object", ""), ("text", ""), ("object", None), ("text", None)):
        value: Any = {"city": _VALUE} if arguments == "object" else f'{{"city": "{_VALUE}"}}'
        turn = _turn(value, content)
        if not _shows(template, [_USER, turn, _result(0)], given_tools, _NAME, _VALUE):
            continue
        twice = [_USER, _turn(value, content, 2), _result(0), _result(1)]
        return TemplateTraits(
            calls=True,
            results=_shows(template, [_USER, turn, _result(0)], given_tools, _RESULT),
            many_calls=_shows(template, twice, given_tools, _VALUE),
            arguments="object" if arguments == "object" else "text",
            empty_content=content,
        )
    return TemplateTraits()


def _turn(arguments: Any, content: str | None, count: int = 1) -> dict[str, Any]:
    calls = [
        {"id": f"probe000{index}", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        for index in range(count)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _result(index: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"probe000{index}", "name": _NAME, "content": _RESULT}


def _shows(template: ChatTemplate, messages: list[dict[str, Any]], given_tools: bool, *words: str) -> bool:
    try:
        text = template.render(messages, tools=[_TOOL] if given_tools else None, prepared=True)
    except TemplateError:
        return False
    return all(word in text for word in words)
