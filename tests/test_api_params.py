"""Every sampling field has its effect on both generation routes, with the real server and the default model."""

import math
import time
from typing import Any

import pytest

from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of, events
from tests.fakes import say
from tests.real_engines import RealServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROUTES = pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
PROMPT = "The capital of France is"
LIST = "one two one two one two one two one two"


def body_of(path: str, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    base = {"model": model, "temperature": 0, "max_tokens": 6}
    asked = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    return base | asked | fields


def ask(live: RealServer, path: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """-> the whole reply, each choice with its text under "text"."""
    reply = live.http.post(path, json=body_of(path, live.model, prompt, **fields))
    assert reply.status_code == 200, reply.text
    value = reply.json()
    for choice in value["choices"]:
        choice.setdefault("text", choice.get("message", {}).get("content"))
    return value


_greedy: dict[tuple[str, str, int], str] = {}


def greedy(live: RealServer, path: str, prompt: str = PROMPT, max_tokens: int = 6) -> str:
    """What every comparison starts from, asked for once."""
    key = (path, prompt, max_tokens)
    if key not in _greedy:
        _greedy[key] = text_of(live, path, prompt, max_tokens=max_tokens, ignore_eos=True)
    return _greedy[key]


def text_of(live: RealServer, path: str, prompt: str = PROMPT, **fields: Any) -> str:
    return ask(live, path, prompt, **fields)["choices"][0]["text"]


def ids_of(live: RealServer, text: str) -> list[int]:
    return live.tokenizer.encode(text, add_special_tokens=False)


@ROUTES
def test_temperature_draws_and_zero_is_greedy(live: RealServer, path: str):
    assert text_of(live, path, seed=5, ignore_eos=True) == greedy(live, path)
    drawn = {text_of(live, path, temperature=2.0, seed=seed) for seed in range(2)}
    assert len(drawn) == 2 and greedy(live, path) not in drawn


@ROUTES
@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda limit: next(iter(limit)))
def test_each_limit_alone_makes_a_hot_draw_greedy(live: RealServer, path: str, limit: dict[str, Any]):
    assert text_of(live, path, temperature=2.0, seed=0, ignore_eos=True, **limit) == greedy(live, path)


@ROUTES
def test_a_seed_repeats_the_text_and_another_changes_it(live: RealServer, path: str):
    first, again, other = (text_of(live, path, temperature=1.5, seed=seed, max_tokens=8) for seed in (1, 1, 2))
    assert first == again != other


@ROUTES
def test_logit_bias_bans_and_forces_tokens(live: RealServer, path: str):
    first = ids_of(live, greedy(live, path))[0]
    assert ids_of(live, text_of(live, path, max_tokens=1, logit_bias={str(first): -100}))[0] != first
    word = ids_of(live, " zebra")
    assert len(word) >= 1
    forced = text_of(live, path, max_tokens=4, logit_bias={str(word[0]): 100})
    assert forced == live.tokenizer.decode([word[0]] * 4, skip_special_tokens=True)


@ROUTES
@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_each_penalty_makes_a_text_repeat_itself_less(live: RealServer, path: str, penalty: dict[str, float]):
    plain = ids_of(live, greedy(live, path, LIST, 24))
    penalised = ids_of(live, text_of(live, path, LIST, max_tokens=24, ignore_eos=True, **penalty))
    assert len(set(penalised)) / len(penalised) > len(set(plain)) / len(plain)


@ROUTES
def test_max_tokens_min_tokens_and_ignore_eos_decide_the_length(live: RealServer, path: str):
    eos = live.tokenizer.eos_token_ids[0]
    early = {"logit_bias": {str(eos): 100}, "max_tokens": 7}  # the model ends at once, unless it may not
    ended = ask(live, path, **early)
    assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["matched_stop"] == eos
    later = ask(live, path, min_tokens=3, **early)
    assert later["usage"]["completion_tokens"] == 4 and later["choices"][0]["finish_reason"] == "stop"
    never = ask(live, path, ignore_eos=True, **early)
    assert never["usage"]["completion_tokens"] == 7 and never["choices"][0]["finish_reason"] == "length"


@ROUTES
def test_stop_token_ids_end_the_text_and_are_not_part_of_it(live: RealServer, path: str):
    plain = ids_of(live, greedy(live, path))
    stop = plain[2]
    choice = ask(live, path, stop_token_ids=[stop])["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"], choice["stop_reason"]) == ("stop", stop, stop)
    assert choice["text"] == live.tokenizer.decode(plain[: plain.index(stop)], skip_special_tokens=True)


