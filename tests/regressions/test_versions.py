"""AReaL's defects C22 to C26: versions and staleness."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from arealtrio.errors import WeightUpdateError
from arealtrio.testing import (
    FixedLengths,
    LogNormalLengths,
    checkpoint,
    made_by,
    simulated_executor,
)
from arealtrio.types import ModelRequest
from arealtrio.weights import WeightUpdate, update_weights

from ..unit.faulty import faulty_engine, refuses_to_load
from ..unit.puppet import Generates, Instant, prompts

Clock = trio.testing.MockClock


async def test_c22_each_token_has_the_version_that_made_it(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=2, lengths=FixedLengths(100), consumer_batch_size=4, max_staleness=2
    ) as (executor, _):
        for prompt in prompts(4):
            executor.submit(prompt, Generates())
        for version in (1, 2):
            await trio.sleep(0.5)
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
        for result in await executor.wait(4):
            assert result.group is not None
            (row,) = result.group.rows
            answer = row.loss_mask == 1
            made = [made_by(float(logprob)) for logprob in row.logprobs[answer]]
            assert row.versions[answer].tolist() == made
            assert set(made) == {0, 1, 2}


async def test_c23_long_answers_are_never_overtaken_beyond_the_bound(autojump_clock: Clock) -> None:
    lengths = LogNormalLengths.with_tail(median=20, p99=400, longest=1000)
    async with simulated_executor(
        servers=2,
        lengths=lengths,
        consumer_batch_size=4,
        max_staleness=1,
        max_concurrent_rollouts=8,
    ) as (executor, _):
        loader = prompts()
        for version in range(1, 15):
            batch = await executor.prepare_batch(loader, Generates())
            assert max(batch.staleness_histogram()) <= 1
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
        assert executor.staleness_violations == 0


async def test_c24_evaluation_costs_no_budget_and_rollout_batch_only_until_the_next_version(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        for _ in range(3):
            for prompt in prompts(8):
                executor.submit(prompt, Instant(), is_eval=True)
            await executor.wait(8, is_eval=True)
            assert executor.get_capacity() == 4
        for version in range(1, 4):
            assert len(await executor.rollout_batch(list(prompts(4)), Instant())) == 4
            assert executor.get_capacity() == 0
            await executor.set_version(version)
            assert executor.get_capacity() == 4
        assert executor.counts.submitted == 12


async def test_c25_one_server_that_fails_an_update_serves_nothing_old_and_stops_nobody(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=3) as (engine, faulty):
        bad = faulty.fleet.addresses[1]
        faulty.fault = refuses_to_load(bad)
        result = await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(1), 1))
        assert list(result.failed) == [bad]
        assert engine.get_version() == 1
        for token in range(6):
            answer = await engine.agenerate(ModelRequest([token]))
            assert set(answer.output_versions.tolist()) == {1}
            assert {segment.server for segment in answer.segments}.isdisjoint({bad})


async def test_c26_an_update_that_fails_raises_where_it_was_asked_for(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1) as (executor, fleet):
        with pytest.raises(WeightUpdateError) as caught:
            await executor.update_weights(WeightUpdate.from_disk("/no/such/checkpoint", 1))
        assert list(caught.value.failed) == list(fleet.addresses)
        assert executor.get_version() == 0
