"""/v1/completions through the real openai client and through raw HTTP."""

import pytest

from tests.api_server import MODEL, TOKENIZER, ApiServer, events

EOS = TOKENIZER.eos_token_ids[0]


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world", "\u00e9\U0001f600!") as server:
        yield server


def test_the_seed_notebooks_completion_stream_works(server):
    stream = server.openai.completions.create(
        model=MODEL,
        prompt="Write a short story about a space explorer.",
        temperature=0.7,
        max_tokens=150,
        top_p=0.9,
        stop=["\n\n", "THE END"],
        presence_penalty=0.3,
        frequency_penalty=0.3,
        n=1,
        seed=123,
        stream=True,
    )
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == "hello world"


def test_a_reply_has_openais_shape_and_16_tokens_by_default(server):
    reply = server.openai.completions.create(model=MODEL, prompt="hi")
    choice = reply.choices[0]
    assert (reply.object, choice.text, choice.finish_reason, choice.index) == (
        "text_completion",
        "hello world",
        "stop",
        0,
    )
    assert reply.id.startswith("cmpl-") and choice.matched_stop == EOS and choice.logprobs is None
    assert server.engine.requests[-1].params.max_tokens == 16


def test_prompts_come_as_text_texts_ids_or_rows_of_ids(server):
    one, two = ([int(id_) for id_ in TOKENIZER.encode(text, add_special_tokens=True)] for text in ("hello", "world"))
    for prompt, sent in (("hello", [one]), (["hello", "world"], [one, two]), (one, [one]), ([one, two], [one, two])):
        reply = server.complete(prompt=prompt).json()
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(sent)))
        requests = sorted(server.engine.requests[-len(sent) :], key=lambda request: request.id)
        assert [list(request.token_ids) for request in requests] == sent
        assert reply["usage"]["prompt_tokens"] == sum(map(len, sent))


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(server):
    reply = server.complete(prompt=["a", "b", "c"], n=2).json()
    assert [choice["text"] for choice in reply["choices"]] == ["hello world", "\u00e9\U0001f600!"] * 3
    chunks = [chunk["choices"][0] for chunk in events(server.complete(prompt=["a", "b", "c"], n=2, stream=True))]
    for index in range(6):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in mine) == ["hello world", "\u00e9\U0001f600!"][index % 2]
        assert [chunk["finish_reason"] for chunk in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_logprob_columns_have_real_text_offsets(server):
    for n in (1, 2):
        choice = server.complete(logprobs=3, n=n).json()["choices"][n - 1]
        columns, text = choice["logprobs"], choice["text"]
        lengths = {len(column) for column in columns.values()}
        assert len(lengths) == 1 and lengths.pop() > 0
        assert columns["text_offset"][0] == 0 and columns["text_offset"] == sorted(columns["text_offset"])
        for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
            assert token.startswith("bytes:") or text.startswith(token, offset)
        assert all(
            len(top) in (3, 4) and token in top
            for token, top in zip(columns["tokens"], columns["top_logprobs"], strict=True)
        )


def test_streamed_logprobs_equal_the_whole_ones(server):
    whole = server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    joined = {name: [] for name in whole}
    for chunk in events(server.complete(logprobs=2, stream=True)):
        for name, column in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += column
    assert joined == whole


def test_echo_returns_the_prompt_before_the_text_once(server):
    assert server.complete(prompt="say: ", echo=True).json()["choices"][0]["text"] == "say: hello world"
    ids = TOKENIZER.encode("say: ", add_special_tokens=False)
    assert server.complete(prompt=ids, echo=True).json()["choices"][0]["text"] == "say: hello world"
    chunks = events(server.complete(prompt=["x", "y"], echo=True, stream=True))
    for index, prompt in enumerate("xy"):
        text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index)
        assert text == prompt + "hello world"


def test_the_stream_has_the_golden_shape_with_usage_at_the_end(server):
    chunks = events(server.complete(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])
    end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "matched_stop": EOS, "stop_reason": None}
    assert chunks[-2]["choices"] == [end]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0
