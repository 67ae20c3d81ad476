"""Text as it becomes certain: characters of several bytes, stop strings in pieces, tokens out of nowhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.inference.text_stream import Stripped, TextStream, clean_text, finished_text

BYTES = ByteTokenizer()


def streamed(text: bytes, stop=(), context: str = "") -> list[str]:
    """What each byte shows, and what the end does; ends early at a stop."""
    stream, shown = TextStream(BYTES, BYTES.encode(context), stop), []
    for token in text:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()]


def test_a_character_appears_when_it_is_whole():
    assert streamed("aé→😀b".encode()) == ["a", "", "é", "", "", "→", "", "", "", "😀", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    assert "".join(streamed(b"a\xff\xfeb")) == "a\ufffd\ufffdb"
    assert streamed(b"a\xf0\x9f") == ["a", "", "", "\ufffd"]
    assert "".join(streamed(b"\xff" * 9)) == "\ufffd" * 9


def test_a_stop_string_is_never_shown_nor_its_beginning():
    assert streamed(b"one\nUse two\nUser: x", ["\nUser:"]) == [
        *"one", "", "", "", "", "\nUse ", *"two", "", "", "", "", "", "", ""
    ]  # fmt: skip
    assert "".join(streamed(b"aabaac", ["aac"])) == "aab"
    assert "".join(streamed(b"abcabd", ["x", "bd"])) == "abca"
    assert streamed(b"ab", ["abc"]) == ["", "", "ab"]


def test_the_earliest_stop_counts():
    assert "".join(streamed(b"one two", ["two", "e "])) == "on"


@given(st.text(min_size=1, max_size=120), st.text(max_size=10), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text(text, context, stop):
    """Whatever the context, all pieces together are the text up to the first stop."""
    ends = [text.find(word) for word in stop if word in text]
    try:
        raw = text.encode()
        context.encode()
    except UnicodeEncodeError:
        return
    # the stop that is whole first ends the text, at the place of the first that is whole by then
    pieces = "".join(streamed(raw, stop, context))
    if not ends:
        assert pieces == text
    else:
        assert text.startswith(pieces) and not any(word in pieces for word in stop)


@pytest.mark.parametrize("length", [63, 64, 65, 500])
def test_long_texts(length):
    text = ("häuser " * length)[:length]
    assert "".join(streamed(text.encode(), ["never"])) == text


@given(st.lists(st.text(" \n\tab", max_size=3), max_size=12))
def test_pieces_without_white_space_around_them(pieces):
    stripped = Stripped()
    assert "".join(map(stripped.push, pieces)) == "".join(pieces).strip()


@given(st.text(min_size=1, max_size=30), st.integers(0, 3), st.booleans())
def test_a_context_may_end_inside_a_character(text, cut, echoed):
    """Its beginning is in the context, its end among the new tokens: it is shown with them."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    place = max(len(raw) - cut, 0)
    stream = TextStream(BYTES, [256, *raw[:place]], (), echoed)
    new = "".join([*map(stream.push, raw[place:]), stream.finish()])
    before = finished_text(BYTES, list(raw[:place]))
    if "\ufffd" not in text:
        assert before + new == text
    assert text.endswith(new)


def test_a_long_run_of_bytes_is_never_cut_inside_a_character():
    """Where a decoder spells a whole run of bytes as unknown as soon as one of its characters is cut."""

    class ByteFallback:
        eod_id = 256

        def decode(self, ids):
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(ids)

    text, shown = "日本語の文章" * 20, ""
    stream = TextStream(ByteFallback(), [])
    for token in text.encode():
        shown += stream.push(token)
    assert shown + stream.finish() == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [("a\ud800b", "a\ufffdb"), ("\udcff", "\ufffd"), ("\ud83d\ude00", "😀"), ("\ufeffa", "\ufeffa"), ("é😀", "é😀")],
)
def test_halves_of_pairs(text, clean):
    assert clean_text(text) == clean
