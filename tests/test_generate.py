"""generate(): text, tokens and log-probabilities line up; stop strings end it; leaving early aborts."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.client import EngineClient, EngineUnavailable
from jaxserve.text.generate import Delta, GenerateOptions, generate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams
from tests.fakes import ScriptedEngine, say, write_byte_level

EOS = 2
DEFAULTS = GenerateOptions()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(write_byte_level(tmp_path_factory.mktemp("byte_level")))


def params(number: int = 1, **fields) -> list[SamplingParams]:
    base = replace(SamplingParams(max_tokens=200, seed=0, stop_token_ids=(EOS,), num_logprobs=1), **fields)
    return [replace(base, choice=choice) for choice in range(number)]


def collect(engine, tokenizer, wanted, options=DEFAULTS) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {each.choice: [] for each in wanted}

    async def main() -> None:
        client = EngineClient(engine.client_end)
        client.start()
        await client.wait_ready()
        async for choice, delta in generate(client, tokenizer, [1, 2, 3], wanted, options):
            deltas[choice].append(delta)
        await asyncio.to_thread(engine.wait_until, lambda: engine.num_running == 0)
        assert client.num_open == 0
        await client.close()

    with engine:
        asyncio.run(asyncio.wait_for(main(), 20))
    for items in deltas.values():
        assert [delta.finish_reason is not None for delta in items] == [False] * (len(items) - 1) + [True]
        assert all(delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids) for delta in items)
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(tokenizer):
    text = "hello wörld 👩‍👩‍👧‍👦!"
    (deltas,) = collect(ScriptedEngine(say(tokenizer, text)), tokenizer, params()).values()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert text_of(deltas) == text and ids_of(deltas) == ids
    last = deltas[-1]
    assert (last.finish_reason, last.matched_stop, last.num_tokens) == ("stop", EOS, len(ids) + 1)


def test_every_delta_holds_exactly_the_tokens_of_its_text(tokenizer):
    text = "a👩‍👩‍👧b日本語c" * 5
    options = GenerateOptions(stop=("b日本語d", "👩‍x"))
    (deltas,) = collect(ScriptedEngine(say(tokenizer, text)), tokenizer, params(), options).values()
    for delta in deltas:
        assert tokenizer.decode(delta.token_ids, skip_special_tokens=True) == delta.text
        assert "\ufffd" not in delta.text
    assert text_of(deltas) == text


def test_a_stop_string_over_token_borders_is_cut_and_ends_the_request(tokenizer):
    engine = ScriptedEngine(say(tokenizer, "hello world" * 1000))
    options = GenerateOptions(stop=("o wor", "never"))
    (deltas,) = collect(engine, tokenizer, params(max_tokens=5000), options).values()
    last = deltas[-1]
    assert text_of(deltas) == "hell"
    assert (last.finish_reason, last.matched_stop) == ("stop", "o wor")
    assert ids_of(deltas) == []  # "hello" is one token, and its text is not complete
    assert last.num_tokens == len(tokenizer.encode("hello wor", add_special_tokens=False))
    assert len(engine.aborted) == 1


def test_an_included_stop_string_is_part_of_the_text(tokenizer):
    options = GenerateOptions(stop=("o wor",), include_stop=True)
    (deltas,) = collect(ScriptedEngine(say(tokenizer, "hello world")), tokenizer, params(), options).values()
    assert text_of(deltas) == "hello wor"
    options = GenerateOptions(include_stop=True, skip_special_tokens=False)
    (deltas,) = collect(ScriptedEngine(say(tokenizer, "hello")), tokenizer, params(), options).values()
    assert text_of(deltas) == "hello<|im_end|>"


def test_no_stop_string_ends_the_text_before_min_tokens(tokenizer):
    options = GenerateOptions(stop=("a",))
    (deltas,) = collect(ScriptedEngine(say(tokenizer, "abcabc")), tokenizer, params(min_tokens=2), options).values()
    assert text_of(deltas) == "abc"


def test_what_was_held_back_is_given_out_at_the_end(tokenizer):
    script = say(tokenizer, "hello <|", "é")
    wanted = params(2, max_tokens=len(tokenizer.encode("hello <|", add_special_tokens=False)))
    first, _ = collect(ScriptedEngine(script), tokenizer, wanted, GenerateOptions(stop=("<|x",))).values()
    assert (text_of(first), first[-1].finish_reason, first[-1].matched_stop) == ("hello <|", "length", None)
    half = tokenizer.encode("a👩", add_special_tokens=False)[:-1]
    engine = ScriptedEngine(lambda request, index: half[index])
    (deltas,) = collect(engine, tokenizer, params(max_tokens=len(half))).values()
    assert text_of(deltas) == "a\ufffd" and ids_of(deltas) == half


def test_choices_are_merged_and_one_stop_leaves_the_others_running(tokenizer):
    texts = ["hello one", "a STOP b", "hello three, the longest of them"]
    engine = ScriptedEngine(say(tokenizer, *texts), cached_tokens=lambda request: request.params.choice)
    deltas = collect(engine, tokenizer, params(3, num_logprobs=None), GenerateOptions(stop=("STOP",)))
    assert [text_of(deltas[choice]) for choice in range(3)] == ["hello one", "a ", texts[2]]
    assert [deltas[choice][-1].matched_stop for choice in range(3)] == [EOS, "STOP", EOS]
    assert [deltas[choice][-1].cached_tokens for choice in range(3)] == [0, 1, 2]
    assert all(delta.logprobs is None for items in deltas.values() for delta in items)
    assert len(engine.batches) == 1


def test_leaving_early_aborts_every_choice(tokenizer):
    engine = ScriptedEngine(lambda request, index: 70)

    async def main() -> None:
        client = EngineClient(engine.client_end)
        client.start()
        await client.wait_ready()
        source = generate(client, tokenizer, [1], params(3, max_tokens=10**6), GenerateOptions())
        await anext(source)
        await source.aclose()
        assert client.num_open == 0
        await asyncio.to_thread(engine.wait_until, lambda: engine.num_running == 0)
        assert sorted(engine.aborted) == sorted(request.id for request in engine.requests)
        await client.close()

    with engine:
        asyncio.run(asyncio.wait_for(main(), 20))


def test_a_dying_engine_raises(tokenizer):
    engine = ScriptedEngine(lambda request, index: 70)

    async def main() -> None:
        client = EngineClient(engine.client_end)
        client.start()
        await client.wait_ready()
        with pytest.raises(EngineUnavailable):
            async for _ in generate(client, tokenizer, [1], params(2, max_tokens=10**6), GenerateOptions()):
                engine.stopped = True
        await client.close()

    with engine:
        asyncio.run(asyncio.wait_for(main(), 20))


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(alphabet="helo w👩é<", min_size=1, max_size=20),
    stops=st.lists(st.text(alphabet="helo w👩é<", min_size=1, max_size=4), max_size=3),
)
def test_text_equals_the_full_text_cut_at_the_first_stop(tokenizer, text, stops):
    (deltas,) = collect(
        ScriptedEngine(say(tokenizer, text)), tokenizer, params(), GenerateOptions(stop=tuple(stops))
    ).values()
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    end, _, stop = min(ends, default=(len(text), 0, None))
    assert text_of(deltas) == (text if stop is None else text[: end - len(stop)])
    assert deltas[-1].matched_stop == (EOS if stop is None else stop)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids_of(deltas) == ids[: len(ids_of(deltas))]
    assert deltas[-1].num_tokens <= len(ids) + 1
