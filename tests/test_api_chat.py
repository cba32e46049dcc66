"""/v1/chat/completions through the real openai client and through raw HTTP."""

import pytest

from tests.api_server import MODEL, TOKENIZER, ApiServer, events
from tests.fakes import CHATML

EOS = TOKENIZER.eos_token_ids[0]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with ApiServer("hello world", "caf\u00e9 \U0001f600!") as server:
        yield server


def test_the_seed_notebooks_chat_example_works(server):
    reply = server.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "You are helpful"}, {"role": "user", "content": "List 3 countries."}],
        temperature=0,
        max_tokens=64,
    )
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("hello world", "assistant", "stop")
    assert choice.matched_stop == EOS
    assert choice.logprobs is None and reply.system_fingerprint is None and reply.service_tier is None
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.model == MODEL
    sampled = len(TOKENIZER.encode("hello world", add_special_tokens=False)) + 1
    assert reply.usage.completion_tokens == sampled
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + sampled
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_the_seed_notebooks_stream_reads_choices_0_of_every_chunk(server):
    stream = server.openai.chat.completions.create(
        model=MODEL,
        messages=HI,
        temperature=0.3,
        max_tokens=100,
        top_p=0.95,
        stop=["\n\n"],
        presence_penalty=0.2,
        frequency_penalty=0.2,
        n=1,
        seed=42,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello world"
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.seed) == (0.3, 0.95, 42)
    assert (params.presence_penalty, params.frequency_penalty, params.max_tokens) == (0.2, 0.2, 100)


def test_a_stream_has_the_golden_shape(server):
    chunks = events(server.chat(stream=True))
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    neutral = {"index": 0, "logprobs": None, "finish_reason": None, "matched_stop": None}
    assert choices[0] == neutral | {"delta": {"role": "assistant", "content": ""}}
    assert choices[-1] == neutral | {"delta": {}, "finish_reason": "stop", "matched_stop": EOS, "stop_reason": None}
    middle = choices[1:-1]
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == "hello world"


def test_every_choice_of_a_stream_has_one_role_and_one_finish(server):
    chunks = events(server.chat(stream=True, n=2, stream_options={"include_usage": True}))
    assert all(len(chunk["choices"]) == 1 and chunk["usage"] is None for chunk in chunks[:-1])
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    texts = ["", ""]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        texts[index] = "".join(choice["delta"].get("content", "") for choice in mine)
    assert texts == ["hello world", "caf\u00e9 \U0001f600!"]
    last = chunks[-1]
    sampled = sum(len(TOKENIZER.encode(text, add_special_tokens=False)) + 1 for text in texts)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == sampled


def test_continuous_usage_counts_up(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(server.chat(stream=True, stream_options=options))]
    assert counts == sorted(counts) and counts[-1] == counts[-2] > 1


def test_n_choices_share_the_seed_and_differ_in_the_choice(server):
    reply = server.chat(n=2, seed=-1).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["hello world", "caf\u00e9 \U0001f600!"]
    sent = [request.params for request in server.engine.requests[-2:]]
    assert [params.choice for params in sent] == [0, 1] and {params.seed for params in sent} == {2**64 - 1}


def test_logprobs_line_up_with_the_text_streamed_or_not(server):
    whole = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert whole["refusal"] is None
    assert "".join(entry["token"] for entry in whole["content"]) == "hello world"
    assert bytes(byte for entry in whole["content"] for byte in entry["bytes"]) == b"hello world"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.1 for entry in whole["content"])
    chunks = events(server.chat(logprobs=True, top_logprobs=2, stream=True))
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole["content"]


def test_without_top_logprobs_only_the_sampled_token_is_reported(server):
    content = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert content and all(entry["top_logprobs"] == [] for entry in content)


def test_a_stop_string_over_token_borders_never_leaks(server):
    for stream in (False, True):
        reply = server.chat(stop="o wor", stream=stream)
        if stream:
            chunks = [chunk["choices"][0] for chunk in events(reply)]
            text, end = "".join(chunk["delta"].get("content", "") for chunk in chunks), chunks[-1]
        else:
            end = reply.json()["choices"][0]
            text = end["message"]["content"]
        assert (text, end["finish_reason"], end["matched_stop"]) == ("hell", "stop", "o wor")
    assert server.chat(stop=["o wor"], no_stop_trim=True).json()["choices"][0]["message"]["content"] == "hello wor"


def test_max_tokens_ends_with_length_under_both_names(server):
    for field in ("max_tokens", "max_completion_tokens"):
        choice = server.chat(**{field: 1}).json()["choices"][0]
        assert (choice["finish_reason"], choice["matched_stop"]) == ("length", None)
    assert server.chat(max_tokens=50, max_completion_tokens=1).json()["usage"]["completion_tokens"] == 1


def prompt_of(server) -> str:
    return TOKENIZER.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def test_messages_are_rendered_with_developer_as_system_and_parts_joined(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
    ]
    assert server.chat(messages=messages).status_code == 200
    begin, end = "<|im_start|>", "<|im_end|>\n"
    expected = f"{begin}system\nbe brief{end}{begin}assistant\n{end}{begin}user\na\nb{end}{begin}assistant\n"
    assert prompt_of(server) == expected


def test_continue_final_message_goes_on_with_the_assistants_words(server):
    messages = [*HI, {"role": "assistant", "content": "I say"}]
    assert server.chat(messages=messages, continue_final_message=True).status_code == 200
    assert prompt_of(server).endswith("<|im_start|>assistant\nI say")
    assert server.chat(messages=messages, add_generation_prompt=False).status_code == 200
    assert prompt_of(server).endswith("I say<|im_end|>\n")


def test_template_variables_reach_the_template():
    from jaxserve.text.chat_template import ChatTemplate

    before = TOKENIZER.chat_template
    TOKENIZER.chat_template = ChatTemplate(CHATML + "{{ mood }}")
    try:
        with ApiServer("x") as server:
            assert server.chat(chat_template_kwargs={"mood": "glad"}).status_code == 200
            assert prompt_of(server).endswith("glad")
    finally:
        TOKENIZER.chat_template = before


def test_rid_becomes_the_replys_id(server):
    assert server.chat(rid="mine-1").json()["id"] == "mine-1"
    assert {chunk["id"] for chunk in events(server.chat(request_id="mine-2", stream=True))} == {"mine-2"}


def test_all_extensions_reach_the_engine(server):
    reply = server.openai.chat.completions.create(
        model=MODEL,
        messages=HI,
        logit_bias={"5": 3},
        extra_body={
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "stop_token_ids": [300 % TOKENIZER.vocab_size],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "max_tokens": 3,
        },
    )
    assert reply.usage.completion_tokens == 3
    params = server.engine.requests[-1].params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (7, 0.1, 1.1, 2)
    assert params.logit_bias == ((5, 3.0),) and params.stop_token_ids == (300 % TOKENIZER.vocab_size,)


def test_stream_interval_joins_tokens_but_never_holds_back_the_first_or_the_last():
    with ApiServer("abcdefghij", stream_interval=4) as server:
        chunks = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(server.chat(stream=True))]
        assert "".join(chunks) == "abcdefghij"
        assert all(len(text) >= 4 for text in chunks[2:-2]), chunks


def test_cached_tokens_are_reported_unless_switched_off():
    with ApiServer("x", engine={"cached_tokens": lambda request: 5}) as server:
        assert server.chat(n=2).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    with ApiServer("x", enable_cache_report=False) as server:
        assert server.chat().json()["usage"]["prompt_tokens_details"] is None
