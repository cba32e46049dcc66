"""echo with log-probabilities, max_tokens 0, best_of and prompt_logprobs, on a scripted engine."""

from itertools import pairwise
from typing import Any

import pytest

from jaxserve.types import Request, SamplingParams
from tests.api_server import MODEL, TOKENIZER, ApiServer, error_of, events
from tests.fakes import prompt_score

PROMPT = "<|im_start|>say: é hello"
IDS = TOKENIZER.encode(PROMPT, add_special_tokens=True)
TOKENS = [TOKENIZER.token_text(token_id) for token_id in IDS]


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world") as server:
        yield server


def choice_of(reply: Any) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice


@pytest.mark.parametrize("given", [PROMPT, IDS], ids=["text", "ids"])
def test_an_echo_with_logprobs_begins_with_the_prompts_columns(server: ApiServer, given: Any):
    plain = choice_of(server.complete(prompt=given, logprobs=2))
    choice = choice_of(server.complete(prompt=given, logprobs=2, echo=True))
    assert choice["text"] == PROMPT + plain["text"]
    columns, after = choice["logprobs"], plain["logprobs"]
    count = len(IDS)
    assert columns["token_logprobs"][:count] == [None, *(-at / 4 for at in range(1, count))]
    assert columns["top_logprobs"][0] is None
    assert all(len(top) == 3 for top in columns["top_logprobs"][1:count]), "two alternatives and the token itself"
    assert {name: column[count:] for name, column in columns.items() if name != "text_offset"} == {
        name: column for name, column in after.items() if name != "text_offset"
    }
    assert columns["text_offset"][count:] == [len(PROMPT) + offset for offset in after["text_offset"]]
    text, offsets = choice["text"], columns["text_offset"]
    for token, start, stop in zip(columns["tokens"], offsets, [*offsets[1:], len(text)], strict=False):
        assert token.startswith("bytes:") or text[start:stop] == token
    assert "<|im_start|>" in columns["tokens"][:count]


def test_a_streamed_echo_with_logprobs_is_the_whole_one(server: ApiServer):
    asked = {"prompt": [PROMPT, "x"], "logprobs": 1, "echo": True, "n": 2, "stop": "wor"}
    whole = server.complete(**asked).json()["choices"]
    texts, columns = [""] * 4, [{name: [] for name in whole[0]["logprobs"]} for _ in range(4)]
    for chunk in events(server.complete(stream=True, **asked)):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        for name, column in (choice["logprobs"] or {}).items():
            columns[choice["index"]][name] += column
    assert texts == [choice["text"] for choice in whole]
    assert columns == [choice["logprobs"] for choice in whole]


def test_the_prompt_is_scored_once_for_all_choices(server: ApiServer):
    before = len(server.engine.requests)
    server.complete(prompt=PROMPT, logprobs=1, echo=True, n=3)
    requests = server.engine.requests[before:]
    assert [request.params.num_prompt_logprobs for request in requests] == [1, None, None]


def test_a_token_the_tokenizer_adds_takes_no_room_in_the_echo(tmp_path):
    from jaxserve.api.logprobs import prompt_offsets
    from jaxserve.text.tokenizer import Tokenizer
    from tests.fakes import write_byte_level, write_sentencepiece

    for tokenizer in (
        Tokenizer.from_folder(write_byte_level(tmp_path / "bytes", bos=True)),
        Tokenizer.from_folder(write_sentencepiece(tmp_path / "pieces")),
    ):
        text = "hello world é"
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids[0] in tokenizer.special_ids
        offsets = prompt_offsets(tokenizer, text, ids)
        assert offsets[:2] == [0, 0] and offsets == sorted(offsets)
        pieces = [text[start:stop] for start, stop in pairwise([*offsets[1:], len(text)])]
        assert "".join(pieces) == text
        assert pieces[0] == tokenizer.token_text(ids[1]).removeprefix(" ")


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_returns_the_prompt_alone(server: ApiServer, logprobs: int | None, stream: bool):
    reply = server.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=logprobs, stream=stream)
    choices = [chunk["choices"][0] for chunk in events(reply)] if stream else [choice_of(reply)]
    assert "".join(choice["text"] for choice in choices) == PROMPT
    assert choices[-1]["finish_reason"] == "length"
    columns = choices[0]["logprobs"]
    assert (columns is None) == (logprobs is None)
    if columns is not None:
        assert columns["token_logprobs"] == [None, *(-at / 4 for at in range(1, len(IDS)))]
    if not stream:
        usage = reply.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(IDS), 0)


