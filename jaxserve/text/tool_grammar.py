"""Grammars (llguidance's Lark) of answers that must be tool calls, or may be, each call in its model's own format."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxserve.text.grammar import JSON_OPTIONS, MAX_GRAMMAR_LENGTH
from jaxserve.text.params import ParameterError
from jaxserve.text.reasoning import CLOSE, OPEN
from jaxserve.text.tool_formats import Tool

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

Thinks = Literal["no", "maybe", "inside"]


def turn_grammar_of(
    tools: Sequence[Tool],
    format_name: str,
    *,
    parallel: bool,
    is_special: Callable[[str], bool],
    answer: str | None = None,
    thinks: Thinks = "no",
) -> str:
    """One call of tools, or several where parallel; or else an answer, where there is a grammar for it (serialised, as
    text.grammar makes them). thinks: <think> ... </think> may come first, or the prompt has opened it.

    is_special(text): the text is a special token, which no string of a grammar matches. Raises ParameterError for tools
    whose schemas are too long together or nested too deeply.
    """
    try:
        rules = _calls(tools, format_name, parallel, is_special) if tools else []
    except RecursionError:
        raise ParameterError("tools holds a schema that is nested too deeply", "tools") from None
    starts = (["calls"] if tools else []) + (["answer"] if answer is not None else [])
    start = f"({' | '.join(starts)})"
    grammars: list[Mapping[str, Any]] = []
    if answer is not None:
        first, *others = json.loads(answer)["grammars"]
        rules.append("answer: @answer")
        grammars = [{**first, "name": "answer"}, *others]
    if thinks != "no":
        end = CLOSE if is_special(CLOSE) else None
        rules.append(f"inside: /(.|\\n)*/ {end}" if end else f'inside[suffix="{CLOSE}"]: /(.|\\n)*/')
        rules.append("border: /\\n{0,2}/")
        opened = f"({_literal(OPEN, is_special)} inside border)?" if thinks == "maybe" else "inside border"
        start = f"{opened} {start}"
    text = "\n".join([f"start: {start}", *rules]) + "\n"
    if len(text) > MAX_GRAMMAR_LENGTH:
        problem = f"the schemas of tools have {len(text)} characters together; at most {MAX_GRAMMAR_LENGTH} are allowed"
        raise ParameterError(problem, "tools")
    return json.dumps({"grammars": [{"lark_grammar": text}, *grammars]})


def parameters_of(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    schema = tool["function"].get("parameters")
    return {"type": "object", **schema} if schema else NO_ARGUMENTS


def _calls(tools: Sequence[Tool], format_name: str, parallel: bool, is_special: Callable[[str], bool]) -> list[str]:
    opens, separator, closes, call_of = {
        "hermes": ("", '"\\n"', "", _hermes_call),
        "llama3": ("", '"; "', "", _llama_call),
        "pythonic": ('"["', '", "', '"]"', _python_call),
    }[format_name]
    more = f" ({separator} call)*" if parallel else ""
    rules = [
        f"calls: {opens} call{more} {closes}".rstrip(),
        "call: " + " | ".join(f"call_{index}" for index in range(len(tools))),
    ]
    for index, tool in enumerate(tools):
        rules.append(f"call_{index}: {call_of(tool, f'arguments_{index}', is_special)}")
        schema = {key: value for key, value in parameters_of(tool).items() if key != "x-guidance"}
        rules.append(f"arguments_{index}: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}")
    return rules


def _hermes_call(tool: Tool, arguments: str, is_special: Callable[[str], bool]) -> str:
    name = json.dumps(tool["function"]["name"])
    opens, closes = _literal("<tool_call>", is_special), _literal("</tool_call>", is_special)
    before, after = _quoted('\n{"name": ' + name + ', "arguments": '), _quoted("}\n")
    return f"{opens} {before} {arguments} {after} {closes}"


def _llama_call(tool: Tool, arguments: str, is_special: Callable[[str], bool]) -> str:
    name = json.dumps(tool["function"]["name"])
    return _quoted('{"name": ' + name + ', "parameters": ') + f' {arguments} "}}"'


def _python_call(tool: Tool, arguments: str, is_special: Callable[[str], bool]) -> str:
    """f(**{...}): the arguments as one JSON object, so that the whole schema holds."""
    return _quoted(tool["function"]["name"] + "(**") + f' {arguments} ")"'


def _literal(marker: str, is_special: Callable[[str], bool]) -> str:
    return marker if is_special(marker) else _quoted(marker)


def _quoted(text: str) -> str:
    return json.dumps(text)
