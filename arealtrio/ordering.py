"""In what order waiting requests get the slots that come free. Lines decide and never wait.

A line holds whatever waits: the pool puts tasks into it. The order is one of three policies. Under
all of them a request that was interrupted goes before those that never ran, and under the two that
let one overtake another a bound keeps everybody moving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Generator, Hashable
from contextlib import closing
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from .errors import ConfigError
from .lengths import PROMPTS_MAX, LengthEstimator

T = TypeVar("T", bound=Hashable)
_Entry: TypeAlias = tuple[float, int, T]  # rank, how many came before, request
_VOID_MAX: Final = 64  # void entries in a heap, beyond as many as there are others


class Origin(NamedTuple):
    """Where a request comes from, as far as the order of the line depends on it.

    Args:
        prompt: A key of its prompt: the same for all rollouts of that prompt, in every epoch.
            None where it is not known.
        version: The weight version of its rollout's permit. The oldest must be consumed first.
    """

    prompt: str | None = None
    version: int = 0


UNKNOWN_ORIGIN: Final = Origin()


class Line(Generic[T]):
    """First come, first served; but what is put at the head goes first.

    Iterating gives the requests in the order in which they are to be served, the next one first.
    Entering, leaving and looking at the next are O(1).
    """

    def __init__(self) -> None:
        # OrderedDicts, because taking the first entry of a plain dict costs O(entries removed so
        # far).
        self._head: OrderedDict[T, None] = OrderedDict()
        self._queue: OrderedDict[T, int] = OrderedDict()  # -> how many came before; oldest first
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._head) + len(self._queue)

    def __iter__(self) -> Generator[T, None, None]:
        yield from self._head
        yield from self._queue

    def enter(self, request: T, origin: Origin) -> None:  # noqa: ARG002 - for the other orders
        """Join the line.

        Args:
            request: Not in the line.
            origin: What its place depends on.
        """
        self._queue[request] = self._arrived
        self._arrived += 1

    def enter_at_head(self, request: T) -> None:
        """Join before all others."""
        self._head[request] = None
        self._head.move_to_end(request, last=False)

    def leave(self, request: T) -> None:
        """Leave the line: served, or given up."""
        if request in self._head:
            del self._head[request]
        else:
            del self._queue[request]

    def learn(self, prompt: str | None, tokens: int) -> None:
        """An answer to a prompt has ended, with so many tokens."""


class RankedLine(Line[T], ABC):
    """Least rank first, and first come first served among equals; but nobody is overtaken for ever.

    The request that has waited longest goes next once ``overtakes_max`` younger ones have left the
    line before it. Entering and leaving are O(log n), looking at the next is too.

    Args:
        overtakes_max: That limit.
    """

    def __init__(self, overtakes_max: int) -> None:
        super().__init__()
        self._overtakes_max = overtakes_max
        self._left = 0  # of those that ever were in the queue
        self._entries: dict[T, _Entry[T]] = {}
        # An entry is void once it is not its request's any more: taking it out of the middle of a
        # heap would cost O(n).
        self._heap: list[_Entry[T]] = []

    def enter(self, request: T, origin: Origin) -> None:
        """See ``Line.enter``."""
        super().enter(request, origin)
        self._set_rank(request, self._rank(request, origin))

    @abstractmethod
    def _rank(self, request: T, origin: Origin) -> float:
        """The rank of a request that enters."""

    def _set_rank(self, request: T, rank: float) -> None:
        entry = self._entries[request] = (rank, self._queue[request], request)
        heappush(self._heap, entry)

    def leave(self, request: T) -> None:
        """See ``Line.leave``."""
        if request not in self._head:
            self._left += 1
            self._entries.pop(request, None)
        super().leave(request)
        self._drop_void()

    def _drop_void(self) -> None:
        while self._heap and self._is_void(self._heap[0]):
            heappop(self._heap)
        if len(self._heap) > 2 * len(self._entries) + _VOID_MAX:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def _is_void(self, entry: _Entry[T]) -> bool:
        return self._entries.get(entry[2]) is not entry

    def __iter__(self) -> Generator[T, None, None]:
        yield from self._head
        served: set[T] = set()
        with closing(self._by_rank()) as ranked:
            while len(served) < len(self._queue):
                request = self._overdue(served)
                if request is None:
                    request = next(other for other in ranked if other not in served)
                served.add(request)
                yield request

    def _overdue(self, served: set[T]) -> T | None:
        """The oldest request, if it was overtaken often enough; those ``served`` have left."""
        for request, before in self._queue.items():
            # All older ones have left, so what left beyond their number was younger.
            if self._left + len(served) - before < self._overtakes_max:
                return None
            if request not in served:
                return request
        return None

    def _by_rank(self) -> Generator[T, None, None]:
        """The requests in the order of their ranks; to be closed before the line changes."""
        with closing(self._pop_entries()) as entries:
            for entry in entries:
                yield entry[2]

    def _pop_entries(self) -> Generator[_Entry[T], None, None]:
        """The entries, least first. Closing it puts them back."""
        taken = []
        try:
            while self._heap:
                entry = heappop(self._heap)
                if not self._is_void(entry):
                    taken.append(entry)
                    yield entry
        finally:
            for entry in taken:
                heappush(self._heap, entry)


class DeadlineLine(RankedLine[T]):
    """The oldest admissible version first: what must be consumed soonest is served soonest."""

    def _rank(self, request: T, origin: Origin) -> float:  # noqa: ARG002
        return origin.version


class LongestExpectedLine(RankedLine[T]):
    """The longest expected answer first, so that no long one is left for the end.

    With exact lengths this is the LPT rule (Graham 1969): at most 4/3 of the best makespan, where
    any order may take 2. What is expected is the mean of the answers to the same prompt, be they of
    an earlier epoch or of finished siblings. The first request of a prompt that nothing is known of
    goes first of all: it is the one to learn from, and siblings that start together teach nothing.
    The others of that prompt count as the running median, until an answer to it has ended.

    Args:
        overtakes_max: As in ``RankedLine``.
        estimator: What is known of lengths.
    """

    def __init__(self, overtakes_max: int, estimator: LengthEstimator) -> None:
        super().__init__(overtakes_max)
        self._estimator = estimator
        self._waiting: dict[str, dict[T, None]] = {}  # prompt -> its requests in the queue
        self._prompts: dict[T, str] = {}  # and back
        self._unknown: OrderedDict[T, None] = OrderedDict()  # they count as the median
        # Prompts of which one request went ahead and none has ended; the oldest is forgotten first.
        self._explored: OrderedDict[str, None] = OrderedDict()

    def enter(self, request: T, origin: Origin) -> None:
        """See ``Line.enter``."""
        if origin.prompt is not None:
            self._waiting.setdefault(origin.prompt, {})[request] = None
            self._prompts[request] = origin.prompt
        super().enter(request, origin)

    def leave(self, request: T) -> None:
        """See ``Line.leave``."""
        self._unknown.pop(request, None)
        prompt = self._prompts.pop(request, None)
        if prompt is not None:
            siblings = self._waiting[prompt]
            del siblings[request]
            if not siblings:
                del self._waiting[prompt]
        super().leave(request)

    def learn(self, prompt: str | None, tokens: int) -> None:
        """See ``Line.learn``. The requests of that prompt change their places."""
        self._estimator.learn(prompt, tokens)
        expected = self._estimator.expected(prompt)
        if prompt is None or expected is None:
            return
        self._explored.pop(prompt, None)
        for request in self._waiting.get(prompt, ()):
            self._unknown.pop(request, None)
            self._set_rank(request, -expected)
        self._drop_void()

    def _set_rank(self, request: T, rank: float) -> None:
        if rank == _AS_MEDIAN:
            self._unknown[request] = None
        else:
            super()._set_rank(request, rank)

    def _rank(self, request: T, origin: Origin) -> float:  # noqa: ARG002
        expected = self._estimator.expected(origin.prompt)
        if expected is not None:
            return -expected
        if origin.prompt is None or origin.prompt in self._explored:
            return _AS_MEDIAN
        self._explore(origin.prompt)
        return -inf

    def _explore(self, prompt: str) -> None:
        self._explored[prompt] = None
        if len(self._explored) > PROMPTS_MAX:
            self._explored.popitem(last=False)

    def _by_rank(self) -> Generator[T, None, None]:
        """The ranked and the unknown, merged: the median moves with every answer."""
        unknown = iter(self._unknown)
        request = next(unknown, None)
        median = -self._estimator.median
        with closing(self._pop_entries()) as entries:
            for rank, before, known in entries:
                while request is not None and (median, self._queue[request]) < (rank, before):
                    yield request
                    request = next(unknown, None)
                yield known
        while request is not None:
            yield request
            request = next(unknown, None)


_AS_MEDIAN: Final = inf  # stands for a rank that is not known yet


def make_line(name: str, overtakes_max: int) -> Line[T]:
    """Return an empty line.

    Args:
        name: ``fifo``, ``deadline`` or ``longest_expected``.
        overtakes_max: For the last two: as in ``RankedLine``.

    Raises:
        ConfigError: If there is no order of that name.
    """
    if name == "fifo":
        return Line()
    if name == "deadline":
        return DeadlineLine(overtakes_max)
    if name == "longest_expected":
        return LongestExpectedLine(overtakes_max, LengthEstimator())
    raise ConfigError(f"queue_order must be one of fifo, deadline, longest_expected, not {name!r}")
