"""AReaL's defects A1 to A11: hangs and deadlocks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.errors import RolloutClosed, RolloutError, TooManyFailures
from arealtrio.testing import FixedLengths, simulated_executor
from arealtrio.types import FailureKind, Outcome

from ..unit.puppet import Deferred, Generates, Instant, Puppet, prompts, raises, settled

Clock = trio.testing.MockClock


async def test_a01_a_rejection_on_policy_over_uneven_servers_does_not_deadlock(
    autojump_clock: Clock,
) -> None:
    def decide(data: Any) -> Any:
        return None if data["prompt_id"] % 7 == 3 else "accept"

    # A batch that three servers can not share evenly, and no staleness to spare.
    async with simulated_executor(servers=3, consumer_batch_size=4) as (executor, _):
        loader = prompts()
        for version in range(6):
            assert len(await executor.prepare_batch(loader, Instant(decide))) == 4
            await executor.set_version(version + 1)


async def test_a02_a_workflow_that_always_fails_ends_prepare_batch(autojump_clock: Clock) -> None:
    workflow = Instant(raises(KeyError("cause")))
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        with pytest.raises(TooManyFailures) as caught:
            await executor.prepare_batch(prompts(), workflow)
    assert {type(cause) for cause in caught.value.exceptions} == {KeyError}
    assert workflow.runs < 200


@pytest.mark.parametrize("queue_size", [1, 4])
async def test_a03_a_queue_no_larger_than_the_batch_is_enough(
    queue_size: int, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, queue_size=queue_size) as (
        executor,
        _,
    ):
        assert len(await executor.prepare_batch(prompts(), Instant())) == 4


async def test_a04_a_new_version_wakes_admission_without_a_resume(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(2):
            executor.submit(prompt, puppet)
        await settled()
        puppet.end_all()
        await executor.wait(1)
        assert not puppet.running
        await executor.set_version(1)
        await settled()
        assert [rollout.prompt_id for rollout in puppet.running] == [1]


async def test_a05_no_capacity_is_idle_after_the_queue_was_full(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=64, max_concurrent_rollouts=8, queue_size=56
    ) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(64):
            executor.submit(prompt, puppet)
        await settled()
        for rounds in range(8):
            assert len(puppet.running) == 8, rounds
            puppet.end_all()
            await settled()
        assert executor.counts.of(Outcome.ACCEPTED) == 64


async def test_a06_closing_ends_every_wait(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
            executor.submit({}, Puppet(), task_id="a")
            executor.submit({}, Puppet(), task_id="b")
            calls = [
                Deferred(nursery, executor.wait, 1),
                Deferred(nursery, executor.wait_for_task, "b"),
            ]
            await settled()
        with trio.fail_after(1):
            for call in calls:
                await call.ended.wait()
    assert [type(call.error) for call in calls] == [RolloutClosed] * 2


async def test_a07_wait_does_not_take_what_wait_for_task_waits_for(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        for name in "ab":
            executor.submit({"prompt_id": name}, puppet, task_id=name)
        async with trio.open_nursery() as nursery:
            by_task = Deferred(nursery, executor.wait_for_task, "a")
            await settled()
            by_count = Deferred(nursery, executor.wait, 1)
            await settled()
            puppet.end_all()
        assert by_task.value.task_id == "a"
        assert [result.task_id for result in by_count.value] == ["b"]


def test_a08_no_default_time_limit_is_longer_than_two_hours() -> None:
    config = RolloutConfig()
    limits = {f.name: getattr(config, f.name) for f in fields(config) if f.name.endswith("_s")}
    assert len(limits) >= 8
    assert all(0 < limit <= 7200 for limit in limits.values()), limits


async def test_a10_a_generation_that_is_aborted_again_and_again_ends(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, lengths=FixedLengths(10_000), max_interruptions=3) as (
        executor,
        _,
    ):
        executor.submit({"input_ids": [3]}, Generates())
        for _ in range(4):
            await trio.sleep(1)
            async with executor.engine.paused("abort"):
                pass
        (result,) = await executor.wait(1)
        assert result.failure is not None
        assert result.failure.kind is FailureKind.INFRASTRUCTURE
        assert isinstance(result.failure.error, RolloutError)
        assert "max_interruptions is 3" in str(result.failure.error)
