"""FailureBudget: when so much fails that going on would only repeat it."""

from __future__ import annotations

from collections import deque

from .errors import TooManyFailures, WorkflowError
from .types import Outcome


class FailureBudget:
    """Counts failed and other settlements; spent after too many in a row, or too many of a window.

    Args:
        max_consecutive: Failures in a row that spend it.
        max_ratio: Failures above this share of the last ``window`` settlements spend it; 1 never.
        window: Settlements looked at; fewer than that prove nothing.
    """

    def __init__(self, max_consecutive: int, max_ratio: float, window: int) -> None:
        self._max_consecutive = max_consecutive
        self._max_ratio = max_ratio
        self._in_a_row: deque[Exception] = deque(maxlen=max_consecutive)
        self._window: deque[Exception | None] = deque(maxlen=window)
        self._failed = 0  # of the window

    def record(self, error: Exception | None) -> None:
        """Count one settlement: its error, or None where it did not fail."""
        if len(self._window) == self._window.maxlen and self._window[0] is not None:
            self._failed -= 1
        self._window.append(error)
        if error is None:
            self._in_a_row.clear()
        else:
            self._failed += 1
            self._in_a_row.append(error)

    @property
    def spent(self) -> bool:
        """Whether to stop."""
        if not self._failed:  # nearly always
            return False
        return self._too_many_in_a_row or self._too_large_a_share

    @property
    def _too_many_in_a_row(self) -> bool:
        return len(self._in_a_row) == self._max_consecutive

    @property
    def _too_large_a_share(self) -> bool:
        window = self._window.maxlen or 0
        return len(self._window) == window and self._failed > self._max_ratio * window

    def take_error(self) -> TooManyFailures:
        """The error with the causes; the count begins anew, so that a later call may try again."""
        if self._too_many_in_a_row:
            causes = list(self._in_a_row)
            words = f"{len(causes)} groups failed in a row (max_consecutive_failures)"
        else:
            causes = [error for error in self._window if error is not None]
            words = (
                f"{len(causes)} of the last {len(self._window)} groups failed "
                f"(max_failure_ratio={self._max_ratio:g})"
            )
        self._in_a_row.clear()
        self._window.clear()
        self._failed = 0
        return TooManyFailures(words, causes)


class RejectionBudget:
    """Counts groups rejected since one was last accepted; spent after too many.

    Args:
        max_consecutive: Rejections that spend it; None never.
    """

    def __init__(self, max_consecutive: int | None) -> None:
        self._max_consecutive = max_consecutive
        self._in_a_row = 0

    def record(self, outcome: Outcome) -> None:
        """Count one settlement; what failed says nothing of the filter."""
        if outcome is Outcome.ACCEPTED:
            self._in_a_row = 0
        elif outcome is Outcome.REJECTED:
            self._in_a_row += 1

    @property
    def spent(self) -> bool:
        """Whether to stop."""
        return self._max_consecutive is not None and self._in_a_row >= self._max_consecutive

    def take_error(self) -> TooManyFailures:
        """The error to raise; the count begins anew, so that a later call may try again."""
        count, self._in_a_row = self._in_a_row, 0
        cause = WorkflowError(
            "the workflow returned None, or should_accept_fn False, for each of them: see what it "
            "rejects in rollout_batch, or raise max_consecutive_rejections"
        )
        words = f"{count} groups were rejected in a row (max_consecutive_rejections)"
        return TooManyFailures(words, [cause])
