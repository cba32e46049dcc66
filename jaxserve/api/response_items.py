"""The items of /v1/responses: what a client may send, and the chat messages that they amount to."""

from typing import Any

from jaxserve.api.errors import APIError, invalid_request, unsupported
from jaxserve.api.response_events import new_id

Item = dict[str, Any]

MAX_ITEM_ID = 256
_ROLES = ("user", "assistant", "system", "developer")
_KINDS = ("message", "function_call", "function_call_output", "reasoning")
_KNOWN_KINDS = (
    "file_search_call", "computer_call", "computer_call_output", "web_search_call", "image_generation_call",
    "code_interpreter_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response",
    "mcp_call", "custom_tool_call", "custom_tool_call_output", "compaction", "compaction_trigger", "tool_search_call",
    "tool_search_output", "additional_tools", "program", "program_output",
)  # fmt: skip
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_MEDIA_PARTS = ("input_image", "input_file", "input_audio", "image_url", "computer_screenshot")


def checked_items(given: str | list[Any]) -> list[Item]:
    """`input` -> items as they are stored, each with an id, type and status; references stay for the caller.

    Raises APIError 400 that names the place, as in input[2].content[0].type.
    """
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, "input")]
    return [_checked(item, f"input[{index}]") for index, item in enumerate(given)]


