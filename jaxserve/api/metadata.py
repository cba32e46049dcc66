"""`metadata` of batches and responses: pairs of strings that the server keeps and gives back."""

from typing import Any

from jaxserve.api.errors import invalid_request

MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
JSON_TYPES = {bool: "a boolean", int: "an integer", float: "a decimal", list: "an array", dict: "an object"}


def check_metadata(value: Any) -> dict[str, str] | None:
    """At most 16 pairs of strings, keys to 64 and values to 512 characters (OpenAI's limits)."""
    if value is None:
        return None
    if not isinstance(value, dict):
        given = JSON_TYPES.get(type(value), "a string")
        message = f"Invalid type for 'metadata': expected an object, but got {given} instead."
        raise invalid_request(message, "metadata", "invalid_type")
    if len(value) > MAX_METADATA:
        message = f"Invalid 'metadata': {len(value)} pairs were given; at most {MAX_METADATA} are allowed."
        raise invalid_request(message, "metadata", "invalid_value")
    for key, item in value.items():
        where = f"metadata.{key[:MAX_METADATA_KEY]}"
        if not isinstance(item, str):
            given = JSON_TYPES.get(type(item), "null")
            message = f"Invalid type for '{where}': expected a string, but got {given} instead."
            raise invalid_request(message, where, "invalid_type")
        if len(key) > MAX_METADATA_KEY or len(item) > MAX_METADATA_VALUE:
            message = f"Invalid '{where}': keys have up to {MAX_METADATA_KEY} characters, values {MAX_METADATA_VALUE}."
            raise invalid_request(message, where, "string_above_max_length")
    return dict(value)
