"""StopMatcher against a search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.stop import StopMatcher

letters = st.text(alphabet="ab<é", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The stop string whose end comes first; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@given(st.lists(letters, max_size=6), stop_strings, st.booleans())
def test_every_split_gives_what_a_search_of_the_whole_text_gives(pieces, stops, include_stop):
    matcher = StopMatcher(stops, include_stop)
    emitted, matched = "", None
    text = "".join(pieces)
    wanted, wanted_stop = naive(text, stops, include_stop)
    for index in range(len(pieces) + 1):
        final = index == len(pieces)
        emit, matched = matcher.push("" if final else pieces[index], final)
        emitted += emit
        assert wanted.startswith(emitted), "something of a stop string leaked"
    assert (emitted, matched) == (wanted, wanted_stop)


@given(letters, stop_strings)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text, stops):
    emitted, matched = StopMatcher(stops, False).push(text, False)
    if matched is None:
        held = text[len(emitted) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_text_passes_at_once():
    matcher = StopMatcher((), False)
    assert matcher.push("abc", False) == ("abc", None)
    assert matcher.push("", True) == ("", None)


def test_a_long_stop_string_of_repeats_stays_linear():
    matcher = StopMatcher(("a" * 20_000 + "b",), False)
    assert matcher.push("a" * 200_000, False) == ("a" * 180_000, None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("a", ""), False)
