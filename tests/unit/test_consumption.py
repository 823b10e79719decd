"""Consumption: a version that came with less than a batch buys no more rollouts than a full one."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest

from arealtrio.config import RolloutConfig
from arealtrio.consumption import Consumption
from arealtrio.staleness import StalenessManager
from arealtrio.trajectory import Group

from .puppet import row

BATCH = 4


class AtZero:
    def get_version(self) -> int:
        return 0


def make(policy: Any = "wait") -> tuple[Consumption, StalenessManager]:
    config = RolloutConfig(
        servers=["http://a:1"], consumer_batch_size=BATCH, straggler_policy=policy
    )
    staleness = StalenessManager(AtZero(), 99, BATCH, 1)
    return Consumption(config, staleness), staleness


def groups(*versions: int) -> list[Group]:
    return [
        Group.of([[row(version)]], number=n, permit_version=0, prompt_id="p", task_id=str(n))
        for n, version in enumerate(versions)
    ]


def test_a_whole_batch_is_charged_nothing() -> None:
    consumption, staleness = make()
    consumption.take(groups(0, 0, 0, 0), oldest=0)
    consumption.charge_for(1)
    assert (consumption.groups, staleness.charged) == (BATCH, 0)


def test_a_short_batch_is_charged_for_once() -> None:
    consumption, staleness = make()
    consumption.take(groups(0), oldest=0)
    consumption.charge_for(1)
    consumption.charge_for(1)
    assert (consumption.groups, staleness.charged) == (BATCH, BATCH - 1)


def test_a_place_of_a_rejected_group_is_charged_when_it_is_taken_and_not_again() -> None:
    consumption, staleness = make()
    consumption.charge_place()
    consumption.take(groups(0, 0, 0), oldest=0)
    consumption.take_places(1)
    consumption.charge_for(1)
    assert staleness.charged == 1


def test_keep_is_charged_nothing_and_counts_what_is_beyond_the_bound() -> None:
    consumption, staleness = make("keep")
    old, *young = groups(2, 3, 4)
    consumption.charge_place()
    consumption.take([old, *young], oldest=3)
    consumption.charge_for(9)
    assert (consumption.violations, staleness.charged) == (1, 0)
    consumption.take_back([old])
    assert (consumption.groups, consumption.violations) == (2, 0)


def test_what_was_in_time_when_it_left_is_no_violation_the_less_when_it_is_given_back() -> None:
    consumption, _ = make("keep")
    (late,), (early,) = groups(2), groups(3)
    consumption.take([late, early], oldest=3)
    consumption.take_back([early])  # at version 9, say, where it would be too old
    assert (consumption.groups, consumption.violations) == (1, 1)
    consumption.take_back([late])
    assert (consumption.groups, consumption.violations) == (0, 0)


def test_it_holds_no_group_that_the_trainer_has_let_go_of() -> None:
    consumption, _ = make("keep")
    (late,) = groups(2)
    consumption.take([late], oldest=3)
    alive = ref(late)
    del late
    gc.collect()
    assert alive() is None
    assert consumption.violations == 1


@pytest.mark.parametrize("version", [0, 3])
def test_a_recovered_run_owes_nothing(version: int) -> None:
    consumption, staleness = make()
    consumption.recover(version)
    consumption.charge_for(version)
    assert staleness.charged == 0