@ROUTES
def test_n_choices_are_drawn_apart(live: RealServer, path: str):
    reply = ask(live, path, temperature=1.5, seed=3, n=4, max_tokens=8)
    assert len({choice["text"] for choice in reply["choices"]}) == 4
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == ask(live, path, max_tokens=1)["usage"]["prompt_tokens"]


@ROUTES
def test_log_probabilities_are_of_the_raw_distribution(live: RealServer, path: str):
    wanted = {"logprobs": True, "top_logprobs": 20} if path == CHAT else {"logprobs": 20}
    plain, hot = (ask(live, path, max_tokens=1, temperature=t, top_k=1, **wanted)["choices"][0] for t in (0, 2))
    for choice in (plain, hot):
        columns = choice["logprobs"]
        if path == CHAT:
            entry = columns["content"][0]
            sampled, top = entry["logprob"], {item["token"]: item["logprob"] for item in entry["top_logprobs"]}
            assert len(entry["top_logprobs"]) == 20
        else:
            sampled, top = columns["token_logprobs"][0], columns["top_logprobs"][0]
        assert sampled == max(top.values()) and 0.3 < sum(map(math.exp, top.values())) <= 1.001
    assert plain["logprobs"] == hot["logprobs"]


# What the front end does with tokens, before a scripted engine


def scripted(server: ApiServer, path: str, **fields: Any) -> Any:
    reply = server.post(path, body_of(path, MODEL, "hi", max_tokens=32, **fields))
    assert reply.status_code == 200, reply.text
    return reply


def choices_of(reply: Any) -> list[dict[str, Any]]:
    return [choice | {"text": choice.get("text", choice.get("message", {}).get("content"))} for choice in reply]


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world", "\u00e9\U0001f600!") as server:
        yield server


@ROUTES
@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_the_stop_that_matched_is_kept_where_asked_for(server: ApiServer, path: str, name: str):
    for keep, text in ((False, "hello "), (True, "hello wor")):
        choice = choices_of(scripted(server, path, stop=["nope", "wor"], **{name: keep}).json()["choices"])[0]
        assert (choice["text"], choice["matched_stop"], choice["stop_reason"]) == (text, "wor", "wor")


@ROUTES
def test_up_to_four_stop_strings_and_the_first_to_appear_wins(server: ApiServer, path: str):
    for stop, text in (("wor", "hello "), (["zzz", "rld", "llo", "wor"], "he"), (["ld"], "hello wor")):
        assert choices_of(scripted(server, path, stop=stop).json()["choices"])[0]["text"] == text
    error = error_of(server.post(path, body_of(path, MODEL, "hi", stop=list("abcde"))), 400)
    assert error["param"] == "stop" and "at most 4" in error["message"]


@ROUTES
def test_special_tokens_are_left_out_unless_asked_for(path: str):
    special = TOKENIZER.encode("<|im_start|>", add_special_tokens=False)
    word = TOKENIZER.encode("hi", add_special_tokens=False)
    tokens = [*word, *special, *word, TOKENIZER.eos_token_ids[0]]
    with ApiServer(script=lambda request, index: tokens[min(index, len(tokens) - 1)]) as server:
        for skip, text in ((True, "hihi"), (None, "hihi"), (False, "hi<|im_start|>hi")):
            reply = scripted(server, path, skip_special_tokens=skip).json()
            assert choices_of(reply["choices"])[0]["text"] == text


