"""ServerPool: the inference servers of a run, and which of them may take a request now.

What a server *is* lives here: its address, dialect, cap, weight version, and whether it is in
service. How its slots are handed out is in ``leases``, which of several is taken in ``scheduling``,
how it is looked after in ``supervision``.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVarTuple

import trio

from .adapters import Adapters
from .config import RolloutConfig, normalise_address
from .errors import (
    ConfigError,
    NoServerAvailable,
    ProtocolError,
    RequestRejected,
    RolloutError,
    TransportError,
    UsageError,
)
from .leases import HeldSlot, LeaseQueue, Waiter
from .ordering import UNKNOWN_ORIGIN, Line, Origin, make_line
from .scheduling import CAP_MAX, DEFAULT_MAX_CONCURRENT_PER_SERVER, SchedulePolicy, make_policy
from .transport import StreamedResponse, Transport
from .types import HttpRequest, HttpResponse, PauseMode, TimeLimits
from .wire.dialect import Dialect, ServerInfo, ServerLoad

Ts = TypeVarTuple("Ts")

SETUP_INTERVAL_S = 0.25  # between two looks at a server that is not up yet


class ServerState(enum.Enum):
    """Whether a server takes requests, and if not, why."""

    JOINING = "joining"  # not yet heard from
    READY = "ready"
    PAUSED = "paused"  # told to stop generating; resumes at the end of the pause scope
    DRAINING = "draining"  # to be removed; finishes what it has
    EJECTED = "ejected"  # failed repeatedly; probed until it is well
    STALE = "stale"  # has not the current weights; gets no traffic until it has
    GONE = "gone"  # removed


IN_SERVICE = (ServerState.READY, ServerState.PAUSED)  # takes requests now, or in a moment
OUT_OF_ORDER = (ServerState.JOINING, ServerState.EJECTED, ServerState.STALE)
LEAVING = (ServerState.DRAINING, ServerState.GONE)


@dataclass(slots=True, eq=False)
class Server:
    """One inference server, as the pool believes it to be.

    Args:
        address: Its base URL, and its name everywhere.
        info: What it said about itself.
        cap: Requests in flight at most, while it is in service; 0 before it is known.
        version: The weights it was last told to serve, and confirmed.
        told: The newest it was told to load, confirmed or not.
        labelled: It carries a label that we gave it, so what it reports can be held to that.
        label_seen: It told a label since then: one that tells none after that is another process.
        state: Whether it takes requests.
        reason: Why it is out of order, in words.
        requests: Generation requests sent to it since the pool opened.
        failovers: Generations that it failed, and that went on.
        tokens_kept: Tokens that those had, and did not have to make again.
        ejections: Times that it was ejected.
        failures: Requests that failed since the last that did not.
        sick: Health checks that failed since the last that did not.
        probes: Times it was looked at since it last proved itself; the interval grows with them.
        frozen: It was paused and not resumed: a server whose update failed must not generate.
        tainted: A load failed or was cut short, so its weights are not known.
        base_version: The weights of its base model, without adapters.
        asleep: The memory that it let go of, by the dialect's tags.
        held: Pause scopes that hold it now.
        trial_cap: Requests it may have while it proves itself after a failure; None: its cap.
        pressure_cap: Requests it may have while it is short of cache; None: its cap.
    """

    address: str
    info: ServerInfo = field(default_factory=ServerInfo)
    cap: int = 0
    version: int = 0
    told: int = 0
    labelled: bool = False
    label_seen: bool = False
    state: ServerState = ServerState.JOINING
    reason: str = ""
    requests: int = 0
    failovers: int = 0
    tokens_kept: int = 0
    ejections: int = 0
    failures: int = 0
    sick: int = 0
    probes: int = 0
    frozen: bool = False
    tainted: bool = False
    base_version: int = 0
    asleep: set[str] = field(default_factory=set)
    held: int = 0
    trial_cap: int | None = None
    pressure_cap: int | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    emptied: trio.Event | None = None  # of those who wait until nothing is in flight on it
    control_lock: trio.Lock = field(default_factory=trio.Lock)  # one weight load at a time
    pause_lock: trio.Lock = field(default_factory=trio.Lock)  # pauses and resumes land in order
    restoring: trio.CancelScope | None = None  # of the probe under way; an update supersedes it
    in_flight: set[trio.CancelScope] = field(default_factory=set)

    @property
    def allowed(self) -> int:
        """Requests it may have in flight now, where it is in service: the least of its caps."""
        caps = (self.cap, self.trial_cap, self.pressure_cap)
        return min(cap for cap in caps if cap is not None)


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """One server's numbers at one moment."""

    address: str
    state: str
    version: int
    cap: int
    outstanding: int
    requests: int
    reason: str = ""
    ejections: int = 0
    failovers: int = 0
    tokens_kept: int = 0
    allowed: int = 0  # of its cap, now


