"""The client's messages -> the plain {"role", "content"} dicts that chat templates are written for."""

from typing import Any

from jaxserve.api.errors import APIError, invalid_request, unsupported

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's older name for a tool's result
}
_MEDIA = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file")


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks every message; developer becomes system, text parts are joined by newlines, an absent reply becomes "".

    A reply may have tool_calls, [{"id", "type": "function", "function": {"name", "arguments": JSON text}}]; a tool's
    result has role tool, the tool_call_id it answers and the name of the function that was called. Raises APIError 400
    naming the part at fault, as in messages.[2].content.[0].type.
    """
    if not messages:
        raise invalid_request("'messages' must hold at least one message.", "messages")
    called: dict[str, str] = {}  # call id -> function, of the calls so far
    plain = []
    for index, message in enumerate(messages):
        plain.append(_plain_message(message, f"messages.[{index}]", called))
        called.update((call["id"], call["function"]["name"]) for call in plain[-1].get("tool_calls", ()))
    return plain


def _plain_message(message: dict[str, Any], where: str, called: dict[str, str]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise invalid_request(f"'{where}.role' must be one of {allowed}; given: {_shown(role)}.", f"{where}.role")
    if message.get("audio") is not None:
        raise unsupported(f"'{where}.audio': only text is accepted.", f"{where}.audio")
    content = _plain_content(message.get("content"), role, f"{where}.content")
    plain: dict[str, Any] = {"role": _ROLES[role], "content": content}
    name = _text(message, "name", where)
    if name is not None:
        plain["name"] = name
    if role == "assistant":
        _add_reply(plain, message, where)
    elif plain["role"] == "tool":
        _add_result(plain, message, where, called)
    return plain


def _add_reply(plain: dict[str, Any], message: dict[str, Any], where: str) -> None:
    """tool_calls (or function_call, the older form of one), and the thinking, which some templates show again."""
    reasoning = _text(message, "reasoning_content", where) or _text(message, "reasoning", where)
    if reasoning:
        plain["reasoning_content"] = reasoning
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _wrong(f"{where}.tool_calls", "an array", calls)
    read = [_plain_call(call, f"{where}.tool_calls.[{index}]") for index, call in enumerate(calls)]
    if message.get("function_call") is not None:
        function = _plain_function(message["function_call"], f"{where}.function_call")
        read.append({"id": f"function_{function['name']}", "type": "function", "function": function})
    if read:
        plain["tool_calls"] = read


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise _wrong(where, "an object", call)
    if call.get("type", "function") != "function":
        message = f"'{where}.type' is {_shown(call['type'])}; only calls of type 'function' are supported."
        raise unsupported(message, f"{where}.type")
    identity = call.get("id")
    if not isinstance(identity, str) or not identity:
        raise _wrong(f"{where}.id", "the id of the call, a string", identity)
    return {"id": identity, "type": "function", "function": _plain_function(call.get("function"), f"{where}.function")}


def _plain_function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise _wrong(where, "an object with name and arguments", function)
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{where}.name", "a string", name)
    if not isinstance(arguments, str):
        raise _wrong(f"{where}.arguments", "JSON text, a string", arguments)
    return {"name": name, "arguments": arguments}


def _add_result(plain: dict[str, Any], message: dict[str, Any], where: str, called: dict[str, str]) -> None:
    if message["role"] == "function":
        if "name" not in plain:
            raise _wrong(f"{where}.name", "the name of the function", None)
        plain["tool_call_id"] = f"function_{plain['name']}"
        return
    identity = message.get("tool_call_id")
    if not isinstance(identity, str) or not identity:
        raise _wrong(f"{where}.tool_call_id", "the id of the call that this is the result of", identity)
    if identity not in called:
        text = f"'{where}.tool_call_id' is {_shown(identity)}, which no assistant message before it has called."
        raise invalid_request(text, f"{where}.tool_call_id")
    plain["tool_call_id"] = identity
    plain.setdefault("name", called[identity])


def _plain_content(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list):
        return "\n".join(_part_text(part, f"{where}.[{index}]") for index, part in enumerate(content))
    raise invalid_request(f"'{where}' must be a string or an array of text parts; given: {_shown(content)}.", where)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid_request(f"'{where}' must be an object with a type; given: {_shown(part)}.", where)
    kind = part.get("type")
    if kind in _MEDIA:
        raise unsupported(f"'{where}': content of type {kind!r} is not supported; only text is.", f"{where}.type")
    key = {"text": "text", "input_text": "text", "refusal": "refusal"}.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise invalid_request(f"'{where}.type' must be 'text'; given: {_shown(kind)}.", f"{where}.type")
    text = part.get(key)
    if not isinstance(text, str):
        raise invalid_request(f"'{where}.{key}' must be a string; given: {_shown(text)}.", f"{where}.{key}")
    return text


def _text(message: dict[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(f"{where}.{key}", "a string", value)
    return value


def _wrong(where: str, expected: str, given: Any) -> APIError:
    return invalid_request(f"'{where}' must be {expected}; given: {_shown(given)}.", where)


def _shown(value: Any) -> str:
    """A short picture of a wrong value, never a long text of the user's."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value[:40])
    return {list: "an array", dict: "an object", bool: "a boolean"}.get(type(value), "a number")
