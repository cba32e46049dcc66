"""The real server, the default model and OpenAI's own client: what a user meets. (test_api_*: the same doors, in more
detail, before a scripted engine.)"""

import http.client
import json
import re
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

from tests.api_server import error_of
from tests.real_engines import RealServer, eventually

NOTEBOOK_MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"
CAPITAL = "What is the capital of France?"
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 4711, "max_tokens": 40}


def _joined(stream: Any) -> dict[int, dict[str, Any]]:
    """A stream's chunks -> per choice: text, finish reasons, matched stops and log-probabilities; usage under -1."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        if chunk.usage is not None:
            choices[-1] = {"usage": chunk.usage}
        for choice in chunk.choices:
            mine = choices.setdefault(choice.index, {"text": "", "reasons": [], "matched": [], "logprobs": []})
            mine["text"] += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            if choice.finish_reason is not None:
                mine["reasons"].append(choice.finish_reason)
                mine["matched"].append(choice.matched_stop)
            mine["logprobs"] += _logprobs(choice)
    return choices


def _logprobs(choice: Any) -> list[float]:
    if choice.logprobs is None:
        return []
    if hasattr(choice.logprobs, "token_logprobs"):
        return list(choice.logprobs.token_logprobs)
    return [entry.logprob for entry in choice.logprobs.content]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sampling", [{"max_tokens": 40}, SEEDED], ids=["greedy", "seeded"])
def test_streamed_chat_is_what_the_whole_reply_is(live: RealServer, sampling: dict[str, Any], n: int):
    options = sampling | {"n": n, "logprobs": True, "top_logprobs": 2}
    whole = live.chat("Tell me about the sea.", **options)
    pieces = _joined(
        live.chat("Tell me about the sea.", stream=True, stream_options={"include_usage": True}, **options)
    )
    for choice in whole.choices:
        streamed = pieces[choice.index]
        assert streamed["text"] == choice.message.content
        assert streamed["reasons"] == [choice.finish_reason] and streamed["matched"] == [choice.matched_stop]
        assert streamed["logprobs"] == pytest.approx(_logprobs(choice), abs=1e-4)
    usage = pieces[-1]["usage"]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert len(pieces) == n + 1


@pytest.mark.parametrize("sampling", [{"max_tokens": 40}, SEEDED], ids=["greedy", "seeded"])
def test_streamed_completions_are_what_the_whole_reply_is(live: RealServer, sampling: dict[str, Any]):
    prompts = ["The sea is", "Once upon a time"]
    options = sampling | {"n": 2, "logprobs": 3}
    whole = live.complete(prompts, **options)
    pieces = _joined(live.complete(prompts, stream=True, **options))
    assert sorted(pieces) == [0, 1, 2, 3]
    for choice in whole.choices:
        streamed = pieces[choice.index]
        assert streamed["text"] == choice.text and streamed["reasons"] == [choice.finish_reason]
        assert streamed["logprobs"] == pytest.approx(_logprobs(choice), abs=1e-4)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(_logprobs(choice))


def test_how_an_answer_ends_is_said(live: RealServer):
    ended = live.chat(CAPITAL, max_tokens=48).choices[0]
    assert (ended.finish_reason, ended.matched_stop) == ("stop", 2)
    cut = live.chat(CAPITAL, max_tokens=3).choices[0]
    assert (cut.finish_reason, cut.matched_stop) == ("length", None)
    assert cut.message.content == "The capital of"
    id_stop = live.chat(CAPITAL, max_tokens=48, extra_body={"stop_token_ids": [314]}).choices[0]
    assert (id_stop.finish_reason, id_stop.matched_stop, id_stop.message.content) == (
        "stop",
        314,
        "The capital of France",
    )
    beyond = live.chat(CAPITAL, max_tokens=20, extra_body={"ignore_eos": True})
    assert beyond.choices[0].finish_reason == "length" and beyond.usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("France", "The capital of "),
        ("tal of Fr", "The capi"),  # begins and ends inside of tokens
        (["Paris is", "Par"], "The capital of France is "),
        ("nowhere", "The capital of France is Paris."),
    ],
)
def test_a_stop_string_never_leaks(live: RealServer, stop: Any, text: str, stream: bool):
    reply = live.chat(CAPITAL, max_tokens=48, stop=stop, stream=stream)
    if stream:
        piece = _joined(reply)[0]
        got, reasons, matched = piece["text"], piece["reasons"], piece["matched"][0]
    else:
        choice = reply.choices[0]
        got, reasons, matched = choice.message.content, [choice.finish_reason], choice.matched_stop
    assert got == text and reasons == ["stop"]
    assert matched == 2 if stop == "nowhere" else matched in ([stop] if isinstance(stop, str) else stop)


def test_usage_counts_what_the_prefix_cache_gave(live: RealServer):
    live.flush()
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    first, second, longer = (
        live.complete(text, max_tokens=2).usage for text in (prompt, prompt, prompt + "And then it sleeps.")
    )
    page = live.engine["page_size"]
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (first.prompt_tokens - 1) // page * page
    assert longer.prompt_tokens_details.cached_tokens >= first.prompt_tokens - 2 * page
    assert second.total_tokens == second.prompt_tokens + second.completion_tokens


def test_seeds_repeat_a_text_and_choices_differ(live: RealServer):
    one, again = (live.chat("Tell me a story.", n=3, **SEEDED) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    other = live.chat("Tell me a story.", **SEEDED | {"seed": 4712})
    assert other.choices[0].message.content != texts[0]
    unseeded = {live.chat("Tell me a story.", temperature=1.0, max_tokens=24).choices[0].message.content for _ in "ab"}
    assert len(unseeded) == 2


def test_more_clients_than_rows_are_all_served(live: RealServer):
    def ask(n: int) -> Any:
        return live.complete(f"Number {n % 6} is", max_tokens=8 + n % 6, extra_body={"ignore_eos": True})

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(ask, range(40)))
    assert [reply.usage.completion_tokens for reply in replies] == [8 + n % 6 for n in range(40)]
    assert all(replies[n].choices[0].text == replies[n % 6].choices[0].text for n in range(40))
    live.wait_idle()


def test_a_chat_model_embeds_beside_its_chats(live: RealServer):
    """Whole prompts, whatever the prefix cache holds, in chunks or not, alone or among others that generate."""
    texts = ["The sea is blue.", "hello", "The sea is blue. " * 60, "The sea is blue."]
    create: Any = live.client.embeddings.create
    with ThreadPoolExecutor(3) as pool:
        chats = [pool.submit(live.chat, "Count to ten.", max_tokens=24) for _ in range(3)]
        together = create(model=live.model, input=texts)
        assert all(chat.result().choices[0].message.content for chat in chats)
    assert [item.index for item in together.data] == [0, 1, 2, 3]
    vectors = np.array([item.embedding for item in together.data])
    assert vectors.shape == (4, live.engine["embedding_size"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = [create(model=live.model, input=text, encoding_format="float").data[0].embedding for text in texts]
    np.testing.assert_allclose(vectors, np.array(alone), atol=1e-4)
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-4)
    assert vectors[0] @ vectors[1] < 0.999
    ids = [live.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    assert together.usage.prompt_tokens == sum(map(len, ids))
    by_ids = create(model=live.model, input=ids[:2])
    np.testing.assert_allclose(np.array([item.embedding for item in by_ids.data]), vectors[:2], atol=1e-4)


def test_models_and_health(live: RealServer):
    assert [model.id for model in live.client.models.list()] == [live.model, NOTEBOOK_MODEL]
    assert live.client.models.retrieve(NOTEBOOK_MODEL).id == NOTEBOOK_MODEL
    assert live.http.get("/health").status_code == live.http.get("/health_generate").status_code == 200


# Abuse

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ABUSE: list[tuple[int, dict[str, Any] | bytes]] = [
    (400, b""),
    (400, b"{"),
    (400, b'"text"'),
    (400, b"[" * 100_000),
    (400, b'{"model": "SmolLM2-135M-Instruct", "temperature": NaN, "prompt": "x", "messages": []}'),
    (400, {"n": 0}),
    (400, {"temperature": 9}),
    (400, {"temperature": "hot"}),
    (400, {"max_tokens": -1}),
    (400, {"max_tokens": 10**9}),
    (400, {"top_p": 0}),
    (400, {"logit_bias": {"49152": 1}}),
    (400, {"stop": ["a"] * 5}),
    (400, {"stop": ""}),
    (400, {"seed": 2**64}),
    (400, {"stop_token_ids": list(range(100))}),
    (404, {"model": "gpt-17"}),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_abuse_is_refused_in_openais_shape_and_leaves_nothing(live: RealServer, path: str, stream: bool):
    good: dict[str, Any] = {"model": live.model, "max_tokens": 4, "stream": stream}
    good |= {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    for status, bad in ABUSE:
        reply = live.http.post(path, content=bad) if isinstance(bad, bytes) else live.http.post(path, json=good | bad)
        error_of(reply, status)
    for bad in ({"messages": "hi"}, {"messages": []}, {"messages": [{"role": "wizard", "content": "x"}]}):
        if path == CHAT:
            error_of(live.http.post(path, json=good | bad), 400)
    for prompt in (None, 7, [], [[]], [-1], [49152], [True]):
        if path == COMPLETIONS:
            error_of(live.http.post(path, json=good | {"prompt": prompt}), 400)
    assert live.wait_idle()["num_queue_reqs"] == 0
    assert live.http.post(path, json=good).status_code == 200


def test_sixty_thousand_words_are_too_many(live: RealServer):
    words = "word " * 60_000
    with pytest.raises(openai.BadRequestError) as refusal:
        live.chat(words)
    assert refusal.value.code == "context_length_exceeded" and "8192" in refusal.value.message
    with pytest.raises(openai.BadRequestError):
        live.complete(words, stream=True)
    live.wait_idle()


def test_unknown_routes_and_methods(live: RealServer):
    error_of(live.http.post("/v1/nothing", json={}), 404)
    error_of(live.http.get(CHAT), 405)
    error_of(live.http.get("/v1/models/gpt-17"), 404)


def _leave(live: RealServer, body: dict[str, Any], *, after_bytes: int) -> None:
    """Sends a request and hangs up after so many bytes of the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=120)
    connection.request("POST", COMPLETIONS, json.dumps({"model": live.model, "ignore_eos": True, **body}))
    if after_bytes:
        reply = connection.getresponse()
        assert reply.status == 200
        reply.read(after_bytes)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_before_the_first_token_is_forgotten(live: RealServer, stream: bool):
    aborted = live.metrics()["num_aborted_requests_total"]
    prompt = [1000 + n for n in range(3000)]
    for n in range(3):
        _leave(live, {"prompt": [500 + n, *prompt], "max_tokens": 5000, "stream": stream}, after_bytes=0)
    assert eventually(lambda: live.metrics()["num_aborted_requests_total"] == aborted + 3, 60)
    values = live.wait_idle(60)
    assert values["generation_tokens_total"] < values["prompt_tokens_total"] + 3000


