"""AReaL's defects D27 to D30: blocking and polling."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from arealtrio.testing import SimulatedServerSettings, checkpoint, simulated_executor
from arealtrio.types import Outcome
from arealtrio.weights import WeightUpdate

from ..unit.puppet import Deferred, Instant, Puppet, prompts, settled

Clock = trio.testing.MockClock


async def test_d27_nothing_stands_still_while_weights_are_loaded(autojump_clock: Clock) -> None:
    slow = SimulatedServerSettings(load_time_s=60)
    async with simulated_executor(servers=[slow], consumer_batch_size=4) as (executor, _):
        update = WeightUpdate.from_disk(checkpoint(1), 1)
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.update_weights, update)
            await trio.sleep(1)
            now = trio.current_time()
            assert executor.get_capacity() == 4
            for prompt in prompts(4):
                executor.submit(prompt, Instant())
            assert len(await executor.wait(4)) == 4
            assert trio.current_time() == now
            assert call.pending
        assert call.value.version == 1


async def test_d28_what_ends_during_a_pause_is_delivered_at_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        await settled()
        executor.pause()
        puppet.end_all()
        now = trio.current_time()
        assert len(await executor.wait(4)) == 4
        assert trio.current_time() == now


async def test_d28_rollouts_that_run_cost_nothing_while_nothing_happens(
    autojump_clock: Clock,
) -> None:
    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1

    async def steps_of(rollouts: int) -> int:
        async with simulated_executor(servers=1, consumer_batch_size=512) as (executor, _):
            for prompt in prompts(rollouts):
                executor.submit(prompt, Puppet())
            await settled()
            instrument = Steps()
            trio.lowlevel.add_instrument(instrument)
            await trio.sleep(95)  # between two health checks
            trio.lowlevel.remove_instrument(instrument)
            return instrument.count

    # What remains are the health checks, at their named interval.
    assert await steps_of(512) == await steps_of(1)


async def test_d30_what_is_rejected_is_replaced_at_once(autojump_clock: Clock) -> None:
    def decide(data: Any) -> Any:
        return None if data["prompt_id"] < 50 else "accept"

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        now = trio.current_time()
        batch = await executor.prepare_batch(prompts(), Instant(decide))
        assert len(batch) == 4
        assert executor.counts.of(Outcome.REJECTED) == 50
        assert trio.current_time() == now