def _checked(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise _wrong_type(where, "an object")
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference" if "id" in item else None
    match kind:
        case "message":
            return _message(item, where)
        case "function_call":
            strings = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
            return {"id": _id(item, "fc", where), "type": kind, "status": "completed", **strings}
        case "function_call_output":
            call_id = _string(item, "call_id", where)
            output = _content(item.get("output"), "input_text", f"{where}.output")
            if isinstance(item["output"], str):
                output = item["output"]
            head = {"id": _id(item, "fco", where), "type": kind, "status": "completed"}
            return {**head, "call_id": call_id, "output": output}
        case "reasoning":
            return _reasoning(item, where)
        case "item_reference":
            return {"type": kind, "id": _string(item, "id", where)}
    if kind in _KNOWN_KINDS:
        raise unsupported(f"'{where}': items of type {kind!r} are not supported; function tools are.", f"{where}.type")
    allowed = ", ".join((*_KINDS, "item_reference"))
    shown = repr(kind[:40]) if isinstance(kind, str) else "none" if kind is None else "no string"
    raise invalid_request(f"'{where}.type' must be one of {allowed}; given: {shown}.", f"{where}.type", "invalid_value")


def _message(item: Item, where: str) -> Item:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else "none" if role is None else "no string"
        message = f"'{where}.role' must be one of {', '.join(_ROLES)}; given: {shown}."
        raise invalid_request(message, f"{where}.role", "invalid_value")
    kind = "output_text" if role == "assistant" else "input_text"
    content = _content(item.get("content"), kind, f"{where}.content")
    head = {"id": _id(item, "msg", where), "type": "message", "status": "completed"}
    return {**head, "role": role, "content": content}


def _reasoning(item: Item, where: str) -> Item:
    parts: dict[str, list[Item]] = {}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        value = [] if item.get(name) is None else item[name]
        if not isinstance(value, list):
            raise _wrong_type(f"{where}.{name}", "an array")
        parts[name] = []
        for index, part in enumerate(value):
            at = f"{where}.{name}[{index}]"
            if not isinstance(part, dict) or part.get("type") not in (kind, "text"):
                raise invalid_request(f"'{at}' must be an object of type '{kind}'.", at, "invalid_value")
            parts[name].append({"type": kind, "text": _string(part, "text", at)})
    return {"id": _id(item, "rs", where), "type": "reasoning", "status": "completed", **parts}


def _content(value: Any, kind: str, where: str) -> list[Item]:
    """A string or text parts -> parts of the given kind."""
    if isinstance(value, str):
        return [_part(kind, value)]
    if not isinstance(value, list):
        raise _wrong_type(where, "a string or an array of text parts")
    parts = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise _wrong_type(at, "an object with a type")
        given = part.get("type")
        if given in _MEDIA_PARTS:
            raise unsupported(f"'{at}': content of type {given!r} is not supported; only text is.", f"{at}.type")
        key = _TEXT_PARTS.get(given) if isinstance(given, str) else None
        if key is None:
            raise invalid_request(f"'{at}.type' must be '{kind}'.", f"{at}.type", "invalid_value")
        parts.append(_part(kind, _string(part, key, at)))
    return parts


def _part(kind: str, text: str) -> Item:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _string(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if value is None:
        raise invalid_request(
            f"Missing required parameter: '{where}.{name}'.", f"{where}.{name}", "missing_required_parameter"
        )
    if not isinstance(value, str):
        raise _wrong_type(f"{where}.{name}", "a string")
    return value


def _id(item: Item, prefix: str, where: str) -> str:
    """The client's id of an item it sends again, or a new one."""
    if item.get("id") is None:
        return new_id(prefix)
    item_id = _string(item, "id", where)
    if not 0 < len(item_id) <= MAX_ITEM_ID:
        message = f"'{where}.id' must have 1 to {MAX_ITEM_ID} characters."
        raise invalid_request(message, f"{where}.id", "invalid_value")
    return item_id


def _wrong_type(where: str, expected: str) -> APIError:
    return invalid_request(f"Invalid type for '{where}': expected {expected}.", where, "invalid_type")


def check_calls(items: list[Item]) -> None:
    """Every output needs its call before it, in this request or in the conversation it goes on with."""
    calls: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            message = f"No tool call found for function call output with call_id {item['call_id'][:100]}."
            raise invalid_request(message, "input")


def cuts_of(items: list[Item]) -> list[int]:
    """Where a conversation may begin when its beginning is dropped: with a message of the user's, or behind the last of
    these with anything but an output, which would lose its call."""
    users = [index for index, item in enumerate(items) if item.get("role") == "user"]
    last = users[-1] if users else 0
    cuts = [*users, *(index for index in range(last + 1, len(items)) if items[index]["type"] != "function_call_output")]
    return [index for index in cuts if _whole_from(items, index)]


def _whole_from(items: list[Item], start: int) -> bool:
    """True when every output from there on has its call there too."""
    calls = {item["call_id"] for item in items[start:] if item["type"] == "function_call"}
    return start > 0 and all(
        item["call_id"] in calls for item in items[start:] if item["type"] == "function_call_output"
    )


def as_messages(items: list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Items -> chat messages. What the assistant did in a row (reasoning, a message, calls) is one message, and
    instructions join the system messages that stand first, since most templates know one system message."""
    messages: list[dict[str, Any]] = [] if not instructions else [{"role": "system", "content": instructions}]
    leading = True
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            role, content = "system" if item["role"] == "developer" else item["role"], _text_of(item["content"])
            if role == "system" and leading and messages:
                messages[0]["content"] += "\n\n" + content
            else:
                messages.append({"role": role, "content": content})
            leading = leading and role == "system"
            continue
        leading = False
        if kind == "function_call_output":
            content = item["output"] if isinstance(item["output"], str) else _text_of(item["output"])
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        else:
            _add_to_assistant(messages, item)
    return messages


def _add_to_assistant(messages: list[dict[str, Any]], item: Item) -> None:
    """Into the assistant's message that is being told, or a new one where that has what the item would add."""
    kind = item["type"]
    last: dict[str, Any] | None = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (kind != "function_call" and (last["content"] is not None or "tool_calls" in last)):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    if kind == "reasoning":
        text = "".join(part["text"] for part in item["content"] or item["summary"])
        last["reasoning_content"] = last.get("reasoning_content", "") + text
    elif kind == "message":
        last["content"] = _text_of(item["content"])
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _text_of(parts: list[Item]) -> str:
    return "\n".join(part["text"] for part in parts)
