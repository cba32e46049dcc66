"""The real all-MiniLM-L6-v2 behind the real server, against vectors of its published pipeline, recorded with torch."""

import base64
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.batch_inputs import finish, jsonl, lines_of, start
from tests.real_engines import RealServer

MODEL = "all-MiniLM-L6-v2"
RECORDED = json.loads((Path(__file__).parent / "data" / "minilm_vectors.json").read_text(encoding="utf-8"))["texts"]
TEXTS = [item["text"] for item in RECORDED]
EXPECTED = np.array([item["vector"] for item in RECORDED])


@pytest.fixture(scope="module")
def server(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    log: Path = tmp_path_factory.mktemp("minilm") / "server.log"
    with RealServer("--model", MODEL, "--cache-dir", cache_dir, log=log) as server:
        yield server.wait()
        server.wait_idle()
        assert server.metrics()["compilations_total:serving"] == 0, "something was compiled after ready"


def embed(server: RealServer, given: Any, **options: Any) -> np.ndarray:
    """Through the openai client, which asks for base64 unless told otherwise."""
    create: Any = server.client.embeddings.create
    reply = create(model=MODEL, input=given, **options)
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data])


def test_minilm_equals_its_published_pipeline(server: RealServer):
    assert server.engine["embedding_size"] == 384 and server.engine["max_model_len"] == 256
    for options in ({}, {"encoding_format": "float"}):
        found = embed(server, TEXTS, **options)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert ((found * EXPECTED).sum(axis=1) >= 0.9999).all()
        np.testing.assert_allclose(found, EXPECTED, atol=2e-6)


def test_minilm_says_the_same_in_any_company_and_order(server: RealServer):
    alone = np.concatenate([embed(server, text) for text in TEXTS])
    np.testing.assert_allclose(embed(server, TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(embed(server, TEXTS[::-1]), alone[::-1], atol=1e-5)
    np.testing.assert_allclose(embed(server, [item["token_ids"] for item in RECORDED]), alone, atol=1e-5)
    many = embed(server, TEXTS[:10] * 10)
    np.testing.assert_allclose(many, np.concatenate([alone[:10]] * 10), atol=1e-5)


def test_minilm_finds_what_means_the_same(server: RealServer):
    question, same, other = embed(server, [TEXTS[6], TEXTS[7], TEXTS[8]])
    assert question @ same > 0.5 > 0.3 > question @ other


def test_an_encoder_server_is_whole(server: RealServer):
    names = [model.id for model in server.client.models.list().data]
    assert names == [MODEL]
    assert server.http.get("/get_model_info").json()["is_generation"] is False
    assert server.http.get("/health_generate").status_code == 200
    for path in ("/v1/loads", "/get_load", "/get_server_info", "/metrics"):
        assert server.http.get(path).status_code == 200, path
    with pytest.raises(openai.BadRequestError, match="its model is an encoder"):
        server.chat("hello")
    for path, body in (("/generate", {"text": "hello"}), ("/v1/responses", {"model": MODEL, "input": "hello"})):
        reply = server.http.post(path, json=body)
        assert reply.status_code == 400 and "its model is an encoder" in reply.text, reply.text
    with pytest.raises(openai.BadRequestError, match="256"):
        embed(server, "word " * 300)
    with pytest.raises(openai.BadRequestError, match="384"):
        embed(server, "hello", dimensions=100)
    body = server.http.post("/tokenize", json={"prompt": "Hello worlds"}).json()
    assert body["tokens"] == [101, 7592, 8484, 102]
    text = server.http.post("/detokenize", json={"tokens": body["tokens"]}).json()["text"]
    assert text == "hello worlds"


def test_a_batch_of_texts_on_an_encoder(server: RealServer):
    lines = [
        {"custom_id": str(index), "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": text}}
        for index, text in enumerate(TEXTS)
    ]
    lines[0]["body"]["encoding_format"] = "base64"
    batch = finish(server.client, start(server.client, jsonl(lines), "/v1/embeddings"), 60)
    assert batch.status == "completed" and batch.request_counts.completed == len(TEXTS)
    for line in lines_of(server.client, batch.output_file_id):
        vector = line["response"]["body"]["data"][0]["embedding"]
        index = int(line["custom_id"])
        vector = array("f", base64.b64decode(vector)) if index == 0 else vector
        np.testing.assert_allclose(vector, EXPECTED[index], atol=2e-6)
