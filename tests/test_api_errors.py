"""Whatever is sent, the answer has OpenAI's error shape and the right status, and nothing is left running."""

import http.client
import json

import pytest

from jaxserve.config import ServerConfig
from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of, events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world", engine={"max_model_len": 256}) as server:
        yield server
        assert server.client.num_open == 0 and server.engine.num_running == 0


BODIES = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b"17",
    b"\xff\xfe",
    b'{"model": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b"[" * 100_000,
    b'{"a":' * 5_000,
    b'{"model": "test-model"',
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:20]))
def test_what_is_no_json_object_is_400(server, path, body):
    assert error_of(server.post(path, body), 400)["type"] == "invalid_request_error"


def test_the_content_type_does_not_matter(server):
    body = json.dumps({"model": MODEL, "messages": HI}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
        assert server.post(CHAT, body, headers={"content-type": kind}).status_code == 200


CHAT_FIELDS = [
    ("messages", None),
    ("messages", "hi"),
    ("messages", []),
    ("messages", [1]),
    ("messages", [{}]),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": ["user"], "content": "x"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": 7}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "user", "content": [{"type": ["text"]}]}]),
    ("messages", [{"role": "user", "content": [None]}]),
    ("messages", [{"role": "user", "content": "x", "name": 3}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": "1"}]),
    ("messages", [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
    ("max_completion_tokens", 0),
    ("max_tokens", 0),
    ("logprobs", 1),
    ("top_logprobs", 21),
    ("top_logprobs", 2),
    ("continue_final_message", True),
    ("chat_template_kwargs", []),
    ("echo", True),
    ("best_of", 2),
    ("functions", [{"name": "f"}]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("modalities", ["text", "audio"]),
]
COMPLETION_FIELDS = [
    ("prompt", None),
    ("prompt", 1),
    ("prompt", {}),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [""]),
    ("prompt", ["a", 1]),
    ("prompt", [1.5]),
    ("prompt", [-1]),
    ("prompt", [True]),
    ("prompt", [10**6]),
    ("prompt", [2**70]),
    ("prompt", [[[1]]]),
    ("prompt", ["a"] * 3000),
    ("logprobs", True),
    ("logprobs", 21),
    ("suffix", "x"),
    ("best_of", 0),
    ("echo", "yes"),
    ("max_completion_tokens", 3),
]
COMMON_FIELDS = [
    ("model", None),
    ("model", 3),
    ("n", 0),
    ("n", -1),
    ("n", 129),
    ("n", "2"),
    ("n", True),
    ("n", 1.5),
    ("max_tokens", -5),
    ("max_tokens", 10**9),
    ("max_tokens", 10**30),
    ("max_tokens", "5"),
    ("temperature", 9),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", []),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", [1]),
    ("logit_bias", {str(n): 1 for n in range(2000)}),
    ("seed", 2**64),
    ("seed", 1.5),
    ("seed", "x"),
    ("stop", ["a"] * 5),
    ("stop", ""),
    ("stop", [1]),
    ("stop", 4),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**6]),
    ("stop_token_ids", list(range(100))),
    ("min_tokens", -1),
    ("min_tokens", 10**6),
    ("ignore_eos", 1),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", 3),
    ("rid", ""),
    ("rid", "x" * 1000),
    ("use_beam_search", True),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", True),
    ("lora_path", "x"),
    ("cache_salt", "x"),
]
CASES = [(CHAT, *case) for case in CHAT_FIELDS + COMMON_FIELDS] + [
    (COMPLETIONS, *case) for case in COMPLETION_FIELDS + COMMON_FIELDS
]


@pytest.mark.parametrize(("path", "field", "value"), CASES, ids=lambda value: repr(value)[:40])
def test_a_wrong_value_is_400_and_names_the_field(server, path, field, value):
    base = {"messages": HI} if path == CHAT else {"prompt": "hello"}
    error = error_of(server.post(path, {"model": MODEL} | base | {field: value}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] and error["param"].split(".")[0] in (field, "max_tokens", "logprobs"), error
    assert len(error["message"]) < 600


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_missing_field_is_named(server, path):
    assert error_of(server.post(path, {"messages": HI} if path == CHAT else {"prompt": "x"}), 400)["param"] == "model"
    missing = "messages" if path == CHAT else "prompt"
    error = error_of(server.post(path, {"model": MODEL}), 400)
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


def test_errors_of_a_streamed_request_come_before_its_first_byte(server):
    assert error_of(server.chat(stream=True, temperature=9), 400)["param"] == "temperature"
    assert error_of(server.complete(stream=True, prompt="w " * 60_000), 400)["code"] == "context_length_exceeded"


def test_a_context_overflow_has_openais_code(server):
    words = "word " * 60_000
    error = error_of(server.chat(messages=[{"role": "user", "content": words}]), 400)
    assert error["code"] == "context_length_exceeded" and "256" in error["message"]
    assert error_of(server.complete(max_tokens=256), 400)["code"] == "context_length_exceeded"


def test_neutral_values_of_unsupported_fields_and_unknown_fields_are_accepted(server):
    neutral = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "functions": None,
        "audio": None,
        "modalities": ["text"],
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "something_new": {"x": [1]},
        "n": None,
        "stop": None,
        "logit_bias": None,
        "stream_options": None,
    }
    assert server.chat(**neutral).status_code == 200
    assert server.complete(suffix=None, best_of=1, prompt_logprobs=None, user="me").status_code == 200


