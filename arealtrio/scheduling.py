"""Which server takes the next request. Policies decide and never wait: the pool waits for them.

A policy knows servers by address, their caps and what each has in flight, all of it exact because
it is counted at the choice. The names of AReaL's pull request 955 are importable as well.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Protocol, final

from ._core.heap import LeastRequestHeap
from .errors import ConfigError, UsageError

__all__ = [
    "DEFAULT_MAX_CONCURRENT_PER_SERVER",
    "LeastRequestPolicy",
    "LeastRequestPrioritySchedulePolicy",
    "RoundRobinPolicy",
    "RoundRobinSchedulePolicy",
    "SchedulePolicy",
    "Slot",
    "make_policy",
]

DEFAULT_MAX_CONCURRENT_PER_SERVER = 256
"""A server's cap where neither the user nor the server names one (AReaL's default). Choose what the
server runs at once, or a few above: a cap too low costs its whole shortfall, one too high next to
nothing."""

CAP_MAX = 2**20  # the heap's


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """One place in one server, held from ``acquire`` to ``release``.

    Args:
        server: The server's address.
        lease: The policy's own number for it.
    """

    server: str
    lease: int


class SchedulePolicy(Protocol):
    """Chooses servers. Every method is synchronous, and one that raises has changed nothing."""

    def set_cap(self, server: str, cap: int) -> None:
        """Take a server in, or change its cap.

        Args:
            server: Its address.
            cap: Requests it may have in flight, 0 … 2**20. 0 drains: it is not chosen any more, and
                what it has in flight is released as ever.

        Raises:
            ConfigError: If cap is out of range.
        """

    def remove(self, server: str) -> None:
        """Let a server go; its slots may still be released. UsageError if it is not there."""

    def acquire(self, *, exclude: Collection[str] = (), prefer: str | None = None) -> Slot | None:
        """Take a slot of the server chosen, or None where no server may take one now.

        Args:
            exclude: Addresses not to choose; unknown ones are ignored. Keep it small.
            prefer: Choose this server if it has a free slot and is not excluded (affinity never
                waits, and never is an error); otherwise choose as usual.
        """

    def acquire_on(self, server: str) -> Slot | None:
        """Take a slot of this server if it has a free one. UsageError if it is not there."""

    def release(self, slot: Slot) -> bool:
        """Give a slot back; say whether its server is still there.

        Raises:
            UsageError: If the slot was released before.
        """

    def outstanding(self, server: str) -> int:
        """Return how many slots of this server are held. UsageError if it is not there."""

    def cap(self, server: str) -> int:
        """Return this server's cap. UsageError if it is not there."""

    def servers(self) -> tuple[str, ...]:
        """Return the addresses of all servers, in the order they came."""

    def free(self) -> int:
        """Return how many slots are free over all servers."""


def _unknown(server: str) -> UsageError:
    return UsageError(f"server {server} is not in service here; add it with set_cap first")


def _released(slot: Slot) -> UsageError:
    return UsageError(
        f"slot {slot.lease} of server {slot.server} is not held: it was released before"
    )


@final
class LeastRequestPolicy:
    """Least outstanding ÷ cap, exactly; among equals the server unchanged for longest.

    Unequal caps share the load in proportion, and a slow server pulls less because it returns its
    slots later. No server ever has more in flight than its cap, save where a cap was lowered.
    """

    def __init__(self) -> None:
        self._heap = LeastRequestHeap()
        self._slots: dict[str, int] = {}  # address -> slot in the heap
        self._addresses: dict[int, str] = {}  # and back

    def set_cap(self, server: str, cap: int) -> None:
        """See SchedulePolicy."""
        slot = self._slots.get(server)
        try:
            if slot is None:
                self._enter(server, self._heap.add(cap))
            else:
                self._heap.set_cap(slot, cap)
        except (ValueError, OverflowError) as exc:
            raise ConfigError(f"server {server}: {exc}") from exc

    def _enter(self, server: str, slot: int) -> None:
        self._slots[server] = slot
        self._addresses[slot] = server

    def remove(self, server: str) -> None:
        """See SchedulePolicy."""
        slot = self._slot(server)
        self._heap.remove(slot)
        del self._slots[server], self._addresses[slot]

    def acquire(self, *, exclude: Collection[str] = (), prefer: str | None = None) -> Slot | None:
        """See SchedulePolicy. O(log servers), plus O(log servers) for each server passed over."""
        if prefer is not None and prefer in self._slots and prefer not in exclude:
            slot = self.acquire_on(prefer)
            if slot is not None:
                return slot
        if not exclude:
            return self._held(self._heap.acquire())
        return self._held(self._heap.acquire_excluding(self._known(exclude)))

    def acquire_on(self, server: str) -> Slot | None:
        """See SchedulePolicy."""
        return self._held(self._heap.acquire_on(self._slot(server)))

    def release(self, slot: Slot) -> bool:
        """See SchedulePolicy."""
        try:
            return self._heap.release(slot.lease) >= 0
        except ValueError as exc:
            raise _released(slot) from exc

    def outstanding(self, server: str) -> int:
        """See SchedulePolicy."""
        return self._heap.outstanding(self._slot(server))

    def cap(self, server: str) -> int:
        """See SchedulePolicy."""
        return self._heap.cap(self._slot(server))

    def servers(self) -> tuple[str, ...]:
        """See SchedulePolicy."""
        return tuple(self._slots)

    def free(self) -> int:
        """See SchedulePolicy."""
        return self._heap.free

    def _held(self, lease: int) -> Slot | None:
        return Slot(self._addresses[self._heap.slot_of(lease)], lease) if lease >= 0 else None

    def _known(self, servers: Collection[str]) -> list[int]:
        return [self._slots[server] for server in servers if server in self._slots]

    def _slot(self, server: str) -> int:
        try:
            return self._slots[server]
        except KeyError:
            raise _unknown(server) from None

    def __repr__(self) -> str:
        return f"<LeastRequestPolicy {self._heap!r}>"


