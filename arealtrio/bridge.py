"""From asyncio code that runs inside an ``AsyncioWorkflow`` back to trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar, TypeVarTuple

import trio

from .errors import UsageError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Bridge:
    """Runs trio functions for the asyncio side of one rollout, in that rollout's own nursery.

    So they are within its cancel scope and its deadline, and none outlives it: an asyncio task that
    a workflow forgets (``asyncio.gather`` leaves siblings behind) holds no server.

    Args:
        loop: The asyncio loop; it runs in the same thread.
        nursery: The rollout's.
    """

    def __init__(self, loop: Any, nursery: trio.Nursery) -> None:
        self._loop = loop
        self._nursery = nursery
        self._context = copy_context()  # trio's side of the rollout

    async def episode(self, run: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """On the asyncio side: run the rollout's code, so that ``in_trio`` finds this bridge."""
        _bridge.set(self)
        return await run(*args)

    async def call(self, run: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """On the asyncio side: await a trio function.

        Cancelling the asyncio task cancels it; an exception arrives as itself.

        Raises:
            UsageError: If the rollout has ended.
        """
        if self._nursery.cancel_scope.cancel_called:
            raise UsageError("the rollout of this asyncio task has ended; nothing was started")
        future = self._loop.create_future()
        scope = trio.CancelScope()
        # In a fresh copy of trio's context: in asyncio's, trio code would find an asyncio loop.
        self._context.copy().run(self._nursery.start_soon, self._answer, future, scope, run, args)
        try:
            return await future  # type: ignore[no-any-return]
        finally:
            scope.cancel()

    async def _answer(
        self,
        future: Any,
        scope: trio.CancelScope,
        run: Callable[..., Awaitable[object]],
        args: tuple[object, ...],
    ) -> None:
        try:
            with scope:
                value = await run(*args)
                if not future.done():
                    future.set_result(value)
        except Exception as exc:  # noqa: BLE001 - it belongs to the other side, which waits for it
            if not future.done():
                future.set_exception(exc)
        finally:
            if not future.done() and not self._loop.is_closed():
                future.cancel()


_bridge: ContextVar[Bridge | None] = ContextVar("arealtrio_bridge", default=None)


async def in_trio(run: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Await a trio function, from trio or from the asyncio code of an ``AsyncioWorkflow``.

    Cancellation passes through either way.
    """
    bridge = _bridge.get()
    return await (run(*args) if bridge is None else bridge.call(run, *args))
