"""Does throughput rise with the staleness bound as it does in AReaL's published measurement?

``docs/simulate.md`` has the same comparison at full length, with its assumptions. The one number
that is fitted is the training time, from the published ends; what lies between them is the test.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from arealtrio.simulate import LogNormalAnswers, Outcome, Plan, fleet, simulate

# Effective training throughput in thousands of tokens per second, by the bound (None: none), from
# the figure staleness_throughput.png of AReaL's repository.
PUBLISHED = {0: 128.7, 1: 269.3, 2: 356.6, 4: 356.6, 8: 371.7, 16: 382.4, None: 396.8}
STEPS = 20
PLAN = Plan(
    servers=fleet("1x48@70"),
    slow_down=0.004,
    answers=LogNormalAnswers(7000, 27000, 27648),
    batch_size=8,
    group_size=5,
    training_s=210.0,
    update_s=3.0,
    straggler_policy="keep",  # AReaL's
    grain=400,
)


@cache
def synchronous() -> Outcome:
    return simulate(replace(PLAN, max_staleness=0, steps=STEPS, warm_up=0))


@cache
def relative(bound: int | None) -> float:
    """Throughput ÷ that of synchronous training."""
    warm_up = min(bound or 8, 8)
    plan = replace(
        PLAN,
        max_staleness=bound,
        training_s=fitted_training_s(),
        steps=STEPS + warm_up,
        warm_up=warm_up,
    )
    generating_s = synchronous().trainer_wait_s
    synchronous_step_s = generating_s + plan.training_s + plan.update_s
    return synchronous_step_s / simulate(plan).step_s


def fitted_training_s() -> float:
    """What makes a step without any waiting as much shorter as is published.

    Synchronous steps generate and train in turns, so nothing but the sum changes with it.
    """
    times = PUBLISHED[None] / PUBLISHED[0]
    return synchronous().trainer_wait_s / (times - 1) - PLAN.update_s


@pytest.mark.parametrize("bound", [1, 2, 4, 8, None])
def test_each_throughput_is_near_the_published_one(bound: int | None) -> None:
    published = PUBLISHED[bound] / PUBLISHED[0]
    assert relative(bound) == pytest.approx(published, rel=0.15)


def test_the_throughput_rises_with_the_bound_to_a_knee_at_two() -> None:
    by_bound = [relative(bound) for bound in (1, 2, 4, 8, None)]
    assert all(later >= 0.98 * earlier for earlier, later in pairwise(by_bound))
    one, two, *_, unbounded = by_bound
    assert one < 0.75 * unbounded  # the trainer still waits
    assert two > 0.85 * unbounded  # and here hardly any more
