from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import trio

from arealtrio.errors import UsageError, WorkflowError
from arealtrio.groups import (
    ACCEPTED,
    CANCELLED,
    REJECTED,
    GroupTask,
    Verdict,
    accepts,
    resolve_accept,
    resolve_workflow,
)
from arealtrio.settlement import Failure
from arealtrio.trajectory import Group
from arealtrio.types import FailureKind, Outcome

from .puppet import Instant, row

FAILED = Verdict(Outcome.FAILED, Failure(FailureKind.WORKFLOW, ValueError("first"), 1))


def make(size: int = 3, data: Any = None) -> GroupTask:
    return GroupTask(
        task_id="t",
        data=data or {},
        workflow=Instant(),
        should_accept=None,
        size=size,
        deliver=lambda *_: None,
    )


async def started(size: int = 3) -> GroupTask:
    group = make(size)
    for index in range(size):
        assert group.start_member(5.0) == index
    return group


def accept_all(_: Group) -> bool:
    return True


# --- a group's life ------------------------------------------------------------------------------


async def test_each_member_has_a_deadline_from_its_own_start() -> None:
    group = await started(2)
    assert group.to_start == 0
    assert not group.all_ended
    for scope in group.scopes:
        assert 0 < scope.deadline - trio.current_time() <= 5
        assert math.isfinite(scope.deadline)


async def test_it_is_accepted_when_the_last_member_is() -> None:
    group = await started(2)
    for index in (1, 0):
        assert group.take_result(index, row(reward=index)) is ACCEPTED
        group.member_ended(ACCEPTED)
        assert group.all_ended == (index == 0)
    assert group.verdict is ACCEPTED
    accepted = group.accepted()
    assert accepted.rewards.tolist() == [0, 1]
    assert accepted.task_id == "t"
    assert accepted.number == -1  # evaluation has a number of its own, and no permit
    assert accepted.permit_version == -1


@pytest.mark.parametrize("verdict", [FAILED, REJECTED, CANCELLED])
async def test_the_first_that_does_not_succeed_ends_the_others(verdict: Verdict) -> None:
    group = make(4)
    for _ in range(3):
        group.start_member(5.0)
    group.member_ended(ACCEPTED)
    group.member_ended(verdict)
    assert group.cancelled
    assert group.to_start == 0
    assert all(scope.cancel_called for scope in group.scopes)
    assert not group.all_ended  # one is still to leave
    group.member_ended(CANCELLED)
    assert group.all_ended
    assert group.verdict is verdict  # the first stands


def test_none_rejects_and_anything_else_has_to_be_rows() -> None:
    group = make()
    assert group.take_result(0, None) is REJECTED
    with pytest.raises(WorkflowError):
        group.take_result(0, 3)
    assert group.take_result(1, [row(), row()]) is ACCEPTED
    assert len(group.rows[1]) == 2
    assert 0 not in group.rows


def test_its_names() -> None:
    assert make().prompt_id == "t"
    assert make(data={"prompt_id": 7}).prompt_id == "7"
    assert str(make(data={"prompt_id": 7})) == "t (prompt 7)"
    assert not make().admitted


# --- what the caller gave ------------------------------------------------------------------------


def test_a_workflow_is_an_instance_a_class_or_a_path() -> None:
    instance = Instant()
    assert resolve_workflow(instance) is instance
    assert isinstance(resolve_workflow(Instant, {"decide": accept_all}), Instant)
    path = "arealtrio.workflow:SingleTurnWorkflow"
    with pytest.raises(TypeError):  # its constructor's own, for missing arguments
        resolve_workflow(path)


class NotACoroutine:
    def arun_episode(self, engine: Any, data: Any, /) -> Any:
        return None


@pytest.mark.parametrize("workflow", [object(), NotACoroutine(), NotACoroutine, int, "json:dumps"])
def test_what_is_no_workflow_is_refused(workflow: Any) -> None:
    with pytest.raises(UsageError, match="arun_episode"):
        resolve_workflow(workflow)


@pytest.mark.parametrize("path", ["no.such.module:name", "json:no_such_name", "", "3:4"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    for resolve in (resolve_workflow, resolve_accept):
        with pytest.raises(UsageError, match="can not be imported"):
            resolve(path)


def test_arguments_for_an_instance_are_refused() -> None:
    with pytest.raises(UsageError, match="made already"):
        resolve_workflow(Instant(), {"decide": accept_all})


def test_a_filter_is_a_function_a_path_or_none() -> None:
    assert resolve_accept(None) is None
    assert resolve_accept(accept_all) is accept_all
    assert callable(resolve_accept("operator:truth"))
    with pytest.raises(UsageError, match="can not be called: int"):
        resolve_accept(3)  # type: ignore[arg-type]


@pytest.fixture
def group() -> Group:
    return Group.of([[row()]], number=0, permit_version=0, prompt_id="p", task_id="t")


def test_a_filter_says_yes_or_no(group: Group) -> None:

    assert accepts(group, None)
    assert accepts(group, accept_all)
    assert not accepts(group, lambda _: False)
    assert accepts(group, lambda _: bool(np.True_))
    assert accepts(group, lambda _: np.True_)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("answer", [None, "yes", 2, [], {}])
def test_a_filter_that_says_neither_broke_its_contract(group: Group, answer: Any) -> None:
    with pytest.raises(WorkflowError, match=type(answer).__name__):
        accepts(group, lambda _: answer)
