from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import trio

from arealtrio.engine import RemoteEngine
from arealtrio.errors import ConfigError, WorkflowError
from arealtrio.group_policy import GroupPolicy
from arealtrio.groups import (
    ACCEPTED,
    CANCELLED,
    REJECTED,
    GroupTask,
    Verdict,
    accepts,
)
from arealtrio.settlement import Failure
from arealtrio.trajectory import Group
from arealtrio.types import FailureKind, Outcome

from .puppet import Instant, row

ENGINE = cast("RemoteEngine", None)  # nothing is asked of it
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
        assert group.start_member(ENGINE, 5.0) == index
    return group


def accept_all(_: Group) -> bool:
    return True


# --- a group's life ------------------------------------------------------------------------------


async def test_each_member_has_a_deadline_from_its_own_start() -> None:
    group = await started(2)
    assert not group.to_start
    assert not group.all_ended
    for member in group.running.values():
        assert 0 < member.scope.deadline - trio.current_time() <= 5
        assert math.isfinite(member.scope.deadline)


async def test_it_is_accepted_when_the_last_member_is() -> None:
    group = await started(2)
    for index in (1, 0):
        assert group.take_result(index, row(reward=index)) is ACCEPTED
        group.member_ended(index, ACCEPTED)
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
        group.start_member(ENGINE, 5.0)
    group.member_ended(0, ACCEPTED)
    group.member_ended(1, verdict)
    assert group.stopped
    assert not group.to_start
    assert all(member.scope.cancel_called for member in group.running.values())
    assert not group.all_ended  # one is still to leave
    group.member_ended(2, CANCELLED)
    assert group.all_ended
    assert group.verdict is verdict  # the first stands


async def test_at_least_goes_on_without_members_while_enough_can_still_succeed() -> None:
    group = await started(4)
    group.policy = GroupPolicy.at_least(2)
    for index, verdict in ((0, FAILED), (2, REJECTED)):
        group.member_ended(index, verdict)
        assert not group.stopped
    for index in (1, 3):
        group.take_result(index, row())
    group.member_ended(1, ACCEPTED)
    group.member_ended(3, ACCEPTED)
    assert group.all_ended
    assert group.verdict is ACCEPTED
    assert [len(member) for member in group.accepted().members] == [0, 1, 0, 1]
    assert group.member_failures == (FAILED.failure,)


async def test_at_least_ends_the_group_when_too_few_are_left() -> None:
    group = await started(3)
    group.policy = GroupPolicy.at_least(2)
    group.member_ended(0, FAILED)
    assert not group.stopped
    group.member_ended(1, FAILED)
    assert group.stopped
    assert group.verdict is FAILED


async def test_replace_runs_a_failed_member_again_so_many_times_and_keeps_the_others() -> None:
    group = await started(2)
    group.policy = GroupPolicy.replace(2)
    group.take_result(1, row())
    group.member_ended(1, ACCEPTED)
    for _ in range(2):
        group.member_ended(0, FAILED)
        assert list(group.to_start) == [0]
        assert group.start_member(ENGINE, 5.0) == 0
    group.member_ended(0, FAILED)
    assert group.stopped
    assert group.verdict is FAILED


async def test_replace_does_not_draw_until_the_workflow_likes_it() -> None:
    group = await started(2)
    group.policy = GroupPolicy.replace(2)
    group.member_ended(0, REJECTED)
    assert group.stopped
    assert group.verdict is REJECTED


async def test_a_group_that_begins_again_forgets_what_it_had() -> None:
    group = await started(2)
    group.take_result(0, row())
    group.member_ended(0, ACCEPTED)
    group.member_ended(1, FAILED)
    group.begin_again()
    assert group.verdict is ACCEPTED
    assert not group.stopped
    assert list(group.to_start) == [0, 1]
    assert group.rows == [(), ()]


@pytest.mark.parametrize(
    "make_policy",
    [lambda: GroupPolicy.all(-1), lambda: GroupPolicy.at_least(0), lambda: GroupPolicy.replace(0)],
)
def test_a_policy_of_impossible_numbers_is_refused(make_policy: Any) -> None:
    with pytest.raises(ConfigError):
        make_policy()


def test_none_rejects_and_anything_else_has_to_be_rows() -> None:
    group = make()
    assert group.take_result(0, None) is REJECTED
    with pytest.raises(WorkflowError):
        group.take_result(0, 3)
    assert group.take_result(1, [row(), row()]) is ACCEPTED
    assert len(group.rows[1]) == 2
    assert group.rows[0] == ()


def test_its_names() -> None:
    assert make().prompt_id == "t"
    assert make(data={"prompt_id": None}).prompt_id == "t"  # a data set's missing value
    assert make(data={"prompt_id": 7}).prompt_id == "7"
    assert str(make(data={"prompt_id": 7})) == "t (prompt 7)"
    assert not make().admitted


async def test_what_its_owner_withdrew_is_cancelled_whatever_went_before() -> None:
    group = await started(2)
    group.member_ended(0, FAILED)
    group.stop(CANCELLED)
    group.member_ended(1, CANCELLED)
    assert group.verdict is CANCELLED


# --- the filter ----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Group:
    return Group.of([[row()]], number=0, permit_version=0, prompt_id="p", task_id="t")


def test_a_filter_says_yes_or_no(group: Group) -> None:

    assert accepts(group, None)
    assert accepts(group, accept_all)
    assert not accepts(group, lambda _: False)
    assert accepts(group, lambda _: bool(np.True_))
    assert accepts(group, lambda _: np.True_)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "answer", [np.array([True]), np.array([True, False]), None, "yes", 2, [], {}]
)
def test_a_filter_that_says_neither_broke_its_contract(group: Group, answer: Any) -> None:
    with pytest.raises(WorkflowError, match=type(answer).__name__):
        accepts(group, lambda _: answer)
