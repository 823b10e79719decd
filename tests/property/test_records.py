"""Filling all slots at once against assigning one after the other."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio._core.records import Filler
from arealtrio.errors import WorkflowError
from arealtrio.trajectory import Group, RolloutResult
from arealtrio.types import ModelRequest, ModelResponse, Outcome, Trajectory

NAMES = ("first", "second", "third")


class Slotted:
    __slots__ = NAMES


@dataclass(frozen=True, slots=True)
class Frozen:
    first: object
    second: object
    third: object


@given(st.lists(st.sampled_from(NAMES), unique=True), st.lists(st.integers(), max_size=4))
def test_it_fills_as_assignments_do(names: list[str], values: list[int]) -> None:
    record, model = Slotted(), Slotted()
    fill = Filler(Slotted, names)
    if len(values) != len(names):
        with pytest.raises(ValueError, match=f"{len(names)} slots need as many values"):
            fill(record, tuple(values))
        return
    fill(record, tuple(values))
    for name, value in zip(names, values, strict=True):
        setattr(model, name, value)
    for name in NAMES:
        assert getattr(record, name, "empty") == getattr(model, name, "empty")


def test_a_frozen_record_is_filled_and_stays_frozen() -> None:
    record = object.__new__(Frozen)
    Filler(Frozen, NAMES)(record, (1, 2, 3))
    assert record == Frozen(1, 2, 3)
    with pytest.raises(FrozenInstanceError):
        record.first = 4  # type: ignore[misc]


def test_what_is_no_slot_is_refused() -> None:
    class WithDict:
        first = 1

    for kind, name in ((WithDict, "first"), (Slotted, "fourth"), (int, "real")):
        with pytest.raises(TypeError, match=f"{kind.__name__}.{name} is no slot"):
            Filler(kind, [name])


def test_another_record_is_refused() -> None:
    with pytest.raises(TypeError, match="Slotted"):
        Filler(Slotted, NAMES)(Frozen(1, 2, 3), (1, 2, 3))


def test_it_holds_what_it_was_given_once() -> None:
    value = object()
    before = sys.getrefcount(value)
    record = Slotted()
    fill = Filler(Slotted, NAMES)
    for _ in range(3):  # what was there before is let go
        fill(record, (value, value, value))
    assert sys.getrefcount(value) == before + 3
    del record
    gc.collect()
    assert sys.getrefcount(value) == before


def records() -> Iterator[Any]:
    ids, logprobs = np.array([1], dtype=np.int32), np.array([-1], dtype=np.float32)
    row = Trajectory(
        input_ids=ids, loss_mask=ids, logprobs=logprobs, versions=ids, reward=1.0, prompt_id="p"
    )
    yield row
    yield row.of_member("q", 3)
    yield ModelRequest(ids, rid="r", session="s", metadata={"a": 1}, messages=[{"role": "user"}])
    yield ModelResponse(
        rid="r",
        input_tokens=ids,
        output_tokens=ids,
        output_logprobs=logprobs,
        output_versions=ids,
        stop_reason="stop",
    )
    yield Group(number=1, permit_version=2, prompt_id="p", task_id="t", members=((row,),))
    yield RolloutResult(task_id="t", prompt_id="p", outcome=Outcome.ACCEPTED, number=1)


@pytest.mark.parametrize("record", list(records()), ids=lambda record: type(record).__name__)
def test_a_dataclass_whose_init_is_written_out_is_one_all_the_same(record: Any) -> None:
    names = [field.name for field in fields(record)]
    assert list(asdict(record)) == names
    changeable = {field.name for field in fields(record) if field.init}
    copy = replace(record)
    assert type(copy) is type(record)
    for name in names:
        assert getattr(copy, name) is getattr(record, name) or name in ("_span", "metadata")
    for name in changeable:
        assert name in repr(record)
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)
    optional = {name: None for name in names if name not in changeable}
    with pytest.raises(TypeError, match="nonsense"):
        replace(record, nonsense=1)
    for name in optional:
        with pytest.raises(ValueError, match=name):
            replace(record, **{name: 1})


def test_what_a_record_is_not_told_is_what_its_fields_say() -> None:
    ids, logprobs = np.array([1], dtype=np.int32), np.array([-1], dtype=np.float32)
    response = ModelResponse(
        rid="r",
        input_tokens=ids,
        output_tokens=ids,
        output_logprobs=logprobs,
        output_versions=ids,
        stop_reason="stop",
    )
    row = Trajectory(input_ids=ids, loss_mask=ids, logprobs=logprobs, versions=ids, reward=0.0)
    result = RolloutResult(task_id="t", prompt_id="p", outcome=Outcome.CANCELLED)
    for record in (response, row, result):
        for field in fields(record):
            if isinstance(field.default, (bool, int, float, str, tuple, type(None))):
                assert getattr(record, field.name) == field.default
    assert row.extras == {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NamedRow(Trajectory):
    name: str = ""


def test_a_class_that_inherits_looks_at_what_it_is_given() -> None:
    ids, logprobs = np.array([1], dtype=np.int32), np.array([-1], dtype=np.float32)
    given: dict[str, Any] = {"input_ids": ids, "loss_mask": ids, "logprobs": logprobs}
    assert NamedRow(**given, versions=ids, reward=1.0, name="n").name == "n"
    with pytest.raises(WorkflowError, match="reward"):
        NamedRow(**given, versions=ids, reward=float("nan"))
    with pytest.raises(WorkflowError, match="versions"):
        NamedRow(**{**given, "versions": [0.5]}, reward=1.0)
