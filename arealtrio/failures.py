"""FailureBudget: when so much fails that going on would only repeat it."""

from __future__ import annotations

from collections import deque

from .errors import TooManyFailures


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
