"""AReaL's defects B12 to B21: lost work, wrong counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import UsageError
from arealtrio.testing import FixedLengths, checkpoint, simulated_executor
from arealtrio.types import Outcome
from arealtrio.weights import WeightUpdate

from ..unit.puppet import (
    Generates,
    Instant,
    Prompt,
    Puppet,
    check_counts,
    prompt_list,
    prompts,
    settled,
)

Clock = trio.testing.MockClock


async def test_b12_cancelled_rollouts_give_their_places_back(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_concurrent_rollouts=4) as (
        executor,
        _,
    ):
        for _ in range(3):
            with trio.move_on_after(1):
                await executor.rollout_batch(prompt_list(4), Puppet())
            await settled()
            check_counts(executor)
            assert executor.get_capacity() == 4
        assert len(await executor.rollout_batch(prompt_list(4), Instant())) == 4


async def test_b13_an_error_after_the_rollout_counts_it_once(autojump_clock: Clock) -> None:
    def broken(_: Any) -> bool:
        raise ZeroDivisionError

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        executor.submit({}, Instant(), should_accept_fn=broken)
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.FAILED
        assert executor.counts.as_dict()["running"] == 0
        assert executor.counts.of(Outcome.ACCEPTED) == executor.counts.of(Outcome.REJECTED) == 0
        check_counts(executor)


async def test_b14_a_rollout_that_ends_at_once_is_counted_as_running_first(
    autojump_clock: Clock,
) -> None:
    seen = []
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):

        def decide(_: Prompt) -> str:
            seen.append(executor.staleness_manager.get_stats().running)
            check_counts(executor)
            return "accept"

        await executor.rollout_batch(prompt_list(8), Instant(decide))
    assert min(seen) >= 1


async def test_b15_a_time_out_drops_no_result(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        await settled()
        for prompt_id in range(3):
            puppet.end(prompt_id)
        with pytest.raises(TimeoutError, match="3 of 4"):
            await executor.wait(4, timeout_s=1)
        puppet.end(3)
        assert len(await executor.wait(4)) == 4


async def test_b16_results_nobody_takes_stop_nothing_and_are_all_there(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=32, queue_size=1) as (executor, _):
        for prompt in prompts(32):
            executor.submit(prompt, Instant())
            await settled()
        assert executor.counts.of(Outcome.ACCEPTED) == 32
        assert len(await executor.wait(32)) == 32


async def test_b17_a_wrong_workflow_or_a_task_id_twice_harms_nobody_else(
    autojump_clock: Clock,
) -> None:
    class Synchronous:
        def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            raise ValueError

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": 1}, puppet, task_id="a")
        with pytest.raises(UsageError):
            executor.submit({}, Synchronous())
        with pytest.raises(UsageError):
            executor.submit({}, puppet, task_id="a")
        executor.submit({"prompt_id": 2}, puppet, task_id="b")
        await settled()
        puppet.end_all()
        assert [result.task_id for result in await executor.wait(2)] == ["a", "b"]


async def test_b18_a_deadline_reaches_the_server(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, lengths=FixedLengths(10_000), rollout_timeout_s=3, traced=True
    ) as (executor, fleet):
        executor.submit({"input_ids": [3]}, Generates())
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.EXPIRED
        assert any("abort" in exchange.request for exchange in fleet.trace)
        assert fleet.servers[0].generations == 0
        assert not fleet.servers[0].scheduler.running


async def test_b19_a_group_leaves_no_orphan_and_is_never_partial(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": 1}, puppet, group_size=4)
        await settled()
        puppet.end(1)
        puppet.end(1, ValueError("one of them"))
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.FAILED
        assert result.group is None
        assert not puppet.running


async def test_b20_a_run_that_resumes_at_a_high_version_has_its_whole_budget(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=1) as (
        executor,
        _,
    ):
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(500), 500))
        loader = prompts()
        for version in range(500, 504):
            assert executor.get_capacity() <= 8
            batch = await executor.prepare_batch(loader, Generates())
            assert batch.staleness().max() <= 1
            await executor.update_weights(
                WeightUpdate.from_disk(checkpoint(version + 1), version + 1)
            )


async def test_b21_a_loader_that_raises_once_goes_on(autojump_clock: Clock) -> None:
    class Stumbles:
        def __init__(self) -> None:
            self.source = prompts(6)
            self.reads = 0

        def __iter__(self) -> Iterator[Prompt]:
            return self

        def __next__(self) -> Prompt:
            self.reads += 1
            if self.reads == 3:
                raise OSError("once")
            return next(self.source)

    async with simulated_executor(servers=1, consumer_batch_size=3) as (executor, _):
        loader = Stumbles()
        with pytest.raises(OSError, match="once"):
            await executor.prepare_batch(loader, Instant())
        seen = []
        async for batch in executor.batches(loader, Instant()):
            seen += sorted(int(group.prompt_id) for group in batch.groups)
            await executor.set_version(batch.version + 1)
        assert seen == list(range(6))
