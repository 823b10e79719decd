"""The compiled pad and pack against lists, for any ragged rows; an error writes nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio._core.collate import pack, pad, span

from ..models.collate import plain_mask, plain_pack, plain_pad, plain_span, plain_unpad

Array = npt.NDArray[Any]

INTS = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32, allow_nan=False)
LENGTHS = st.lists(st.integers(0, 40), max_size=12)


@st.composite
def columns(draw: st.DrawFn) -> tuple[list[list[Array]], list[float]]:
    """Columns of either dtype over the same lengths, and a fill value for each."""
    lengths = draw(LENGTHS)
    dtypes = draw(st.lists(st.sampled_from([np.int32, np.float32]), min_size=1, max_size=4))
    numbers = {np.int32: INTS, np.float32: FLOATS}
    made = [
        [
            np.array(draw(st.lists(numbers[dtype], min_size=n, max_size=n)), dtype=dtype)
            for n in lengths
        ]
        for dtype in dtypes
    ]
    return made, [draw(numbers[dtype]) for dtype in dtypes]


def outputs(made: list[list[Array]], fills: list[float], shape: tuple[int, ...]) -> list[Array]:
    """Arrays full of something that neither the rows nor the fills are likely to be."""
    dtypes = [
        column[0].dtype if column else np.asarray(fill).astype(np.float32).dtype
        for column, fill in zip(made, fills, strict=True)
    ]
    return [np.full(shape, 77, dtype=dtype) for dtype in dtypes]


def widest(rows: list[Array]) -> int:
    return max(map(len, rows), default=0)


@given(columns(), st.integers(0, 3))
def test_pad_is_the_model(given_columns: tuple[list[list[Array]], list[float]], room: int) -> None:
    made, fills = given_columns
    shape = (len(made[0]), widest(made[0]) + room)
    outs = outputs(made, fills, shape)
    fills = [int(f) if out.dtype == np.int32 else f for f, out in zip(fills, outs, strict=True)]
    mask = np.full(shape, fill_value=True)
    pad(made, fills, outs, mask)
    for rows, fill, out in zip(made, fills, outs, strict=True):
        assert out.tolist() == plain_pad([r.tolist() for r in rows], fill, shape[1])
    assert mask.tolist() == plain_mask([r.tolist() for r in made[0]], shape[1])


@given(columns())
def test_unpad_of_pad_is_the_rows(given_columns: tuple[list[list[Array]], list[float]]) -> None:
    made, fills = given_columns
    shape = (len(made[0]), widest(made[0]))
    outs = outputs(made, fills, shape)
    mask = np.empty(shape, dtype=bool)
    pad(made, fills, outs, mask)
    for rows, out in zip(made, outs, strict=True):
        assert plain_unpad(out.tolist(), mask.tolist()) == [r.tolist() for r in rows]


@given(columns())
def test_pack_is_the_model_and_agrees_with_pad(
    given_columns: tuple[list[list[Array]], list[float]],
) -> None:
    made, fills = given_columns
    total = sum(map(len, made[0]))
    packed = outputs(made, fills, (total,))
    starts = np.full(len(made[0]) + 1, 77, dtype=np.int32)
    pack(made, packed, starts)
    padded = outputs(made, fills, (len(made[0]), widest(made[0])))
    mask = np.empty(padded[0].shape, dtype=bool)
    pad(made, fills, padded, mask)
    for rows, flat, rectangle in zip(made, packed, padded, strict=True):
        assert (flat.tolist(), starts.tolist()) == plain_pack([r.tolist() for r in rows])
        assert flat.tolist() == rectangle[mask].tolist()


@pytest.mark.parametrize("fill", [0, -1, -2, 1, 255, 0x01010101, -(2**31), 2**31 - 1])
def test_any_int32_may_fill(fill: int) -> None:
    out = rectangle()
    pad([ROWS], [fill], [out])
    assert out.tolist() == [[1, 2, 3], [4, fill, fill]]


@pytest.mark.parametrize("fill", [0.0, -0.0, 0.5, float("inf"), float("nan"), 1])
def test_any_float_may_fill(fill: float) -> None:
    out = rectangle(np.float32)
    pad([LOGPROBS], [fill], [out])
    assert out[1, 1:].tobytes() == np.full(2, fill, np.float32).tobytes()


def ids(*numbers: int) -> Array:
    return np.array(numbers, dtype=np.int32)


def rectangle(dtype: npt.DTypeLike = np.int32, shape: tuple[int, ...] = (2, 3)) -> Array:
    return np.full(shape, 7, dtype=dtype)


def readonly() -> Array:
    array = rectangle()
    array.flags.writeable = False
    return array


ROWS = [ids(1, 2, 3), ids(4)]
LOGPROBS = [np.zeros(3, np.float32), np.zeros(1, np.float32)]

WRONG_PADS: dict[str, tuple[type[Exception], Callable[[], tuple[Any, ...]]]] = {
    "no column": (ValueError, lambda: ([], [], [], None)),
    "an output too few": (ValueError, lambda: ([ROWS, ROWS], [0, 0], [rectangle()], None)),
    "a fill too few": (ValueError, lambda: ([ROWS], [], [rectangle()], None)),
    "a row too few": (ValueError, lambda: ([ROWS, ROWS[:1]], [0, 0], two(), None)),
    "lengths differ": (ValueError, lambda: ([ROWS, ROWS[::-1]], [0, 0], two(), None)),
    "row is int64": (TypeError, lambda: ([[ROWS[0], np.ones(1, int)]], [0], [rectangle()], None)),
    "row is big-endian": (
        TypeError,
        lambda: ([[ROWS[0], np.ones(1, ">i4")]], [0], [rectangle()], None),
    ),
    "row is float": (TypeError, lambda: ([LOGPROBS], [0], [rectangle()], None)),
    "row is int": (TypeError, lambda: ([ROWS], [0], [rectangle(np.float32)], None)),
    "row is 2-D": (ValueError, lambda: ([[ROWS[0], ids(1)[None]]], [0], [rectangle()], None)),
    "row is a list": (TypeError, lambda: ([[ROWS[0], [4]]], [0], [rectangle()], None)),
    "row has gaps": (TypeError, lambda: ([[ROWS[0], ids(1, 2, 3)[::2]]], [0], [rectangle()], None)),
    "output is int64": (TypeError, lambda: ([ROWS], [0], [rectangle(int)], None)),
    "output is unsigned": (TypeError, lambda: ([ROWS], [0], [rectangle(np.uint32)], None)),
    "output is read-only": (TypeError, lambda: ([ROWS], [0], [readonly()], None)),
    "output is transposed": (TypeError, lambda: ([ROWS], [0], [rectangle().T], None)),
    "output is 1-D": (ValueError, lambda: ([ROWS], [0], [rectangle(shape=(6,))], None)),
    "output is narrow": (ValueError, lambda: ([ROWS], [0], [rectangle(shape=(2, 2))], None)),
    "output is short": (ValueError, lambda: ([ROWS], [0], [rectangle(shape=(1, 3))], None)),
    "output is tall": (ValueError, lambda: ([ROWS], [0], [rectangle(shape=(3, 3))], None)),
    "fill is too large": (OverflowError, lambda: ([ROWS], [2**31], [rectangle()], None)),
    "fill is a float": (TypeError, lambda: ([ROWS], [0.5], [rectangle()], None)),
    "fill is a text": (TypeError, lambda: ([ROWS], ["0"], [rectangle()], None)),
    "mask is int": (TypeError, lambda: ([ROWS], [0], [rectangle()], rectangle())),
    "mask is narrow": (
        ValueError,
        lambda: ([ROWS], [0], [rectangle()], rectangle(bool, (2, 2))),
    ),
}


def two() -> list[Array]:
    return [rectangle(), rectangle()]


def contents(outs: list[Array], last: Array | None) -> list[bytes]:
    return [array.tobytes() for array in (*outs, *([] if last is None else [last]))]


@pytest.mark.parametrize("case", WRONG_PADS)
def test_a_wrong_pad_raises_and_writes_nothing(case: str) -> None:
    error, arguments = WRONG_PADS[case]
    made, fills, outs, mask = arguments()
    before = contents(outs, mask)
    with pytest.raises(error):
        pad(made, fills, outs, mask)
    assert contents(outs, mask) == before


@pytest.mark.parametrize("where", [0, 3, 5])
def test_pad_refuses_shared_memory(where: int) -> None:
    out = rectangle()
    row = out.reshape(-1)[where : where + 1]
    with pytest.raises(ValueError, match="row 1 of column 0 shares memory with an output"):
        pad([[ROWS[0], row]], [0], [out])
    with pytest.raises(ValueError, match="output 1 shares memory with another output"):
        pad([ROWS, ROWS], [0, 0], [out, out])
    assert out.tolist() == rectangle().tolist()


def test_pad_into_neighbouring_memory_is_no_sharing() -> None:
    memory = np.zeros(12, dtype=np.int32)
    pad([[memory[:3], memory[9:]]], [0], [memory[3:9].reshape(2, 3)])


WRONG_PACKS: dict[str, tuple[type[Exception], Callable[[], tuple[Any, ...]]]] = {
    "no column": (ValueError, lambda: ([], [], rectangle(shape=(1,)))),
    "output is short": (ValueError, lambda: ([ROWS], [ids(7, 7, 7)], ids(7, 7, 7))),
    "output is long": (ValueError, lambda: ([ROWS], [rectangle(shape=(5,))], ids(7, 7, 7))),
    "output is 2-D": (ValueError, lambda: ([ROWS], [rectangle(shape=(2, 2))], ids(7, 7, 7))),
    "offsets are short": (ValueError, lambda: ([ROWS], [rectangle(shape=(4,))], ids(7, 7))),
    "offsets are float": (
        TypeError,
        lambda: ([ROWS], [rectangle(shape=(4,))], np.zeros(3, np.float32)),
    ),
    "lengths differ": (
        ValueError,
        lambda: ([ROWS, ROWS[::-1]], [rectangle(shape=(4,)) for _ in range(2)], ids(7, 7, 7)),
    ),
}


@pytest.mark.parametrize("case", WRONG_PACKS)
def test_a_wrong_pack_raises_and_writes_nothing(case: str) -> None:
    error, arguments = WRONG_PACKS[case]
    made, outs, starts = arguments()
    before = contents(outs, starts)
    with pytest.raises(error):
        pack(made, outs, starts)
    assert contents(outs, starts) == before


def test_pack_refuses_more_than_int32_can_count() -> None:
    """2¹⁷ rows of 2¹⁴ tokens, all of them the same array: large in sum, not in memory."""
    row = np.zeros(2**14, dtype=np.int32)
    with pytest.raises(ValueError, match="cu_seqlens, which is int32"):
        pack([[row] * 2**17], [ids(0)], np.zeros(2**17 + 1, dtype=np.int32))


def test_an_error_names_its_row() -> None:
    with pytest.raises(TypeError, match="row 1 of column 0"):
        pad([[ROWS[0], np.ones(1, int)]], [0], [rectangle()])
    with pytest.raises(ValueError, match="row 0 has 1 tokens in column 1, but 3 in column 0"):
        pad([ROWS, ROWS[::-1]], [0, 0], two())


def test_no_buffer_is_held_afterwards() -> None:
    """An array that is exported as a buffer can not be resized; a bytearray says so."""
    memory = bytearray(24)
    out = np.frombuffer(memory, dtype=np.int32).reshape(2, 3)
    row = ids(1, 2, 3)
    pad([[row, ROWS[1]]], [0], [out])
    with pytest.raises(TypeError, match="int32 or float32"):
        pad([[row, ROWS[1]]], [0], [out.view(np.uint32)])
    del out
    gc.collect()
    memory.append(0)
    assert len(memory) == 25


def test_threads_may_collate_at_once() -> None:
    rows = [np.full(n, n, dtype=np.int32) for n in range(1, 400)]
    outs = [np.empty((len(rows), 400), dtype=np.int32) for _ in range(4)]
    threads = [threading.Thread(target=pad, args=([rows], [-1], [out])) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = plain_pad([row.tolist() for row in rows], -1, 400)
    assert all(out.tolist() == expected for out in outs)


@given(st.lists(st.lists(INTS | st.just(-1), max_size=20), max_size=6))
def test_span_is_the_model(rows: list[list[int]]) -> None:
    assert span([np.array(row, dtype=np.int32) for row in rows]) == plain_span(rows)


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(4, np.float32),
        np.zeros(4, np.int64),
        np.zeros((2, 2), np.int32),
        np.zeros(8, np.int32)[::2],
        [1, 2],
        None,
    ],
)
def test_span_refuses_what_is_no_vector_of_int32(row: Any) -> None:
    with pytest.raises(TypeError):
        span([np.zeros(1, np.int32), row])
