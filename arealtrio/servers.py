"""ServerPool: the inference servers, who may take a request now, and one queue for those that wait.

What a server *is* lives here: its address, dialect, cap, weight version, and whether it is in
service. How its slots are handed out is in ``leases``, which of several is taken in ``scheduling``.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import trio

from .config import RolloutConfig
from .errors import (
    ConfigError,
    NoServerAvailable,
    RequestRejected,
    RolloutError,
    TransportError,
)
from .leases import HeldSlot, LeaseQueue
from .scheduling import DEFAULT_MAX_CONCURRENT_PER_SERVER, SchedulePolicy, make_policy
from .transport import Transport
from .types import HttpRequest, HttpResponse, PauseMode, TimeLimits
from .wire.dialect import Dialect, ServerInfo, ServerLoad

SETUP_INTERVAL_S = 0.25  # between two looks at a server that is not up yet


class ServerState(enum.Enum):
    """Whether a server takes requests, and if not, why."""

    JOINING = "joining"  # not yet heard from
    READY = "ready"
    PAUSED = "paused"  # told to stop generating; resumes at the end of the pause scope
    STALE = "stale"  # missed a weight update: no traffic until it has the current weights


@dataclass(slots=True, eq=False)
class Server:
    """One inference server, as the pool believes it to be.

    Args:
        address: Its base URL, and its name everywhere.
        info: What it said about itself.
        cap: Requests in flight at most, while it is in service.
        version: The weights it was last told to serve, and confirmed.
        state: Whether it takes requests.
        requests: Generation requests sent to it since the pool opened.
    """

    address: str
    info: ServerInfo = field(default_factory=ServerInfo)
    cap: int = DEFAULT_MAX_CONCURRENT_PER_SERVER
    version: int = 0
    state: ServerState = ServerState.JOINING
    requests: int = 0


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """One server's numbers at one moment."""

    address: str
    state: str
    version: int
    cap: int
    outstanding: int
    requests: int


class Lease:
    """A held slot on a server. Leaving the ``with`` block gives it back, synchronously, once.

    Args:
        server: Whose slot it is.
        slot: The slot.

    Attributes:
        version: The server's weight version when the lease was granted.
    """

    __slots__ = ("_slot", "server", "version")

    def __init__(self, server: Server, slot: HeldSlot) -> None:
        self.server = server
        self.version = server.version
        self._slot = slot

    def release(self) -> None:
        """Give the slot back.

        Raises:
            UsageError: If it was given back before; nothing is changed.
        """
        self._slot.release()

    def __enter__(self) -> Self:
        self._slot.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._slot.__exit__(exc_type, exc, traceback)


