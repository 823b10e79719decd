"""Defects of ours that the simulation found, each as small as it can be told."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from arealtrio.errors import StalenessBudgetExhausted
from arealtrio.testing import simulated_executor
from arealtrio.types import Outcome

from ..unit.puppet import Instant, prompts


async def test_a_result_that_nobody_takes_in_time_gives_its_budget_back(
    autojump_clock: MockClock,
) -> None:
    """It kept it until somebody took it, and a trainer that was told to update was told again."""
    async with simulated_executor(servers=1, consumer_batch_size=1) as (executor, _):
        loader = prompts()
        task = executor.submit({"prompt_id": "untaken"}, Instant())
        await executor.drain()
        with pytest.raises(StalenessBudgetExhausted):
            await executor.prepare_batch(loader, Instant())
        await executor.set_version(1)
        assert len(await executor.prepare_batch(loader, Instant())) == 1
        assert (await executor.wait_for_task(task)).outcome is Outcome.EXPIRED
        counts = executor.counts.as_dict()
        assert (counts["accepted"], counts["expired"]) == (1, 1)
