"""Tokenizer: what it reads from a folder, and the bytes of tokens."""

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from tests.fakes import CHATML, write_byte_level, write_sentencepiece


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer.from_folder(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return Tokenizer.from_folder(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


@given(st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level, text):
    ids = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(byte_level.token_bytes(token_id) for token_id in ids) == text.encode()
    assert byte_level.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(st.text(), st.integers(1, 400))
def test_a_text_has_no_fewer_tokens_than_can_be_told_from_its_length(byte_level, sentencepiece, text, times):
    text *= times
    for tokenizer in (byte_level, sentencepiece):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    assert byte_level.fewest_tokens("x" * 1000) > 0


def test_long_texts_are_tokenised_as_short_ones_and_others_may_run_meanwhile(byte_level):
    words = [f"word {index} " for index in range(1000)]
    each = byte_level.encode_all(words, add_special_tokens=False)
    assert each == [byte_level.encode(word, add_special_tokens=False) for word in words]
    text = "".join(words)
    assert byte_level.decode(byte_level.encode(text, add_special_tokens=False), skip_special_tokens=False) == text
    thread = threading.Thread(target=byte_level.encode, args=(text * 100,), kwargs={"add_special_tokens": False})
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20, "the interpreter was held"


def test_bytes_of_sentencepiece_tokens(sentencepiece):
    ids = sentencepiece.encode("hello €", add_special_tokens=False)
    pieces = [sentencepiece.token_bytes(token_id) for token_id in ids]
    assert pieces == [b" hello", b" ", b"\xe2", b"\x82", b"\xac"]
    assert sentencepiece.token_text(ids[2]) == "\ufffd"


def test_ids_outside_the_vocabulary_have_no_text(byte_level):
    for token_id in (-1, byte_level.vocab_size, 2**40):
        assert byte_level.token_bytes(token_id) == b"" and byte_level.token_text(token_id) == ""


def test_a_lone_surrogate_is_named(byte_level):
    with pytest.raises(ValueError, match=r"character 2 .*U\+D83D"):
        byte_level.encode("ab\ud83d", add_special_tokens=True)


def test_the_folder_is_read(tmp_path):
    folder = write_byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, "bos_token_id": 1}))
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "top_k": None, "do_sample": True, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)  # as tokenizer_config.json says
    assert tokenizer.eos_token_ids == (0, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.sampling_defaults == {"temperature": 0.6, "top_p": 0.9}
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()
    assert tokenizer.chat_template is not None and tokenizer.chat_template.sources == {"default": CHATML}


def test_a_template_in_its_own_file_wins_and_a_given_one_wins_over_that(tmp_path):
    folder = write_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'file' }}")
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}")
    for chosen, wanted in [(None, "file"), (str(tmp_path / "mine.jinja"), "mine"), ("{{ 'text' }}", "text")]:
        tokenizer = Tokenizer.from_folder(folder, chat_template=chosen)
        assert tokenizer.chat_template is not None
        assert tokenizer.chat_template.render([]) == wanted
    with pytest.raises(TokenizerError, match=r"nowhere\.jinja"):
        Tokenizer.from_folder(folder, chat_template="nowhere.jinja")


def test_bos_is_added_as_the_configuration_says(tmp_path):
    folder = write_byte_level(tmp_path, bos=True)
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=True)[0] == 0
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=False)[0] != 0
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=True)[0] != 0
    write_byte_level(tmp_path, bos=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert Tokenizer.from_folder(folder).encode("a", add_special_tokens=True)[0] == 0


def test_a_stored_truncation_is_not_obeyed(tmp_path):
    folder = write_byte_level(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert len(Tokenizer.from_folder(folder).encode("x" * 100, add_special_tokens=False)) == 100


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(str(tmp_path))
