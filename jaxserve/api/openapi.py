"""What /openapi.json says besides what FastAPI can see: routes parse their own bodies and queries, so their schemas and
every status they may answer with are stated here."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from jaxserve.api.errors import ANTHROPIC_PATH

RouteRow = tuple[Sequence[str], Sequence[str], Any, type[BaseModel] | None]
_SCHEMAS = "#/components/schemas/"

_WHEN = {
    "400": "The request is not right, or asks for what is not supported; the message says what to change.",
    "401": "The API key is missing or wrong.",
    "404": "There is nothing by this name.",
    "408": "The body stopped coming.",
    "409": "It is not in the state for that.",
    "413": "The body is larger than --max-body-size.",
    "415": "The body is packed (Content-Encoding).",
    "500": "A bug, or a disk that failed; the server's log has the details.",
    "503": "Starting, stopping, overloaded, or the engine has ended. Retry-After says when to try again.",
    "507": "The disk is full.",
}
_STREAMS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"),
    "/v1/engine",
)
_TEXT = {
    "/metrics": "text/plain",
    "/flush_cache": "text/plain",
    "/v1/files/{file_id}/content": "application/octet-stream",
}
_LISTS = {"/get_load"}
_EITHER = {"/generate", "/encode"}  # an object, or a list for several
_STORED = ("/v1/files", "/v1/batches", "/v1/responses")
_CONFLICTS = ("/v1/batches/{batch_id}/cancel", "/v1/responses/{response_id}/cancel", "/start_profile", "/stop_profile")
_NO_BODY_BUT_400 = (
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/responses/{response_id}/input_items",
)
_BARE = ("/health", "/ping", "/metrics", "/version")  # neither the engine's state nor the client can make them fail

_LIMIT = {"type": "integer", "minimum": 1}
_QUERIES: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "after": {"type": "string"},
        "limit": _LIMIT | {"maximum": 10000},
        "order": {"enum": ["asc", "desc"]},
        "purpose": {"type": "string"},
    },
    "/v1/batches": {"after": {"type": "string"}, "limit": _LIMIT | {"maximum": 100}},
    "/v1/engine": {
        "stream": {"enum": ["true", "false"]},
        "interval_ms": {"type": "integer", "minimum": 100, "maximum": 10000},
    },
    "/v1/responses/{response_id}/input_items": {
        "after": {"type": "string"},
        "limit": _LIMIT | {"maximum": 100},
        "order": {"enum": ["asc", "desc"]},
    },
}
_BATCH = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"type": "string"},
        "completion_window": {"enum": ["24h"]},
        "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
    },
}
_FILE = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}},
}
_EVENT = {  # of each event in the stream, as OpenAPI 3.2 has it (section "Server-Sent Event Streams")
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "additionalProperties": False,
}
_ERRORS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def complete(document: dict[str, Any], routes: Iterable[RouteRow]) -> dict[str, Any]:
    """FastAPI's document -> the same with parameters, bodies, statuses and the ways to send a key."""
    components = document.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    schemas.update(_ERRORS)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "--api-key, where the server was given one"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "the same, as Anthropic's"},
    }
    document["security"] = [{}, {"bearer": []}, {"header": []}]
    for paths, methods, _, model in routes:
        for path in (each.replace(":path}", "}") for each in paths):
            for method in methods:
                _complete_operation(document["paths"][path][method.lower()], path, method, model, schemas)
    return document


def _complete_operation(
    operation: dict[str, Any], path: str, method: str, model: type[BaseModel] | None, schemas: dict[str, Any]
) -> None:
    names = re.findall(r"\{(\w+)\}", path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    queries = _QUERIES.get(path, {}) if method == "GET" else {}
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in queries.items()]
    if parameters:
        operation["parameters"] = parameters
    body = None if method == "GET" else _body(path, model, schemas)
    if body is not None:
        operation["requestBody"] = body
    operation["responses"] = _responses(path, method, has_body=body is not None, has_query=bool(queries))


def _body(path: str, model: type[BaseModel] | None, schemas: dict[str, Any]) -> dict[str, Any] | None:
    if model is not None:
        schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        reference = {"$ref": _SCHEMAS + model.__name__}
        required = path != "/start_profile"
        return {"required": required, "content": {"application/json": {"schema": reference}}}
    if path == "/v1/files":
        return {"required": True, "content": {"multipart/form-data": {"schema": _FILE}}}
    if path == "/v1/batches":
        return {"required": True, "content": {"application/json": {"schema": _BATCH}}}
    return None


def _responses(path: str, method: str, *, has_body: bool, has_query: bool) -> dict[str, Any]:
    statuses = {"200", "408", "415"} if has_body else {"200"}
    has_input = has_body or has_query
    if path == "/health" or path == "/ping":
        statuses.add("503")
    elif path not in _BARE:
        statuses |= {"401", "413", "500", "503"}
    if path == "/version":
        statuses |= {"401", "413"}
    if has_input or path in _NO_BODY_BUT_400 or path == "/start_profile":
        statuses.add("400")
    if "{" in path or has_input:
        statuses.add("404")
    if path in _CONFLICTS:
        statuses.add("409")
    if path.startswith(_STORED) and method != "GET":
        statuses.add("507")
    kind = "AnthropicError" if path.startswith(ANTHROPIC_PATH) else "Error"
    answers = {status: _error(_WHEN[status], kind, path) for status in sorted(statuses - {"200"})}
    return {"200": _answer(path), **answers}


def _error(when: str, kind: str, path: str) -> dict[str, Any]:
    if path == "/ping":
        return {"description": when}
    schema = {"type": "object"} if path == "/health" else {"$ref": _SCHEMAS + kind}
    return {"description": when, "content": {"application/json": {"schema": schema}}}


def _answer(path: str) -> dict[str, Any]:
    if path == "/ping":
        return {"description": "Requests can be served."}
    if path in _TEXT:
        return {"description": "The answer.", "content": {_TEXT[path]: {"schema": {"type": "string"}}}}
    schema: dict[str, Any] = {"type": "array"} if path in _LISTS else {"type": "object"}
    if path in _EITHER:
        schema = {"oneOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if path in _STREAMS:
        content["text/event-stream"] = {"schema": _EVENT}
    return {
        "description": "The answer, or its events where stream is true." if path in _STREAMS else "The answer.",
        "content": content,
    }
