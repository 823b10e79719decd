"""Wait for a state of something outside this process, which nobody can wake us for."""

from __future__ import annotations

from collections.abc import Callable

import trio

LOOK_EVERY_S = 0.02


async def until(holds: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Return once ``holds()``; each look runs in a thread, for it asks a server.

    Args:
        holds: Asked again and again.
        what: The state, for the error.
        limit_s: Give up after that long.
    """
    with trio.move_on_after(limit_s):
        while not await trio.to_thread.run_sync(holds):  # noqa: ASYNC110 - nobody sets an event
            await trio.sleep(LOOK_EVERY_S)
        return
    raise AssertionError(f"{what} did not come true within {limit_s} s")
