"""Progress: one line on a terminal while a simulation runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

_BETWEEN_S = 0.2  # two lines, of real time
_CALLS = 64  # between two looks at the clock
_CLEAR = "\r\x1b[K"
_WIDTH = 80  # of a terminal that does not say how wide it is


class Progress:
    """Overwrites one line of a terminal, or does nothing.

    It writes to the descriptor, past any buffer, so that a signal handler may write in the middle.

    Args:
        descriptor: Of the terminal; None: there is none.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._calls = 0
        self._next = 0.0
        self._what, self._steps = "", 0
        self._moments: Sequence[object] = ()

    def begin(self, what: str, steps: int, moments: Sequence[object]) -> None:
        """Show another run from now on.

        Args:
            what: Its name.
            steps: That it will take.
            moments: Its beginning and its steps so far; looked at whenever a line is written.
        """
        self._what, self._steps, self._moments = what, steps, moments
        self._show()

    def changed(self) -> None:
        """Something happened: write a line if it is time for one."""
        self._calls += 1
        if self._descriptor is None or self._calls % _CALLS:
            return
        if time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        self._next = time.monotonic() + _BETWEEN_S
        step = max(0, len(self._moments) - 1)
        line = f"{self._what}: step {step} of {self._steps}, {self._calls // 2:,} rollouts"
        self._write(_CLEAR + line[: self._width() - 1])  # in the last column some begin a new line

    def _width(self) -> int:
        """Of the terminal as it is now."""
        if self._descriptor is None:
            return _WIDTH
        try:
            return os.get_terminal_size(self._descriptor).columns or _WIDTH
        except OSError:
            return _WIDTH

    def clear(self) -> None:
        """Leave an empty line."""
        self._write(_CLEAR)

    def _write(self, text: str) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, text.encode())
