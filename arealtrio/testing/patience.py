"""Patience: ends the waits of a server's clients when their time is up."""

from __future__ import annotations

import math

import trio

from .stream import Connection
from .timetable import Timetable


class Patience:
    """Ends the waits of a server's clients when their time is up.

    One timer does it for all of them: a scope for each costs more than a server takes to find out
    what it answers.

    Args:
        timetable: Of the fleet.
    """

    def __init__(self, timetable: Timetable) -> None:
        self._until: dict[Connection, float] = {}
        self._timer = timetable.timer(self._end_waits)

    def watch(self, connection: Connection, hour: float) -> None:
        """End what a connection waits for at this hour of trio's clock, unless ``forget`` comes."""
        self._until[connection] = hour
        if hour < self._timer.hour:
            self._timer.set(hour)

    def forget(self, connection: Connection) -> None:
        """It waits no more. The timer may go off for nothing then; moving it costs more."""
        self._until.pop(connection, None)
        if not self._until:
            self._timer.set(math.inf)

    def _end_waits(self) -> None:
        now = trio.current_time()
        for connection in [one for one, hour in self._until.items() if hour <= now]:
            del self._until[connection]
            connection.end_wait()
        self._timer.set(min(self._until.values(), default=math.inf))
