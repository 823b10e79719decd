"""Rows out of responses, and out of whatever a workflow returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.errors import InvalidRequest, WorkflowError
from arealtrio.rows import (
    RESERVED_NAMES,
    RowBuilder,
    as_column,
    as_reward,
    rows_from_result,
    trajectory_from_response,
)
from arealtrio.types import Int32Array, ModelResponse, Trajectory


def ids(*numbers: int) -> Int32Array:
    return np.array(numbers, dtype=np.int32)


def response(
    prompt: Int32Array, output: Int32Array, version: int = 0, *, exact: bool = True
) -> ModelResponse:
    return ModelResponse(
        rid="r",
        input_tokens=prompt,
        output_tokens=output,
        output_logprobs=np.linspace(-1, -0.5, len(output), dtype=np.float32),
        output_versions=np.full(len(output), version, dtype=np.int32),
        stop_reason="stop",
        versions_exact=exact,
    )


def test_a_response_becomes_a_row_with_its_prompt_masked_out() -> None:
    row = trajectory_from_response(response(ids(5, 6), ids(7, 8, 9), version=3), 1)
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert row.loss_mask.tolist() == [0, 0, 1, 1, 1]
    assert row.logprobs.tolist() == [0.0, 0.0, -1.0, -0.75, -0.5]
    assert row.versions.tolist() == [-1, -1, 3, 3, 3]
    assert (row.reward, type(row.reward), row.versions_exact) == (1.0, float, True)


def test_a_response_without_tokens_is_a_row_without_anything_to_learn() -> None:
    row = trajectory_from_response(response(ids(5, 6), ids()), 0.5)
    assert row.loss_mask.tolist() == [0, 0]
    assert row.head_version is None


def test_a_response_in_other_dtypes_is_the_same_row() -> None:
    usual = response(ids(5, 6), ids(7, 8, 9), version=3)
    unusual = replace(
        usual,
        output_tokens=usual.output_tokens.astype(np.int64),
        output_logprobs=usual.output_logprobs.astype(np.float64),
        output_versions=np.array([3, 0, 3, 0, 3, 0], dtype=np.int32)[::2],
    )
    expected, row = (trajectory_from_response(answer, 1) for answer in (usual, unusual))
    for name in ("input_ids", "loss_mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(row, name), getattr(expected, name), strict=True)


def test_a_row_is_its_own_memory() -> None:
    prompt = ids(1, 2)
    row = trajectory_from_response(response(prompt, ids(3)), 0)
    prompt[0] = 99
    assert row.input_ids.tolist() == [1, 2, 3]


def test_extras_are_as_long_as_the_row_and_get_a_dtype_of_a_batch() -> None:
    row = trajectory_from_response(
        response(ids(1), ids(2, 3)), 0, extras={"advantages": np.array([0, 0.5, 1.5])}
    )
    assert row.extras["advantages"].dtype == np.float32
    with pytest.raises(WorkflowError, match="'advantages' must be as long"):
        trajectory_from_response(response(ids(1), ids(2, 3)), 0, extras={"advantages": np.zeros(2)})


def test_turns_add_up() -> None:
    row = RowBuilder()
    row.append_response(response(ids(1, 2), ids(3), version=4))
    row.append_prompt([8, 8])
    assert (len(row), row.input_ids.tolist()) == (5, [1, 2, 3, 8, 8])
    row.append_response(response(row.input_ids, ids(4, 5), version=6, exact=False))
    built = row.build(2.0)
    assert built.input_ids.tolist() == [1, 2, 3, 8, 8, 4, 5]
    assert built.loss_mask.tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert built.versions.tolist() == [-1, -1, 4, -1, -1, 6, 6]
    assert built.logprobs[[0, 1, 3, 4]].tolist() == [0.0] * 4
    assert (built.head_version, built.tail_version, built.versions_exact) == (4, 6, False)


def test_a_row_in_the_making_is_its_own_memory() -> None:
    """A tool may answer in one array, turn after turn."""
    answer = ids(1, 2)
    row = RowBuilder().append_prompt(answer)
    row.append_response(response(row.input_ids, ids(3)))
    answer[:] = 9
    row.append_prompt(answer)
    answer[:] = 0
    assert row.build(0.0).input_ids.tolist() == [1, 2, 3, 9, 9]


def test_a_builder_can_branch_by_building_early() -> None:
    row = RowBuilder().append_response(response(ids(1), ids(2)))
    first = row.build(0.0)
    row.append_prompt([9])
    assert (len(first), len(row.build(0.0))) == (2, 3)


@pytest.mark.parametrize("prompt", [ids(1, 2), ids(1, 2, 4), ids(), ids(1, 2, 3, 4)])
def test_an_answer_to_another_prompt_is_refused(prompt: Int32Array) -> None:
    row = RowBuilder().append_prompt([1, 2, 3])
    with pytest.raises(WorkflowError, match="send the builder's input_ids"):
        row.append_response(response(prompt, ids(7)))
    assert row.input_ids.tolist() == [1, 2, 3]


def test_a_response_of_unequal_vectors_is_refused() -> None:
    row = RowBuilder()
    torn = ModelResponse(
        rid="r",
        input_tokens=ids(1),
        output_tokens=ids(2, 3),
        output_logprobs=np.zeros(1, np.float32),
        output_versions=ids(0, 0),
        stop_reason="stop",
    )
    with pytest.raises(WorkflowError, match="differ in length"):
        row.append_response(torn)
    assert len(row) == 0


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(WorkflowError, match="at least one token"):
        RowBuilder().build(0.0)


def test_a_prompt_that_is_no_prompt_is_refused() -> None:
    row = RowBuilder()
    with pytest.raises(InvalidRequest, match="prompt tokens"):
        row.append_prompt([-5])
    assert len(row) == 0


class Scalar:
    """A tensor of no dimension, as far as this library looks."""

    shape = ()

    def __init__(self, value: object) -> None:
        self.value = value

    def item(self) -> object:
        return self.value


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array(3.0), 3.0),
        (Scalar(0.25), 0.25),
    ],
)
def test_a_reward_is_a_number(value: object, reward: float) -> None:
    assert (as_reward(value), type(as_reward(value))) == (reward, float)


@pytest.mark.parametrize(
    "value",
    [None, "1", [1.0], np.array([1.0]), {}, 1j, float("nan"), float("inf"), -np.inf, Scalar("1")],
)
def test_a_reward_that_is_none_is_never_zero(value: object) -> None:
    with pytest.raises(WorkflowError, match="a reward must be"):
        as_reward(value)


@pytest.mark.parametrize("value", [1e39, -1e300, 10**39, np.float64(1e300)])
def test_a_reward_that_is_infinite_in_a_batch_is_refused(value: Any) -> None:
    with pytest.raises(WorkflowError, match="a reward must be finite as a float32"):
        as_reward(value)
    with pytest.raises(WorkflowError, match="reward must be finite as a float32"):
        replace(trajectory_from_response(response(ids(1), ids(2)), 0.0), reward=value)
    with pytest.raises(WorkflowError, match="not inf"):
        as_reward(10**400)
    largest = float(np.finfo(np.float32).max)
    assert as_reward(largest) == largest


def test_columns_are_int32_or_float32() -> None:
    assert as_column("x", [True, False]).dtype == np.int32
    assert as_column("x", np.array([1, 2**31 - 1, -(2**31)])).tolist() == [1, 2**31 - 1, -(2**31)]
    assert as_column("x", np.array([0.5], np.float16)).dtype == np.float32
    assert as_column("x", np.arange(6, dtype=np.int32)[::2]).flags.c_contiguous


class NeedsGrad:
    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise RuntimeError("call detach() first")


@pytest.mark.parametrize(
    "value", [[2**31], [-(2**31) - 1], ["a"], [[1], [1, 2]], [None], [1j], NeedsGrad()]
)
def test_a_column_of_anything_else_is_refused(value: object) -> None:
    with pytest.raises(WorkflowError, match="quantity"):
        as_column("quantity", value)


def a_row(length: int = 3, **changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "input_ids": np.arange(length),
        "loss_mask": np.ones(length, int),
        "logprobs": np.full(length, -0.5),
        "versions": np.zeros(length, int),
        "reward": 1.0,
    }
    return Trajectory(**fields | changes)


def test_none_means_no_rows() -> None:
    assert rows_from_result(None) == ()


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_trajectory_or_several(kind: type) -> None:
    one, two = a_row(), a_row(2)
    assert rows_from_result(one) == (one,)
    assert rows_from_result(kind([one, two])) == (one, two)


@pytest.mark.parametrize(
    "result", [[], (), "rows", b"rows", 3, object(), [None], [a_row(), 3], [[a_row()]], {}]
)
def test_anything_else_is_refused_and_told_what_to_return(result: object) -> None:
    with pytest.raises(WorkflowError, match="a workflow returns a Trajectory, a non-empty seq"):
        rows_from_result(result)


def test_extras_of_a_returned_row_get_a_dtype_of_a_batch() -> None:
    (row,) = rows_from_result(a_row(extras={"score": np.array([0.5, 1, 2])}))
    assert row.extras["score"].dtype == np.float32
    clean = a_row(extras={"score": np.zeros(3, np.float32)})
    assert rows_from_result(clean) == (clean,)
    with pytest.raises(WorkflowError, match="extra 'score' must hold integers or floats"):
        rows_from_result(a_row(extras={"score": np.array(["a", "b", "c"])}))


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_an_extra_can_not_be_called_like_a_column(name: str) -> None:
    with pytest.raises(WorkflowError, match=f"extras can not be called {name}"):
        rows_from_result(a_row(extras={name: np.zeros(3)}))


@pytest.mark.parametrize("name", [3, "\ud800", None])
def test_an_extra_is_called_by_text(name: Any) -> None:
    with pytest.raises(WorkflowError, match="an extra is called by text, not"):
        rows_from_result(a_row(extras={name: np.zeros(3, np.int32)}))


def areal_dict(**changes: Any) -> dict[str, Any]:
    """Rows of 2 and 3 tokens, the first padded."""
    return {
        "input_ids": np.array([[5, 6, 0], [7, 8, 9]]),
        "loss_mask": np.array([[0, 1, 0], [0, 1, 1]]),
        "logprobs": np.array([[0, -0.5, 0], [0, -1.0, -2.0]]),
        "versions": np.array([[-1, 3, -1], [-1, 3, 4]]),
        "attention_mask": np.array([[True, True, False], [True, True, True]]),
        "rewards": np.array([1.0, -1.0]),
    } | changes


def test_areals_dict_is_unpadded() -> None:
    first, second = rows_from_result(areal_dict())
    assert first.input_ids.tolist() == [5, 6]
    assert first.loss_mask.tolist() == [0, 1]
    assert first.logprobs.tolist() == [0.0, -0.5]
    assert first.versions.tolist() == [-1, 3]
    assert (first.reward, second.reward) == (1.0, -1.0)
    assert second.input_ids.tolist() == [7, 8, 9]
    assert first.input_ids.dtype == np.int32


def test_areals_dict_may_be_padded_on_the_left_and_hold_more() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    first, _ = rows_from_result(
        areal_dict(attention_mask=mask, values=np.arange(6.0).reshape(2, 3))
    )
    assert first.input_ids.tolist() == [6, 0]
    assert first.extras["values"].tolist() == [1.0, 2.0]


def test_rows_of_a_dict_are_their_own_memory() -> None:
    arrays = areal_dict(values=np.zeros((2, 3), np.float32))
    arrays["input_ids"] = arrays["input_ids"].astype(np.int32)
    first, _ = rows_from_result(arrays)
    arrays["input_ids"][:] = 99
    arrays["values"][:] = 99
    assert first.input_ids.tolist() == [5, 6]
    assert first.extras["values"].tolist() == [0, 0]


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in areal_dict().items() if k != key}


@pytest.mark.parametrize("key", areal_dict())
def test_areals_dict_needs_each_key(key: str) -> None:
    with pytest.raises(WorkflowError, match=f"{key} missing in the dict"):
        rows_from_result(without(key))


WRONG_DICTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "1-D": ({"input_ids": np.arange(3)}, r"input_ids has the shape \[3\]"),
    "no rows": ({"input_ids": np.zeros((0, 3))}, r"input_ids has the shape \[0, 3\]"),
    "shape": ({"versions": np.zeros((2, 2), int)}, r"versions has the shape \[2, 2\]"),
    "batch": ({"logprobs": np.zeros((3, 3))}, r"logprobs has the shape \[3, 3\]"),
    "rewards": ({"rewards": np.zeros(3)}, r"rewards has the shape \[3\]"),
    "reward": ({"rewards": np.array([1.0, np.nan])}, "a reward must be finite"),
    "extra": ({"seqlen": np.zeros(2)}, r"seqlen has the shape \[2\]"),
    "extra's name": ({"cu_seqlens": np.zeros((2, 3))}, "extras can not be called cu_seqlens"),
    "float ids": ({"input_ids": np.zeros((2, 3))}, "input_ids must hold integers"),
    "float versions": ({"versions": np.zeros((2, 3))}, "versions must hold integers"),
    "negative ids": ({"input_ids": np.full((2, 3), -1)}, "row 0: input_ids holds an id outside"),
    "texts": ({"input_ids": [["a"]]}, "input_ids must hold integers or floats"),
    "hole": ({"attention_mask": np.array([[1, 0, 1], [1, 1, 1]])}, "holes inside row 0"),
    "empty row": ({"attention_mask": np.array([[1, 1, 1], [0, 0, 0]])}, "no token of row 1"),
}


@pytest.mark.parametrize("case", WRONG_DICTS)
def test_a_wrong_dict_is_refused(case: str) -> None:
    changes, message = WRONG_DICTS[case]
    with pytest.raises(WorkflowError, match=message):
        rows_from_result(areal_dict(**changes))


TURNS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
        st.lists(st.integers(0, 9), max_size=3),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=4,
)


@given(TURNS)
def test_a_row_of_turns_is_their_tokens_and_only_the_models_are_learnt(
    turns: list[tuple[list[int], list[int], int]],
) -> None:
    row = RowBuilder()
    for prompt, output, version in turns:
        row.append_prompt(prompt)
        row.append_response(response(row.input_ids, ids(*output), version))
    built = row.build(0.0)
    assert built.input_ids.tolist() == [t for p, o, _ in turns for t in (*p, *o)]
    made = [v for p, o, version in turns for v in ([-1] * len(p) + [version] * len(o))]
    assert built.versions.tolist() == made
    assert built.loss_mask.tolist() == [int(v >= 0) for v in made]
