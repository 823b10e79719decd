"""Wait for a state of something outside this process, which nobody can wake us for."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

LOOK_EVERY_S = 0.02


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Return once ``holds()``.

    Args:
        holds: Asked again and again.
        what: The state, for the error.
        limit_s: Give up after that long.
    """
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s} s: {what}")
        time.sleep(LOOK_EVERY_S)


async def until(holds: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """``wait_until`` for a trio test: the looks run in a thread, for each asks a server."""
    await trio.to_thread.run_sync(wait_until, holds, what, limit_s)
