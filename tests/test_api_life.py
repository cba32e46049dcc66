"""Readiness, overload, clients that leave, and an engine that dies."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Progress
from tests.api_server import MODEL, ApiServer, error_of
from tests.fakes import write_byte_level

ENDLESS = {"max_tokens": 4000, "ignore_eos": True}


def slowly(request, index) -> int:
    """A script of endless text, five milliseconds a token."""
    time.sleep(0.005)
    return 40 + index % 20


def wait_until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_nothing_but_health_answers_200_before_ready():
    with ApiServer("x", engine={"announce_ready": False}) as server:
        server.engine.send(Progress("compile", 7, 18, "S=16"))
        wait_until(lambda: server.client.progress is not None)
        reply = server.http.get("/health")
        assert reply.status_code == 503
        assert {key: reply.json()[key] for key in ("stage", "done", "total")} == {
            "stage": "compile",
            "done": 7,
            "total": 18,
        }
        for reply in (server.http.get("/v1/models"), server.chat(), server.complete()):
            assert error_of_starting(reply)["code"] == "server_starting"
            assert (reply.json()["stage"], reply.json()["done"], reply.json()["total"]) == ("compile", 7, 18)
        assert server.http.get("/metrics").status_code == 200
        assert server.http.get("/version").status_code == 200
        server.engine.become_ready()
        wait_until(lambda: server.http.get("/health").status_code == 200)
        assert server.chat().status_code == 200


def error_of_starting(reply):
    assert reply.status_code == 503 and reply.headers["retry-after"]
    return reply.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_a_client_that_leaves_aborts_every_choice(route, stream):
    with ApiServer("x", script=slowly) as server:
        body = {"model": MODEL, "stream": stream, "n": 3, **ENDLESS}
        body |= {"messages": [{"role": "user", "content": "hi"}]} if route == "chat" else {"prompt": ["a", "b"]}
        path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
        expected = 3 if route == "chat" else 6
        with httpx2.Client(base_url=server.url, timeout=0.3, trust_env=False) as client:
            if stream:
                with client.stream("POST", path, json=body) as reply:
                    next(reply.iter_bytes())
            else:
                with pytest.raises(httpx2.TimeoutException):
                    client.post(path, json=body)
        server.engine.wait_until(lambda: len(server.engine.aborted) == expected)
        wait_until(lambda: server.engine.num_running == 0 and server.client.num_open == 0)
        assert "jaxserve:num_aborted_requests_total" in server.http.get("/metrics").text


def test_an_overloaded_server_says_503_with_retry_after():
    with ApiServer("x", script=slowly) as server:
        server.client.max_open_requests = 1
        endless = {"model": MODEL, "prompt": "a", "stream": True, **ENDLESS}
        with (
            httpx2.Client(base_url=server.url, trust_env=False) as holder,
            holder.stream("POST", "/v1/completions", json=endless),
        ):
            for stream in (False, True):
                reply = server.complete(stream=stream)
                assert error_of(reply, 503)["code"] == "server_overloaded" and reply.headers["retry-after"]
        wait_until(lambda: server.client.num_open == 0)
        assert server.complete(max_tokens=2).status_code == 200


def test_when_the_engine_dies_streams_end_with_an_error_and_health_turns_503():
    with ApiServer("x", script=slowly) as server:
        request = {"model": MODEL, "prompt": "a", "stream": True, **ENDLESS}
        lines = []
        with server.http.stream("POST", "/v1/completions", json=request) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                if not lines:
                    server.engine.die()
                if line:
                    lines.append(line)
        assert lines[-1] == "data: [DONE]"
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
        reply = server.http.get("/health")
        assert reply.status_code == 503 and reply.json()["status"] == "failed"
        assert error_of_starting(server.chat())["code"] == "server_failed"


def test_native_routes_answer():
    with ApiServer("hello world", engine={"max_model_len": 256}) as server:
        assert server.http.get("/health_generate").status_code == 200
        models = server.openai.models.list().data
        assert [model.id for model in models] == [MODEL] and models[0].max_model_len == 256
        assert server.openai.models.retrieve(MODEL).root == "/models/test"
        info = server.http.get("/get_model_info").json()
        assert (info["model_path"], info["is_generation"]) == ("/models/test", True)
        assert server.http.get("/get_server_info").json()["engine"]["page_size"] == 16
        tokens = server.post("/tokenize", {"prompt": "hello world"}).json()
        assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 256
        assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["text"] == "hello world"
        rows = server.post("/v1/tokenize", {"prompt": ["a", "bc"]}).json()
        assert server.post("/v1/detokenize", {"tokens": rows["tokens"]}).json()["prompt"] == ["a", "bc"]
        chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
        assert chat["count"] > tokens["count"]
        assert error_of(server.post("/detokenize", {"tokens": [10**6]}), 400)["param"] == "tokens"
        assert server.post("/flush_cache").status_code == server.http.get("/flush_cache").status_code == 200
        server.engine.wait_until(lambda: server.engine.num_flushes == 2)
        document = server.http.get("/openapi.json")
        assert "/v1/chat/completions" in document.json()["paths"]
        known = document.json().get("components", {}).get("schemas", {})
        assert set(re.findall(r'"#/components/schemas/(\w+)"', document.text)) <= set(known), "refers to nothing"


def test_tokens_around_a_text_can_be_left_out(tmp_path, monkeypatch):
    with_bos = Tokenizer.from_folder(write_byte_level(tmp_path, bos=True))
    with ApiServer("x") as server:
        monkeypatch.setattr(server.serving, "tokenizer", with_bos)
        full, bare = (
            server.post("/tokenize", {"prompt": "hi", "add_special_tokens": add}).json()["tokens"]
            for add in (True, False)
        )
        assert full == [with_bos.bos_token_id, *bare]
        shown, plain = (
            server.post("/detokenize", {"tokens": full, "skip_special_tokens": skip}).json()["text"]
            for skip in (False, True)
        )
        assert plain == "hi" and shown == "<|endoftext|>hi"


def test_a_model_name_may_hold_slashes():
    with ApiServer("x", served_model_names=("org/name", "short")) as server:
        assert server.openai.models.retrieve("org/name").id == "org/name"
        assert [model.id for model in server.openai.models.list()] == ["org/name", "short"]
        assert server.chat(model="short").json()["model"] == "short"


def test_metrics_count_requests_tokens_and_times():
    with ApiServer("hello world") as server:
        server.chat()
        server.complete(n=2, max_tokens=1)
        text = server.http.get("/metrics").text
        label = '{model_name="test-model"}'
        assert f"jaxserve:num_requests_total{label} 2.0" in text
        assert 'jaxserve:request_success_total{finished_reason="length",model_name="test-model"} 2.0' in text
        assert f"jaxserve:time_to_first_token_seconds_count{label} 3.0" in text
        assert f"jaxserve:e2e_request_latency_seconds_count{label} 2.0" in text
        assert f"jaxserve:num_open_requests{label} 0.0" in text
        assert 'jaxserve:compilations_total{model_name="test-model",phase="serving"} 0.0' in text
        for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "kv_cache_usage_perc", "cache_hit_rate"):
            assert f"jaxserve:{name}{label}" in text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "prompt_logprobs": 1}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "ignore_eos": True},
        ),
        ("/v1/responses", {"input": "a", "max_output_tokens": 60, "ignore_eos": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "ignore_eos": True}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}),
    ],
)
def test_what_is_open_when_the_server_begins_to_stop_is_answered_in_full(path, fields):
    with ApiServer(script=slowly) as server, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(server.post, path, {"model": MODEL, **fields})
        wait_until(lambda: server.engine.num_running == 1)
        server.serving.stopping = True
        assert server.post(path, {"model": MODEL, **fields}).status_code == 503
        reply = asked.result(10)
        assert reply.status_code == 200, reply.text
        assert ("prompt_logprobs" in fields) == ('"prompt_logprobs"' in reply.text)
