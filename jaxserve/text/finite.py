"""JSON schemas that only an endless value could satisfy: llguidance enforces them, and the answer never ends."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MAX_REFERENCES = 300  # schemas with more are not looked into


def has_finite_instance(schema: Mapping[str, Any]) -> bool:
    """False where every instance would contain itself, as in {"required": ["a"], "properties": {"a": {"$ref": "#"}}}.

    Only what is certain is False; whatever else makes a schema unsatisfiable is llguidance's to find.
    """
    references: set[str] = set()
    _collect(schema, references)
    if not references or len(references) > MAX_REFERENCES:
        return True
    targets = {reference: _resolve(schema, reference) for reference in references}
    finite = {reference for reference, target in targets.items() if not isinstance(target, Mapping)}
    while True:  # the least fixed point: what is finite given what was found finite before
        more = {ref for ref, target in targets.items() if ref not in finite and _is_finite(target, finite)}
        if not more:
            return _is_finite(schema, finite)
        finite |= more


def _collect(value: Any, found: set[str]) -> None:
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            found.add(value["$ref"])
        for each in value.values():
            _collect(each, found)
    elif isinstance(value, list):
        for each in value:
            _collect(each, found)


def _resolve(schema: Mapping[str, Any], reference: str) -> Any:
    """The place that a pointer (RFC 6901) names; None for every other kind of reference."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    at: Any = schema
    for part in unquote(reference[2:]).split("/") if len(reference) > 1 else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, Mapping):
            at = at.get(key)
        elif isinstance(at, list) and key.isascii() and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        else:
            return None
    return at


def _is_finite(schema: Any, finite: set[str]) -> bool:
    if not isinstance(schema, Mapping):
        return True
    if "$ref" in schema and isinstance(schema["$ref"], str) and schema["$ref"] not in finite:
        return False
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        if isinstance(branches, list) and branches and not any(_is_finite(each, finite) for each in branches):
            return False
    branches = schema.get("allOf")
    if isinstance(branches, list) and not all(_is_finite(each, finite) for each in branches):
        return False
    if schema.get("type") == "object":
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and isinstance(properties, Mapping):
            names = [name for name in required if isinstance(name, str) and name in properties]
            return all(_is_finite(properties[name], finite) for name in names)
    if schema.get("type") == "array":
        least = schema.get("minItems")
        if isinstance(least, int) and least > 0 and "prefixItems" not in schema:
            return _is_finite(schema.get("items"), finite)
    return True
