"""The failure budget: when so much fails that going on would only repeat it."""

from __future__ import annotations

import pytest

from arealtrio.errors import TooManyFailures
from arealtrio.failures import FailureBudget, RejectionBudget
from arealtrio.types import Outcome


def test_so_many_in_a_row_spend_it_and_one_that_does_not_fail_begins_anew() -> None:
    budget = FailureBudget(3, 1.0, 100)
    for number in (1, 2):
        budget.record(ValueError(number))
    budget.record(None)
    for number in (3, 4):
        budget.record(ValueError(number))
        assert not budget.spent
    budget.record(ValueError(5))
    assert budget.spent
    error = budget.take_error()
    assert isinstance(error, TooManyFailures)
    assert [str(cause) for cause in error.exceptions] == ["3", "4", "5"]
    assert not budget.spent  # a later call may try again


def test_too_large_a_share_of_a_full_window_spends_it() -> None:
    budget = FailureBudget(100, 0.25, 8)
    for number in range(8):
        budget.record(ValueError(number) if number % 4 == 0 else None)
    assert not budget.spent  # a quarter, and not more
    budget.record(None)  # pushes a failure out
    budget.record(ValueError("second"))
    budget.record(ValueError("third"))
    assert budget.spent
    assert len(budget.take_error().exceptions) == 3


def test_a_window_that_is_not_full_proves_nothing() -> None:
    budget = FailureBudget(100, 0.0, 8)
    for _ in range(7):
        budget.record(ValueError())
    assert not budget.spent
    budget.record(ValueError())
    assert budget.spent


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_at_a_ratio_of_one_only_the_row_counts(ratio: float) -> None:
    budget = FailureBudget(50, ratio, 10)
    for _ in range(20):
        budget.record(ValueError())
    assert budget.spent == (ratio == 0.0)


def test_rejections_count_until_one_is_accepted_whatever_fails_between() -> None:
    budget = RejectionBudget(2)
    for outcome in (Outcome.REJECTED, Outcome.ACCEPTED, Outcome.REJECTED, Outcome.FAILED):
        budget.record(outcome)
        assert not budget.spent
    budget.record(Outcome.REJECTED)
    assert budget.spent
    assert str(budget.take_error()).startswith("2 groups were rejected in a row")
    assert not budget.spent


def test_without_a_limit_rejections_are_never_too_many() -> None:
    budget = RejectionBudget(None)
    for _ in range(1000):
        budget.record(Outcome.REJECTED)
    assert not budget.spent
