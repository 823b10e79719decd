"""WaitList: wait for a condition on our own state without polling it, or losing what is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import outcome
import trio

from .errors import RolloutCrashed

T = TypeVar("T")


class WaitList:
    """Tasks that wait for something to become possible.

    Whoever changes the state calls ``notify``; each waiter's own function then decides and takes in
    one synchronous step. There are a handful of waiters, so looking at each is cheap.
    """

    def __init__(self) -> None:
        self._waiters: dict[trio.lowlevel.Task, Callable[[], Any]] = {}  # task -> its poll

    async def wait_until(self, poll: Callable[[], T | None]) -> T:
        """Return the first value of ``poll`` that is not None, asking it after every ``notify``.

        An exception of ``poll`` is raised here. The value is handed to the waiting task, so a
        cancellation finds either nothing taken, or the value delivered.

        Args:
            poll: Decides, and takes what it returns, without suspending.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        value = poll()
        if value is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return value
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiters[task]
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiters[task] = poll
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def notify(self) -> None:
        """Wake every waiter that can go on now."""
        for task, poll in tuple(self._waiters.items()):
            if task not in self._waiters:
                continue  # an earlier waiter's step ended this one's wait
            try:
                value = poll()
            except BaseException as exc:  # noqa: BLE001 - raised in the task that waits
                self._wake(task, outcome.Error(exc))
            else:
                if value is not None:
                    self._wake(task, outcome.Value(value))

    def _wake(self, task: trio.lowlevel.Task, found: outcome.Outcome[Any]) -> None:
        del self._waiters[task]
        trio.lowlevel.reschedule(task, found)

    def end(self, error: Callable[[], Exception]) -> None:
        """Wake every waiter with an error of its own."""
        while self._waiters:
            task, _ = self._waiters.popitem()
            trio.lowlevel.reschedule(task, outcome.Error(error()))


@asynccontextmanager
async def background(
    function: Callable[..., Awaitable[object]], *args: object
) -> AsyncIterator[trio.Nursery]:
    """Run ``function(*args)`` beside the block, and end it with the block.

    An exception of the block leaves as itself; out of a nursery it would come wrapped in a group.

    Args:
        function: Runs until cancelled; if it raises, that is a bug of ours.
        args: For it.

    Yields:
        The nursery it runs in, for more of its kind.

    Raises:
        RolloutCrashed: If what runs beside the block broke; the cause is attached.
    """
    left_with: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function, *args)
            try:
                yield nursery
            except BaseException as exc:  # noqa: BLE001 - raised again below, unwrapped
                left_with = exc
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise crash_of(group, left_with) from group
    if left_with is not None:
        raise left_with


def crash_of(
    group: BaseExceptionGroup[BaseException], left_with: BaseException | None = None
) -> BaseException:
    """What a caller gets where a nursery died: an ordinary error, but Ctrl-C as itself.

    Where the nursery was only cancelled from outside, that is the group itself.

    Args:
        group: What the nursery died of, and the cause of what is returned.
        left_with: What the block beside it raised before; it becomes the group's ``__context__``,
            so that a traceback shows both.
    """
    if left_with is not None:
        group.__context__ = left_with
        group.__suppress_context__ = False
    _, ours = group.split(trio.Cancelled)
    if ours is None:
        return group
    if ours.subgroup(KeyboardInterrupt):
        return KeyboardInterrupt()
    return RolloutCrashed(f"the rollout side died: {ours.exceptions[0]!r}")


class BriefWaits:
    """Waits for servers that may never answer, each bounded, and all of them less at the end.

    What is waited for is no more than a confirmation: the request was sent, and its connection
    closes. So a server that hangs must not hold up what closes, least of all Ctrl-C.

    Args:
        limit_s: Of each.
    """

    CLOSING_S = 0.5

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def bounded(self, *, shield: bool = False) -> Iterator[None]:
        """Leave the block when the time has passed.

        Args:
            shield: Whether it goes on under cancellation until then.
        """
        with trio.move_on_after(self.limit_s, shield=shield) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def hurry(self) -> None:
        """Everything closes: from now on wait for ``CLOSING_S`` at most, those who wait too."""
        self.limit_s = min(self.limit_s, self.CLOSING_S)
        soon = trio.current_time() + self.limit_s
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, soon)


@contextmanager
def time_limit(timeout_s: float | None, words: Callable[[], str]) -> Iterator[None]:
    """Raise TimeoutError, with ``words()`` of how far it came, when ``timeout_s`` passes.

    Args:
        timeout_s: Seconds; None is no limit of its own.
        words: Called when the time has passed.
    """
    if timeout_s is None:
        yield
        return
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"after timeout_s={timeout_s:g}: {words()}")
