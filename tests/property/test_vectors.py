"""The compiled questions to vectors against lists; what is no vector of theirs is refused."""

from __future__ import annotations

import gc
import re
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio._core.vectors import are_alike, ascends, columns, has_nan, largest, token_ids
from arealtrio.errors import InvalidRequest
from arealtrio.types import as_token_ids

from ..models.vectors import plain_are_ids, plain_ascends, plain_columns, plain_has_nan

INT32S = st.integers(-(2**31), 2**31 - 1)
VECTORS = st.lists(INT32S, max_size=40)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(2**31 - 2, 2**31 + 1) | st.integers(0, 9)


class Subclass(np.ndarray[Any, Any]):
    """An array that is one of NumPy's own all the same."""


def vector(*values: float, dtype: type = np.int32) -> npt.NDArray[Any]:
    return np.array(values, dtype=dtype)


# What holds four int32 bytes for each item, and is no usual vector of int32.
UNUSUAL: dict[str, object] = {
    "strided": np.arange(8, dtype=np.int32)[::2],
    "reversed": np.arange(8, dtype=np.int32)[::-1],
    "matrix": np.zeros((2, 2), dtype=np.int32),
    "scalar": np.array(1, dtype=np.int32),
    "number": np.int32(1),
    "big-endian": np.arange(3, dtype=">i4"),
    "unsigned": np.arange(3, dtype=np.uint32),
    "wide": np.arange(3, dtype=np.int64),
    "dates": np.arange(3).astype("datetime64[s]"),
    "structs": np.zeros(3, dtype=[("a", np.int32)]),
    "objects": np.array([1, 2], dtype=object),
    "bytes": b"\0\0\0\0",
    "tuple": (1, 2),
    "none": None,
}


# --- token ids ---------------------------------------------------------------------------------


@given(VECTORS)
def test_a_vector_of_ids_is_itself(values: list[int]) -> None:
    ids = vector(*values)
    found = token_ids(ids)
    assert (found is ids) if plain_are_ids(values) else (found is None)


@given(st.lists(NUMBERS | st.booleans() | st.floats() | st.text(), max_size=8))
@example([2**31 - 1])
@example([2**31])
@example([2**64 + 1])
@example([True])
@example([np.int32(1)])
@example([[1]])
def test_a_list_of_ids_becomes_a_vector(values: list[Any]) -> None:
    found = token_ids(values)
    assert (found is not None) == plain_are_ids(values)
    if found is not None:
        assert type(found) is np.ndarray
        assert found.dtype == np.int32
        assert found.tolist() == values


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_other_ids_are_left_to_whom_they_are_usual(value: object) -> None:
    assert token_ids(value) is None


def test_an_array_of_a_subclass_is_left_too() -> None:
    assert token_ids(vector(1, 2).view(Subclass)) is None


@given(st.lists(NUMBERS, max_size=8))
def test_a_list_and_a_tuple_are_read_alike(values: list[int]) -> None:
    """Of which the second is never usual."""
    try:
        expected = as_token_ids(tuple(values))
    except InvalidRequest as exc:
        with pytest.raises(InvalidRequest, match=re.escape(str(exc))):
            as_token_ids(values)
    else:
        np.testing.assert_array_equal(as_token_ids(values), expected, strict=True)


# --- the columns of a row ----------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("if"), st.integers(0, 2)), max_size=5), st.text("if"))
def test_columns_are_alike_in_length_and_of_their_kinds(
    columns: list[tuple[str, int]], kinds: str
) -> None:
    dtypes = {"i": np.int32, "f": np.float32}
    arrays = tuple(np.zeros(length, dtype=dtypes[kind]) for kind, length in columns)
    if len(columns) != len(kinds):
        with pytest.raises(ValueError, match="need as many kinds"):
            are_alike(arrays, kinds.encode())
        return
    lengths = {length for _, length in columns}
    assert are_alike(arrays, kinds.encode()) == (
        [kind for kind, _ in columns] == list(kinds) and len(lengths - {0}) == len(lengths) <= 1
    )


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_another_column_is_not_alike(value: object) -> None:
    assert not are_alike((value,), b"i")
    assert not are_alike((vector(1), value), b"ii")


def test_a_column_of_a_subclass_is_not_alike() -> None:
    assert not are_alike((vector(1).view(Subclass),), b"i")


Part = tuple[list[int], list[float] | None, list[int] | None]


def made(tokens: list[int]) -> st.SearchStrategy[Part]:
    size = len(tokens)
    logprobs = st.lists(st.floats(width=32), min_size=size, max_size=size)
    versions = st.lists(INT32S, min_size=size, max_size=size)
    return st.tuples(st.just(tokens), logprobs, versions)


