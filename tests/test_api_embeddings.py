"""/v1/embeddings and /encode: forms, formats, sizes, refusals, and servers that make vectors only."""

import base64
import json
import math
import threading
from array import array
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jaxserve.api import batch_lines
from jaxserve.api.embeddings import REFUSED_IN_EMBEDDINGS, REFUSED_IN_ENCODE
from jaxserve.store.sqlite import SQLiteStore
from jaxserve.text.embed import matryoshka_sizes
from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of
from tests.batch_inputs import finish, jsonl, lines_of, start
from tests.fakes import vector_of

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def server():
    with ApiServer() as server:
        yield server


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=True)


def embed(server: ApiServer, given: Any, **fields: Any) -> httpx2.Response:
    return server.post(PATH, {"model": MODEL, "input": given} | fields)


def test_a_reply_has_openais_shape_in_both_formats(server: ApiServer):
    texts = ["hello world", "é", "hello"]
    reply = embed(server, texts)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    num_tokens = sum(len(ids(text)) for text in texts)
    assert {name: body[name] for name in ("object", "model", "usage")} == {
        "object": "list",
        "model": MODEL,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    assert [set(item) for item in body["data"]] == [{"object", "index", "embedding"}] * 3
    for index, (item, text) in enumerate(zip(body["data"], texts, strict=True)):
        assert (item["object"], item["index"]) == ("embedding", index)
        assert item["embedding"] == pytest.approx(vector_of(ids(text), 8), abs=1e-7)
    coded = embed(server, texts, encoding_format="base64").json()
    for item, plain in zip(coded["data"], body["data"], strict=True):
        assert array("f", base64.b64decode(item["embedding"])).tolist() == plain["embedding"]
    assert embed(server, texts, encoding_format="float", user="u", dimensions=8).json() == body


def test_the_openai_client_reads_what_it_asks_for(server: ApiServer):
    for options in ({}, {"encoding_format": "float"}):  # without, the client asks for base64 and decodes it
        found: Any = server.openai.embeddings.create(model=MODEL, input=["hello", "world"], **options)
        for item, text in zip(found.data, ("hello", "world"), strict=True):
            assert item.embedding == pytest.approx(vector_of(ids(text), 8), abs=1e-7)
        assert found.usage.prompt_tokens == found.usage.total_tokens > 0


def test_input_comes_as_text_texts_ids_or_rows_of_ids():
    with ApiServer() as server:
        rows = [[5, 6, 7], [0]]
        for given, expected in (
            ("hello", [ids("hello")]),
            (["hello", "a b"], [ids("hello"), ids("a b")]),
            (rows[0], rows[:1]),
            (rows, rows),
        ):
            del server.engine.requests[:]
            body = embed(server, given).json()
            assert [list(request.token_ids) for request in server.engine.requests] == expected
            assert len(body["data"]) == len(expected)
        assert {request.task for request in server.engine.requests} == {"embed"}


def test_special_tokens_are_the_models_own_unless_switched_off(monkeypatch: pytest.MonkeyPatch):
    seen = []
    encode = TOKENIZER.encode_all

    def spy(texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        seen.append(add_special_tokens)
        return encode(texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(TOKENIZER, "encode_all", spy)
    with ApiServer() as server:
        del seen[:]
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            assert embed(server, "x", **fields).status_code == 200
    assert seen == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "empty_input"),
        ({"input": []}, "input", "empty_input"),
        ({"input": ["a", ""]}, "input", "empty_input"),
        ({"input": [[1], []]}, "input", "empty_input"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": ["a", 1]}, "input", "invalid_type"),
        ({"input": [[1.5]]}, "input", "invalid_type"),
        ({"input": [-1]}, "input", "invalid_type"),
        ({"input": ["x"] * 2049}, "input", None),
        ({"input": [512]}, "input", None),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"dimensions": "8"}, "dimensions", "invalid_type"),
        ({"dimensions": 4}, "dimensions", "unsupported_parameter"),
        ({"add_special_tokens": 1}, "add_special_tokens", "invalid_type"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"model": None}, "model", "invalid_type"),
    ],
)
def test_what_is_wrong_is_named(server: ApiServer, fields: dict, param: str, code: str | None):
    reply = server.post(PATH, json.dumps({"model": MODEL, "input": "hello"} | fields).encode())
    error = error_of(reply, 404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("path", "name", "rule"),
    [
        *((PATH, name, rule) for name, rule in REFUSED_IN_EMBEDDINGS.items()),
        *(("/encode", name, rule) for name, rule in REFUSED_IN_ENCODE.items()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_fields_of_embeddings_say_why(server: ApiServer, path: str, name: str, rule: Any):
    body = {"model": MODEL, "input": "x"} if path == PATH else {"text": "x"}
    error = error_of(server.post(path, body | {name: ["neutral nowhere"]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter") and rule.why in error["message"]
    for neutral in (None, *rule.neutral):
        assert server.post(path, body | {name: neutral}).status_code == 200


def test_2048_inputs_are_one_message_and_come_back_in_order():
    with ApiServer() as server:
        rows = [[index % 500, index // 500] for index in range(2048)]
        body = embed(server, rows).json()
        assert len(server.engine.batches) == 1
        assert [item["index"] for item in body["data"]] == list(range(2048))
        for index in (0, 1, 1000, 2047):
            assert body["data"][index]["embedding"] == pytest.approx(vector_of(rows[index], 8), abs=1e-7)


def test_the_whole_context_fits_and_one_token_more_does_not():
    with ApiServer(engine={"max_model_len": 20}) as server:
        assert embed(server, [1] * 20).status_code == 200
        error = error_of(embed(server, ["x", "hello " * 30]), 400)
        assert error["code"] == "context_length_exceeded"
        assert "Entry 1" in error["message"] and "20 tokens" in error["message"]


def test_dimensions_are_cut_where_the_model_declares_it():
    with ApiServer() as server:
        server.serving.matryoshka = ()
        whole = embed(server, "hello").json()["data"][0]["embedding"]
        short = embed(server, "hello", dimensions=3).json()["data"][0]["embedding"]
        length = math.sqrt(sum(value * value for value in whole[:3]))
        assert short == pytest.approx([value / length for value in whole[:3]], abs=1e-6)
        assert embed(server, "hello", dimensions=3, encoding_format="base64").status_code == 200
        assert "1 to 8" in error_of(embed(server, "hello", dimensions=9), 400)["message"]
        server.serving.matryoshka = (2, 4)
        assert len(embed(server, "hello", dimensions=4).json()["data"][0]["embedding"]) == 4
        assert "2, 4" in error_of(embed(server, "hello", dimensions=3), 400)["message"]


def test_the_model_declares_its_dimensions_in_config_json(tmp_path: Path):
    assert matryoshka_sizes(str(tmp_path)) is None
    for config, expected in (
        ({}, None),
        ({"is_matryoshka": False}, None),
        ({"is_matryoshka": True}, ()),
        ({"matryoshka_dimensions": [512, 64]}, (64, 512)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert matryoshka_sizes(str(tmp_path)) == expected


def test_encode_gives_the_same_vectors_by_sglangs_names(server: ApiServer):
    whole = embed(server, ["hello", "a b"]).json()["data"]
    one = server.post("/encode", {"text": "hello", "rid": "mine"}).json()
    assert one["embedding"] == whole[0]["embedding"]
    assert one["meta_info"] == {"id": "mine", "finish_reason": {"type": "stop"}, "prompt_tokens": len(ids("hello"))}
    for given in ({"text": ["hello", "a b"]}, {"input_ids": [ids("hello"), ids("a b")]}):
        found = server.post("/encode", given).json()
        assert [row["embedding"] for row in found] == [item["embedding"] for item in whole]
        assert len({row["meta_info"]["id"] for row in found}) == 2
    assert server.post("/encode", {"input_ids": ids("hello")}).json()["embedding"] == one["embedding"]
    assert server.post("/encode", {"text": "hello", "dimensions": 8}).json()["embedding"] == one["embedding"]
    for wrong in ({}, {"text": "a", "input_ids": [1]}, {"text": ["a", "b"], "rid": "x"}, {"text": []}):
        error_of(server.post("/encode", wrong), 400)


def test_a_client_that_leaves_aborts_every_input():
    with ApiServer() as server:
        server.engine.hold()
        with httpx2.Client(base_url=server.url, timeout=0.3, trust_env=False) as client:
            for path, body in ((PATH, {"model": MODEL, "input": ["a", "b", "c"]}), ("/encode", {"text": ["a", "b"]})):
                with pytest.raises(httpx2.TimeoutException):
                    client.post(path, json=body)
        server.engine.wait_until(lambda: len(server.engine.aborted) == 5 and server.engine.num_running == 0)
        assert server.client.num_open == 0
        assert "jaxserve:num_aborted_requests_total" in server.http.get("/metrics").text


def test_abort_request_ends_an_embedding_by_its_id():
    with ApiServer() as server:
        server.engine.hold()

        def end() -> None:
            server.engine.wait_until(lambda: len(server.engine.requests) == 2)
            assert server.post("/abort_request", {"rid": "mine"}).json() == {"aborted": 1}

        thread = threading.Thread(target=end)
        thread.start()
        reply = server.post(PATH, {"model": MODEL, "input": ["a", "b"]}, headers={"x-request-id": "mine"})
        assert error_of(reply, 400)["code"] == "request_aborted"
        thread.join()


def test_more_inputs_than_the_server_ever_takes_are_a_400():
    with ApiServer() as server:
        server.client.max_open_requests = 3
        assert embed(server, ["a"] * 3).status_code == 200
        assert "(3)" in error_of(embed(server, ["a"] * 4), 400)["message"]


def test_vectors_are_counted_and_timed(server: ApiServer):
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"jaxserve:{name}{{"))

    names = ("num_requests_total", "request_success_total", "e2e_request_latency_seconds_count")
    before = [value(name) for name in names]
    embed(server, ["a", "b"])
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 2, 1]
    assert value("num_open_requests") == 0


@pytest.mark.parametrize("how", ["an encoder", "--is-embedding"])
def test_a_server_of_embeddings_says_so_to_those_who_chat(how: str):
    options: dict[str, Any] = {"engine": {"generates": False}} if how == "an encoder" else {"embedding_only": True}
    with ApiServer(**options) as server:
        assert embed(server, "hello").status_code == 200
        for reply in (server.chat(), server.chat(stream=True), server.complete(), server.complete(stream=True)):
            error = error_of(reply, 400)
            assert error["code"] == "model_not_generative" and how in error["message"]
            assert "/v1/embeddings" in error["message"]
        assert server.http.get("/health_generate").status_code == 200
        assert {request.task for request in server.engine.requests} == {"embed"}
        assert server.http.get("/get_model_info").json()["is_generation"] is False
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == [MODEL]
        assert server.http.get("/health").status_code == 200


def test_a_chat_server_embeds_too(server: ApiServer):
    assert server.complete().status_code == 200 and embed(server, "hello").status_code == 200
    assert server.http.get("/get_model_info").json()["is_generation"] is True


def test_an_engine_without_vectors_says_so():
    with ApiServer(engine={"embedding_size": 0}) as server:
        assert "no embeddings" in error_of(embed(server, "hello"), 400)["message"]
        error_of(server.post("/encode", {"text": "hello"}), 400)


def test_an_engine_that_dies_is_a_503():
    with ApiServer() as server:
        server.engine.hold()
        before = len(server.engine.requests)

        def die() -> None:
            server.engine.wait_until(lambda: len(server.engine.requests) > before)
            server.engine.die()

        thread = threading.Thread(target=die)
        thread.start()
        error_of(embed(server, "hello"), 503)
        thread.join()


def test_lines_of_a_batch_are_what_the_online_route_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    bodies = [
        {"input": "hello"},
        {"input": ["a", "b"], "encoding_format": "base64"},
        {"input": ""},
    ]
    lines = [
        {"custom_id": str(index), "method": "POST", "url": PATH, "body": {"model": MODEL} | body}
        for index, body in enumerate(bodies)
    ]
    with ApiServer(store=store) as server:
        batch = finish(server.openai, start(server.openai, jsonl(lines), PATH))
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert {request.priority for request in server.engine.requests} == {1}
        for file_id, count in ((batch.output_file_id, 2), (batch.error_file_id, 1)):
            found = lines_of(server.openai, file_id)
            assert len(found) == count
            for line in found:
                online = server.post(PATH, lines[int(line["custom_id"])]["body"])
                assert line["response"]["status_code"] == online.status_code
                assert line["response"]["body"] == online.json()
        assert batch.usage.input_tokens == len(ids("hello")) + len(ids("a")) + len(ids("b"))
        assert batch.usage.output_tokens == 0
        many = [
            {"custom_id": str(index), "method": "POST", "url": PATH, "body": {"model": MODEL, "input": ["x"] * 5}}
            for index in range(3)
        ]
        monkeypatch.setattr(batch_lines, "MAX_INPUTS", 10)
        batch = finish(server.openai, start(server.openai, jsonl(many[:2]), PATH))
        assert batch.status == "completed" and batch.request_counts.completed == 2
        batch = finish(server.openai, start(server.openai, jsonl(many), PATH))
        assert batch.status == "failed" and batch.errors.data[0].code == "too_many_inputs"
    store.close()