@pytest.fixture(scope="module")
def slow_server():
    words = say(TOKENIZER, "hello world")

    def script(request: Any, index: int) -> int:
        time.sleep(0.03)  # so that tokens come one by one
        return words(request, index)

    with ApiServer(script=script) as server:
        yield server


@ROUTES
def test_usage_comes_at_the_end_or_with_every_chunk_or_not_at_all(slow_server: ApiServer, path: str):
    server = slow_server
    silent = events(scripted(server, path, stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in silent)
    at_end = events(scripted(server, path, stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] is None for chunk in at_end] == [True] * (len(at_end) - 1) + [False]
    assert at_end[-1]["choices"] == []
    both = {"include_usage": True, "continuous_usage_stats": True}
    counted = [chunk["usage"] for chunk in events(scripted(server, path, stream=True, stream_options=both))]
    counts = [usage["completion_tokens"] for usage in counted]
    assert counts == sorted(counts) and counts[0] < counts[-1] and counted[-1] == at_end[-1]["usage"]
    alone = {"continuous_usage_stats": True}
    assert "usage" not in events(scripted(server, path, stream=True, stream_options=alone))[-1]
    error = error_of(server.post(path, body_of(path, MODEL, "hi", stream_options={"include_usage": True})), 400)
    assert error["param"] == "stream_options"


@ROUTES
@pytest.mark.parametrize("name", ["rid", "request_id"])
def test_the_clients_id_is_the_replys(server: ApiServer, path: str, name: str):
    assert scripted(server, path, **{name: "mine"}).json()["id"] == "mine"
    assert {chunk["id"] for chunk in events(scripted(server, path, stream=True, **{name: "mine"}))} == {"mine"}
    with_header = server.post(path, body_of(path, MODEL, "hi"), headers={"x-request-id": "abc"})
    assert with_header.headers["x-request-id"] == "abc" and with_header.json()["id"] != "abc"


@ROUTES
def test_the_model_of_a_reply_is_the_name_that_was_asked_for(path: str):
    with ApiServer("x", served_model_names=("first", "second")) as server:
        for name in ("first", "second"):
            reply = server.post(path, body_of(path, name, "hi"))
            assert reply.json()["model"] == name
        assert error_of(server.post(path, body_of(path, "third", "hi")), 404)["code"] == "model_not_found"


@ROUTES
def test_images_and_sound_are_refused_with_the_part_at_fault(server: ApiServer, path: str):
    if path == COMPLETIONS:
        assert error_of(server.complete(prompt={"image": "x"}), 400)["param"] == "prompt"
        return
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    error = error_of(server.chat(messages=[{"role": "user", "content": parts}]), 400)
    assert error["param"].startswith("messages.[0].content.[1]") and "only text" in error["message"]
    assert error_of(server.chat(modalities=["text", "audio"], audio={"voice": "x"}), 400)["param"] in (
        "modalities",
        "audio",
    )


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_every_role_takes_text_and_parts_and_only_a_reply_may_be_null(server: ApiServer, role: str):
    for content in ("a", [{"type": "text", "text": "a"}], ["a"]):
        assert server.chat(messages=[{"role": role, "content": content}]).status_code == 200
        shown = "system" if role == "developer" else role
        prompt = TOKENIZER.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)
        assert prompt == f"<|im_start|>{shown}\na<|im_end|>\n<|im_start|>assistant\n"
    null = server.chat(messages=[{"role": role, "content": None}])
    assert null.status_code == (200 if role == "assistant" else 400)


def test_random_seed_repeats_what_requests_without_a_seed_draw():
    def drawn(**config: Any) -> list[int]:
        with ApiServer("x", **config) as server:
            for _ in range(3):
                server.complete(max_tokens=1, temperature=1)
            return [request.params.seed for request in server.engine.requests]

    first, again, other = drawn(random_seed=7), drawn(random_seed=7), drawn()
    assert first == again and len(set(first)) == 3 and not set(first) & set(other)
