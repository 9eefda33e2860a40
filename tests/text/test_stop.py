"""Stop strings, in a whole text and in a stream."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llada_jax.text import StopStringMatcher, find_stop


def naive_stop(text, stops):
    places = [i for i in range(len(text)) if any(text[i:].startswith(stop) for stop in stops)]
    return places[0] if places else None


words = st.text("ab", max_size=20)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@given(text=words, stops=stop_lists)
def test_find_stop(text, stops):
    assert find_stop(text, stops) == naive_stop(text, stops)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=10), stops=stop_lists)
def test_stream_equals_whole(pieces, stops):
    matcher = StopStringMatcher(stops)
    shown = "".join(map(matcher.push, pieces)) + matcher.flush()
    text = "".join(pieces)
    stop = naive_stop(text, stops)
    assert shown == text[:stop]
    assert matcher.stopped == (stop is not None)
    if matcher.matched is not None:
        assert text.startswith(matcher.matched, stop)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=10), stops=stop_lists)
def test_nothing_is_held_back_needlessly(pieces, stops):
    matcher, shown, text = StopStringMatcher(stops), "", ""
    for piece in pieces:
        shown += matcher.push(piece)
        text += piece
        if matcher.stopped:
            return
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_example():
    matcher = StopStringMatcher("###")
    assert [matcher.push(p) for p in ("a#", "b##", "#c", "d")] == ["a", "#b", "", ""]
    assert matcher.matched == "###"
    assert matcher.flush() == ""


def test_the_earliest_wins_even_if_it_ends_later():
    matcher = StopStringMatcher(["abcd", "c"])
    assert [matcher.push(p) for p in ("abc", "d")] == ["", ""]
    assert matcher.matched == "abcd"
    matcher = StopStringMatcher(["abcd", "c"])
    assert [matcher.push(p) for p in ("abc", "x")] == ["", "ab"]
    assert matcher.matched == "c"
    matcher = StopStringMatcher(["abcd", "c"])
    assert matcher.push("abc") + matcher.flush() == "ab"


def test_no_stops():
    matcher = StopStringMatcher(None)
    assert matcher.push("abc") + matcher.flush() == "abc"
    assert find_stop("abc", []) is None


def test_one_string_is_one_stop():
    assert find_stop("ab ba", "ba") == 3


def test_empty_stop_string():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStringMatcher(["a", ""])
    with pytest.raises(ValueError, match="must not be empty"):
        find_stop("a", "")
