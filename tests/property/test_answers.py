"""The compiled writer of an answer's tokens against msgspec: the same bytes."""

from __future__ import annotations

import math

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio._core.answers import write_pairs, write_records

from ..models import answers as model

# Runs of one object, as the tokens of scripted weights have; and of equal ones that are others.
logprobs = st.floats() | st.sampled_from([0.0, -0.0, -(2.0**-10), -1e300, 5e-324])
runs = st.lists(st.tuples(logprobs, st.integers(1, 4)), max_size=8)
integers = st.integers(0, 2**31 - 1) | st.integers(-(2**63), 2**63 - 1)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[float], list[int]]:
    values = [value for value, times in draw(runs) for _ in range(times)]
    numbers = st.lists(integers, min_size=len(values), max_size=len(values))
    return draw(numbers), values, draw(numbers)


@given(answers())
@example(([], [], []))
@example(([-(2**63)] * 2, [-math.pi * 1e-300] * 2, [-(2**63)] * 2))  # the longest of everything
@example(([1, 2], [0.0, -0.0], [1, 1]))
@example(([1, 2, 3], [math.nan, math.inf, -math.inf], [1, 1, 1]))
def test_the_bytes_are_those_of_msgspec(answer: tuple[list[int], list[float], list[int]]) -> None:
    ids, values, ranks = answer
    assert write_records(ids, values, ranks, msgspec.json.encode) == model.records(*answer)
    assert write_pairs(values, ids, msgspec.json.encode) == model.pairs(values, ids)