PROMPTS = st.tuples(VECTORS, st.none(), st.none())
PARTS = st.lists(PROMPTS | VECTORS.flatmap(made), max_size=4)


def arrays_of(part: Part) -> tuple[Any, Any, Any]:
    tokens, logprobs, versions = part
    if logprobs is None or versions is None:
        return vector(*tokens), None, None
    return vector(*tokens), vector(*logprobs, dtype=np.float32), vector(*versions)


@given(PARTS)
@example([])
@example([([], None, None), ([], [], [])])
def test_parts_are_laid_end_to_end(parts: list[Part]) -> None:
    found = columns([arrays_of(part) for part in parts])
    assert found is not None
    assert [column.dtype for column in found] == [np.int32, np.int32, np.float32, np.int32]
    for column, expected in zip(found, plain_columns(parts), strict=True):
        np.testing.assert_array_equal(column, expected)


def test_columns_are_fresh() -> None:
    ids, logprobs = vector(1, 2), vector(0, 0, dtype=np.float32)
    found = columns([(ids, logprobs, ids)])
    assert found is not None
    assert not any(np.shares_memory(column, given) for column in found for given in (ids, logprobs))


@pytest.mark.parametrize(
    "part",
    [
        (vector(1, 2), vector(0, dtype=np.float32), vector(1, 2)),
        (vector(1, 2), vector(0, 0, dtype=np.float32), vector(1)),
        (vector(1), vector(0, 0, dtype=np.float32), vector(1, 2)),
        (vector(1), vector(0), vector(1)),
        (vector(1), vector(0, dtype=np.float64), vector(1)),
        (vector(1), vector(0, dtype=np.float32), None),
        (vector(1, dtype=np.int64), None, None),
        (vector(1).view(Subclass), None, None),
        ([1], None, None),
        (np.zeros((2, 1), dtype=np.int32), None, None),
    ],
)
def test_other_parts_are_left_to_whom_they_are_usual(part: Any) -> None:
    assert columns([part]) is None
    assert columns([(vector(1), None, None), part]) is None


def test_a_part_is_three_things() -> None:
    with pytest.raises(ValueError, match="unpack"):
        columns([(vector(1), None)])  # type: ignore[list-item]


# --- looks at values ---------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), max_size=40))
@example([float("nan")])
@example([0.0] * 33 + [float("nan")])
@example([float("inf"), float("-inf")])
def test_a_nan_is_seen(values: list[float]) -> None:
    assert has_nan(vector(*values, dtype=np.float32)) == plain_has_nan(values)


@given(VECTORS | VECTORS.map(sorted), INT32S)
@example([], 5)
@example([-(2**31), 2**31 - 1], -(2**31))
@example([2**31 - 1, -(2**31)], -(2**31))
@example([5], 6)
def test_a_fall_is_seen(values: list[int], least: int) -> None:
    assert ascends(vector(*values), least) == plain_ascends(values, least)


@given(st.lists(INT32S, min_size=1, max_size=40))
@example([-(2**31)])
def test_the_largest_is_found(values: list[int]) -> None:
    assert largest(vector(*values)) == max(values)


def test_nothing_is_the_largest_of_none() -> None:
    with pytest.raises(ValueError, match="empty vector"):
        largest(vector())


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_only_vectors_are_looked_at(value: Any) -> None:
    with pytest.raises(TypeError, match="expected a C-contiguous vector of int32"):
        largest(value)
    with pytest.raises(TypeError, match="expected a C-contiguous vector of int32"):
        ascends(value, 0)
    with pytest.raises(TypeError, match="expected a C-contiguous vector of float32"):
        has_nan(value)


@pytest.mark.parametrize("least", [2**31, -(2**31) - 1])
def test_a_floor_is_an_int32(least: int) -> None:
    with pytest.raises(OverflowError):
        ascends(vector(1), least)


def test_what_can_not_be_written_to_is_looked_at() -> None:
    ids = vector(1, 2)
    ids.flags.writeable = False
    assert token_ids(ids) is ids
    assert ascends(ids, 0)


def test_nothing_is_held_on_to() -> None:
    ids, values = vector(3, 2), vector(1, dtype=np.float32)
    gc.collect()
    before = sys.getrefcount(ids), sys.getrefcount(values)
    for _ in range(10):
        assert token_ids(ids) is ids
        assert are_alike((ids, ids), b"ii")
        assert not are_alike((ids, values), b"if")
        assert not are_alike((ids,), b"f")
        assert not ascends(ids, 0)
        assert not has_nan(values)
        assert largest(ids) == 3
        assert columns([(ids, None, None), (ids, values, ids)]) is None
        assert columns([(ids, None, None)]) is not None
    assert (sys.getrefcount(ids), sys.getrefcount(values)) == before
    ids.resize(0)  # raises while a buffer is out
