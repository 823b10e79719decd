"""What did not become an accepted group has its place and its budget back at that moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import trio.testing

from arealtrio.executor import WorkflowExecutor
from arealtrio.group_policy import GroupPolicy
from arealtrio.testing import simulated_executor
from arealtrio.types import Outcome

from .puppet import Puppet, check_counts, settled

Clock = trio.testing.MockClock


def never(_: object) -> bool:
    return False


def broken(_: object) -> bool:
    raise ValueError("told to")


async def by_itself(executor: WorkflowExecutor, puppet: Puppet, how: Any) -> None:
    puppet.end("first", how)


async def at_its_deadline(executor: WorkflowExecutor, puppet: Puppet, _: Any) -> None:
    await trio.sleep(60)


async def as_a_straggler(executor: WorkflowExecutor, puppet: Puppet, _: Any) -> None:
    await executor.set_version(1)


@pytest.mark.parametrize(
    ("submitted", "end", "how", "outcome"),
    [
        ({}, by_itself, None, Outcome.REJECTED),
        ({}, by_itself, ValueError("told to"), Outcome.FAILED),
        ({"should_accept_fn": never}, by_itself, "accept", Outcome.REJECTED),
        ({"should_accept_fn": broken}, by_itself, "accept", Outcome.FAILED),
        ({"group_size": 2}, by_itself, None, Outcome.REJECTED),
        ({"group_size": 2}, by_itself, ValueError("told to"), Outcome.FAILED),
        ({}, by_itself, "no row", Outcome.FAILED),
        ({}, at_its_deadline, None, Outcome.EXPIRED),
        ({}, as_a_straggler, None, Outcome.EXPIRED),
    ],
)
async def test_another_starts_at_once(
    submitted: Mapping[str, Any],
    end: Callable[..., Any],
    how: Any,
    outcome: Outcome,
    autojump_clock: Clock,
) -> None:
    """The budget is one group: the second starts in the instant that the first gives it back."""
    async with simulated_executor(
        servers=1,
        consumer_batch_size=1,
        max_concurrent_rollouts=4,
        rollout_timeout_s=60,
        straggler_policy="drop",
    ) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": "first"}, puppet, task_id="first", **submitted)
        await settled()
        executor.submit({"prompt_id": "second"}, puppet)
        await settled()
        assert "second" not in puppet.started
        await end(executor, puppet, how)
        ended = trio.current_time()
        await settled()
        assert puppet.started[-1] == "second"
        assert trio.current_time() == ended
        assert (await executor.wait_for_task("first")).outcome is outcome
        assert executor.get_capacity() == 0
        check_counts(executor)


async def test_a_group_that_is_run_again_keeps_its_own(autojump_clock: Clock) -> None:
    """A fresh prompt that took it would leave the group waiting for what it can not get."""
    async with simulated_executor(servers=1, consumer_batch_size=1, max_concurrent_rollouts=4) as (
        executor,
        _,
    ):
        puppet, policy = Puppet(), GroupPolicy.all(max_retries=1)
        executor.submit({"prompt_id": "first"}, puppet, group_policy=policy)
        executor.submit({"prompt_id": "second"}, puppet)
        await settled()
        puppet.end("first", ValueError("told to"))
        await settled()
        assert puppet.started == ["first", "first"]
        puppet.end("first", ValueError("told to"))
        await settled()
        assert puppet.started == ["first", "first", "second"]
