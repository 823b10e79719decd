"""Timetable: calls each part of a fleet at its hour. Timer: one of those hours."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Final, NoReturn

import trio

from .alarm import Alarm

_MOMENT_S: Final = 1e-9  # sums of floating-point times that mean one moment differ by less


class Timetable:
    """Calls functions at hours that may be moved: one task and one alarm for a whole fleet.

    Servers that were told to go on at one moment have their next tokens at one moment, too. Waking
    each of them costs more than all that it then does, so those who are due are called in one go.
    """

    def __init__(self) -> None:
        self._alarm = Alarm()
        # (hour, tie-breaker, timer); all but one of a timer are out of date, see ``Timer._entry``
        self._entries: list[tuple[float, int, Timer]] = []
        self._ties = itertools.count()

    def timer(self, call: Callable[[], None]) -> Timer:
        """Return a timer that calls a function; at no hour so far."""
        return Timer(self, call)

    async def run(self) -> NoReturn:
        """Call what is due, until cancelled. What a function raises is raised here."""
        while True:
            await self._alarm.sleep_until(self._next_hour())
            self._call_due(trio.current_time() + _MOMENT_S)

    def _call_due(self, now: float) -> None:
        """Call each once, though it may be due again at once: others have to get their turn."""
        due = []
        while self._next_hour() <= now:
            _, _, timer = heapq.heappop(self._entries)
            timer._entry = math.inf
            due.append(timer)
        for timer in due:
            if timer.hour <= now:  # else the one before has moved it
                timer.hour = math.inf
                timer._call()

    def _next_hour(self) -> float:
        """The first hour of all, with what is out of date before it dropped."""
        entries = self._entries
        while entries:
            hour, _, timer = entries[0]
            if hour == timer._entry == timer.hour:
                return hour
            heapq.heappop(entries)
            if hour == timer._entry:  # it was put off
                timer._entry = math.inf
                timer._enter()
        return math.inf

    def _add(self, timer: Timer) -> None:
        heapq.heappush(self._entries, (timer.hour, next(self._ties), timer))
        if timer.hour < self._alarm.hour:
            self._alarm.move(timer.hour)

    def _put_off(self, timer: Timer) -> None:
        if self._entries and self._entries[0][2] is timer:  # else the alarm is not set for it
            self._alarm.move(self._next_hour())


class Timer:
    """Calls a function at an hour that may be moved, once. ``Timetable.timer`` makes it.

    Attributes:
        hour: On trio's clock; infinite where it is not to call.
    """

    __slots__ = ("_call", "_entry", "_stopped", "_timetable", "hour")

    def __init__(self, timetable: Timetable, call: Callable[[], None]) -> None:
        self.hour = math.inf
        self._timetable = timetable
        self._call = call
        self._entry = math.inf  # the hour under which the timetable has it, at the latest ``hour``
        self._stopped = False

    def set(self, hour: float) -> None:
        """Call at this hour and at no other; ``inf`` is never. One that has passed means now."""
        if hour == self.hour or self._stopped:
            return
        self.hour = hour
        if hour < self._entry:
            self._enter()
        else:
            self._timetable._put_off(self)

    def stop(self) -> None:
        """Never call again, whatever is set."""
        self.set(math.inf)
        self._stopped = True

    def _enter(self) -> None:
        if self.hour < math.inf:
            self._entry = self.hour
            self._timetable._add(self)