@dataclass(slots=True)
class _Server:
    """One server in the rotation."""

    cap: int
    outstanding: int = 0

    @property
    def free(self) -> int:
        return max(self.cap - self.outstanding, 0)


@final
class RoundRobinPolicy:
    """Each server in its turn, in the order they came. A draining or excluded one is passed over.

    Prefer ``LeastRequestPolicy``: a rotation does not see load, so counts drift apart; and under
    caps it is worse, because a request waits for the full server whose turn it is while others have
    free slots.

    Args:
        no_block: True, AReaL's default, takes the server in turn whatever its load: caps are not
            enforced, only that 0 drains (so ``outstanding <= cap`` does not hold), and the rest
            queues inside the server. False waits for the turn's server to have a free slot.
    """

    def __init__(self, no_block: bool = True) -> None:
        self.no_block = no_block
        self._servers: dict[str, _Server] = {}
        self._order: list[str] = []
        self._turn = 0  # index into _order
        self._leases: dict[int, _Server] = {}  # slots held
        self._next_lease = 0

    def set_cap(self, server: str, cap: int) -> None:
        """See SchedulePolicy. A new server joins at the end of the rotation."""
        if not 0 <= cap <= CAP_MAX:
            raise ConfigError(
                f"server {server}: a server's cap must be in 0 … {CAP_MAX}, not {cap}"
            )
        if server in self._servers:
            self._servers[server].cap = cap
        else:
            self._servers[server] = _Server(cap)
            self._order.append(server)

    def remove(self, server: str) -> None:
        """See SchedulePolicy. The turn stays with the server that has it, or passes to the next."""
        self._server(server)
        place = self._order.index(server)
        del self._servers[server], self._order[place]
        if place < self._turn:
            self._turn -= 1
        if self._turn == len(self._order):
            self._turn = 0

    def acquire(self, *, exclude: Collection[str] = (), prefer: str | None = None) -> Slot | None:
        """See SchedulePolicy. A preferred server found free does not use up a turn."""
        if prefer is not None and prefer in self._servers and prefer not in exclude:
            slot = self.acquire_on(prefer)
            if slot is not None:
                return slot
        return self._take_turn(exclude)

    def _take_turn(self, exclude: Collection[str]) -> Slot | None:
        for place in range(self._turn, self._turn + len(self._order)):
            name = self._order[place % len(self._order)]
            server = self._servers[name]
            if server.cap == 0 or name in exclude:
                continue
            if not self.no_block and not server.free:
                return None
            self._turn = (place + 1) % len(self._order)
            return self._hold(name, server)
        return None

    def acquire_on(self, server: str) -> Slot | None:
        """See SchedulePolicy."""
        entry = self._server(server)
        return self._hold(server, entry) if entry.free else None

    def release(self, slot: Slot) -> bool:
        """See SchedulePolicy."""
        server = self._leases.pop(slot.lease, None)
        if server is None:
            raise _released(slot)
        server.outstanding -= 1
        return self._servers.get(slot.server) is server

    def outstanding(self, server: str) -> int:
        """See SchedulePolicy."""
        return self._server(server).outstanding

    def cap(self, server: str) -> int:
        """See SchedulePolicy."""
        return self._server(server).cap

    def servers(self) -> tuple[str, ...]:
        """See SchedulePolicy."""
        return tuple(self._order)

    def free(self) -> int:
        """See SchedulePolicy."""
        return sum(server.free for server in self._servers.values())

    def _hold(self, name: str, server: _Server) -> Slot:
        slot = Slot(name, self._next_lease)
        self._next_lease += 1
        self._leases[slot.lease] = server
        server.outstanding += 1
        return slot

    def _server(self, server: str) -> _Server:
        try:
            return self._servers[server]
        except KeyError:
            raise _unknown(server) from None

    def __repr__(self) -> str:
        return (
            f"<RoundRobinPolicy [Servers: {len(self._order)} | Slots: {len(self._leases)} held, "
            f"{self.free()} free | no_block: {self.no_block}]>"
        )


LeastRequestPrioritySchedulePolicy = LeastRequestPolicy
RoundRobinSchedulePolicy = RoundRobinPolicy

_POLICIES: dict[str, Callable[[], SchedulePolicy]] = {
    "least_request": LeastRequestPolicy,
    "round_robin": partial(RoundRobinPolicy, no_block=False),
}


def make_policy(name: str) -> SchedulePolicy:
    """Return a new, empty policy.

    Args:
        name: ``least_request``, or ``round_robin`` (strict turns under the caps, because a cap is a
            promise; AReaL's, which enforces none, is ``RoundRobinPolicy(no_block=True)``).

    Raises:
        ConfigError: If there is no policy of that name.
    """
    try:
        return _POLICIES[name]()
    except KeyError:
        raise ConfigError(
            f"schedule_policy must be one of {', '.join(_POLICIES)}, not {name!r}"
        ) from None
