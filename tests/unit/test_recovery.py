"""A trainer that was restarted: its version first, then rollouts, with the budget of an old run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import UsageError, WeightUpdateError
from arealtrio.testing import checkpoint, simulated_executor
from arealtrio.types import Outcome
from arealtrio.weights import WeightUpdate

from .puppet import Deferred, Generates, Puppet, check_closed, check_counts, prompts, settled

Clock = trio.testing.MockClock


async def test_nothing_starts_before_the_servers_have_the_version(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=2, consumer_batch_size=2, max_staleness=1, max_concurrent_rollouts=10
    ) as (executor, _):
        update = WeightUpdate.from_disk(checkpoint(50), 50)
        puppet = Puppet()
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.recover, 50, update)
            while not executor._admission.recovering:
                await trio.lowlevel.checkpoint()
            assert call.pending
            for is_eval in (False, True):
                for prompt in prompts(6):
                    executor.submit(prompt, puppet, is_eval=is_eval)
            assert not puppet.started
        assert call.value.version == executor.get_version() == 50
        await settled()
        assert {rollout.version for rollout in puppet.running} == {50}
        assert (executor.counts.running, executor.eval_counts.running) == (4, 6)
        puppet.end_all()
        await settled()


async def test_its_budget_is_that_of_a_run_that_never_stopped(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, max_staleness=1) as (
        executor,
        _,
    ):
        await executor.recover(50)
        assert executor.staleness_manager.get_stats().accepted == 100
        assert executor.staleness_manager.charged == 0
        assert executor.staleness_manager.get_budget() == 4
        loader = prompts()
        for version in range(51, 56):
            batch = await executor.prepare_batch(loader, Generates())
            assert batch.staleness().max() <= 1
            assert min(group.head_version or 0 for group in batch.groups) >= 50
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
        assert executor.staleness_manager.charged == 0


async def test_one_that_failed_starts_nothing_until_the_next_succeeds(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1) as (executor, _):
        with pytest.raises(WeightUpdateError):
            await executor.recover(7, WeightUpdate.from_disk("/nowhere", 7))
        assert executor.get_version() == 0
        puppet = Puppet()
        executor.submit({}, puppet, is_eval=True)
        await settled()
        assert not puppet.started
        await executor.recover(7, WeightUpdate.from_disk(checkpoint(7), 7))
        await settled()
        assert len(puppet.started) == 1


async def test_after_one_that_failed_an_update_is_as_good(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        with pytest.raises(WeightUpdateError):
            await executor.recover(7, WeightUpdate.from_disk("/nowhere", 7))
        puppet = Puppet()
        executor.submit({}, puppet)
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(8), 8))
        await settled()
        assert len(puppet.started) == 1
        assert not executor.status().admission.recovering
        assert executor.staleness_manager.get_stats().accepted == 16
        puppet.end_all()
        assert (await executor.wait(1))[0].outcome is Outcome.ACCEPTED
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(9), 9))
        assert executor.staleness_manager.charged == 1


async def test_it_comes_first_and_is_of_one_version(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1) as (executor, _):
        with pytest.raises(UsageError, match="update to 8"):
            await executor.recover(7, WeightUpdate.label(8))
        executor.submit({}, Puppet())
        with pytest.raises(UsageError, match="comes first"):
            await executor.recover(7)
        check_counts(executor)


# --- close ---------------------------------------------------------------------------------------


class Stubborn(Puppet):
    """Goes on for a while when it is cancelled."""

    async def arun_episode(self, engine: Any, data: Any, /) -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(25)


async def test_a_rollout_that_ignores_cancellation_is_named_and_close_still_ends(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "arealtrio")
    async with simulated_executor(
        servers=1, consumer_batch_size=4, max_concurrent_rollouts=4, close_timeout_s=10
    ) as (executor, fleet):
        executor.submit({}, Stubborn(), task_id="stays")
        executor.submit({}, Puppet(), task_id="leaves")
        await settled()
        began = trio.current_time()
    assert trio.current_time() - began == 25
    (words,) = [r.getMessage() for r in caplog.records if "close" in r.getMessage()]
    assert "1 rollouts" in words
    assert "10 s after they were cancelled" in words
    assert "stays[0]" in words
    assert "leaves" not in words
    assert executor.counts.of(Outcome.CANCELLED) == 2
    check_closed(executor, fleet)


async def test_rollouts_that_leave_are_no_news(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "arealtrio")
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        for prompt in prompts(3):
            executor.submit(prompt, Puppet())
        await settled()
        began = trio.current_time()
    assert trio.current_time() == began
    assert not caplog.records
