"""Whatever a prompt or a group holds comes back from its bytes, and no damage to them passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from arealtrio.errors import UsageError
from arealtrio.ledger import decode_group, decode_prompt, encode_group, encode_prompt, mark_of
from arealtrio.trajectory import Group
from arealtrio.types import FLOAT32_MAX, Trajectory

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
ARRAYS = st.sampled_from(["<i4", "<f4", ">i8", "bool", "u1", "<f8", "<M8[s]", "<U3"]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=3))
)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)
PROMPTS = st.dictionaries(st.text("abc_"), VALUES, max_size=4)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@given(PROMPTS)
def test_a_prompt_comes_back(prompt: dict[str, Any]) -> None:
    blob = encode_prompt(prompt)
    assert same(prompt, decode_prompt(blob))
    assert mark_of(prompt, blob) == mark_of(prompt, encode_prompt(decode_prompt(blob)))


def test_prompts_whose_id_is_missing_are_known_apart() -> None:
    prompts = [{"prompt_id": None, "input_ids": [n]} for n in range(2)]
    marks = [mark_of(prompt, encode_prompt(prompt)) for prompt in prompts]
    assert len(set(marks)) == 2


@given(st.recursive(st.builds(object) | SCALARS, st.lists), st.booleans())
def test_what_can_not_come_back_is_refused(value: Any, nested: bool) -> None:
    """Or it is written as what it is: nothing becomes something else unnoticed."""
    prompt = {"field": {"deep": value} if nested else value}
    try:
        blob = encode_prompt(prompt)
    except UsageError as exc:
        assert "prompt" in str(exc)  # noqa: PT017
    else:
        assert same(prompt, decode_prompt(blob))


@pytest.mark.parametrize("value", [{1, 2}, 2**70, "\ud800", object(), {(1, 2): 3}, np.array([{}])])
def test_the_refusal_names_the_field_and_not_the_value(value: Any) -> None:
    with pytest.raises(UsageError, match="image"):
        encode_prompt({"prompt_id": "p", "image": value})


INT32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(1, 12))

    def column(elements: st.SearchStrategy[Any], dtype: Any) -> Any:
        return np.array(draw(st.lists(elements, min_size=length, max_size=length)), dtype)

    small = st.sampled_from([st.just(3), st.integers(-1, 0), st.integers(-1, 1), INT32])

    def matrix(dtype: str) -> Any:
        return draw(arrays.arrays(dtype, (length, draw(st.integers(0, 3)))))

    extras = {
        name: draw(
            st.sampled_from(
                [column(INT32, np.int32), column(FLOATS, np.float32), matrix("u1"), matrix("<i2")]
            )
        )
        for name in draw(st.lists(st.text("xy", min_size=1, max_size=2), unique=True, max_size=2))
    }
    return Trajectory(
        input_ids=column(INT32, np.int32),
        loss_mask=column(draw(small), np.int32),
        logprobs=column(FLOATS, np.float32),
        versions=column(draw(small), np.int32),
        reward=draw(st.floats(-FLOAT32_MAX, FLOAT32_MAX)),
        versions_exact=draw(st.booleans()),
        extras=extras,
    )


FLOATS = st.floats(width=32)
GROUPS = st.builds(
    Group.of,
    st.lists(st.lists(trajectories(), max_size=2), min_size=1, max_size=3).filter(any),
    number=st.integers(-(2**40), 2**40),
    permit_version=st.integers(-1, 2**31),
    prompt_id=st.text(st.characters(exclude_categories=["Cs"])),
    task_id=st.text("abc"),
)


@given(GROUPS)
def test_a_group_comes_back_bit_by_bit(group: Group) -> None:
    back = decode_group(encode_group(group))
    for name in ("number", "permit_version", "prompt_id", "task_id", "head_version"):
        assert getattr(back, name) == getattr(group, name)
    assert [len(rows) for rows in back.members] == [len(rows) for rows in group.members]
    for ours, theirs in zip(back.rows, group.rows, strict=True):
        for name in ("input_ids", "loss_mask", "logprobs", "versions"):
            mine = getattr(ours, name)
            assert same(mine, getattr(theirs, name))
            assert mine.flags.writeable
        assert same(dict(ours.extras), dict(theirs.extras))
        assert (ours.reward, ours.versions_exact) == (theirs.reward, theirs.versions_exact)
        assert (ours.prompt_id, ours.member_index) == (theirs.prompt_id, theirs.member_index)


@given(GROUPS, st.data())
def test_no_damaged_byte_passes(group: Group, data: st.DataObject) -> None:
    blob = bytearray(encode_group(group))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="record"):
        decode_group(bytes(blob))
    with pytest.raises(ValueError, match="record"):
        decode_group(encode_group(group)[:at])


def test_an_ordinary_token_takes_eight_bytes() -> None:
    count = 4096
    ids = np.arange(count, dtype=np.int32)
    row = Trajectory(
        input_ids=ids,
        loss_mask=(ids > 512).astype(np.int32),
        logprobs=np.zeros(count, np.float32),
        versions=ids // 1000 - 1,
        reward=1,
    )
    group = Group.of([[row]], number=1, permit_version=0, prompt_id="p", task_id="t")
    assert len(encode_group(group)) <= 8 * count + 200
