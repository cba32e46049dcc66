"""/generate: SGLang's own route, its shapes, batches and streams."""

import itertools
import json
from typing import Any

import pytest

from jaxserve.api.generate_schema import REFUSED_IN_GENERATE, REFUSED_IN_SAMPLING
from jaxserve.api.schema import Refused
from tests.api_server import TOKENIZER, ApiServer, error_of, events
from tests.real_engines import RealServer

EOS = TOKENIZER.eos_token_ids[0]
TEXTS = ("hello world", "\u00e9\U0001f600!")
HELLO = TOKENIZER.encode("hello world", add_special_tokens=False)


@pytest.fixture(scope="module")
def server():
    with ApiServer(*TEXTS, engine={"max_model_len": 256}) as server:
        yield server
        assert server.client.num_open == 0 and server.engine.num_running == 0


def generate(server: ApiServer, status: int = 200, **body: Any) -> Any:
    reply = server.post("/generate", {"text": "hi"} | body)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_one_prompt_is_answered_by_an_object_with_meta_info(server: ApiServer):
    for reply in (generate(server), server.http.put("/generate", json={"text": "hi"}).json()):
        assert reply["text"] == "hello world" and reply["output_ids"] == [*HELLO, EOS]
        meta = reply["meta_info"]
        assert meta["finish_reason"] == {"type": "stop", "matched": EOS} and meta["id"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (2, len(HELLO) + 1)
        assert meta["cached_tokens"] == 0 and 0 < meta["e2e_latency"] < 20
    assert server.engine.requests[-1].params.max_tokens == 128


def test_ids_lists_and_choices_make_a_list_prompt_by_prompt(server: ApiServer):
    ids = TOKENIZER.encode("hi", add_special_tokens=False)
    assert generate(server, text=None, input_ids=ids)["text"] == TEXTS[0]
    for body in ({"text": ["a", "b", "c"]}, {"text": None, "input_ids": [ids, ids, ids]}):
        rows = generate(server, sampling_params={"n": 2}, **body)
        assert [row["text"] for row in rows] == [*TEXTS] * 3
        assert len({row["meta_info"]["id"] for row in rows}) == 6
    assert [row["text"] for row in generate(server, sampling_params={"n": 2})] == [*TEXTS]
    assert len(generate(server, text=["a"])) == 1


def test_every_prompt_may_have_its_own_parameters(server: ApiServer):
    each = [{"max_new_tokens": 2, "temperature": 0}, {"stop": ["wor"]}, {"stop": "wor", "no_stop_trim": True}]
    rows = generate(server, text=["a", "b", "c"], sampling_params=each, rid=["x", "y", "z"])
    assert [row["meta_info"]["id"] for row in rows] == ["x", "y", "z"]
    assert rows[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert [row["text"] for row in rows[1:]] == ["hello ", "hello wor"]
    assert rows[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "wor"}
    assert rows[1]["meta_info"]["completion_tokens"] == len(rows[1]["output_ids"]), "cut tokens are reported too"


def test_all_sampling_parameters_reach_the_engine(server: ApiServer):
    wanted = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 3},
        "sampling_seed": 11,
        "stop_token_ids": [17],
        "ignore_eos": True,
    }
    generate(server, sampling_params=wanted)
    params = server.engine.requests[-1].params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p) == (9, 2, 0.5, 0.9)
    assert (params.top_k, params.min_p, params.presence_penalty, params.frequency_penalty) == (7, 0.1, 0.2, 0.3)
    assert (params.repetition_penalty, params.logit_bias, params.seed) == (1.1, ((5, 3.0),), 11)
    assert params.stop_token_ids == (17,)
    generate(server, sampling_params={"seed": 12, "skip_special_tokens": False})
    assert server.engine.requests[-1].params.seed == 12


