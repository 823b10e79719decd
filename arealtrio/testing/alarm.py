"""Alarm: wakes one task at an hour that others may move."""

from __future__ import annotations

import math

import trio


class Alarm:
    """Wakes one task at an hour that others may move.

    trio's one clock is the deadline of a scope, which cancels what is in it. The sleeper is woken
    in place of that: an exception that is raised and caught costs as much as the rest of the sleep.

    Attributes:
        hour: At which it rings, on trio's clock.
    """

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self.hour = math.inf

    async def sleep_until(self, hour: float) -> None:
        """Sleep until trio's clock shows the hour, or the one that ``move`` has put in its place.

        Cancelling it from outside is as usual.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # at the hour itself, ``wake`` hides it
        task = trio.lowlevel.current_task()
        self.hour = hour
        with trio.CancelScope(deadline=hour) as self._scope:
            scope = self._scope

            def wake(_: object) -> trio.lowlevel.Abort:
                if not scope.cancel_called:  # what is around it was cancelled
                    return trio.lowlevel.Abort.SUCCEEDED
                trio.lowlevel.reschedule(task)
                return trio.lowlevel.Abort.FAILED

            await trio.lowlevel.wait_task_rescheduled(wake)

    def move(self, hour: float) -> None:
        """Wake the sleeper at another hour; where nobody sleeps, nothing."""
        if hour != self.hour:
            self.hour = hour
            self._scope.deadline = hour
