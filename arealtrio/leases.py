"""LeaseQueue: slots on servers, and the one queue of requests that wait for one.

A request never waits inside a full server. It waits here, and a released slot goes directly to
the first waiter that may use it (Graham's list scheduling: no slot is idle while somebody could
use it).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import outcome
import trio

from .errors import RolloutClosed, UsageError
from .scheduling import SchedulePolicy, Slot


class HeldSlot:
    """A slot on a server, until it is given back: synchronously, once.

    Args:
        queue: Where it came from.
        slot: The policy's own handle.
    """

    __slots__ = ("_queue", "_slot", "address")

    def __init__(self, queue: LeaseQueue, slot: Slot) -> None:
        self._queue = queue
        self._slot: Slot | None = slot
        self.address = slot.server

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


@dataclass(frozen=True, slots=True, eq=False)
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
    """

    def __init__(self, policy: SchedulePolicy, barred: Barred) -> None:
        self.policy = policy
        self._barred = barred
        # Parked requests, oldest first. An OrderedDict, because taking the first entry of a plain
        # dict costs O(entries removed so far).
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        """Requests parked."""
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """The parked requests, the next one first."""
        return iter(self._waiters)

    async def acquire(
        self,
        exclude: frozenset[str],
        min_version: int,
        prefer: str | None,
        *,
        at_head: bool = False,
    ) -> HeldSlot:
        """Take a slot, waiting while none is free.

        Cancelling a waiter, at any moment, loses no slot: either it is taken out of the queue, or
        the slot was already handed over, is returned here, and released by the caller's ``with``.

        Args:
            exclude: Addresses not to use.
            min_version: Only servers with weights at least this new.
            prefer: Used if it has a free slot.
            at_head: Wait before all others: a generation that was interrupted goes on first.

        Raises:
            RolloutClosed: If the queue was closed, before or during the wait.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise RolloutClosed("the server pool is closed")
        slot = self._take(exclude, min_version, prefer)
        if slot is None:
            waiter = Waiter(trio.lowlevel.current_task(), exclude, min_version)
            slot = await self._park(waiter, at_head)
        return HeldSlot(self, slot)

    def _take(self, exclude: frozenset[str], min_version: int, prefer: str | None) -> Slot | None:
        return self.policy.acquire(exclude=self._barred(exclude, min_version), prefer=prefer)

    async def _park(self, waiter: Waiter, at_head: bool) -> Slot:
        self._waiters[waiter] = None
        if at_head:
            self._waiters.move_to_end(waiter, last=False)

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiters[waiter]
            return trio.lowlevel.Abort.SUCCEEDED

        slot: Slot = await trio.lowlevel.wait_task_rescheduled(abort)
        return slot

    def release(self, slot: Slot) -> None:
        """Take a slot back, and give it to the next waiter that may use it."""
        self.policy.release(slot)
        self.hand_over()

    def hand_over(self) -> None:
        """Give free slots to waiters, oldest first, each to the first that may use it."""
        if not self._waiters:
            return
        for waiter in list(self._worth_asking()):
            slot = self._take(waiter.exclude, waiter.min_version, None)
            if slot is not None:
                del self._waiters[waiter]
                trio.lowlevel.reschedule(waiter.task, outcome.Value(slot))

    def _worth_asking(self) -> Iterator[Waiter]:
        """The waiters that could take a slot: as many as are free, and the choosy among them."""
        free = self.policy.free()
        for waiter in self._waiters:
            if free <= 0:
                return
            yield waiter
            if not self._barred(waiter.exclude, waiter.min_version):
                free -= 1

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Wake every waiter with an error of its own."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            trio.lowlevel.reschedule(waiter.task, outcome.Error(error()))

    def close(self) -> None:
        """Wake every waiter with RolloutClosed, and refuse new ones."""
        self._closed = True
        self.fail_all(lambda: RolloutClosed("the server pool was closed while this request waited"))
