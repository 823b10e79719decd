"""StallAlarm: says so when something is to be settled and nothing was for long."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

logger = logging.getLogger(__name__)


class StallAlarm:
    """A timer that every settlement winds up again. Nothing is polled, and idleness is no stall.

    Settlements are many, and stalls few: a settlement notes the time, and the timer is set anew
    when it fires, which is at most once in the limit.

    Args:
        limit_s: Seconds without a settlement; the warning is repeated after as many more.
        describe: What to log.
    """

    def __init__(self, limit_s: float, describe: Callable[[], str]) -> None:
        self._limit_s = limit_s
        self._describe = describe
        self._scope = trio.CancelScope()
        self._since = math.inf
        self._now = trio.lowlevel.current_clock().current_time

    def quiet_s(self) -> float:
        """Seconds since it was wound up; 0 while it is off."""
        return max(0.0, self._now() - self._since)

    def wind_up(self) -> None:
        """Something settled, and more is to."""
        self._since = self._now()
        if self._scope.deadline == math.inf:
            self._scope.deadline = self._since + self._limit_s

    def arm(self) -> None:
        """Something is to settle; unlike ``wind_up`` it moves no time that runs already."""
        if self._since == math.inf:
            self.wind_up()

    def stop(self) -> None:
        """Nothing is left to settle."""
        self._since = math.inf

    async def run(self) -> None:
        """Wait, and warn whenever the time has passed, until cancelled."""
        while True:
            with self._scope:
                await trio.sleep_forever()
            due = self._since + self._limit_s  # infinite where nothing is to settle
            if due <= self._now():
                logger.warning("nothing settled for %.0f s\n%s", self.quiet_s(), self._describe())
                due = self._now() + self._limit_s
            self._scope = trio.CancelScope(deadline=due)
