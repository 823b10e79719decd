"""In what order settled groups leave for the trainer; this is what makes staleness a guarantee.

AReaL's capacity formula bounds how many rollouts are admitted, not how old the consumed ones are:
with long-tailed lengths the young overtake the old. Under ``wait`` a group leaves only once every
lower-numbered permit has settled. Why that suffices: at its grant in version a, a permit ranks at
most (max_staleness + a + 1)·B among the accepted and the running; rejections only lower ranks; each
release removes the B lowest; so it leaves by version a + max_staleness.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class _Numbered(Protocol):
    """A Group or a RolloutResult."""

    @property
    def number(self) -> int | None: ...

    @property
    def task_id(self) -> str: ...


T = TypeVar("T", bound=_Numbered)
_by_number = attrgetter("number")


class PermitOrder:
    """Which permits have settled, and below which number all have.

    Args:
        in_order: False lets everything pass as soon as it is there (``keep``).
    """

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._granted: deque[int] = deque()  # not settled, or above one that is not; ascending
        self._settled: set[int] = set()  # settled, but above one that is not

    @property
    def frontier(self) -> float:
        """Every permit below this number has settled."""
        return self._granted[0] if self._in_order and self._granted else inf

    @property
    def unsettled(self) -> int:
        """Permits granted and not settled."""
        return len(self._granted) - len(self._settled)

    def granted(self, number: int) -> None:
        """A permit was granted; numbers only grow."""
        assert not self._granted or number > self._granted[-1], (number, self._granted[-1])
        self._granted.append(number)

    def settled(self, number: int) -> None:
        """A permit was settled, whatever its outcome."""
        granted = self._granted
        assert granted, number
        assert number not in self._settled, number
        if granted[0] != number:
            self._settled.add(number)
            return
        granted.popleft()
        while self._settled and granted[0] in self._settled:
            self._settled.remove(granted.popleft())


class DeliveryQueue(Generic[T]):
    """What has settled and waits for its consumer, lowest permit first.

    Args:
        order: Shared by all queues of one executor: what may leave depends on every permit.
    """

    def __init__(self, order: PermitOrder) -> None:
        self._order = order
        self._entries: list[T] = []  # ascending by number

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    @property
    def ready(self) -> int:
        """Entries that may leave now."""
        frontier = self._order.frontier
        if frontier == inf:
            return len(self._entries)
        return bisect_left(self._entries, frontier, key=_by_number)

    def has_ready(self, count: int) -> bool:
        """Whether at least ``count`` entries, of which there is one or more, may leave now."""
        entries = self._entries
        return len(entries) >= count and _by_number(entries[count - 1]) < self._order.frontier

    def put(self, entry: T) -> None:
        """Add an entry that settled, or give back one that was not delivered."""
        entries = self._entries
        if entries and _by_number(entry) < _by_number(entries[-1]):
            insort(entries, entry, key=_by_number)
        else:  # most settle nearly in order
            entries.append(entry)

    def take(self, count: int) -> list[T]:
        """Remove the ``count`` lowest-numbered entries; never more than are ready."""
        assert count <= self.ready, (count, self.ready)
        taken, self._entries = self._entries[:count], self._entries[count:]
        return taken

    def take_where(self, which: Callable[[T], bool]) -> list[T]:
        """Remove those entries, among the ones that may leave now, for which ``which`` holds."""
        ready = self._entries[: self.ready]
        taken = [entry for entry in ready if which(entry)]
        if taken:
            kept = [entry for entry in ready if not which(entry)]
            self._entries[: len(ready)] = kept
        return taken

    def remove_where(self, which: Callable[[T], bool]) -> None:
        """Remove those entries, of all, for which ``which`` holds."""
        self._entries = [entry for entry in self._entries if not which(entry)]

    def pop_task(self, task_id: str) -> T:
        """Remove the entry of one task, wherever it is in the order."""
        index = next(i for i, entry in enumerate(self._entries) if entry.task_id == task_id)
        return self._entries.pop(index)