class ServerPool:
    """All servers of a run, the selection among them, and the one queue in front of them.

    Every decision is a synchronous function, so no task sees it half made.

    Args:
        config: Servers, caps, policy, time limits.
        dialect: How the servers speak.
        transport: How bytes get there. The pool does not close it.
        policy: Which server is next; None makes the one that ``config`` names.
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
        self.version = 0
        self._transport = transport
        self._headers = tuple(config.headers.items())
        self._policy = policy or make_policy(config.schedule_policy)
        self._servers = {address: Server(address) for address in config.servers}
        self._leases = LeaseQueue(self._policy, self._barred)
        self._newest_told = 0

    # --- what there is -----------------------------------------------------------------------

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order of the configuration."""
        return tuple(self._servers.values())

    @property
    def waiting(self) -> int:
        """Requests parked in the queue."""
        return len(self._leases)

    @property
    def newest_told(self) -> int:
        """The newest version any server was told to load: no token can be newer."""
        return self._newest_told

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """A snapshot of every server."""
        return tuple(
            ServerStatistics(
                address=server.address,
                state=server.state.value,
                version=server.version,
                cap=server.cap,
                outstanding=self._policy.outstanding(server.address),
                requests=server.requests,
            )
            for server in self.servers
        )

    def smallest(self, attribute: str) -> int | None:
        """The least of a limit that servers report (``max_model_len``, ``vocab_size``), if any."""
        values = [getattr(server.info, attribute) for server in self.servers]
        return min((value for value in values if value is not None), default=None)

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
    ) -> Lease:
        """Take a slot on the best server, waiting in the queue while none is free.

        Cancelling a waiter, at any moment, loses no slot: either it is taken out of the queue, or
        the slot was already handed over, is returned here, and released by the caller's ``with``.

        Args:
            exclude: Addresses not to use (a server that just failed this request).
            min_version: Only servers whose weights are at least this new.
            prefer: The server that holds the session's prefix; used if it has a free slot.

        Raises:
            RolloutClosed: If the pool was closed, before or during the wait.
            NoServerAvailable: If no server of the pool could ever be eligible.
        """
        if exclude.issuperset(self._servers):
            raise NoServerAvailable("every server of the pool is excluded for this request")
        slot = await self._leases.acquire(exclude, min_version, prefer)
        return Lease(self._servers[slot.address], slot)

    def _barred(self, exclude: frozenset[str], min_version: int) -> frozenset[str]:
        """What a request can not use: servers it excludes, and those older than it needs."""
        if min_version <= self.version:  # what is in service is at least that new
            return exclude
        return exclude | {s.address for s in self.servers if s.version < min_version}

    # --- service -----------------------------------------------------------------------------

    def put_in_service(self, server: Server, state: ServerState = ServerState.READY) -> None:
        """Set a server's state; only READY takes requests. Wakes whoever can use it now."""
        server.state = state
        self._policy.set_cap(server.address, server.cap if state is ServerState.READY else 0)
        self._leases.hand_over()

    def told(self, version: int) -> None:
        """Record that some server is about to be told to load ``version``."""
        self._newest_told = max(self._newest_told, version)

    def advance(self, version: int) -> None:
        """Make ``version`` the version of the pool, in either direction (recovery goes back)."""
        self.version = version
        self.told(version)
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
            headers=self._headers,
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

    async def health(self) -> dict[str, str | None]:
        """Ask every server at once whether it is alive: address to None, or to what is wrong."""
        found: dict[str, str | None] = {}

        async def ask(server: Server) -> None:
            try:
                await self._check_health(server)
                found[server.address] = None
            except RolloutError as exc:
                found[server.address] = str(exc)

        async with trio.open_nursery() as nursery:
            for server in self.servers:
                nursery.start_soon(ask, server)
        return found

    async def _check_health(self, server: Server) -> None:
        limits = self.config.control_limits(self.config.health_timeout_s)
        self.dialect.parse_health(await self.send(server, self.dialect.health(), limits))

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
            words = "; ".join(f"{address}: {last_words.get(address, 'no answer')}"
                              for address in missing)  # fmt: skip
            limit = f" within setup_timeout_s={self.config.setup_timeout_s:g}"
            raise NoServerAvailable(f"not ready{limit if scope.cancelled_caught else ''}: {words}")

    async def _join_one(
        self, server: Server, last_words: dict[str, str], all_of_them: trio.CancelScope
    ) -> None:
        while True:  # a server is outside: it is asked at a named interval until it is up
            try:
                await self._check_health(server)
                await self._learn(server)
                break
            except RolloutError as exc:
                last_words[server.address] = str(exc)
                if not isinstance(exc, TransportError) and not _may_still_start(exc):
                    last_words[server.address] = f"not usable: {exc}"
                    all_of_them.cancel()
            await trio.sleep(SETUP_INTERVAL_S)
        self.put_in_service(server)

    async def _learn(self, server: Server) -> None:
        limits = self.config.control_limits(self.config.control_timeout_s)
        answers = [await self.send(server, ask, limits) for ask in self.dialect.discover()]
        server.info = self.dialect.parse_discover(answers)
        configured = self.config.cap_of(server.address)
        server.cap = configured or server.info.max_concurrency or DEFAULT_MAX_CONCURRENT_PER_SERVER
        server.version = self.version
        if server.info.weight_version != self.version:
            # Without it the first tokens would carry the server's own word ("default"), and their
            # version would be a belief.
            await self.label(server, self.version)

    async def label(self, server: Server, version: int) -> None:
        """Set the label of the weights a server has. One without such a route keeps its word."""
        try:
            request = self.dialect.label_weights(version)
            await self.control(server, request, self.config.control_timeout_s)
        except RequestRejected as exc:
            if exc.status not in (404, 405):
                raise

    # --- pausing -----------------------------------------------------------------------------

    @asynccontextmanager
    async def paused(self, mode: PauseMode = "keep") -> AsyncIterator[dict[str, str]]:
        """Stop generation on every server in service, for the length of the block.

        Every server that was asked is always resumed, also when the block raises or is cancelled,
        within ``control_timeout_s``; one that can not be resumed becomes stale. Nothing new is
        sent to a server from before it is paused until after it is resumed.

        Args:
            mode: ``keep`` freezes requests and lets them go on (with the new weights, if they
                changed); ``abort`` returns them with what they have; ``wait`` lets them finish.

        Yields:
            The servers that could not be paused: address to what went wrong.
        """
        servers = [s for s in self.servers if s.state in (ServerState.READY, ServerState.STALE)]
        failed: dict[str, str] = {}
        try:
            for server in servers:
                if server.state is ServerState.READY:
                    self.put_in_service(server, ServerState.PAUSED)
            await self._each(servers, self.dialect.pause(mode), failed)
            yield failed
        finally:
            with trio.CancelScope(shield=True):  # each request is bounded by control_timeout_s
                await self._resume(servers)

    async def _resume(self, servers: Sequence[Server]) -> None:
        failed: dict[str, str] = {}
        await self._each(servers, self.dialect.resume(), failed)
        for server in servers:
            if server.address in failed:
                server.state = ServerState.STALE  # it may well be frozen still
            elif server.state is ServerState.PAUSED:
                self.put_in_service(server)

    async def _each(
        self, servers: Sequence[Server], request: HttpRequest, failed: dict[str, str]
    ) -> None:
        """Send one control request to several servers at once; note who failed, and go on."""

        async def one(server: Server) -> None:
            try:
                await self.control(server, request, self.config.control_timeout_s)
            except RolloutError as exc:
                failed[server.address] = str(exc)

        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(one, server)


def _may_still_start(error: RolloutError) -> bool:
    """Whether a server that answered so may yet become healthy: it says 503 while it loads."""
    return getattr(error, "status", None) in (429, 502, 503, 504)
