"""What becomes of fields that are not honoured: refused with a reason, or accepted and logged once by name."""

import logging
from typing import Any

import pytest

from jaxserve.api.schema import (
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
    Refused,
)
from tests.api_server import ApiServer, error_of

ROUTES = [("chat", ChatRequest, REFUSED_IN_CHAT), ("complete", CompletionRequest, REFUSED_IN_COMPLETIONS)]
CASES = [(route, name, rule) for route, _, own in ROUTES for name, rule in {**REFUSED, **own}.items()]
FOREIGN: Any = {"something": ["that is", "neutral nowhere"]}


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world") as server:
        yield server


@pytest.mark.parametrize(("route", "name", "rule"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_refused_field_is_a_400_that_says_why(server: ApiServer, route: str, name: str, rule: Refused):
    send = getattr(server, route)
    for stream in (False, True):
        error = error_of(send(stream=stream, **{name: FOREIGN}), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_parameter") and rule.why in error["message"]
    for neutral in (None, *rule.neutral):
        reply = send(**{name: neutral})
        assert reply.status_code == 200, (neutral, reply.text)


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_fields_without_effect_change_nothing_and_are_logged_once(route: str, caplog: pytest.LogCaptureFixture):
    fields: dict[str, Any] = dict.fromkeys((*WITHOUT_EFFECT, "field_of_2031"), FOREIGN)
    with ApiServer("hello world") as server, caplog.at_level(logging.INFO, logger="jaxserve.api.schema"):
        send = getattr(server, route)
        plain, first, again = (send(seed=1, **extra).json() for extra in ({}, fields, fields))
        assert plain["choices"] == first["choices"] == again["choices"]
        assert len({request.params for request in server.engine.requests}) == 1
    messages = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(messages) == len(fields), messages
    for name in fields:
        assert sum(repr(name) in message for message in messages) == 1, name
    assert not any("neutral nowhere" in message for message in messages), "values are nobody's business"
