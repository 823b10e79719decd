"""Which connection serves next, and which are closed: decisions without I/O to wait for.

Every operation costs the same whatever the number of connections and requests: httpcore's pool
looks at each of them for each request, which is what makes it stall at a thousand in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from .connection import Connection
from .origin import Origin


@dataclass(frozen=True, slots=True)
class TransportStatistics:
    """What a transport has done and holds.

    Args:
        opened: Connections opened since the start.
        idle: Connections kept for later requests, now.
        active: Connections in use, now.
        requests: Requests begun since the start.
        retried: Requests that began again on a fresh connection because the kept one was dead
            before a byte of theirs went out.
    """

    opened: int
    idle: int
    active: int
    requests: int
    retried: int


class Pool:
    """The open connections: active ones by identity, idle ones by origin, newest last.

    Args:
        keep_alive_s: How long a connection is kept unused.
        idle_per_origin: Connections kept unused for one origin at most.
    """

    def __init__(self, keep_alive_s: float, idle_per_origin: int) -> None:
        self._keep_alive_s: Final = keep_alive_s
        self._idle_per_origin: Final = idle_per_origin
        self._idle: dict[Origin, deque[Connection]] = {}  # each sorted by idle_since
        self._idle_count = 0
        self._active: set[Connection] = set()
        self._swept_at = float("-inf")

    @property
    def idle_count(self) -> int:
        """Connections kept unused."""
        return self._idle_count

    @property
    def active_count(self) -> int:
        """Connections in use."""
        return len(self._active)

    def take(self, origin: Origin, now: float) -> Connection | None:
        """The connection used last, so that surplus ones age and go; None where none is alive."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if now - connection.idle_since < self._keep_alive_s and connection.is_quiet():
                self._active.add(connection)
                return connection
            connection.close()
        return None

    def add(self, connection: Connection) -> None:
        """Count a fresh connection as active."""
        self._active.add(connection)

    def put(self, connection: Connection, now: float) -> None:
        """Keep a connection on which nothing is outstanding."""
        self._active.remove(connection)
        if not self._idle_per_origin:
            connection.close()
            return
        idle = self._idle.setdefault(connection.origin, deque())
        if len(idle) >= self._idle_per_origin:
            self._drop_oldest(idle)
        connection.idle_since = now
        idle.append(connection)
        self._idle_count += 1
        self._sweep(now)

    def discard(self, connection: Connection) -> None:
        """Close a connection that is in use."""
        self._active.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close everything, in use or not."""
        self.close_idle()
        while self._active:
            self._active.pop().close()

    def close_idle(self) -> None:
        """Close everything that is not in use."""
        for idle in self._idle.values():
            while idle:
                self._drop_oldest(idle)
        self._idle.clear()

    def _sweep(self, now: float) -> None:
        """Once per keep-alive time, close what is too old, of servers long gone too.

        Each connection is closed once and each origin looked at once per keep-alive time, so the
        cost per request stays constant.
        """
        if now - self._swept_at < self._keep_alive_s:
            return
        self._swept_at = now
        for origin, idle in list(self._idle.items()):
            while idle and now - idle[0].idle_since >= self._keep_alive_s:
                self._drop_oldest(idle)
            if not idle:
                del self._idle[origin]

    def _drop_oldest(self, idle: deque[Connection]) -> None:
        idle.popleft().close()
        self._idle_count -= 1

    def _check(self) -> None:
        """Assert the invariants; for tests."""
        kept = [connection for idle in self._idle.values() for connection in idle]
        assert len(kept) == len(set(kept)) == self._idle_count
        assert not self._active.intersection(kept), "a connection both in use and idle"
        assert not any(connection.closed for connection in kept)
        for origin, idle in self._idle.items():
            ages = [connection.idle_since for connection in idle]
            assert ages == sorted(ages)
            assert len(idle) <= self._idle_per_origin
            assert all(connection.origin is origin for connection in idle)
