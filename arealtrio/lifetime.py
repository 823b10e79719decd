"""OncePerRun: something opened by whoever needs it first, and closed with the trio run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import trio

from .errors import RolloutClosed

T = TypeVar("T")

logger = logging.getLogger(__name__)

CLOSE_LIMIT_S = 60.0
"""How long ``OncePerRun.aclose`` waits at most.

What is opened ends its processes, or its loop, within seconds; what does not must not hold up
whoever closes it, least of all under cancellation.
"""


class _Opening(Generic[T]):
    """One opening, in one trio run."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.settled = trio.Event()  # opened, or failed to
        self.closed = trio.Event()
        self.value: T | None = None
        self.error: Exception | None = None


class OncePerRun(Generic[T]):
    """A resource that lives in the trio run that uses it, and never outlives it.

    A workflow is made before there is a run, often in a trainer's thread, and may be used in one
    run after another; what it needs inside a run (processes, an event loop) can not be opened with
    it. So it is opened at its first use, in a system task, which trio ends with the run. ``aclose``
    ends it before. Each run has its own.

    Args:
        name: For the task and the log.
        open_: Returns the context manager that is the resource. Entered and left in one task.
    """

    def __init__(self, name: str, open_: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._name = name
        self._open = open_
        self._opening: trio.lowlevel.RunVar[_Opening[T] | None] = trio.lowlevel.RunVar(name, None)

    def start(self) -> None:
        """Begin to open it, unless that was begun; return at once."""
        self._started()

    async def get(self) -> T:
        """Return it, opened.

        Raises:
            Exception: What opening it raised. The next call tries again.
            RolloutClosed: If it was closed meanwhile.
        """
        opening = self._started()
        await opening.settled.wait()
        if opening.error is not None:
            raise opening.error
        if opening.value is None:
            raise RolloutClosed(f"the {self._name} was closed while it was opened")
        return opening.value

    async def aclose(self) -> None:
        """Close it, and return when it is closed, also under cancellation. Harmless twice.

        After ``CLOSE_LIMIT_S`` it is left to the end of the run, with a warning.
        """
        opening = self._opening.get()
        if opening is None:
            return
        opening.scope.cancel()
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_LIMIT_S, shield=True):
            await opening.closed.wait()
            return
        logger.warning("%s has not closed within %g s; left behind", self._name, CLOSE_LIMIT_S)

    def _started(self) -> _Opening[T]:
        opening = self._opening.get()
        if opening is None:
            opening = _Opening()
            self._opening.set(opening)
            trio.lowlevel.spawn_system_task(self._hold, opening, name=self._name)
        return opening

    async def _hold(self, opening: _Opening[T]) -> None:
        try:
            with opening.scope:
                async with self._open() as opening.value:
                    opening.settled.set()
                    await trio.sleep_forever()
        except Exception as exc:  # what leaves a system task would end the entire run
            opening.error = exc
            if opening.settled.is_set():
                logger.exception("%s did not close cleanly", self._name)
        finally:
            if self._opening.get() is opening:
                self._opening.set(None)
            opening.settled.set()
            opening.closed.set()
