"""Incremental detokenisation equals a full decode, for every split and every kind of tokenizer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import write_byte_level, write_sentencepiece

HARD = "hello wörld é 👩‍👩‍👧‍👦 日本語 🏳️‍🌈 न्दे \u200d\ufffd  two  spaces\n"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer.from_folder(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return Tokenizer.from_folder(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


@pytest.fixture(scope="module")
def metaspace():
    vocab = {token: index for index, token in enumerate(["<unk>", "▁a", "b", "▁", "▁▁c", "é"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def wordpiece():
    vocab = {token: index for index, token in enumerate(["[UNK]", "hello", "world", "##s", "##ing", "café"])}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)


def pieces_of(tokenizer, batches, skip=False, after_text=False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, after_text=after_text)
    return [*(detokenizer.push(ids) for ids in batches), detokenizer.finish()]


def split(ids, cuts) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(edges)]


def ids_below(size):
    return st.lists(st.integers(0, size - 1), max_size=40)


cuts = st.lists(st.integers(0, 100), max_size=12)


@given(st.data(), cuts, st.booleans())
def test_any_ids_byte_level(byte_level, data, cuts, skip):
    ids = data.draw(ids_below(byte_level.vocab_size + 3))
    wanted = byte_level.backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(byte_level, split(ids, cuts), skip)) == wanted
    assert byte_level.decode(ids, skip_special_tokens=skip) == wanted


@given(st.text(max_size=30), cuts)
def test_any_text_sentencepiece(sentencepiece, text, cuts):
    ids = sentencepiece.encode(text, add_special_tokens=True)
    wanted = sentencepiece.backend.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(sentencepiece, split(ids, cuts), skip=True)) == wanted


@given(st.data(), cuts, st.booleans())
def test_any_ids_sentencepiece(sentencepiece, data, cuts, skip):
    ids = data.draw(ids_below(sentencepiece.vocab_size))
    assert "".join(pieces_of(sentencepiece, split(ids, cuts), skip)) == sentencepiece.decode(
        ids, skip_special_tokens=skip
    )


@given(st.data(), cuts)
def test_any_ids_metaspace(metaspace, data, cuts):
    ids = data.draw(ids_below(metaspace.vocab_size))
    assert "".join(pieces_of(metaspace, split(ids, cuts))) == metaspace.backend.decode(ids)


@given(st.data(), cuts)
def test_any_ids_of_a_tokenizer_that_is_no_table_of_bytes(wordpiece, data, cuts):
    assert wordpiece.layout is None
    ids = data.draw(ids_below(wordpiece.vocab_size))
    assert "".join(pieces_of(wordpiece, split(ids, cuts))) == wordpiece.backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_half_a_character_is_never_given_out(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(HARD, add_special_tokens=False)
    pieces = pieces_of(tokenizer, [[token_id] for token_id in ids])
    assert "".join(pieces) == HARD
    assert sum(piece.count("\ufffd") for piece in pieces) == 1  # the one that is in the text
    assert len([piece for piece in pieces if piece]) > 20


def test_an_unfinished_character_becomes_a_replacement_at_the_end(byte_level):
    ids = byte_level.encode("a👩", add_special_tokens=False)[:-1]
    assert pieces_of(byte_level, [ids]) == ["a", "\ufffd"]


def test_the_space_before_the_first_word_stays_only_where_a_text_goes_on(sentencepiece):
    ids = sentencepiece.encode("hello hello", add_special_tokens=False)
    assert "".join(pieces_of(sentencepiece, [[id_] for id_ in ids])) == "hello hello"
    assert "".join(pieces_of(sentencepiece, [[id_] for id_ in ids], after_text=True)) == " hello hello"
