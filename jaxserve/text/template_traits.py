"""What a chat template makes of tools, found out by showing it some: templates ignore in silence what they do not
know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.text.chat_template import ChatTemplate, TemplateError

_NAME, _VALUE, _RESULT = "probe_weather", "probe-city-4711", "probe-result-0815"


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """tools, calls, results: whether the template shows them. arguments: what it wants a call's arguments to be.

    empty_content: what it wants the content of a message to be that has calls only. many_calls: whether it takes more
    than one call in a message.
    """

    tools: bool = False
    calls: bool = False
    results: bool = False
    many_calls: bool = True
    arguments: Literal["object", "text"] = "object"
    empty_content: str | None = ""


def traits_of(template: ChatTemplate) -> TemplateTraits:
    """Renders a few conversations; takes some milliseconds. Raises nothing: a template that refuses does not know."""
    user = {"role": "user", "content": "What is the weather?"}
    tool = {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name"}}},
        },
    }
    tools = _shows(template, [user], [tool], _NAME)
    for arguments, content in (("object", ""), ("text", ""), ("object", None), ("text", None)):
        value: Any = {"city": _VALUE} if arguments == "object" else f'{{"city": "{_VALUE}"}}'
        turn = _turn(value, content)
        if not _shows(template, [user, turn, _result(0)], [tool], _NAME, _VALUE, raw=True):
            continue
        return TemplateTraits(
            tools=tools,
            calls=_shows(template, [user, turn, _result(0)], None, _NAME, _VALUE, raw=True),
            results=tools and _shows(template, [user, turn, _result(0)], None, _RESULT, raw=True),
            many_calls=_shows(
                template, [user, _turn(value, content, 2), _result(0), _result(1)], None, _VALUE, raw=True
            ),
            arguments="object" if arguments == "object" else "text",
            empty_content=content,
        )
    return TemplateTraits(tools=tools)


def _turn(arguments: Any, content: str | None, count: int = 1) -> dict[str, Any]:
    calls = [
        {"id": f"probe000{index}", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        for index in range(count)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _result(index: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"probe000{index}", "name": _NAME, "content": _RESULT}


def _shows(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    *words: str,
    raw: bool = False,
) -> bool:
    render: Callable[..., str] = template.render_raw if raw else template.render
    try:
        text = render(messages, tools=tools)
    except TemplateError:
        return False
    return all(word in text for word in words)
