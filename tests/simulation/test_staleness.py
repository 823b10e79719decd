"""No consumed token is older than the bound: on tokens, over whole runs, for several seeds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio

from arealtrio import StalenessBudgetExhausted

from .training import (
    MAX_RUNNING,
    SERVERS,
    TRAINING_S,
    Broken,
    Report,
    Run,
    Scenario,
    open_run,
    prompts,
    trained,
    virtually,
)

SEEDS = (1, 2, 3)
BOUNDS = (0, 1, 2, 4)


def in_permit_order(report: Report) -> bool:
    """Each batch holds higher permits than the one before."""
    sets = [[group.number for group in batch.groups] for batch in report.batches if batch.groups]
    return all(max(a) < min(b) for a, b in itertools.pairwise(sets))


def assert_bounded(run: Run) -> None:
    report, scenario = run.report, run.scenario
    assert report.oldest_token() <= scenario.max_staleness, scenario  # I6
    assert run.executor.staleness_violations == 0
    assert in_permit_order(report)
    assert len(set(report.numbers)) == len(report.numbers)  # I7


@pytest.mark.parametrize("max_staleness", BOUNDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_wait_keeps_the_bound(seed: int, max_staleness: int) -> None:
    run = trained(Scenario(seed=seed, max_staleness=max_staleness))
    assert_bounded(run)
    assert [len(batch) for batch in run.report.batches] == [run.scenario.batch_size] * 40


@pytest.mark.parametrize("max_staleness", BOUNDS)
def test_wait_keeps_the_bound_of_whole_groups(max_staleness: int) -> None:
    run = trained(Scenario(seed=7, max_staleness=max_staleness, group_size=4))
    assert_bounded(run)
    assert all(len(group) == 4 for group in run.report.groups)


def test_the_bound_is_reached() -> None:
    """A bound that nothing comes near would be kept by doing too little."""
    assert trained(Scenario(seed=1, max_staleness=2)).report.oldest_token() == 2


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_keep_violates_it_and_counts_each_violation(max_staleness: int, group_size: int) -> None:
    run = trained(
        Scenario(seed=1, max_staleness=max_staleness, group_size=group_size, policy="keep")
    )
    recounted = run.report.groups_older_than(max_staleness)
    assert run.executor.staleness_violations == recounted
    assert (recounted > 0) == (max_staleness > 0)  # at 0 nothing overlaps with training
    assert len(set(run.report.numbers)) == len(run.report.numbers)


@pytest.mark.parametrize("max_staleness", BOUNDS)
@pytest.mark.parametrize("group_size", [1, 4])
def test_rejections_and_failures_leave_the_bound(max_staleness: int, group_size: int) -> None:
    scenario = Scenario(
        seed=5, max_staleness=max_staleness, group_size=group_size, reject=0.3, fail=0.1, steps=25
    )
    run = trained(scenario)
    assert_bounded(run)
    ends = [failure.outcome.value for batch in run.report.batches for failure in batch.failures]
    assert {"rejected", "failed"} == set(ends)
    assert all(
        isinstance(result.failure.error, Broken)
        for batch in run.report.batches
        for result in batch.failures
        if result.failure is not None
    )
    for prompt in (group.prompt_id for group in run.report.groups):
        assert scenario.chance("reject", prompt) >= 0.3
        assert scenario.chance("fail", prompt) >= 0.1


async def _epochs(scenario: Scenario, epoch: int, epochs: int) -> Run:
    async with open_run(scenario) as run:
        for _ in range(epochs):
            loader = list(prompts(epoch))
            try:
                while True:
                    await run.train(loader, 1)
            except StopAsyncIteration:
                pass
    return run


@pytest.mark.parametrize("max_staleness", BOUNDS)
@pytest.mark.parametrize("reject", [0.0, 0.3])
def test_short_last_batches_leave_the_bound(max_staleness: int, reject: float) -> None:
    """Four epochs of 18 prompts in batches of 4: each ends with a batch that is not full."""
    scenario = Scenario(seed=11, max_staleness=max_staleness, reject=reject)
    run = virtually(_epochs, scenario, 18, 4)
    assert_bounded(run)
    counts = run.executor.counts.as_dict()
    assert counts["submitted"] == 72
    assert counts["accepted"] == len(run.report.numbers)  # I7: none was lost either
    if not reject:
        assert [len(batch) for batch in run.report.batches] == [4, 4, 4, 4, 2] * 4


async def _skip_batches(scenario: Scenario) -> Run:
    """Every third step the trainer advances by two versions, and takes one batch."""
    async with open_run(scenario) as run:
        loader = prompts()
        for step in range(30):
            await run.train(loader, 1)
            if step % 3 == 0:
                await run.update()
                await trio.sleep(TRAINING_S)
    return run


@pytest.mark.parametrize("max_staleness", BOUNDS)
def test_versions_without_a_batch_deliver_nothing_too_old(max_staleness: int) -> None:
    run = virtually(_skip_batches, Scenario(seed=13, max_staleness=max_staleness))
    assert_bounded(run)
    delivered = len(run.report.numbers)
    discarded = [
        result.number
        for batch in run.report.batches
        for result in batch.failures
        if result.outcome.value == "expired"
    ]
    assert delivered == 30 * run.scenario.batch_size
    assert not set(discarded) & set(run.report.numbers)
    assert len(set(discarded)) == len(discarded)


async def _stop_and_go(scenario: Scenario) -> Run:
    """The trainer often lets rollouts pile up, and then advances without a batch."""
    async with open_run(scenario) as run:
        loader = prompts()
        for _ in range(20):
            await run.train(loader, 1)
            await trio.sleep(3 * TRAINING_S)
            await run.update()
    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_age_does_not_follow_the_number_where_rollouts_think_first(
    seed: int, max_staleness: int
) -> None:
    """An old group may stand behind a young one: the lowest number alone says nothing."""
    scenario = Scenario(seed=seed, max_staleness=max_staleness, think_s=15.0)
    assert_bounded(virtually(_stop_and_go, scenario))


async def _two_batches_at_once(scenario: Scenario) -> Run:
    async with open_run(scenario) as run:
        loader = prompts()
        await run.next_batch(loader)
        with pytest.raises(StalenessBudgetExhausted, match="Update the weights"):
            await run.next_batch(loader)
        await run.update()
        await run.next_batch(loader)
    return run


def test_a_second_batch_of_one_version_is_refused_at_once() -> None:
    """Waiting would never end: whoever waits is the one who has to advance the version."""
    run = virtually(_two_batches_at_once, Scenario(seed=1, max_staleness=0))
    assert len(run.report.batches) == 2
    assert_bounded(run)


def traced(seed: int) -> tuple[Any, ...]:
    async def main() -> tuple[Any, ...]:
        scenario = Scenario(seed=seed, max_staleness=2, group_size=2, reject=0.2, fail=0.1)
        async with open_run(scenario, traced=True) as run:
            await run.train(prompts(), 10)
        consumed = [
            (group.number, group.prompt_id, [row.versions.tolist() for row in group.rows])
            for group in run.report.groups
        ]
        return run.fleet.trace, consumed, run.executor.counts.as_dict()

    return tuple(virtually(main, seed=seed))


def test_one_seed_is_one_run() -> None:
    first = traced(17)
    assert len(first[0]) > 200
    assert first == traced(17)
    assert first[0] != traced(18)[0]


def test_requests_do_wait_for_slots_in_these_runs() -> None:
    """Else the checks of caps and of idle slots would have nothing to check."""
    run = trained(Scenario(seed=1, max_staleness=4, group_size=4, steps=5))
    assert run.most_waiting > 0
    assert [server.most_generations for server in run.fleet] == [4] * len(SERVERS)
    assert run.workflow.most_running == MAX_RUNNING
