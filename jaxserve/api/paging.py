"""OpenAI's lists: ?after and ?limit in, {object: "list", data, first_id, last_id, has_more} out."""

from typing import Any

from fastapi import Request

from jaxserve.api.errors import invalid_request


def integer_query(http: Request, name: str, default: int, low: int, high: int) -> int:
    """Raises APIError 400 for what is no integer from low to high."""
    text = http.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        message = f"Invalid value for '{name}': '{text[:100]}' was given, an integer from {low} to {high} is expected."
        raise invalid_request(message, name, "invalid_value")
    return int(text)


def page_object(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}
