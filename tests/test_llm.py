"""LLM in front of a scripted engine: the golden tests run it on the real one."""

import time

import pytest

import jaxserve.llm
from checkpoints.hub import ResolvedModel
from jaxserve.client import EngineUnavailable
from jaxserve.config import ConfigError
from jaxserve.llm import LLM
from jaxserve.text.grammar import json_object, regex
from jaxserve.text.params import ParameterError
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import ScriptedEngine, say, vector_of, write_byte_level


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(script, **options of ScriptedEngine) -> (LLM, ScriptedEngine)"""
    folder = write_byte_level(tmp_path / "model")
    made = []

    def start(*texts, script=None, **options):
        engine = ScriptedEngine(script or say(Tokenizer.from_folder(folder), *texts), **options)
        monkeypatch.setattr(jaxserve.llm, "resolve_model", lambda *args, **named: ResolvedModel("tiny", folder))
        monkeypatch.setattr(jaxserve.llm, "Pipe", lambda: (engine.client_end, None))
        monkeypatch.setattr(jaxserve.llm, "_run_engine", lambda connection, config: engine.start())
        made.append(LLM(show_progress=False, cache_dir=str(tmp_path)))
        return made[-1], engine

    yield start
    for llm in made:
        llm.close()


def test_one_prompt_gives_a_completion_and_several_a_list(start):
    llm, _ = start("hello", "world")
    done = llm.generate("say", n=2, num_logprobs=1)
    assert (done.text, str(done), done.choices[1].text) == ("hello", "hello", "world")
    assert (
        done.finish_reason == "stop"
        and len(done.logprobs or ()) == len(done.token_ids) == done.choices[0].num_tokens - 1
    )
    assert done.prompt_token_ids == tuple(llm.tokenizer.encode("say", add_special_tokens=True))
    assert [each.text for each in llm.generate(["a", "b", "c"])] == ["hello"] * 3
    assert llm.generate([5, 6]).prompt_token_ids == (5, 6)
    assert [each.prompt_token_ids for each in llm.generate([[5], [6, 7]])] == [(5,), (6, 7)]


def test_prompts_are_scored_and_texts_become_vectors(start):
    llm, engine = start("hello")
    done = llm.generate("say hello", num_prompt_logprobs=1, max_tokens=0, n=2)
    assert done.finish_reason == "length" and done.text == "" and done.token_ids == ()
    assert [item and item.logprob for item in done.prompt_logprobs] == [
        None,
        *(-at / 4 for at in range(1, len(done.prompt_token_ids))),
    ]
    assert llm.generate("say").prompt_logprobs is None
    texts = ["hello", "é"]
    vectors = llm.embed(texts)
    assert vectors == [
        pytest.approx(vector_of(llm.tokenizer.encode(text, add_special_tokens=True), 8)) for text in texts
    ]
    assert llm.embed("hello") == vectors[0] and llm.embed([5, 6]) == llm.embed([[5, 6]])[0]
    assert [request.task for request in engine.requests[-2:]] == ["embed", "embed"]
    for wrong in ("", [], [3] * 8193):
        with pytest.raises(ValueError, match="1 to 8192"):
            llm.embed([wrong])
    with pytest.raises(ParameterError, match="prompt_logprobs"):
        llm.generate("x", num_prompt_logprobs=21)
    with pytest.raises(ParameterError, match="max_tokens"):
        llm.generate("x", max_tokens=0)


def test_chat_renders_the_template(start):
    llm, engine = start("hello")
    assert llm.chat("hi").text == "hello"
    said = llm.tokenizer.decode(engine.requests[0].token_ids, skip_special_tokens=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    conversation = [{"role": "user", "content": "hi"}]
    assert llm.chat(conversation).prompt_token_ids == engine.requests[0].token_ids
    assert [each.text for each in llm.chat([conversation, conversation])] == ["hello", "hello"]


def test_stream_gives_pieces_and_leaving_it_early_aborts(start):
    llm, engine = start(script=lambda request, index: 70 + index % 2)
    assert "".join(llm.stream("hi", max_tokens=50)) == llm.tokenizer.decode([70, 71] * 25, skip_special_tokens=True)
    pieces = llm.stream([{"role": "user", "content": "hi"}])
    next(pieces)
    pieces.close()
    engine.wait_until(lambda: engine.num_running == 0)
    assert engine.aborted == [engine.requests[-1].id]


def test_wrong_options_are_named(start):
    llm, engine = start("hello")
    with pytest.raises(TypeError, match="unknown sampling option temprature; known are: max_tokens, temperature"):
        llm.generate("a", temprature=1)
    with pytest.raises(ParameterError, match="temperature is 9"):
        llm.generate("a", temperature=9)
    with pytest.raises(ValueError, match="n is 0"):
        llm.generate("a", n=0)
    with pytest.raises(ValueError, match="a stream has one choice"):
        llm.stream("a", n=2)
    with pytest.raises(ValueError, match="ids are integers"):
        llm.generate([[1, -5]])
    with pytest.raises(TypeError, match="unknown engine option dtpye"):
        LLM(dtpye="float32")
    assert engine.requests == []


def test_one_text_gives_a_vector_and_several_a_list(start):
    llm, engine = start("hello", max_model_len=20)
    ids = llm.tokenizer.encode("a b", add_special_tokens=True)
    vector = llm.embed("a b")
    assert vector == pytest.approx(vector_of(ids, 8), abs=1e-7) and llm.embed(ids) == vector
    assert llm.embed(["a b", "c"])[0] == vector == llm.embed([ids])[0]
    assert {request.task for request in engine.requests} == {"embed"}
    for wrong in ("", [1] * 21, ["a", ""]):
        with pytest.raises(ValueError, match="1 to 20"):
            llm.embed(wrong)


def test_an_encoder_generates_nothing(start):
    llm, _ = start("hello", generates=False)
    assert len(llm.embed("a")) == 8
    with pytest.raises(ValueError, match="encoder"):
        llm.generate("a")


def test_closing_ends_the_engine_and_further_calls_say_so(start):
    llm, engine = start("hello")
    with llm:
        llm.flush_cache()
        llm.generate("a")
        assert llm.stats is not None
    assert engine.stopped and engine.num_flushes == 1
    llm.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        llm.generate("a")


def test_dropping_the_last_reference_ends_the_engine(tmp_path, monkeypatch):
    folder = write_byte_level(tmp_path / "model")
    engine = ScriptedEngine(lambda request, index: 70)
    monkeypatch.setattr(jaxserve.llm, "resolve_model", lambda *args, **named: ResolvedModel("tiny", folder))
    monkeypatch.setattr(jaxserve.llm, "Pipe", lambda: (engine.client_end, None))
    monkeypatch.setattr(jaxserve.llm, "_run_engine", lambda connection, config: engine.start())
    llm = LLM(show_progress=False)
    del llm
    engine.wait_until(lambda: engine.stopped)


@pytest.mark.parametrize(("exit_code", "kind"), [(2, ConfigError), (1, EngineUnavailable)])
def test_a_failed_start_raises_with_the_engines_words(start, monkeypatch, exit_code, kind):
    started = ScriptedEngine.start

    def start_and_fail(engine: ScriptedEngine) -> None:
        started(engine).fail("too little memory", exit_code)

    monkeypatch.setattr(ScriptedEngine, "start", start_and_fail)
    before = time.monotonic()
    with pytest.raises(kind, match="too little memory"):
        start("hello", announce_ready=False)
    assert time.monotonic() - before < 5


def test_the_form_of_the_answer_is_asked_for_by_the_same_names_as_over_http(start):
    llm, engine = start("hello")
    llm.generate(["a", "b"], regex="a+")
    llm.chat("hi", response_format={"type": "json_object"})
    assert [request.grammar for request in engine.requests] == [regex("a+"), regex("a+"), json_object()]
    with pytest.raises(ParameterError, match="regex cannot be enforced: .*unclosed"):
        llm.generate("a", regex="[")
    with pytest.raises(ParameterError, match="one of them"):
        llm.generate("a", regex="a", guided_choice=["b"])
    assert len(engine.requests) == 3