def test_log_probabilities_are_triples_with_the_text_where_asked_for(server: ApiServer):
    meta = generate(server, return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True)["meta_info"]
    columns = meta["output_token_logprobs"]
    assert [token_id for _, token_id, _ in columns] == [*HELLO, EOS]
    assert all(logprob == -0.1 for logprob, _, _ in columns)
    assert "".join(text for _, _, text in columns[:-1]) == "hello world"
    assert all(
        len(top) == 2 and top[0][1] == column[1]
        for top, column in zip(meta["output_top_logprobs"], columns, strict=True)
    )
    plain = generate(server, return_logprob=True)["meta_info"]
    assert all(text is None for _, _, text in plain["output_token_logprobs"]) and "output_top_logprobs" not in plain
    assert plain["input_token_logprobs"] == []
    assert "output_token_logprobs" not in generate(server)["meta_info"]
    rows = generate(server, text=["a", "b"], return_logprob=[True, False], top_logprobs_num=[1, 0])
    assert ["output_token_logprobs" in row["meta_info"] for row in rows] == [True, False]


def test_a_stream_repeats_the_text_so_far_and_ends_as_the_whole_does(server: ApiServer):
    body = {"text": "hi", "stream": True, "return_logprob": True, "rid": "mine"}
    chunks = events(server.post("/generate", body))
    texts = [chunk["text"] for chunk in chunks]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert all(chunk["meta_info"]["id"] == "mine" and "index" not in chunk for chunk in chunks)
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    whole = generate(server, return_logprob=True, rid="mine")
    for reply in (whole, chunks[-1]):
        assert reply["meta_info"].pop("e2e_latency") > 0
    assert chunks[-1] == whole


def test_a_streamed_batch_says_which_prompt_a_chunk_is_of(server: ApiServer):
    chunks = events(server.post("/generate", {"text": ["a", "b"], "stream": True, "sampling_params": {"n": 2}}))
    last = {chunk["index"]: chunk["text"] for chunk in chunks if chunk["meta_info"]["finish_reason"]}
    assert last == {0: TEXTS[0], 1: TEXTS[1], 2: TEXTS[0], 3: TEXTS[1]}


