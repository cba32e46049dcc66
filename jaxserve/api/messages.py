"""The client's messages -> the plain {"role", "content"} dicts that chat templates are written for."""

from typing import Any

from jaxserve.api.errors import invalid_request, unsupported

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = ("tool", "function")
_MEDIA = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file")


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks every message; developer becomes system, text parts are joined by newlines, an absent reply becomes "".

    Raises APIError 400 naming the part at fault, as in messages.[2].content.[0].type.
    """
    if not messages:
        raise invalid_request("'messages' must hold at least one message.", "messages")
    return [_plain_message(message, f"messages.[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role in _TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise unsupported(f"'{where}': tool calling is not supported yet.", f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise invalid_request(f"'{where}.role' must be one of {allowed}; given: {_shown(role)}.", f"{where}.role")
    if message.get("audio") is not None:
        raise unsupported(f"'{where}.audio': only text is accepted.", f"{where}.audio")
    plain = {"role": _ROLES[role], "content": _plain_content(message.get("content"), role, f"{where}.content")}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise invalid_request(f"'{where}.name' must be a string; given: {_shown(name)}.", f"{where}.name")
        plain["name"] = name
    return plain


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


def _shown(value: Any) -> str:
    """A short picture of a wrong value, never a long text of the user's."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value[:40])
    return {list: "an array", dict: "an object", bool: "a boolean"}.get(type(value), "a number")