class Lease:
    """A held slot on a server. Leaving the ``with`` block gives it back, synchronously, once.

    Args:
        pool: Whose server it is.
        server: The server.
        slot: The slot.

    Attributes:
        version: The server's weight version when the lease was granted, or renewed.
        base_version: That of its base model.
        adapter_version: The pool's version when the request named a versioned adapter; None where
            it names none.
        labelled: Whether it carried our label then, so that its reports can be held to it.
    """

    __slots__ = (
        "_pool",
        "_slot",
        "adapter_version",
        "base_version",
        "labelled",
        "server",
        "version",
    )

    def __init__(self, pool: ServerPool, server: Server, slot: HeldSlot) -> None:
        self.server = server
        self._pool = pool
        self._slot = slot
        self.pin()

    def pin(self) -> None:
        """Note what the server has now, for what it is about to be asked."""
        self.version = self.server.version
        self.base_version = self.server.base_version
        self.adapter_version: int | None = None
        self.labelled = self.server.labelled

    def release(self) -> None:
        """Give the slot back.

        Raises:
            UsageError: If it was given back before; nothing is changed.
        """
        self._slot.release()
        self._pool.drained(self.server)

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
        recipe: The requests that bring a server to ``base_version``; None where nobody can repeat
            them.
        base_version: The version of the last update that was not of an adapter alone.
        adapters: Which versions of adapters requests are to name.
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
        self.adapters = Adapters()
        self.recipe: Sequence[HttpRequest] | None = ()  # version 0 is what a server starts with
        self.service_changed = trio.Event()
        self.update_lock = trio.Lock()  # versions reach every server in one order
        self._pauses = 0  # scopes that hold the whole pool
        self._held: set[Server] = set()  # for the end of a scope to resume; removed ones, too
        self._transport = transport
        self._policy = policy or make_policy(config.schedule_policy)
        self._servers = {address: Server(address) for address in config.servers}
        line: Line[Waiter] = make_line(config.queue_order, config.queue_overtakes_max)
        self._leases = LeaseQueue(self._policy, self._barred, line)
        self._newest_told = 0
        self._abandoned = 0  # the newest version that the pool went back from
        self._lowest = 0  # no server in service is older
        self._smallest: dict[str, int | None] = {}  # forgotten when a server comes, goes or speaks

    # --- what there is -----------------------------------------------------------------------

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order they came."""
        return tuple(self._servers.values())

    @property
    def waiting(self) -> int:
        """Requests parked in the queue."""
        return len(self._leases)

    @property
    def in_service(self) -> tuple[Server, ...]:
        """Servers that take requests, or will at the end of a pause."""
        return tuple(s for s in self._servers.values() if s.state in IN_SERVICE)

    @property
    def newest_told(self) -> int:
        """The newest version any server was told to load: no token can be newer."""
        return self._newest_told

    def is_current(self, version: int) -> bool:
        """Whether a server of a version may serve: the pool's, or beyond it in an update now."""
        return self.version <= version <= self._newest_told

    def outstanding(self, server: Server) -> int:
        """Requests in flight on a server."""
        return self._policy.outstanding(server.address)

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """A snapshot of every server."""
        return tuple(
            ServerStatistics(
                address=server.address,
                state=server.state.value,
                version=server.version,
                cap=server.cap,
                outstanding=self.outstanding(server) if self._is_known(server) else 0,
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
            values = [getattr(server.info, attribute) for server in self._servers.values()]
            known = [value for value in values if value is not None]
            self._smallest[attribute] = min(known, default=None)
        return self._smallest[attribute]

    def _is_known(self, server: Server) -> bool:
        return server.address in self._policy.servers()

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
        return Lease(self, self._servers[slot.address], slot)

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
        return exclude | {s.address for s in self.servers if s.version < min_version}

    def _will_not_come(self, version: int) -> bool:
        return self._newest_told < version <= self._abandoned

    def _went_back(self, version: int) -> RolloutError:
        return RolloutError(
            f"it needs weights of version {version}, and the servers went back to {self.version}: "
            "what was begun before that can not go on"
        )

    def fail_waiters(self, message: str) -> None:
        """Wake every request in the queue with NoServerAvailable."""
        self._leases.fail_all(lambda: NoServerAvailable(message))

    # --- membership --------------------------------------------------------------------------

    def add(self, address: str, cap: int | None = None) -> Server:
        """Add a server; it takes requests once it is healthy and has the current weights.

        Args:
            address: Its base URL.
            cap: Requests in flight at most; None asks the server.

        Raises:
            UsageError: If it is there already.
            ConfigError: If the address is none, or the cap is no integer of at least 1.
        """
        address = normalise_address(address)
        if address in self._servers:
            raise UsageError(f"{address} is in the pool, {self._servers[address].state.value}")
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
            raise ConfigError(f"a server's cap must be an integer of at least 1, not {cap!r}")
        server = Server(address)
        server.cap = cap or 0
        self._servers[address] = server
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
        if self._is_known(server):
            if self.outstanding(server):
                return
            self._policy.remove(server.address)
        del self._servers[server.address]
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
        server.cap = cap
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
        server = self._servers.get(address)
        return server is not None and server.state in IN_SERVICE

    def named(self, address: str) -> Server:
        """The server of an address.

        Raises:
            UsageError: If there is none.
        """
        server = self._servers.get(normalise_address(address))
        if server is None:
            raise UsageError(f"{address} is not in the pool: {', '.join(self._servers)}")
        return server

    # --- service -----------------------------------------------------------------------------

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

    def succeeded(self, server: Server) -> None:
        """A request to a server went well; one on trial may have one more at once.

        So what it may have doubles with each round of requests: TCP's slow start (RFC 5681 §3.1).
        """
        server.failures = 0
        if server.state not in IN_SERVICE:
            return  # it was sent before the server went out of service, and proves nothing
        if server.trial_cap is None:
            server.probes = 0
            return
        server.trial_cap += 1
        if server.trial_cap >= server.cap:
            server.trial_cap = None
        self.set_state(server, server.state, server.reason)

    def failed(self, server: Server, error: RolloutError) -> None:
        """A request to a server failed; too many in a row eject it."""
        server.failures += 1
        self._judge(server, server.failures, error)

    def healthy(self, server: Server) -> None:
        """A health check went well. It says nothing of requests, so their count stands."""
        server.sick = 0

    def unhealthy(self, server: Server, error: RolloutError) -> None:
        """A health check or a probe failed; too many in a row eject the server.

        One that is out of service and can not be reached loses what it was sent before, too: else
        those requests would wait for an answer until ``segment_timeout_s``.
        """
        server.sick += 1
        self._judge(server, server.sick, error)
        unreachable = isinstance(error, TransportError)
        if unreachable and server.state in OUT_OF_ORDER and self._is_too_many(server.sick):
            self.cut_off(server)

    def _judge(self, server: Server, failures: int, error: RolloutError) -> None:
        """Eject a server that failed too often; one on trial, at once."""
        if server.state is not ServerState.READY:
            return
        if server.trial_cap is None and not self._is_too_many(failures):
            return
        if isinstance(error, TransportError) and not error.request_sent:
            self._eject(server, error)  # nobody is there: no signal that could be wrong
        elif self._may_eject_another():
            self._eject(server, error)

    def _is_too_many(self, failures: int) -> bool:
        return failures >= self.config.eject_after_failures

    def _may_eject_another(self) -> bool:
        """Never the last half of the fleet on a signal that can be wrong for all at once."""
        fleet = sum(s.state not in LEAVING for s in self._servers.values())
        return 2 * (len(self.in_service) - 1) >= fleet

    def _eject(self, server: Server, error: RolloutError) -> None:
        server.ejections += 1
        server.trial_cap = 1  # for when it returns
        self.set_state(server, ServerState.EJECTED, f"{type(error).__name__}: {error}")

    def take_back(self, server: Server) -> None:
        """Put a server into service that was found well: what it failed before, it may have."""
        server.failures = 0
        self._leases.forgive(server.address)
        self.set_state(server, ServerState.READY)

    def mark_stale(self, server: Server, reason: str) -> None:
        """Take a server out of service until it has the current weights."""
        if server.state not in LEAVING:
            self.set_state(server, ServerState.STALE, reason)

    @contextmanager
    def attached(self, server: Server) -> Iterator[None]:
        """Wait for an answer of a server within, no longer than it is worth waiting for.

        Raises:
            TransportError: If the server was cut off meanwhile; the wait is cancelled.
        """
        with trio.CancelScope() as scope:
            server.in_flight.add(scope)
            try:
                yield
            finally:
                server.in_flight.discard(scope)
        if scope.cancelled_caught:
            raise TransportError(f"{server.address} was given up: {server.reason}")

    def cut_off(self, server: Server) -> None:
        """End every wait for an answer of a server: what it would answer is of no use any more."""
        for scope in tuple(server.in_flight):
            scope.cancel()

    def told(self, version: int) -> None:
        """Record that some server is about to be told to load ``version``."""
        self._newest_told = max(self._newest_told, version)
        self._lowest = min(self._lowest, version)

    def advance(
        self, version: int, recipe: Sequence[HttpRequest] | None, *, has_base: bool = True
    ) -> None:
        """Make ``version`` the version of the pool, in either direction (recovery goes back).

        Going back fails what waits for weights that are given up by it.

        Args:
            version: The version.
            recipe: The requests that bring a server to its base weights; None: nobody can.
            has_base: Whether it changed the base weights, and not an adapter alone.
        """
        if version < self.version:
            self._abandoned = max(self._abandoned, self._newest_told)
            self._newest_told = version
        self.version, self.recipe = version, recipe
        if has_base:
            self.base_version = version
        self.told(version)
        self._lowest = version
        self._leases.fail(
            lambda waiter: self._will_not_come(waiter.min_version),
            lambda waiter: self._went_back(waiter.min_version),
        )
        self._leases.hand_over()

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Keep the pool open; on leaving, every waiter is woken with RolloutClosed."""
        try:
            yield self
        finally:
            self._leases.close()

    # --- talking to servers ------------------------------------------------------------------

    async def send(self, server: Server, request: HttpRequest, limits: TimeLimits) -> HttpResponse:
        """Send one request to one server and return the whole answer, whatever its status.

        Cancellation closes the connection; whether the server notices is not relied upon.

        Raises:
            TransportError: If no whole answer arrived.
        """
        return await self._transport.request(
            server.address,
            request,
            limits,
            headers=self.config.headers_of(server.address),
            size_bytes_max=self.config.response_size_bytes,
        )

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
        self.dialect.parse_control(response)

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
        server.info = self.dialect.parse_discover(answers)
        server.label_seen |= server.info.weight_version is not None
        self._smallest.clear()
        if server.state is ServerState.JOINING and not server.cap:
            server.cap = self._initial_cap(server)

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
            if exc.status not in (404, 405):
                raise
            server.labelled = False
        else:
            server.labelled = True

    async def confirm(self, server: Server, version: int) -> None:
        """Ask a server which weights it has; raise if it is to have others.

        Raises:
            ProtocolError: It reports another version than it was given.
        """
        if not server.labelled:
            return
        limits = self.config.control_limits(self.config.control_timeout_s)
        response = await self.send(server, self.dialect.weight_version(), limits)
        reported = self.dialect.parse_weight_version(response)
        server.label_seen |= reported is not None
        if reported != version:
            raise ProtocolError(f"it reports version {reported} after it was given {version}")

    # --- joining -----------------------------------------------------------------------------

    async def join(self) -> None:
        """Wait until every server answers, learn what it is, label its weights, take it in.

        Raises:
            NoServerAvailable: If a server is not healthy within ``setup_timeout_s``, or answers
                what no server of this dialect would; each is named, with what it last said.
        """
        last_words: dict[str, str] = {}
        with trio.move_on_after(self.config.setup_timeout_s) as scope:
            async with trio.open_nursery() as nursery:
                for server in self.servers:
                    nursery.start_soon(self._join_one, server, last_words, nursery.cancel_scope)
        missing = [s.address for s in self.servers if s.state is ServerState.JOINING]
        if missing:
            words = "; ".join(f"{name}: {last_words.get(name, 'no answer')}" for name in missing)
            limit = f" within setup_timeout_s={self.config.setup_timeout_s:g}"
            raise NoServerAvailable(f"not ready{limit if scope.cancelled_caught else ''}: {words}")

    async def _join_one(
        self, server: Server, last_words: dict[str, str], all_of_them: trio.CancelScope
    ) -> None:
        while True:  # a server is outside: it is asked at a named interval until it is up
            try:
                await self.check_health(server)
                await self.discover(server)
                server.version = self.version
                await self.label(server, self.version)
                break
            except RolloutError as exc:
                last_words[server.address] = str(exc)
                if not isinstance(exc, TransportError) and not _may_still_start(exc):
                    last_words[server.address] = f"not usable: {exc}"
                    all_of_them.cancel()
            await trio.sleep(SETUP_INTERVAL_S)
        self.set_state(server, ServerState.READY)

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

    # --- pausing -----------------------------------------------------------------------------

    def is_held(self, server: Server) -> bool:
        """Whether a pause scope holds a server, or would if the server were in service."""
        return bool(server.held or self._pauses)

    @asynccontextmanager
    async def paused(
        self,
        mode: PauseMode = "keep",
        servers: Sequence[Server] | None = None,
        *,
        drain: bool = False,
    ) -> AsyncIterator[dict[str, str]]:
        """Stop generation on servers, for the length of the block.

        Every server that was asked is resumed, also when the block raises or is cancelled, within
        ``control_timeout_s``; one that can not be resumed becomes stale. Only a server marked
        ``frozen`` meanwhile stays as it is: its weights are not to be used. Nothing new is sent to
        a server from before it is paused until after it is resumed. Scopes may overlap: a server
        goes on when the last that holds it ends. One that comes back into service waits for the
        end of a scope that holds the whole pool.

        Args:
            mode: ``keep`` freezes requests and lets them go on (with the new weights, if they
                changed); ``abort`` returns them with what they have; ``wait`` lets them finish,
                within ``update_timeout_s``.
            servers: Which; None: all, also those that are to be removed.
            drain: Let everything finish first, for at most ``update_timeout_s``; nothing new is
                sent meanwhile. Unlike ``wait``, every dialect can do it.

        Yields:
            The servers that could not be paused: address to what went wrong.

        Raises:
            ConfigError: For a mode that the dialect does not have; nothing was paused.
        """
        request = self.dialect.pause(mode)
        whole_pool = servers is None
        chosen = [s for s in (self.servers if servers is None else servers) if _can_pause(s)]
        limit_s = self.config.update_timeout_s if mode == "wait" else self.config.control_timeout_s
        failed: dict[str, str] = {}
        self._pauses += whole_pool
        try:
            self._hold(chosen)
            if drain:
                await self._until_empty(chosen)
            await self._each(self._pause, chosen, failed, request, limit_s)
            yield failed
        finally:
            self._pauses -= whole_pool
            with trio.CancelScope(shield=True):  # each request is bounded by control_timeout_s
                await self._each(self._let_go, chosen, {})
            if whole_pool:
                self._announce_end_of_pause()

    def _hold(self, servers: Sequence[Server]) -> None:
        for server in servers:
            server.held += 1
            self._held.add(server)
            if server.state is ServerState.READY:
                self.set_state(server, ServerState.PAUSED)

    async def _until_empty(self, servers: Sequence[Server]) -> None:
        with trio.move_on_after(self.config.update_timeout_s):
            for server in servers:
                while self._is_known(server) and self.outstanding(server):
                    server.emptied = server.emptied or trio.Event()
                    await server.emptied.wait()

    async def _pause(self, server: Server, request: HttpRequest, limit_s: float) -> None:
        async with server.pause_lock:
            await self.control(server, request, limit_s)

    async def _let_go(self, server: Server) -> None:
        """End a scope's hold on a server; it goes on where no other scope holds it.

        It is held until it was resumed: a scope that begins meanwhile pauses it after that.
        """
        try:
            if server.held == 1:  # else another scope resumes it: no need to wait for the lock
                await self._resume_last_held(server)
        except RolloutError as exc:
            server.frozen = True
            self.mark_stale(server, f"not resumed: {exc}")
        finally:
            server.held -= 1
            if not server.held:
                self._held.discard(server)
        if server.state is ServerState.PAUSED and not server.held and not server.frozen:
            self.set_state(server, ServerState.READY)

    async def _resume_last_held(self, server: Server) -> None:
        async with server.pause_lock:
            if server.held == 1 and server in self._held and not server.frozen:
                await self.control(server, self.dialect.resume(), self.config.control_timeout_s)

    async def resume_held(self) -> None:
        """Have every server generate that a pause scope still holds, but those that are frozen.

        For the end of a run: whoever holds them may never come to the end of its scope, and where
        it does, sends nothing. What a server answers does not matter: nobody looks after it now.
        """
        held, self._held = self._held, set()
        await self._each(self._resume_at_the_end, held, {})

    async def _resume_at_the_end(self, server: Server) -> None:
        async with server.pause_lock:
            if server.held and not server.frozen:
                await self.control(server, self.dialect.resume(), self.config.control_timeout_s)

    async def resume(self, server: Server) -> None:
        """Let a frozen server generate; one that a scope holds stays as it is, until that ends.

        Raises:
            RolloutError: If the server did not confirm it.
        """
        async with server.pause_lock:
            if not self.is_held(server):
                await self.control(server, self.dialect.resume(), self.config.control_timeout_s)
                server.frozen = False

    def _announce_end_of_pause(self) -> None:
        """Wake the probes of servers that could have come back meanwhile."""
        for server in self.servers:
            if server.state in OUT_OF_ORDER:
                self.set_state(server, server.state, server.reason)

    async def _each(
        self,
        act: Callable[[Server, *Ts], Awaitable[None]],
        servers: Iterable[Server],
        failed: dict[str, str],
        *args: *Ts,
    ) -> None:
        """Do the same with several servers at once; note who failed, and go on."""

        async def one(server: Server) -> None:
            try:
                await act(server, *args)
            except RolloutError as exc:
                failed[server.address] = str(exc)

        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(one, server)

    async def freeze(self, server: Server, reason: str) -> None:
        """Take a server whose weights are not to be used out, and give back what it was doing.

        A vLLM whose update failed answers the next generation with 500 and exits, so it must not
        generate once more: its requests are returned with the tokens they have, and it stays
        paused until a load succeeds. Where that can not be asked, its requests are cut off.
        Bounded by ``abort_timeout_s``; never raises for the server.
        """
        server.frozen = server.tainted = True
        self.mark_stale(server, reason)
        limit_s = self.config.abort_timeout_s
        with trio.move_on_after(limit_s), suppress(RolloutError):
            await self.halt(server, limit_s)
            return
        self.cut_off(server)

    async def halt(self, server: Server, limit_s: float) -> None:
        """Have a server return what it generates, and generate no more until it has weights.

        Raises:
            RolloutError: If it did not confirm that; it is taken to be frozen all the same.
        """
        server.frozen = server.tainted = True
        await self._pause(server, self.dialect.pause("abort"), limit_s)


def _can_pause(server: Server) -> bool:
    """Whether it may be generating, and can be asked to stop."""
    return server.state in (*IN_SERVICE, ServerState.STALE, ServerState.DRAINING)


def _may_still_start(error: RolloutError) -> bool:
    """Whether a server that answered so may yet become healthy: it says 503 while it loads."""
    return getattr(error, "status", None) in (429, 502, 503, 504)