def test_special_tokens_are_left_out_of_a_generated_text_unless_asked_for():
    special = TOKENIZER.encode("<|im_start|>", add_special_tokens=False)
    tokens = [*HELLO, *special, EOS]
    with ApiServer(script=lambda request, index: tokens[min(index, len(tokens) - 1)]) as server:
        assert generate(server)["text"] == "hello world"
        assert generate(server, sampling_params={"skip_special_tokens": False})["text"] == "hello world<|im_start|>"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text": None}, "text"),
    ({"input_ids": [1]}, "text"),
    ({"text": []}, "text"),
    ({"text": ""}, "text"),
    ({"text": 3}, "text"),
    ({"text": None, "input_ids": []}, "input_ids"),
    ({"text": None, "input_ids": [[]]}, "text"),
    ({"text": None, "input_ids": [10**6]}, "input_ids"),
    ({"text": None, "input_ids": [[1], 2]}, "input_ids"),
    ({"text": ["a"] * 3000}, "text"),
    ({"text": "w " * 9000}, "text"),
    ({"sampling_params": []}, "sampling_params"),
    ({"sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "sampling_params.n"),
    ({"sampling_params": "hot"}, "sampling_params"),
    ({"sampling_params": {"temperature": 9}}, "sampling_params.temperature"),
    ({"sampling_params": {"temperature": "9"}}, "sampling_params"),
    ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": 10**6}}, "sampling_params.max_new_tokens"),
    ({"sampling_params": {"min_new_tokens": 500}}, "sampling_params.min_new_tokens"),
    ({"sampling_params": {"sampling_seed": 2**70}}, "sampling_params.sampling_seed"),
    ({"sampling_params": {"n": 0}}, "sampling_params"),
    ({"sampling_params": {"stop": ""}}, "sampling_params"),
    ({"sampling_params": {"stop_regex": "x"}}, "sampling_params.stop_regex"),
    ({"sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
    ({"return_logprob": "yes"}, "return_logprob"),
    ({"top_logprobs_num": 21, "return_logprob": True}, "top_logprobs_num"),
    ({"rid": ""}, "rid"),
    ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"stream": 1}, "stream"),
    ({"image_data": "x"}, "image_data"),
    ({"lora_path": "x"}, "lora_path"),
    ({"return_hidden_states": True}, "return_hidden_states"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: json.dumps(value)[:50])
def test_a_wrong_generate_is_400_and_names_the_field(server: ApiServer, body: dict[str, Any], param: str):
    for stream in ({}, {"stream": True}):
        error = error_of(server.post("/generate", {"text": "hi"} | stream | body), 400)
        assert error["param"].startswith(param), error
        assert len(error["message"]) < 600


REFUSED = [(name, rule, False) for name, rule in REFUSED_IN_GENERATE.items()]
REFUSED += [(name, rule, True) for name, rule in REFUSED_IN_SAMPLING.items()]


@pytest.mark.parametrize(("name", "rule", "inside"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_every_refused_native_field_is_a_400_that_says_why(server: ApiServer, name: str, rule: Refused, inside: bool):
    def body(value: Any) -> dict[str, Any]:
        return {"text": "hi"} | ({"sampling_params": {name: value}} if inside else {name: value})

    error = error_of(server.post("/generate", body({"neutral": "nowhere"})), 400)
    assert error["param"] == ("sampling_params." if inside else "") + name and rule.why in error["message"]
    for neutral in (None, *rule.neutral):
        assert server.post("/generate", body(neutral)).status_code == 200, neutral


def test_unknown_native_fields_are_accepted_and_logged_once(server: ApiServer):
    plain = generate(server, sampling_params={"seed": 1})
    extra = generate(server, log_metrics=True, model="any", sampling_params={"seed": 1, "new_thing": 1})
    assert plain["text"] == extra["text"]
    assert {"log_metrics", "sampling_params.new_thing"} <= server.serving.fields.seen


def test_log_probabilities_of_a_prompt_begin_where_asked_for(server: ApiServer):
    assert generate(server, return_logprob=True)["meta_info"]["input_token_logprobs"] == []
    assert "input_token_logprobs" not in generate(server, logprob_start_len=0)["meta_info"]
    ids = TOKENIZER.encode("hello you", add_special_tokens=True)
    for stream in (False, True):
        body = {"text": "hello you", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
        reply = server.post("/generate", body | {"stream": stream})
        meta = (events(reply)[-1] if stream else reply.json())["meta_info"]
        columns, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
        assert [token_id for _, token_id, _ in columns] == ids and columns[0][0] is None is tops[0]
        assert all(value is not None for value, _, _ in columns[1:]) and all(len(top) == 1 for top in tops[1:])
    later = generate(server, text="hello you", return_logprob=True, logprob_start_len=2)["meta_info"]
    assert later["input_token_logprobs"] == [[*column[:2], None] for column in columns[2:]]


def test_a_prompt_can_be_scored_without_an_answer(live: RealServer):
    wanted = {"return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
    reply = live.http.post("/generate", json={"text": "The capital of France is Paris"} | wanted).json()
    assert reply["text"] == "" and reply["output_ids"] == [] and reply["meta_info"]["completion_tokens"] == 0
    echoed = live.complete("The capital of France is Paris", max_tokens=0, echo=True, logprobs=0).choices[0]
    values = [logprob for logprob, _, _ in reply["meta_info"]["input_token_logprobs"]]
    assert values[0] is None and values[1:] == pytest.approx(echoed.logprobs.token_logprobs[1:], abs=1e-4)


def test_generate_gives_the_same_text_as_completions(live: RealServer):
    prompt = "The capital of France is"
    wanted = {"max_new_tokens": 8, "temperature": 0}
    native = live.http.post("/generate", json={"text": prompt, "sampling_params": wanted, "return_logprob": True})
    reply = native.json()
    choice = live.complete(prompt, max_tokens=8, logprobs=0).choices[0]
    assert reply["text"] == choice.text
    logprobs = [logprob for logprob, _, _ in reply["meta_info"]["output_token_logprobs"]]
    assert logprobs == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    ids = live.tokenizer.encode(prompt, add_special_tokens=True)
    rows = live.http.post("/generate", json={"input_ids": [ids, ids], "sampling_params": wanted}).json()
    assert [row["text"] for row in rows] == [choice.text] * 2
