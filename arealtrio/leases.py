"""LeaseQueue: slots on servers, and the one queue of requests that wait for one.

A request never waits inside a full server. It waits here, and a released slot goes directly to
the first waiter that may use it (Graham's list scheduling: no slot is idle while somebody could
use it).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import outcome
import trio

from .errors import RolloutClosed, UsageError
from .ordering import UNKNOWN_ORIGIN, Line, Origin
from .scheduling import SchedulePolicy, Slot


class HeldSlot:
    """A slot on a server, until it is given back: synchronously, once.

    Args:
        queue: Where it came from.
        slot: The policy's own handle.
        waited_s: Seconds that it was waited for.
    """

    __slots__ = ("_queue", "_slot", "address", "waited_s")

    def __init__(self, queue: LeaseQueue, slot: Slot, waited_s: float) -> None:
        self._queue = queue
        self._slot: Slot | None = slot
        self.address = slot.server
        self.waited_s = waited_s

    @property
    def released(self) -> bool:
        """Whether it was given back."""
        return self._slot is None

    def release(self) -> None:
        """Give the slot back.

        Raises:
            UsageError: If it was given back before; nothing is changed.
        """
        slot, self._slot = self._slot, None
        if slot is None:
            raise UsageError("this lease was released before")
        self._queue.release(slot)


Barred: TypeAlias = Callable[[frozenset[str], int], frozenset[str]]


@dataclass(slots=True, eq=False)
class Waiter:
    """A task parked in the queue, and which servers it can not use."""

    task: trio.lowlevel.Task
    exclude: frozenset[str]
    min_version: int


class LeaseQueue:
    """Slots under each server's cap, by a selection policy, and the queue in front of them.

    Invariants: a server's outstanding requests never exceed its cap (I4; ``round_robin`` with
    ``no_block`` excepted), and no slot is free that a waiter could use (I5). Every decision is a
    synchronous function, so no task sees it half made.

    Args:
        policy: Which server is next.
        barred: Given the servers a waiter excludes and the version it needs, the addresses it can
            not use at this moment. Asked anew at each decision, because servers come and go.
        line: In what order requests are served; None serves them as they come.
    """

    def __init__(
        self, policy: SchedulePolicy, barred: Barred, line: Line[Waiter] | None = None
    ) -> None:
        self.policy = policy
        self._barred = barred
        self._line = Line[Waiter]() if line is None else line
        self._closed = False

    def __len__(self) -> int:
        """Requests parked."""
        return len(self._line)

    def __iter__(self) -> Iterator[Waiter]:
        """The parked requests, the next one first."""
        return iter(self._line)

    async def acquire(
        self,
        exclude: frozenset[str],
        min_version: int,
        prefer: str | None,
        *,
        at_head: bool = False,
        origin: Origin = UNKNOWN_ORIGIN,
    ) -> HeldSlot:
        """Take a slot, waiting while none is free.

        Cancelling a waiter, at any moment, loses no slot: either it is taken out of the queue, or
        the slot was already handed over, is returned here, and released by the caller's ``with``.

        Args:
            exclude: Addresses not to use.
            min_version: Only servers with weights at least this new.
            prefer: Used if it has a free slot.
            at_head: Wait before all others: a generation that was interrupted goes on first.
            origin: What its place in the line depends on.

        Raises:
            RolloutClosed: If the queue was closed, before or during the wait.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise RolloutClosed("the server pool is closed")
        slot = self._take(exclude, min_version, prefer)
        if slot is not None:
            return HeldSlot(self, slot, 0.0)
        waiter = Waiter(trio.lowlevel.current_task(), exclude, min_version)
        if at_head:
            self._line.enter_at_head(waiter)
        else:
            self._line.enter(waiter, origin)
        began = trio.current_time()
        slot = await self._park(waiter)
        return HeldSlot(self, slot, trio.current_time() - began)

    def _take(self, exclude: frozenset[str], min_version: int, prefer: str | None) -> Slot | None:
        return self.policy.acquire(exclude=self._barred(exclude, min_version), prefer=prefer)

    async def _park(self, waiter: Waiter) -> Slot:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._line.leave(waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        slot: Slot = await trio.lowlevel.wait_task_rescheduled(abort)
        return slot

    def release(self, slot: Slot) -> None:
        """Take a slot back, and give it to the next waiter that may use it."""
        self.policy.release(slot)
        self.hand_over()

    def hand_over(self) -> None:
        """Give free slots to waiters, in the line's order, each to the first that may use it."""
        if not self._line:
            return
        for waiter in list(self._worth_asking()):
            slot = self._take(waiter.exclude, waiter.min_version, None)
            if slot is not None:
                self._line.leave(waiter)
                trio.lowlevel.reschedule(waiter.task, outcome.Value(slot))

    def _worth_asking(self) -> Generator[Waiter, None, None]:
        """The waiters that could take a slot: as many as are free, and the choosy among them."""
        free = self.policy.free()
        if free <= 0:
            return
        with closing(iter(self._line)) as line:
            for waiter in line:
                yield waiter
                if not self._barred(waiter.exclude, waiter.min_version):
                    free -= 1
                if free == 0:
                    return

    def learn(self, prompt: str | None, tokens: int) -> None:
        """An answer to a prompt has ended, with so many tokens; the line may change."""
        self._line.learn(prompt, tokens)

    def forgive(self, server: str) -> None:
        """Let every waiter use a server again that it excluded: what it did then is over."""
        for waiter in self._line:
            waiter.exclude -= {server}
        self.hand_over()

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Wake every waiter with an error of its own."""
        self.fail(lambda _: True, lambda _: error())

    def fail(self, which: Callable[[Waiter], bool], error: Callable[[Waiter], Exception]) -> None:
        """Wake some of the waiters with an error of its own each."""
        for waiter in [waiter for waiter in self._line if which(waiter)]:
            self._line.leave(waiter)
            trio.lowlevel.reschedule(waiter.task, outcome.Error(error(waiter)))

    def close(self) -> None:
        """Wake every waiter with RolloutClosed, and refuse new ones."""
        self._closed = True
        self.fail_all(lambda: RolloutClosed("the server pool was closed while this request waited"))
