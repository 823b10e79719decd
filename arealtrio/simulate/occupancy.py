"""Occupancy: how many slots generate, added up over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from ..testing import SimulatedServer


class Occupancy:
    """Slot-seconds in which servers generated, by kind. Servers that stand still count as idle.

    Args:
        servers: All servers, before the first request. It takes over their ``on_change``.
        kinds: The index of each one's kind.
        on_change: Called whenever a request began or ended on a server.
    """

    def __init__(
        self,
        servers: Iterable[SimulatedServer],
        kinds: Sequence[int],
        on_change: Callable[[], None],
    ) -> None:
        self._on_change = on_change
        self._busy = [0] * (max(kinds) + 1)
        self._seconds = [0.0] * len(self._busy)
        self._since = trio.current_time()
        self._standing = False
        # The server's kind, and its generations when last looked at.
        self._seen: dict[SimulatedServer, tuple[int, int]] = {}
        for server, kind in zip(servers, kinds, strict=True):
            self._seen[server] = (kind, 0)
            server.on_change = self._changed

    def _changed(self, server: SimulatedServer) -> None:
        self._add_up()
        kind, before = self._seen[server]
        self._busy[kind] += server.generations - before
        self._seen[server] = (kind, server.generations)
        self._on_change()

    def _add_up(self) -> None:
        now = trio.current_time()
        elapsed = now - self._since
        if elapsed and not self._standing:
            self._seconds = [
                s + busy * elapsed for s, busy in zip(self._seconds, self._busy, strict=True)
            ]
        self._since = now

    def slot_seconds(self) -> tuple[float, ...]:
        """Of each kind, until now."""
        self._add_up()
        return tuple(self._seconds)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Whatever has a slot meanwhile does not generate."""
        self._add_up()
        self._standing = True
        try:
            yield
        finally:
            self._add_up()
            self._standing = False