def test_clients_that_leave_in_mid_stream_are_forgotten(live: RealServer):
    before = live.metrics()

    def visit(n: int) -> None:
        body = {"prompt": f"{n} Once upon a time", "max_tokens": 4000, "stream": True, "n": 1 + n % 2}
        _leave(live, body, after_bytes=200 + 100 * n)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(12)))
    assert eventually(
        lambda: live.metrics()["num_aborted_requests_total"] == before["num_aborted_requests_total"] + 12, 60
    )
    after = live.wait_idle(60)
    assert after["num_cached_pages"] <= after["num_pages"]
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 12 * 1000


def test_the_log_has_the_lines_people_grep_for(live: RealServer):
    live.complete("A long line for the log:", max_tokens=90, extra_body={"ignore_eos": True})
    output = live.output()
    assert re.search(
        r"TP0\] Prefill batch\. #new-seq: \d+, #new-token: \d+, #cached-token: \d+, .*#cache_miss: 0\n", output
    )
    assert re.search(
        r"TP0\] Decode batch\. #running-req: \d+, #token: \d+, .*gen throughput .*#cache_miss: 0\n", output
    )
    assert "Traceback" not in output and "The server is fired up and ready to roll!" in output
    levels = Counter(re.findall(r"\] (WARNING|ERROR): ", output))
    assert not levels["ERROR"], levels


def test_metrics_add_up_and_nothing_was_compiled(live: RealServer):
    values = live.wait_idle()
    assert values["compilations_total:serving"] == 0
    assert values["prompt_tokens_total"] > values["cached_tokens_total"] > 0
    assert values["num_pages"] >= values["num_cached_pages"] > 0
