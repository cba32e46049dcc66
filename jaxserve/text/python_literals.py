"""The arguments of a call written in Python -> JSON."""

import ast
import json
from typing import Any


def python_arguments(text: str) -> str | None:
    """The text between a Python call's parentheses -> JSON text of an object; None where it is not made of keywords
    and literals. true, false and null are understood too, and so is **{...}."""
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            value = _literal(keyword.value)
            if keyword.arg is not None:
                values[keyword.arg] = value
            elif isinstance(value, dict):
                values.update(value)
            else:
                return None
        written = json.dumps(values, ensure_ascii=False, allow_nan=False)
        written.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say as an escape
        return json.dumps(values, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return written


def _literal(node: ast.expr) -> Any:
    """A literal's value; tuples and sets become lists. Raises ValueError."""
    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("JSON has no such value")
    return value


def _key(node: ast.expr | None) -> str:
    if node is None or not isinstance(key := _literal(node), str):
        raise ValueError("a key of an object must be a string")
    return key
