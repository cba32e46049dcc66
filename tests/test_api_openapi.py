"""/openapi.json says what the routes do: their bodies, their parameters, and every status."""

import re
from typing import Any

import pytest

from jaxserve.api.app import ROUTES
from tests.api_server import ApiServer


@pytest.fixture(scope="module")
def document():
    with ApiServer("x") as server:
        yield server.http.get("/openapi.json").json()


def test_the_page_of_the_document_asks_nobody_else():
    with ApiServer("x") as server:
        page = server.http.get("/docs").text
        assert "/openapi.json" in page
        files = re.findall(r"""(?:href|src)=["']([^"']+)""", page)
        assert len(files) >= 3 and all(file.startswith("/docs/static/") for file in files), files
        assert [server.http.get(file).status_code for file in files] == [200] * len(files)


def operations(document: dict[str, Any]):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def test_every_route_is_documented_with_its_parameters_and_statuses(document: dict[str, Any]):
    served = {(p.replace(":path}", "}"), method) for paths, methods, *_ in ROUTES for p in paths for method in methods}
    assert {(path, method) for path, method, _ in operations(document)} == served
    for path, method, operation in operations(document):
        named = [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]
        assert named == re.findall(r"\{(\w+)\}", path), path
        assert operation["description"], f"{method} {path} says nothing of what it does"
        statuses = set(operation["responses"])
        assert "200" in statuses and "422" not in statuses, path
        if "requestBody" in operation:
            assert {"400", "401", "413", "503"} <= statuses, path
        if "{" in path:
            assert "404" in statuses
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_body_has_a_schema_and_every_reference_leads_somewhere(document: dict[str, Any]):
    models = {p: model for paths, _, _, model in ROUTES for p in paths if model is not None}
    for path, method, operation in operations(document):
        if path in models and method != "GET":
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert reference.endswith("/" + models[path].__name__)
    schemas = document["components"]["schemas"]

    def references(value: Any):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    named = set(references(document))
    assert named and all(name.rpartition("/")[2] in schemas for name in named), named
    assert {"messages", "model", "stream_options"} <= set(schemas["ChatRequest"]["properties"])
