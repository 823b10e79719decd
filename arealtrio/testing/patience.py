"""Patience: ends the waits of a server's clients when their time is up."""

from __future__ import annotations

import math

import trio

from .alarm import Alarm
from .stream import Connection


class Patience:
    """Ends the waits of a server's clients when their time is up.

    One scope does it for all of them: one for each costs more than a server takes to find out what
    it answers.
    """

    def __init__(self) -> None:
        self._until: dict[Connection, float] = {}
        self._alarm = Alarm()

    async def end_waits(self) -> None:
        """Sleep until somebody's time is up, or until ``ring``, and end the waits that are due."""
        await self._alarm.sleep_until(min(self._until.values(), default=math.inf))
        now = trio.current_time()
        for connection in [one for one, hour in self._until.items() if hour <= now]:
            del self._until[connection]
            connection.end_wait()

    def ring(self) -> None:
        """Let ``end_waits`` return."""
        self._alarm.ring()

    def watch(self, connection: Connection, hour: float) -> None:
        """End what a connection waits for at this hour of trio's clock, unless ``forget`` comes."""
        self._until[connection] = hour
        if hour < self._alarm.hour:
            self._alarm.move(hour)

    def forget(self, connection: Connection) -> None:
        """It waits no more. The alarm may ring for nothing then; moving it costs more than that."""
        self._until.pop(connection, None)
        if not self._until:
            self._alarm.move(math.inf)
