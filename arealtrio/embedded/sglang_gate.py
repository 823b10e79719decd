"""Where requests wait before SGLang's scheduler sees them: while paused, and around weight loads.

SGLang's front end holds new requests back while generation is paused, and a load of weights outside
a pause waits for those that went through before, and holds back those that come after. Requests at
the gate are in no queue that its metrics count, and an abort does not find them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio


class Gate:
    """Many go through at a time while it is open; a load of weights goes through alone."""

    def __init__(self) -> None:
        self.paused = False
        self.waiting = 0  # requests held back
        self._inside = 0
        self._loads = 0  # that wait for their turn or have it
        self._loading = False
        self._changed: trio.Event | None = None  # of those who wait for a change

    def pause(self) -> None:
        """Hold new requests back."""
        self.paused = True
        self._notify()

    def resume(self) -> None:
        """Let them through."""
        self.paused = False
        self._notify()

    def try_to_enter(self) -> bool:
        """Go through if it is open, and be inside until ``leave``; whether it was."""
        is_open = not self.paused and not self._loads
        self._inside += is_open
        return is_open

    async def enter(self) -> None:
        """Go through when it is open, and be inside until ``leave``."""
        self.waiting += 1
        try:
            await self.until(lambda: not self.paused and not self._loads)
        finally:
            self.waiting -= 1
        self._inside += 1

    def leave(self) -> None:
        """A request has been answered, or its client has left."""
        self._inside -= 1
        self._notify()

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Go through alone: at once if paused, else when nothing is inside any more.

        Requests that come meanwhile wait until the block ends.
        """
        if self.paused:
            yield
            return
        self._loads += 1
        try:
            await self.until(lambda: not self._inside and not self._loading)
            self._loading = True
            yield
        finally:
            self._loads -= 1
            self._loading = False
            self._notify()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a state of the gate."""
        while not holds():
            if self._changed is None:
                self._changed = trio.Event()
            await self._changed.wait()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
