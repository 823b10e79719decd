"""Who may start next, decided without anything running."""

from __future__ import annotations

from typing import Any, cast

import pytest

from arealtrio.admission import Admission
from arealtrio.config import RolloutConfig
from arealtrio.delivery import PermitOrder
from arealtrio.engine import RemoteEngine
from arealtrio.errors import StalenessBudgetExhausted
from arealtrio.groups import CANCELLED, GroupTask
from arealtrio.staleness import StalenessManager
from arealtrio.types import Outcome

from .puppet import Instant


class Versions:
    version = 0

    def get_version(self) -> int:
        return self.version


def make(**config: Any) -> tuple[Admission, Versions]:
    chosen = RolloutConfig(**{"consumer_batch_size": 4, **config})
    versions = Versions()
    manager = StalenessManager(
        versions,
        chosen.max_concurrent_rollouts or chosen.consumer_batch_size,
        chosen.consumer_batch_size,
        chosen.max_staleness,
    )
    return Admission(chosen, manager, PermitOrder(in_order=True)), versions


def group(name: str, size: int = 1, *, is_eval: bool = False) -> GroupTask:
    return GroupTask(
        task_id=name,
        data={},
        workflow=Instant(),
        should_accept=None,
        size=size,
        deliver=lambda *_: None,
        is_eval=is_eval,
    )


def start_all(admission: Admission) -> list[str]:
    started = []
    while (member := admission.next_member(cast("RemoteEngine", None))) is not None:
        started.append(f"{member[0].task_id}{member[1]}")
    return started


def settle(admission: Admission, task: GroupTask, outcome: Outcome) -> None:
    while task.running:
        task.running.popitem()
        admission.member_ended(task)
    admission.settled(task, outcome)


async def test_groups_start_whole_in_order_as_slots_allow() -> None:
    admission, _ = make(max_concurrent_rollouts=3)
    first, second = group("a", 2), group("b", 2)
    admission.enqueue(first)
    admission.enqueue(second)
    assert start_all(admission) == ["a0", "a1", "b0"]
    assert admission.running_members == 3
    assert (first.number, second.number) == (0, 1)
    settle(admission, first, Outcome.ACCEPTED)
    assert start_all(admission) == ["b1"]


async def test_without_a_limit_a_batch_of_the_largest_groups_runs() -> None:
    admission, _ = make(consumer_batch_size=2)
    assert admission.concurrency == 2
    admission.enqueue(group("a", 3))
    assert admission.concurrency == 6
    assert admission.queue_limit == 96


async def test_a_large_evaluation_raises_no_limit_of_training() -> None:
    admission, _ = make(consumer_batch_size=2)
    evaluation = group("e", 64, is_eval=True)
    admission.enqueue(evaluation)
    assert admission.concurrency == 2
    assert len(start_all(admission)) == 64
    settle(admission, evaluation, Outcome.ACCEPTED)
    for name in "abc":
        admission.enqueue(group(name))
    assert start_all(admission) == ["a0", "b0"]
    admission.enqueue(group("d", 3))
    assert admission.concurrency == 6


async def test_evaluation_goes_first_and_needs_no_permit() -> None:
    admission, _ = make(consumer_batch_size=1)
    admission.enqueue(group("a"))
    admission.enqueue(group("e", 3, is_eval=True))
    assert start_all(admission) == ["e0", "e1", "e2"]
    assert admission.staleness.get_stats().running == 0
    assert admission.eval_counts.running == 1


async def test_a_pause_stops_training_only() -> None:
    admission, _ = make()
    admission.paused = True
    admission.enqueue(group("a"))
    admission.enqueue(group("e", is_eval=True))
    assert start_all(admission) == ["e0"]
    admission.paused = False
    assert start_all(admission) == ["a0"]


async def test_a_started_group_is_completed_during_a_pause() -> None:
    admission, _ = make(max_concurrent_rollouts=1)
    task = group("a", 2)
    admission.enqueue(task)
    assert start_all(admission) == ["a0"]
    admission.paused = True
    task.running.popitem()
    admission.member_ended(task)
    assert start_all(admission) == ["a1"]


async def test_no_permit_no_start_until_the_version_moves() -> None:
    admission, versions = make(consumer_batch_size=1)
    first, second = group("a"), group("b")
    admission.enqueue(first)
    admission.enqueue(second)
    assert start_all(admission) == ["a0"]
    settle(admission, first, Outcome.ACCEPTED)
    assert start_all(admission) == []
    with pytest.raises(StalenessBudgetExhausted, match="1 groups are queued") as caught:
        admission.check_budget()
    assert "1 accepted" in str(caught.value)
    versions.version = 1
    admission.check_budget()
    assert start_all(admission) == ["b0"]
    assert second.permit is not None
    assert second.permit.version == 1


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_only_an_accepted_group_keeps_its_budget_spent(outcome: Outcome) -> None:
    admission, _ = make()
    task = group("a")
    admission.enqueue(task)
    start_all(admission)
    settle(admission, task, outcome)
    assert task.permit is not None
    assert task.permit.settled
    assert admission.staleness.get_capacity() == (3 if outcome is Outcome.ACCEPTED else 4)
    assert admission.counts.of(outcome) == 1
    assert admission.running_members == 0


@pytest.mark.parametrize("is_eval", [True, False])
async def test_a_group_withdrawn_from_the_queue_leaves_no_count_behind(is_eval: bool) -> None:
    admission, _ = make()
    admission.paused = True
    task = group("a", is_eval=is_eval)
    admission.enqueue(task)
    admission.withdraw(task)
    task.stop(CANCELLED)
    admission.settled(task, Outcome.CANCELLED)
    assert not admission.queued
    counts = admission.eval_counts if is_eval else admission.counts
    assert counts.as_dict()["cancelled"] == 1
    stat = admission.staleness.get_stats()
    assert (stat.enqueued, stat.running) == (0, 0)
    assert admission.staleness.get_capacity() == 4
    admission.paused = False
    assert start_all(admission) == []


async def test_a_group_withdrawn_while_it_starts_starts_no_further_member() -> None:
    admission, _ = make(max_concurrent_rollouts=2)
    task, other = group("a", 3), group("b")
    admission.enqueue(task)
    admission.enqueue(other)
    assert start_all(admission) == ["a0", "a1"]
    admission.withdraw(task)
    task.stop(CANCELLED)
    task.running.popitem()
    admission.member_ended(task)
    assert start_all(admission) == ["b0"]


@pytest.mark.parametrize("why", ["running", "paused", "empty"])
async def test_there_is_hope_while_something_can_still_happen(why: str) -> None:
    admission, _ = make(consumer_batch_size=1)
    if why != "empty":
        admission.enqueue(group("a"))
        start_all(admission)
        admission.enqueue(group("b"))
    admission.paused = why == "paused"
    admission.check_budget()