def test_max_tokens_0_fits_a_prompt_that_fills_the_context():
    with ApiServer("x", engine={"max_model_len": 16}) as server:
        assert choice_of(server.complete(prompt=[5] * 16, max_tokens=0, echo=True))["finish_reason"] == "length"
        for fields in ({"prompt": [5] * 16, "max_tokens": 1}, {"prompt": [5] * 17, "max_tokens": 0}):
            assert error_of(server.complete(**fields), 400)["code"] == "context_length_exceeded"


def test_best_of_returns_the_likeliest_by_token():
    """Choice 1 is longer, so its sum is smaller although its mean is the largest."""
    means = (-0.9, -0.2, -0.5)
    texts = ("one", "hello world and more", "two")

    def logprob(request: Request, index: int) -> float:
        return means[request.params.choice]

    with ApiServer(*texts, engine={"logprob": logprob}) as server:
        for fields, best in (({"best_of": 3}, [1]), ({"best_of": 3, "n": 2}, [1, 2]), ({"best_of": 1}, [0])):
            reply = server.complete(prompt=["a", "b"], **fields)
            choices = reply.json()["choices"]
            assert [choice["text"] for choice in choices] == [texts[i] for i in best] * 2
            assert [choice["index"] for choice in choices] == list(range(len(best) * 2))
            assert all(choice["logprobs"] is None for choice in choices)
            drawn = range(fields["best_of"])
            count = sum(len(TOKENIZER.encode(texts[i], add_special_tokens=False)) + 1 for i in drawn)
            assert reply.json()["usage"]["completion_tokens"] == 2 * count, "what was drawn and not returned counts"
        (choice,) = server.complete(best_of=2, logprobs=1, echo=True, prompt=PROMPT).json()["choices"]
        assert choice["text"] == PROMPT + texts[1] and set(choice["logprobs"]["token_logprobs"][len(IDS) :]) == {-0.2}


def test_best_of_is_refused_in_a_stream_and_below_n(server: ApiServer):
    assert server.complete(best_of=2, n=2, stream=True).status_code == 200
    for fields in ({"best_of": 2, "stream": True}, {"best_of": 1, "n": 2}):
        assert error_of(server.complete(**fields), 400)["param"] == "best_of"
    many = error_of(server.complete(prompt=["x"] * 20, best_of=128), 400)
    assert many["param"] == "prompt" and "best_of" in many["message"]


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_are_vllms_on_both_routes(server: ApiServer, count: int):
    told = choice_of(server.complete(prompt=PROMPT, prompt_logprobs=count))["prompt_logprobs"]
    reply = server.chat(prompt_logprobs=count).json()
    chat_ids = server.engine.requests[-1].token_ids
    for ids, entries in ((IDS, told), (chat_ids, reply["prompt_logprobs"])):
        request = Request(0, tuple(ids), SamplingParams(max_tokens=1, seed=0))
        assert entries[0] is None and len(entries) == len(ids)
        for at in range(1, len(ids)):
            score, entry = prompt_score(request, at, count), entries[at]
            own = {"logprob": score.logprob, "rank": score.rank, "decoded_token": TOKENIZER.token_text(ids[at])}
            assert entry[str(ids[at])] == own
            assert [entry[str(other)]["rank"] for other in score.top_ids] == list(range(1, count + 1))
            assert [entry[str(other)]["logprob"] for other in score.top_ids] == list(score.top_logprobs)
            assert len(entry) == count + 1
    assert "prompt_logprobs" not in server.chat().json()
    assert "prompt_logprobs" not in choice_of(server.complete())


def test_prompt_logprobs_and_an_echo_may_want_different_numbers(server: ApiServer):
    for echoed, listed in ((1, 4), (4, 1)):
        choice = choice_of(server.complete(prompt=PROMPT, logprobs=echoed, echo=True, prompt_logprobs=listed))
        # Ids beyond the tokenizer's have no text, so that their keys fall together.
        assert max(len(top) for top in choice["logprobs"]["top_logprobs"][1 : len(IDS)]) == echoed + 1
        assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {listed + 1}


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_prompt_logprobs_are_no_part_of_a_stream(server: ApiServer, route: str):
    error = error_of(getattr(server, route)(prompt_logprobs=1, stream=True), 400)
    assert error["param"] == "prompt_logprobs"


def test_a_client_that_leaves_before_its_prompt_is_scored_frees_its_slot(server: ApiServer):
    server.engine.hold()
    try:
        with pytest.raises(Exception, match="timed out"):
            server.complete(prompt=PROMPT, echo=True, logprobs=1, n=2, timeout=0.3)
        server.engine.wait_until(lambda: server.engine.num_running == 0)
    finally:
        server.engine.release()


def test_the_openai_client_scores_a_prompt(server: ApiServer):
    reply = server.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    columns = reply.choices[0].logprobs
    assert reply.choices[0].text == PROMPT and columns is not None
    assert columns.token_logprobs is not None and columns.token_logprobs[1] == -0.25
    assert columns.tokens == TOKENS
