"""Where a ledger's blocking calls run: in a thread, or at once where there may be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Writer(Protocol):
    """Calls functions one after the other."""

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what ``function`` returns. It is not interrupted by a cancellation."""


class ThreadWriter:
    """Calls each in a thread: the event loop never waits for a disk."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)  # SQLite's connection is for one at a time

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """See ``Writer.run``."""
        return await trio.to_thread.run_sync(
            function, *args, limiter=self._limiter, thread_name="arealtrio ledger"
        )


class InlineWriter:
    """Calls each at once. For a simulated run, whose clock would jump while a thread works."""

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """See ``Writer.run``."""
        await trio.lowlevel.checkpoint()
        return function(*args)