def test_an_unknown_model_is_404_unless_any_is_allowed(server):
    for reply in (server.chat(model="gpt-4"), server.complete(model=""), server.http.get("/v1/models/gpt-4")):
        error = error_of(reply, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    with ApiServer("x", allow_any_model=True) as lenient:
        assert lenient.chat(model="gpt-4").json()["model"] == "gpt-4"


def test_unknown_routes_and_methods_have_the_same_shape(server):
    assert error_of(server.http.get("/nope"), 404)["code"] == "not_found"
    assert error_of(server.post("/v1/audio/speech", {}), 404)["code"] == "not_found"
    reply = server.http.get(CHAT)
    assert error_of(reply, 405)["code"] == "method_not_allowed" and reply.headers["allow"] == "POST"


def test_bodies_over_the_limit_are_413_declared_or_not():
    with ApiServer("x", max_body_size=1) as server:
        assert error_of(server.post(CHAT, b" " * 2_000_000), 413)["code"] == "request_too_large"
        pieces = (b" " * 100_000 for _ in range(20))
        assert error_of(server.http.post(CHAT, content=pieces), 413)["code"] == "request_too_large"
        assert server.chat().status_code == 200


def test_the_api_key_guards_everything_but_health_and_metrics():
    with ApiServer("x", api_key="s\u00e9cret") as server:
        good = {"Authorization": "Bearer s\u00e9cret".encode()}
        assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200
        for bad in ({}, {"Authorization": "Bearer None"}, {"Authorization": "Basic s"}, {"Authorization": b"\xff\xfe"}):
            reply = server.http.get("/v1/models", headers=bad)
            error = error_of(reply, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        assert server.http.get("/v1/models", headers=good).status_code == 200
        assert "s\u00e9cret" not in server.http.get("/get_server_info", headers=good).text
        assert error_of(server.chat(), 401)


def test_any_bearer_token_is_fine_without_a_key(server):
    assert server.http.get("/v1/models", headers={"Authorization": "Bearer None"}).status_code == 200


def test_every_reply_has_a_request_id_and_keeps_the_clients(server):
    assert len(server.http.get("/health").headers["x-request-id"]) == 32
    assert server.http.get("/nope", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    assert server.http.get("/health", headers={"x-request-id": "x" * 500}).headers["x-request-id"] != "x" * 500


def test_a_request_that_stops_in_the_middle_of_its_body_harms_nobody(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.putrequest("POST", CHAT)
    connection.putheader("content-length", "1000")
    connection.endheaders(b'{"model"')
    connection.close()
    assert server.chat().status_code == 200


def test_a_bug_is_500_with_openais_shape_and_no_details(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.app.state.serving, "check_model", broken)
    reply = server.chat()
    assert error_of(reply, 500)["code"] == "internal_error" and "secret" not in reply.text
    assert reply.headers["x-request-id"]


def test_log_probabilities_of_minus_infinity_are_json():
    from jaxserve.api.logprobs import chat_logprobs
    from jaxserve.types import TokenLogprobs

    item = TokenLogprobs(float("-inf"), (5,), (float("nan"),))
    entry = chat_logprobs(TOKENIZER, [5], [item])["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_defaults_are_the_documented_ones():
    config = ServerConfig()
    assert (config.host, config.port, config.enable_cache_report) == ("127.0.0.1", 30000, True)


def test_n_and_prompts_beyond_what_the_server_ever_takes_are_400_not_503():
    with ApiServer("x") as server:
        server.client.max_open_requests = 4
        assert error_of(server.chat(n=5), 400)["param"] == "n"
        assert len(events(server.chat(n=4, stream=True))) >= 4
