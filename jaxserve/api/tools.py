"""What a request says about tools, checked (OpenAI API reference, "Create chat completion": tools, tool_choice)."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.api.errors import APIError, invalid_request, unsupported
from jaxserve.api.schema import ChatRequest

MAX_TOOLS = 128  # OpenAI's limit

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """tools: those the model is told of and may call, as templates want them; empty where it may call none.

    mode: auto, or required: the answer is calls and nothing else. named: the one function that must be called.
    """

    tools: tuple[dict[str, Any], ...] = ()
    mode: Literal["auto", "required"] = "auto"
    named: bool = False
    parallel: bool = True
    strict: tuple[int, ...] = ()  # indices of tools whose schema is to be followed to the letter

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)


def read_tools(request: ChatRequest) -> ToolUse:
    """Raises APIError 400 naming the field at fault, as in tools.[0].function.name."""
    given = request.tools or []
    if len(given) > MAX_TOOLS:
        raise invalid_request(f"'tools' holds {len(given)} tools; at most {MAX_TOOLS} are allowed.", "tools")
    tools = [_tool(item, f"tools.[{index}]") for index, item in enumerate(given)]
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if (name := tool["function"]["name"]) in names:
            where = f"tools.[{index}].function.name"
            raise invalid_request(f"'{where}': there are two functions {name!r}; names must differ.", where)
        names.add(name)
    use = _choose(tools, request.tool_choice, "tool_choice")
    parallel = request.parallel_tool_calls is not False
    flags = {item["function"]["name"]: bool(item["function"].get("strict")) for item in given}
    strict = tuple(index for index, tool in enumerate(use.tools) if flags[tool["function"]["name"]])
    return ToolUse(use.tools, use.mode, use.named, parallel and not use.named, strict)


def _tool(item: Any, where: str) -> dict[str, Any]:
    """-> {"type": "function", "function": {"name", "description"?, "parameters"}}."""
    if not isinstance(item, dict):
        raise _wrong(where, "an object", item)
    kind = item.get("type", "function")
    if kind != "function":
        message = f"'{where}.type' is {_shown(kind)}; only tools of type 'function' are supported."
        raise unsupported(message, f"{where}.type")
    function = item.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{where}.function", "an object with a name", function)
    where += ".function"
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"'{where}.name' is {_shown(name)}; a name has 1 to 64 of the characters a-z, A-Z, 0-9, _ and -."
        raise invalid_request(message, f"{where}.name")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{where}.description", "a string", description)
    if function.get("strict") is not None and not isinstance(function["strict"], bool):
        raise _wrong(f"{where}.strict", "a boolean", function["strict"])
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise _wrong(f"{where}.parameters", "a JSON Schema, which is an object,", parameters)
    if parameters and parameters.get("type", "object") != "object":
        message = f"'{where}.parameters.type' is {_shown(parameters['type'])}; arguments are always an 'object'."
        raise invalid_request(message, f"{where}.parameters.type")
    plain: dict[str, Any] = {"name": name}
    if description is not None:
        plain["description"] = description
    plain["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": plain}


def _choose(tools: list[dict[str, Any]], choice: Any, where: str) -> ToolUse:
    if choice is None or choice == "auto":
        return ToolUse(tuple(tools))
    if choice == "none":
        return ToolUse()
    if isinstance(choice, str) and choice not in _MODES:
        allowed = ", ".join(repr(mode) for mode in _MODES)
        message = f"'{where}' is {_shown(choice)}; {allowed} or an object that names a function is expected."
        raise invalid_request(message, where)
    if not tools:
        raise invalid_request(f"'{where}' is only allowed when 'tools' are specified.", where)
    if choice == "required":
        return ToolUse(tuple(tools), "required")
    if not isinstance(choice, dict):
        raise _wrong(where, "a string or an object", choice)
    kind = choice.get("type")
    if kind == "function":
        return ToolUse((_named(tools, choice, where),), "required", named=True)
    if kind == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools"), f"{where}.allowed_tools")
    message = f"'{where}.type' is {_shown(kind)}; 'function' and 'allowed_tools' are supported."
    raise invalid_request(message, f"{where}.type")


def _named(tools: list[dict[str, Any]], choice: dict[str, Any], where: str) -> dict[str, Any]:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool
    names = ", ".join(tool["function"]["name"] for tool in tools)
    message = f"'{where}.function.name' is {_shown(name)}, which is none of the tools: {names[:400]}."
    raise invalid_request(message, f"{where}.function.name")


def _allowed(tools: list[dict[str, Any]], allowed: Any, where: str) -> ToolUse:
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list) or not allowed["tools"]:
        raise _wrong(where, "an object with a mode and a list of tools", allowed)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise invalid_request(f"'{where}.mode' is {_shown(mode)}; 'auto' or 'required' is expected.", f"{where}.mode")
    wanted = [
        _named(tools, item if isinstance(item, dict) else {}, f"{where}.tools.[{index}]")
        for index, item in enumerate(allowed["tools"])
    ]
    return ToolUse(tuple(tool for tool in tools if tool in wanted), mode)


def _wrong(where: str, expected: str, given: Any) -> APIError:
    return invalid_request(f"'{where}' is {_shown(given)}; {expected} is expected.", where, "invalid_type")


def _shown(value: Any) -> str:
    """A short picture of a wrong value."""
    if value is None:
        return "null"
    if isinstance(value, str | bool | int | float):
        return repr(value)[:80]
    return "an array" if isinstance(value, list) else "an object"
