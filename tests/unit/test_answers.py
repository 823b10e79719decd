"""The compiled writer of an answer's tokens: what it refuses, and when it asks for a text."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from arealtrio._core.answers import write_pairs, write_records

encode = msgspec.json.encode


def test_the_shapes() -> None:
    chosen = b'{"token_id":7,"logprob":-0.5,"rank":2'
    assert write_records([7], [-0.5], [2], encode) == (
        b"[" + chosen + b',"top_logprobs":[' + chosen + b"}]}]"
    )
    assert write_pairs([-0.5, -1.0], [7, 8], encode) == b"[[-0.5,7,null],[-1.0,8,null]]"


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3]])
def test_lists_of_two_lengths_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="for each token"):
        write_records(ids, [-0.5] * 2, [1] * len(ids), encode)
    with pytest.raises(ValueError, match="for each token"):
        write_records(ids, [-0.5] * len(ids), [1] * 2, encode)
    with pytest.raises(ValueError, match="for each token"):
        write_pairs([-0.5] * 2, ids, encode)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(1.0, TypeError), ("1", TypeError), (None, TypeError), (2**63, OverflowError)],
)
def test_what_is_no_integer_is_refused(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        write_records([wrong], [-0.5], [1], encode)
    with pytest.raises(error):
        write_records([1], [-0.5], [wrong], encode)
    with pytest.raises(error):
        write_pairs([-0.5], [wrong], encode)


def test_the_text_of_an_object_is_asked_for_once_in_a_row() -> None:
    asked = []

    def text_of(value: float) -> bytes:
        asked.append(value)
        return encode(value)

    one, other = -0.5, -0.25
    write_pairs([one, one, other, one], [1, 2, 3, 4], text_of)
    write_records([1, 2, 3, 4], [one, one, other, one], [1] * 4, text_of)
    assert asked == [one, other, one] * 2


def test_a_text_has_room_for_32_bytes() -> None:
    assert write_pairs([0.0], [1], lambda _: b"9" * 32) == b"[[" + b"9" * 32 + b",1,null]]"
    with pytest.raises(ValueError, match="more than 32 bytes"):
        write_records([1], [0.0], [1], lambda _: b"9" * 33)


@pytest.mark.parametrize("text", [None, "0", 1, bytearray(b"0")])
def test_a_text_that_is_no_bytes_is_refused(text: Any) -> None:
    with pytest.raises(TypeError, match="bytes"):
        write_records([1], [0.0], [1], lambda _: text)
    with pytest.raises(TypeError, match="bytes"):
        write_pairs([0.0], [1], lambda _: text)


def test_what_a_text_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        write_records([1], [0.0], [1], lambda _: b"%d" % (1 // 0))


def test_lists_that_shrink_meanwhile_are_no_danger() -> None:
    ids, values = [1, 2, 3], [-0.5, -0.25, -0.125]

    def text_of(_: float) -> bytes:
        ids.clear()
        return b"0"

    with pytest.raises(IndexError):
        write_pairs(values, ids, text_of)
