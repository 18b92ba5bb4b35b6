"""Streamed text is the text, up to the first stop string, and never more than that at any time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lossy_model import train_lossy_model
from ttt_e2e.data.tokenizers import ByteTokenizer, load_tokenizer
from ttt_e2e.inference.text import TextStream, held_back

TOKENIZER = ByteTokenizer()
stops = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


def streamed(ids, stops=()):
    """What a stream gives out, token by token and at the end; and whether it stopped."""
    stream, pieces = TextStream(TOKENIZER, stops), []
    for token in ids:
        pieces.append(stream.push(int(token)))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


@given(text=st.text("ab€é𝄞\n", max_size=12), stops=stops)
def test_is_the_text_before_the_first_stop_string(text, stops):
    pieces, stopped = streamed(TOKENIZER.encode(text), stops)
    found = [text.find(stop) for stop in stops if stop in text]
    # Strings that end later are not waited for: the first to be complete wins.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    expected = text[: min(ends)] if found else text
    if found:
        expected = expected[: min(expected.find(stop) for stop in stops if stop in expected)]
    assert "".join(pieces) == expected


@given(ids=st.lists(st.integers(0, 256), max_size=12))
def test_malformed_bytes_and_bos_read_as_they_do_at_once(ids):
    pieces, _ = streamed(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_no_partial_character_and_no_partial_stop_string_is_given_out():
    pieces, stopped = streamed(TOKENIZER.encode("a€b\n\nUser: c"), ["\n\nUser:"])
    assert pieces[:5] == ["a", "", "", "€", "b"]
    assert "".join(pieces[5:]) == ""
    assert stopped
    pieces, stopped = streamed(TOKENIZER.encode("b\n\nUse"), ["\n\nUser:"])
    assert pieces[-1] == "\n\nUse"  # nothing more comes: it was no stop string
    assert not stopped


@given(text=st.text("ab", max_size=8), stop=st.text("ab", min_size=1, max_size=4))
def test_held_back_is_what_may_yet_become_a_stop_string(text, stop):
    expected = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
    assert held_back(text, [stop]) == expected


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """A tokenizer that puts a space before a text, and drops it when it decodes."""
    path = tmp_path_factory.mktemp("model") / "lossy.model"
    train_lossy_model(path)
    return load_tokenizer(path)


@given(prompt=st.text("ab ", max_size=30), text=st.text("ab c.", max_size=12))
def test_a_text_after_a_prompt_is_what_follows_it(lossy, prompt, text):
    """Whether it begins with a space or not, as decoding both at once says."""
    before, ids = ([lossy.bos_id, *lossy.encode(part)][start:] for part, start in ((prompt, 0), (text, 1)))
    stream = TextStream(lossy, (), before)
    streamed = "".join([*(stream.push(int(token)) for token in ids), stream.finish()])
    assert streamed == lossy.decode([*before, *ids])[len(lossy.decode(before)) :]


def test_a_space_before_the_first_word_is_given_out(lossy):
    ids = lossy.encode("cd ef")
    for before, expected in (
        (lossy.encode("ab"), " cd ef"),
        ([lossy.bos_id, *lossy.encode("ab")], " cd ef"),
        (np.asarray(lossy.encode("ab " * 20)), " cd ef"),
        ([lossy.bos_id], "cd ef"),  # a new document begins without one
        ([], "cd ef"),
    ):
        stream = TextStream(lossy, (), before)
        assert "".join([*(stream.push(int(token)) for token in ids), stream.finish()]) == expected


def test_a_stop_string_that_begins_with_a_space_is_found_at_once(lossy):
    for before, stopped in ((lossy.encode("ab"), True), ([lossy.bos_id], False)):
        stream = TextStream(lossy, [" cd"], before)
        text = "".join(stream.push(int(token)) for token in lossy.encode("cd"))
        assert stream.stopped is stopped
        assert text + stream.finish() == ("" if stopped else "cd")


def test_a_prompt_that_ends_within_a_character():
    """The bytes that follow complete a character whose beginning was given out before: they are shown as they are."""
    stream = TextStream(TOKENIZER, (), "é".encode()[:1])
    assert stream.push("é".encode()[1]) + stream.push(ord("x")) + stream.finish() == "\ufffdx"
    stream = TextStream(TOKENIZER, (), "é".encode())
    assert stream.push(ord("x")) + stream.finish() == "x"
