"""ServerPool: the inference servers of a run, and which of them may take a request now.

The pool owns the parts, and does itself what needs them together: leases, versions, and talking to
servers. What a server *is* lives in ``server``; which there are and which serve, in ``fleet``; what
becomes of one that fails, in ``ejection``; who holds them from generating, in ``pausing``. How
slots are handed out is in ``leases``, which server is taken in ``scheduling``, how servers are
waited for in ``joining`` and looked after in ``supervision``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import Self

import trio

from .adapters import Adapters
from .config import RolloutConfig
from .ejection import Ejection
from .errors import ConfigError, NoServerAvailable, ProtocolError, RequestRejected, RolloutError
from .fleet import Fleet
from .leases import HeldSlot, LeaseQueue, Waiter
from .ordering import UNKNOWN_ORIGIN, Line, Origin, make_line
from .pausing import Pausing
from .scheduling import CAP_MAX, DEFAULT_MAX_CONCURRENT_PER_SERVER, SchedulePolicy, make_policy
from .server import IN_SERVICE, LEAVING, OUT_OF_ORDER, Server, ServerState, ServerStatistics
from .transport import StreamedResponse, Transport
from .types import HttpRequest, HttpResponse, TimeLimits
from .waiting import BriefWaits
from .wire.dialect import Dialect, ServerLoad
from .wire.status import masked

__all__ = [
    "IN_SERVICE",
    "LEAVING",
    "OUT_OF_ORDER",
    "Lease",
    "Server",
    "ServerPool",
    "ServerState",
    "ServerStatistics",
]


class Lease:
    """A held slot on a server. Leaving the ``with`` block gives it back, synchronously, once.

    Args:
        fleet: Whose server it is.
        server: The server.
        slot: The slot.

    Attributes:
        version: The server's weight version when the lease was granted, or renewed.
        base_update: Which update had given it its base weights by then.
        adapter_version: The pool's version when the request named a versioned adapter; None where
            it names none.
        labelled: Whether it carried our label then, so that its reports can be held to it.
    """

    __slots__ = (
        "_fleet",
        "_slot",
        "adapter_version",
        "base_update",
        "labelled",
        "server",
        "version",
    )

    def __init__(self, fleet: Fleet, server: Server, slot: HeldSlot) -> None:
        self.server = server
        self._fleet = fleet
        self._slot = slot
        self.pin()

    def pin(self) -> None:
        """Note what the server has now, for what it is about to be asked."""
        self.version = self.server.version
        self.base_update = self.server.base_update
        self.adapter_version: int | None = None
        self.labelled = self.server.labelled

    @property
    def waited_s(self) -> float:
        """Seconds that its request waited for the slot."""
        return self._slot.waited_s

    def release(self) -> None:
        """Give the slot back.

        Raises:
            UsageError: If it was given back before; nothing is changed.
        """
        self._slot.release()
        self._fleet.drained(self.server)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._slot.released:
            self.release()


class ServerPool:
    """All servers of a run, the selection among them, and the one queue in front of them.

    Every decision is a synchronous function, so no task sees it half made.

    Args:
        config: Servers, caps, policy, time limits.
        dialect: How the servers speak.
        transport: How bytes get there. The pool does not close it.
        policy: Which server is next; None makes the one that ``config`` names.

    Attributes:
        version: The weight version that every server in service has, or is beyond.
        update: Which update gave it that, counted from 1; 0: none did. A trainer that begins anew,
            or tries again, may give a version's number to other weights. The count of updates
            never goes back, so it tells who missed one to the version that it had already.
        recipe: The requests that bring a server to ``base_version``; None where nobody can repeat
            them.
        base_version: The version of the last update that was not of an adapter alone.
        base_update: Which update that was.
        updates: Updates begun.
        adapters: Which versions of adapters requests are to name.
        fleet: The servers, who is in service, and their caps.
        ejection: Judges the servers by what they fail.
        pausing: Holds servers from generating.
        brief: Bounds what is asked of a server that may be out of order.
    """

    def __init__(
        self,
        config: RolloutConfig,
        dialect: Dialect,
        transport: Transport,
        policy: SchedulePolicy | None = None,
    ) -> None:
        if not config.servers:
            raise ConfigError("no servers are named; set RolloutConfig(servers=[…])")
        self.config = config
        self.dialect = dialect
        self.version = self.base_version = 0
        self.updates = self.update = self.base_update = 0
        self.adapters = Adapters()
        self.recipe: Sequence[HttpRequest] | None = ()  # version 0 is what a server starts with
        self.update_lock = trio.Lock()  # versions reach every server in one order
        self._transport = transport
        self._policy = policy or make_policy(config.schedule_policy)
        line: Line[Waiter] = make_line(config.queue_order, config.queue_overtakes_max)
        self._leases = LeaseQueue(self._policy, self._barred, line)
        self.fleet = Fleet(config.servers, self._leases)
        self._servers = self.fleet.by_address
        self.ejection = Ejection(config, self.fleet, self._leases)
        self.brief = BriefWaits(config.abort_timeout_s)
        self.pausing = Pausing(config, dialect, self.fleet, self.control, self.brief)
        self._newest_told = 0
        self._abandoned = 0  # the newest version that the pool went back from
        self._lowest = 0  # no server in service is older

    # --- what there is -----------------------------------------------------------------------

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order they came."""
        return self.fleet.servers

    @property
    def waiting(self) -> int:
        """Requests parked in the queue."""
        return len(self._leases)

    @property
    def in_service(self) -> tuple[Server, ...]:
        """Servers that take requests, or will at the end of a pause."""
        return self.fleet.in_service

    @property
    def service_changed(self) -> trio.Event:
        """Set at the next change of any server's state; another one takes its place then."""
        return self.fleet.service_changed

    @property
    def newest_told(self) -> int:
        """The newest version any server was told to load: no token can be newer."""
        return self._newest_told

    def is_current(self, server: Server) -> bool:
        """Whether a server's weights may serve: the pool's, or beyond them in an update now."""
        took_it = server.update >= self.update
        return took_it and self.version <= server.version <= self._newest_told

    def outstanding(self, server: Server) -> int:
        """Requests in flight on a server."""
        return self._policy.outstanding(server.address)

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """A snapshot of every server."""
        return self.fleet.statistics()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every server is ready. See ``Fleet.wait_ready``."""
        await self.fleet.wait_ready(timeout_s)

    def __repr__(self) -> str:
        rows = ", ".join(
            f"{s.address} {s.state} v{s.version} {s.outstanding}/{s.cap}" for s in self.statistics()
        )
        return f"<ServerPool v{self.version} [{rows}] waiting {self.waiting}>"

    # --- leases ------------------------------------------------------------------------------

    async def lease(
        self,
        *,
        exclude: frozenset[str] = frozenset(),
        min_version: int = 0,
        prefer: str | None = None,
        at_head: bool = False,
        origin: Origin = UNKNOWN_ORIGIN,
    ) -> Lease:
        """Take a slot on the best server, waiting in the queue while none is free.

        Cancelling a waiter, at any moment, loses no slot: either it is taken out of the queue, or
        the slot was already handed over, is returned here, and released by the caller's ``with``.

        Args:
            exclude: Addresses to avoid (a server that just failed this request), as long as any
                other is in service.
            min_version: Only servers whose weights are at least this new.
            prefer: The server that holds the session's prefix; used if it has a free slot.
            at_head: Wait before all others: a generation that was interrupted goes on first.
            origin: What its place in the queue depends on, under the orders other than ``fifo``.

        Raises:
            RolloutClosed: If the pool was closed, before or during the wait.
            NoServerAvailable: If no server has been in service for ``no_server_grace_s``.
            RolloutError: If the pool went back from ``min_version``, before or during the wait.
        """
        if self._will_not_come(min_version):
            raise self._went_back(min_version)
        slot = await self._leases.acquire(
            exclude, min_version, prefer, at_head=at_head, origin=origin
        )
        return Lease(self.fleet, self._servers[slot.address], slot)

    def renew(self, lease: Lease, min_version: int) -> bool:
        """Hold a slot for a next request, if the server takes one now and has not too many.

        Args:
            lease: What it has now is pinned anew.
            min_version: As in ``lease``.

        Returns:
            Whether the slot may be used again; it is held either way.
        """
        server = lease.server
        ready = server.state is ServerState.READY and server.version >= min_version
        if not ready or self.outstanding(server) > server.allowed:
            return False
        lease.pin()
        return True

    def clearly_idler(self, server: Server, min_version: int) -> str | None:
        """The address of a server with so much less to do that it pays to move a request there.

        A request that moves has its prefix computed again, so the other has to be less loaded by
        half of what a server may have, this request counted. It would not move back after that.
        """
        if not self._policy.free():
            return None
        least, least_load = None, self._load_of(server) - 0.5
        for other in self._servers.values():
            if other.state is not ServerState.READY or other.version < min_version:
                continue
            load = self._load_of(other, 1)
            if other is not server and load <= min(least_load, 1):
                least, least_load = other.address, load
        return least

    def _load_of(self, server: Server, more: int = 0) -> float:
        return (self.outstanding(server) + more) / max(server.allowed, 1)

    def answered(self, origin: Origin, tokens: int) -> None:
        """An answer has ended, with so many tokens: what is expected of its prompt may change."""
        self._leases.learn(origin.prompt, tokens)

    def _barred(self, exclude: frozenset[str], min_version: int) -> frozenset[str]:
        """What a request can not use: servers older than it needs, and those that failed it.

        The latter only while there is another: alone, a server that failed is better than none.
        """
        if exclude and exclude.issuperset(s.address for s in self.in_service):
            exclude = frozenset()
        if min_version <= self._lowest:  # what is in service is at least that new
            return exclude
        return exclude | {s.address for s in self._servers.values() if s.version < min_version}

    def fail_waiters(self, message: str) -> None:
        """Wake every request in the queue with NoServerAvailable."""
        self._leases.fail_all(lambda: NoServerAvailable(message))

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Keep the pool open; on leaving, every waiter is woken with RolloutClosed."""
        try:
            yield self
        finally:
            self._leases.close()

    # --- membership and service --------------------------------------------------------------

    def named(self, address: str) -> Server:
        """The server of an address; raises UsageError if there is none."""
        return self.fleet.named(address)

    def set_state(self, server: Server, state: ServerState, reason: str = "") -> None:
        """Set a server's state. See ``Fleet.set_state``."""
        self.fleet.set_state(server, state, reason)

    def mark_stale(self, server: Server, reason: str) -> None:
        """Take a server out of service until it has the current weights."""
        self.fleet.mark_stale(server, reason)

    # --- versions ----------------------------------------------------------------------------

    def begin_update(self, version: int) -> None:
        """Count an update whose servers are about to be told to load ``version``."""
        self.updates += 1
        self.told(version)

    def told(self, version: int) -> None:
        """Record that some server is about to be told to load ``version``."""
        self._newest_told = max(self._newest_told, version)
        self._lowest = min(self._lowest, version)

    def advance(
        self, version: int, recipe: Sequence[HttpRequest] | None, *, has_base: bool = True
    ) -> None:
        """Make ``version`` the version of the pool, in either direction (recovery goes back).

        Who joined or returned during the update, and missed it, is out of service before anything
        is handed out. Going back fails what waits for weights that are given up by it.

        Args:
            version: The version.
            recipe: The requests that bring a server to its base weights; None: nobody can.
            has_base: Whether it changed the base weights, and not an adapter alone.
        """
        if version < self.version:
            self._abandoned = max(self._abandoned, self._newest_told)
            self._newest_told = version
        self.version, self.update, self.recipe = version, self.updates, recipe
        if has_base:
            self.base_version, self.base_update = version, self.updates
        self.told(version)
        self._leases.fail(
            lambda waiter: self._will_not_come(waiter.min_version),
            lambda waiter: self._went_back(waiter.min_version),
        )
        self.take_out_outdated()
        self._lowest = version
        self._leases.hand_over()

    def take_out_outdated(self) -> None:
        """Take out of service who has not the pool's weights, nor newer ones of an update now."""
        for server in self.servers:
            if server.state in IN_SERVICE and not self.is_current(server):
                missed = f"missed the update to version {self.version}"
                before = " of before" if server.version == self.version else ""
                self.mark_stale(server, f"{missed}: it has {server.version}{before}")

    def _will_not_come(self, version: int) -> bool:
        return self._newest_told < version <= self._abandoned

    def _went_back(self, version: int) -> RolloutError:
        return RolloutError(
            f"it needs weights of version {version}, and the servers went back to {self.version}: "
            "what was begun before that can not go on"
        )

    # --- talking to servers ------------------------------------------------------------------

    async def send(self, server: Server, request: HttpRequest, limits: TimeLimits) -> HttpResponse:
        """Send one request to one server and return the whole answer, whatever its status.

        Cancellation closes the connection; whether the server notices is not relied upon.

        Raises:
            TransportError: If no whole answer arrived.
        """
        response = await self._transport.request(
            server.address,
            request,
            limits,
            headers=self.config.headers_of(server.address),
            size_bytes_max=self.config.response_size_bytes,
        )
        return self.without_keys(server, response)

    def without_keys(self, server: Server, response: HttpResponse) -> HttpResponse:
        """An answer as it is, but that a refusal repeats no key that was sent to the server."""
        if response.status < 400:
            return response
        return masked(response, self.config.secrets_of(server.address))

    def stream(
        self, server: Server, request: HttpRequest, limits: TimeLimits
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        """Like ``send``, entered once status and headers are there; the body is read within."""
        return self._transport.stream(
            server.address,
            request,
            limits,
            headers=self.config.headers_of(server.address),
            size_bytes_max=self.config.response_size_bytes,
        )

    async def control(self, server: Server, request: HttpRequest, total_s: float) -> None:
        """Send one control request; raise where the server refused or did not answer in time."""
        response = await self.send(server, request, self.config.control_limits(total_s))
        # Masked whatever its status: with 200, too, it may say that it refuses, and whom.
        self.dialect.parse_control(masked(response, self.config.secrets_of(server.address)))

    async def load_of(self, server: Server) -> ServerLoad:
        """Ask a server for its own gauges."""
        limits = self.config.control_limits(self.config.health_timeout_s)
        return self.dialect.parse_load(await self.send(server, self.dialect.load(), limits))

    async def check_health(self, server: Server) -> None:
        """Ask a server whether it is alive; raise if it is not."""
        limits = self.config.control_limits(self.config.health_timeout_s)
        self.dialect.parse_health(await self.send(server, self.dialect.health(), limits))

    async def health(self) -> dict[str, str | None]:
        """Ask every server at once whether it is alive: address to None, or to what is wrong."""
        found: dict[str, str | None] = {}

        async def ask(server: Server) -> None:
            try:
                await self.check_health(server)
                found[server.address] = None
            except RolloutError as exc:
                found[server.address] = str(exc)

        async with trio.open_nursery() as nursery:
            for server in self.servers:
                nursery.start_soon(ask, server)
        return found

    async def discover(self, server: Server) -> None:
        """Ask a server what it is."""
        limits = self.config.control_limits(self.config.control_timeout_s)
        answers = [await self.send(server, ask, limits) for ask in self.dialect.discover()]
        self.fleet.learned(server, self.dialect.parse_discover(answers))
        server.tells_label(server.info.weight_version)
        if server.state is ServerState.JOINING and not server.cap_known:
            server.cap, server.cap_known = self._initial_cap(server), True

    def _initial_cap(self, server: Server) -> int:
        configured = self.config.cap_of(server.address)
        told = server.info.max_concurrency or DEFAULT_MAX_CONCURRENT_PER_SERVER
        return configured or min(told, CAP_MAX)

    async def label(self, server: Server, version: int) -> None:
        """Set the label of the weights a server has. One without such a route keeps its word.

        Without it the first tokens would carry the server's own word ("default"), and their
        version would be a belief.
        """
        server.told = version
        if not self.dialect.has_labels:
            return
        try:
            request = self.dialect.label_weights(version)
            await self.control(server, request, self.config.control_timeout_s)
        except RequestRejected as exc:
            if not exc.is_of_the_route:
                raise
            server.labelled = False
        else:
            server.labelled = True

    async def confirm(self, server: Server, version: int) -> None:
        """Ask a server which weights it has; raise if it is to have others.

        Raises:
            ProtocolError: It reports another version than it was given; or, where it reports none,
                it is another process than the one that was last looked at.
        """
        if not server.labelled:
            if await self.is_another_process(server):
                raise ProtocolError("it was restarted, before it had the weights or after")
            return
        reported = await self.label_of(server)
        if reported != version:
            raise ProtocolError(f"it reports version {reported} after it was given {version}")

    async def label_of(self, server: Server) -> int | None:
        """Ask a server for its label; None where it is not a version."""
        limits = self.config.control_limits(self.config.control_timeout_s)
        response = await self.send(server, self.dialect.weight_version(), limits)
        reported = self.dialect.parse_weight_version(response)
        server.tells_label(reported)
        return reported

    async def is_another_process(self, server: Server) -> bool:
        """Whether a server that takes no label was restarted since it was last looked at."""
        if server.started is None:
            return False
        return await self.start_of(server) not in (None, server.started)

    async def start_of(self, server: Server) -> float | None:
        """When the process of a server started; None where it does not tell."""
        question = self.dialect.started()
        if question is None:
            return None
        limits = self.config.control_limits(self.config.health_timeout_s)
        response = await self.send(server, question, limits)
        try:
            return self.dialect.parse_started(response)
        except (RequestRejected, ProtocolError):  # it has no such page, or another
            return None
