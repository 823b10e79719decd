"""Fleet: which servers there are, the state of each, and the slots that follow from it."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from .checks import integer
from .config import normalise_address
from .errors import NoServerAvailable, UsageError
from .leases import LeaseQueue
from .scheduling import CAP_MAX
from .server import IN_SERVICE, LEAVING, Server, ServerState, ServerStatistics
from .wire.dialect import ServerInfo


class Fleet:
    """The servers of a pool: who comes and goes, who is in service, and with how many slots.

    Every change of a server's state or caps comes through here, so the slots that the policy hands
    out, and the tasks that wait for a change, always agree with it.

    Args:
        addresses: The servers it begins with, not yet heard from.
        leases: The queue in front of them; what a change frees is handed over at once.

    Attributes:
        by_address: All servers, in the order they came.
        service_changed: Set, and replaced by a new one, when the state of any server is set.
    """

    def __init__(self, addresses: Iterable[str], leases: LeaseQueue) -> None:
        self.by_address = {address: Server(address) for address in addresses}
        self.service_changed = trio.Event()
        self._leases = leases
        self._policy = leases.policy
        self._smallest: dict[str, int | None] = {}  # forgotten when a server comes, goes or speaks

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order they came."""
        return tuple(self.by_address.values())

    @property
    def in_service(self) -> tuple[Server, ...]:
        """Servers that take requests, or will at the end of a pause."""
        return tuple(s for s in self.by_address.values() if s.state in IN_SERVICE)

    def outstanding(self, server: Server) -> int:
        """Requests in flight on a server."""
        return self._policy.outstanding(server.address)

    def is_known(self, server: Server) -> bool:
        """Whether the policy knows a server: not before it has a cap, nor once it is gone."""
        return server.address in self._policy.servers()

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """A snapshot of every server."""
        return tuple(
            ServerStatistics(
                address=server.address,
                state=server.state.value,
                version=server.version,
                cap=server.cap,
                outstanding=self.outstanding(server) if self.is_known(server) else 0,
                requests=server.requests,
                reason=server.reason,
                ejections=server.ejections,
                failovers=server.failovers,
                tokens_kept=server.tokens_kept,
                allowed=server.allowed,
            )
            for server in self.servers
        )

    def smallest(self, attribute: str) -> int | None:
        """The least of a limit that servers report (``max_model_len``, ``vocab_size``), if any."""
        if attribute not in self._smallest:
            values = [getattr(server.info, attribute) for server in self.by_address.values()]
            known = [value for value in values if value is not None]
            self._smallest[attribute] = min(known, default=None)
        return self._smallest[attribute]

    def learned(self, server: Server, info: ServerInfo) -> None:
        """Note what a server said about itself."""
        server.info = info
        self._smallest.clear()

    def add(self, address: str, cap: int | None = None) -> Server:
        """Add a server; it takes requests once it is healthy and has the current weights.

        Args:
            address: Its base URL.
            cap: Requests in flight at most; None asks the server.

        Raises:
            UsageError: If it is there already.
            ConfigError: If the address is none, or the cap is no integer in 1 … 2**20.
        """
        address = normalise_address(address)
        if address in self.by_address:
            raise UsageError(f"{address} is in the pool, {self.by_address[address].state.value}")
        if cap is not None:
            cap = integer("a server's cap", cap, 1, CAP_MAX)
        server = Server(address)
        server.cap, server.cap_known = cap or 0, cap is not None
        server.ungrouped = True
        self.by_address[address] = server
        self._smallest.clear()
        self.set_state(server, ServerState.JOINING, "added")
        return server

    def remove(self, address: str) -> None:
        """Take a server out: it gets no further request, finishes what it has, and is gone.

        Raises:
            UsageError: If it is not there.
        """
        server = self.named(address)
        self.set_state(server, ServerState.DRAINING, "removed")
        self.drained(server)

    def drained(self, server: Server) -> None:
        """Forget a server that was to be removed, once nothing is in flight on it."""
        if server.emptied is not None and not self.outstanding(server):
            server.emptied.set()
            server.emptied = None
        if server.state is not ServerState.DRAINING:
            return
        if self.is_known(server):
            if self.outstanding(server):
                return
            self._policy.remove(server.address)
        del self.by_address[server.address]
        self._smallest.clear()
        self.set_state(server, ServerState.GONE, server.reason)

    def set_cap(self, address: str, cap: int) -> None:
        """Change how many requests a server may have; 0 drains it without removing it.

        Raises:
            UsageError: If it is not there, or the cap is negative.
        """
        server = self.named(address)
        if isinstance(cap, bool) or not isinstance(cap, int) or not 0 <= cap <= CAP_MAX:
            raise UsageError(f"a cap is an integer in 0 … {CAP_MAX}, not {cap!r}")
        server.cap, server.cap_known = cap, True
        if server.trial_cap is not None and server.trial_cap >= cap:
            server.trial_cap = None
        self._apply_cap(server)

    def relieve(self, server: Server, cap: int | None) -> None:
        """Hold a server below its cap while it is short of cache; None lets it have its cap.

        Its state is the same, so whoever waits for that is not woken: health checks go on.
        """
        server.pressure_cap = cap
        self._apply_cap(server)

    def serves(self, address: str) -> bool:
        """Whether the server of an address is there, and takes requests or will in a moment."""
        server = self.by_address.get(address)
        return server is not None and server.state in IN_SERVICE

    def named(self, address: str) -> Server:
        """The server of an address.

        Raises:
            UsageError: If there is none.
        """
        server = self.by_address.get(normalise_address(address))
        if server is None:
            raise UsageError(f"{address} is not in the pool: {', '.join(self.by_address)}")
        return server

    def set_state(self, server: Server, state: ServerState, reason: str = "") -> None:
        """Set a server's state; only READY takes requests. Wakes whoever it concerns."""
        server.state, server.reason = state, reason
        self._apply_cap(server)
        changed, server.changed = server.changed, trio.Event()
        changed.set()
        changed, self.service_changed = self.service_changed, trio.Event()
        changed.set()

    def _apply_cap(self, server: Server) -> None:
        if server.state is not ServerState.GONE:
            allowed = server.allowed if server.state is ServerState.READY else 0
            self._policy.set_cap(server.address, allowed)
        self._leases.hand_over()

    def mark_stale(self, server: Server, reason: str) -> None:
        """Take a server out of service until it has the current weights."""
        if server.state not in LEAVING:
            self.set_state(server, ServerState.STALE, reason)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every server is ready, but those that are leaving, and there is one.

        Raises:
            NoServerAvailable: If one is not within ``timeout_s``; each is named, with the reason.
        """
        with trio.move_on_after(timeout_s):
            while self._not_ready() or not self._has_ready:
                await self.service_changed.wait()
            return
        missing = self._not_ready()
        words = "; ".join(f"{s.address} is {s.state.value} ({s.reason})" for s in missing)
        words = words or "there is no server, or all are leaving"
        raise NoServerAvailable(f"not ready within {timeout_s:g} s: {words}")

    @property
    def _has_ready(self) -> bool:
        return any(server.state is ServerState.READY for server in self.servers)

    def _not_ready(self) -> list[Server]:
        fine = (ServerState.READY, *LEAVING)
        return [server for server in self.servers if server.state not in fine]
