"""Groups whose members fail, at small concurrency: what each policy keeps; none is stuck."""

from __future__ import annotations

from collections import Counter

import pytest

from arealtrio import GroupPolicy

from .training import Run, Scenario, trained

SIZE = 4
STEPS = 25
FLAKY = 0.1  # of the attempts at a member: a third of all groups of four have one that fails


def flaky(group_policy: GroupPolicy, **more: object) -> Run:
    given = {"seed": 1, "max_staleness": 1, "steps": STEPS, "max_running": 6, **more}
    return trained(
        Scenario(group_size=SIZE, flaky=FLAKY, group_policy=group_policy, **given)  # type: ignore[arg-type]
    )


def ends(run: Run) -> Counter[str]:
    """How the groups ended that were not accepted."""
    return Counter(f.outcome.value for batch in run.report.batches for f in batch.failures)


def check(run: Run) -> None:
    """I6, I7, full batches, and each member where it belongs."""
    report = run.report
    assert report.oldest_token() <= run.scenario.max_staleness
    assert [len(batch) for batch in report.batches] == [
        run.scenario.batch_size
    ] * run.scenario.steps
    assert len(set(report.numbers)) == len(report.numbers)
    assert len({group.prompt_id for group in report.groups}) == len(report.groups)
    for group in report.groups:
        assert len(group.members) == SIZE
        for index, rows in enumerate(group.members):
            assert {(row.prompt_id, row.member_index) for row in rows} <= {(group.prompt_id, index)}
    assert run.executor.staleness_manager.charged == 0


# 1: below the group's size, so that a replacement finds no slot free but its own
@pytest.mark.parametrize("max_running", [1, 3, 6])
@pytest.mark.parametrize("straggler_policy", ["wait", "requeue"])
def test_replace_keeps_the_others_and_loses_no_group(
    straggler_policy: str, max_running: int
) -> None:
    run = flaky(
        GroupPolicy.replace(), max_running=max_running, policy=straggler_policy, steps=STEPS // 2
    )
    check(run)
    assert set(ends(run)) <= {"expired"}  # the chance that four replacements fail is 1e-5
    assert all(len(group.rows) == SIZE for group in run.report.groups)
    replaced = [g for g in run.report.groups if run.workflow.attempts[g.prompt_id] > SIZE]
    assert replaced
    if straggler_policy == "wait":  # the failed ones alone were run again
        attempts = sum(run.workflow.attempts[g.prompt_id] for g in run.report.groups)
        assert attempts < 1.3 * SIZE * len(run.report.groups)


@pytest.mark.parametrize("max_running", [1, 6])
def test_a_group_tried_again_keeps_its_permit(max_running: int) -> None:
    """At a window of one batch a fresh prompt that took its budget would leave the batch short."""
    run = flaky(GroupPolicy.all(max_retries=8), max_staleness=0, max_running=max_running)
    check(run)
    assert not ends(run)
    assert sorted(run.report.numbers) == list(range(len(run.report.numbers)))  # no permit was lost
    assert any(run.workflow.attempts[g.prompt_id] > SIZE for g in run.report.groups)


def test_all_drops_the_group_and_another_prompt_takes_its_place() -> None:
    run = flaky(GroupPolicy.all())
    check(run)
    assert set(ends(run)) == {"failed"}
    share = ends(run)["failed"] / (ends(run).total() + len(run.report.groups))
    assert 0.2 < share < 0.5  # 1 - 0.9 ** 4 = 0.34


@pytest.mark.parametrize("max_running", [1, 6])
def test_at_least_goes_on_with_the_rest(max_running: int) -> None:
    run = flaky(GroupPolicy.at_least(3), max_running=max_running)
    check(run)
    sizes = Counter(len(group.rows) for group in run.report.groups)
    assert set(sizes) == {3, 4}  # the missing one is absent, not imputed
    assert set(ends(run)) <= {"failed"}
    for group in run.report.groups:
        assert {row.member_index for row in group.rows} == {
            index for index, rows in enumerate(group.members) if rows
        }
