"""One timer ends the waits of all clients whose time is up, and of nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock

from arealtrio.testing.patience import Patience
from arealtrio.testing.stream import Connection
from arealtrio.testing.timetable import Timetable


class Clients:
    """Connections by name, and when the wait of each was ended."""

    def __init__(self, patience: Patience) -> None:
        self.ended: list[tuple[float, str]] = []
        self._patience = patience
        self._connections: dict[str, Connection] = {}
        self._begun = trio.current_time()

    def wait(self, name: str, seconds: float) -> None:
        connection = self._connections[name] = Connection()
        connection.end_wait = lambda: self.ended.append((trio.current_time() - self._begun, name))
        self._patience.watch(connection, self._begun + seconds)

    def leave(self, name: str) -> None:
        self._patience.forget(self._connections.pop(name))


@asynccontextmanager
async def clients() -> AsyncIterator[Clients]:
    timetable = Timetable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timetable.run)
        yield Clients(Patience(timetable))
        nursery.cancel_scope.cancel()


async def test_each_wait_ends_at_its_hour_and_once(autojump_clock: MockClock) -> None:
    async with clients() as waiting:
        for name, seconds in (("late", 7), ("early", 2), ("twin", 2), ("middle", 5)):
            waiting.wait(name, seconds)
        await trio.sleep(20)
        assert waiting.ended == [(2, "early"), (2, "twin"), (5, "middle"), (7, "late")]


async def test_who_has_left_is_left_alone(autojump_clock: MockClock) -> None:
    async with clients() as waiting:
        waiting.wait("answered", 2)
        waiting.wait("waits", 4)
        waiting.leave("answered")
        await trio.sleep(20)
        assert waiting.ended == [(4, "waits")]


async def test_with_nobody_left_there_is_no_hour_to_wake_at(autojump_clock: MockClock) -> None:
    async with clients() as waiting:
        waiting.wait("answered", 2)
        waiting.leave("answered")
        await trio.sleep(1)
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")


async def test_who_comes_later_may_have_less_time(autojump_clock: MockClock) -> None:
    async with clients() as waiting:
        waiting.wait("patient", 10)
        await trio.sleep(1)
        waiting.wait("hasty", 3)
        await trio.sleep(20)
        assert waiting.ended == [(3, "hasty"), (10, "patient")]
