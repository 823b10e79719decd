"""Batches in which a rejected group takes its place: short ones, and nothing too old after them."""

from __future__ import annotations

import pytest

from .training import Run, Scenario, open_run, prompts, trained, virtually

STEPS = 30


def scenario(**more: object) -> Scenario:
    given = {"seed": 1, "max_staleness": 1, "reject": 0.4, "steps": STEPS, **more}
    return Scenario(dynamic_batch_size=True, **given)  # type: ignore[arg-type]


def sizes(run: Run) -> list[int]:
    return [len(batch) for batch in run.report.batches]


def outcomes(run: Run) -> list[str]:
    return [f.outcome.value for batch in run.report.batches for f in batch.failures]


@pytest.mark.parametrize("policy", ["wait", "requeue"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_short_batches_leave_the_bound_and_waste_nothing(max_staleness: int, policy: str) -> None:
    run = trained(scenario(max_staleness=max_staleness, policy=policy))
    size = run.scenario.batch_size
    assert run.report.oldest_token() <= max_staleness
    assert run.executor.staleness_violations == 0
    assert all(1 <= n <= size for n in sizes(run))
    assert 0.4 < sum(sizes(run)) / (size * STEPS) < 0.85  # near the share that is accepted
    if policy == "wait":
        assert set(outcomes(run)) == {"rejected"}, "a group became too old behind a short batch"


def test_each_step_moves_on_by_one_batch_of_groups() -> None:
    """Rejected groups are not replaced, so a step generates as much whatever the filter thinks."""
    run = trained(scenario(max_staleness=0))
    groups = len(run.report.numbers) + len(outcomes(run))
    assert abs(groups - STEPS * run.scenario.batch_size) <= 2 * run.scenario.batch_size


def test_there_is_a_batch_even_where_nearly_everything_is_rejected() -> None:
    run = trained(scenario(reject=0.95, steps=10))
    assert sizes(run) == [1] * 10
    assert run.report.oldest_token() <= 1


async def _epochs(scenario: Scenario) -> Run:
    async with open_run(scenario) as run:
        for _ in range(4):
            loader = list(prompts(18))
            try:
                while True:
                    await run.train(loader, 1)
            except StopAsyncIteration:
                pass
    return run


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_epochs_end_and_nothing_is_owed(max_staleness: int) -> None:
    run = virtually(_epochs, scenario(max_staleness=max_staleness))
    assert run.report.oldest_token() <= max_staleness
    counts = run.executor.counts.as_dict()
    assert counts["submitted"] == 72
    assert counts["accepted"] == len(run.report.numbers)
    assert counts["accepted"] + counts["rejected"] == 72, "some became too old"
    stat, manager = run.executor.staleness_manager.get_stats(), run.executor.staleness_manager
    used = stat.accepted + manager.charged
    assert used <= run.executor.get_version() * run.scenario.batch_size


async def _change_of_mind(scenario: Scenario) -> Run:
    async with open_run(scenario) as run:
        loader = prompts()
        await run.train(loader, 5)
        for _ in range(5):
            batch = await run.executor.prepare_batch(
                loader, run.workflow, should_accept_fn=run.workflow.should_accept
            )
            assert len(batch) == scenario.batch_size
            assert batch.staleness().max() <= scenario.max_staleness
            await run.update()
    return run


def test_the_next_call_may_want_whole_batches_again() -> None:
    virtually(_change_of_mind, scenario())
