"""Server: one inference server, as the pool believes it to be, and the states it can be in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import TracebackType

import trio

from .errors import TransportError
from .wire.dialect import ServerInfo


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
        cap_known: Somebody named its cap, or it was asked: a cap of 0 is one, too.
        version: The weights it was last told to serve, and confirmed.
        told: The newest it was told to load, confirmed or not.
        labelled: It carries a label that we gave it, so what it reports can be held to that.
        label_seen: It told a label since then: one that tells none after that is another process.
        started: When its process started, in seconds since 1970, where it tells that and no label.
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
        loading: It has told no label since weights were sent to it. If it was restarted, nobody
            knows whether before or after them.
        taking: An update is being brought to it: nobody brings it what was before that.
        update: Which update it took last. See ``ServerPool.update``.
        base_update: Which gave it the weights of its base model, without adapters.
        ungrouped: It was added, or started again, since a weights group met, so it is in none.
        asleep: The memory that it let go of, by the dialect's tags.
        unwoken: The memory that it was to take back and did not confirm to have, by tag: whether it
            may have it all the same.
        held: Pause scopes that hold it now.
        trial_cap: Requests it may have while it proves itself after a failure; None: its cap.
        pressure_cap: Requests it may have while it is short of cache; None: its cap.
    """

    address: str
    info: ServerInfo = field(default_factory=ServerInfo)
    cap: int = 0
    cap_known: bool = False
    version: int = 0
    told: int = 0
    labelled: bool = False
    label_seen: bool = False
    started: float | None = None
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
    loading: bool = False
    taking: bool = False
    update: int = 0
    base_update: int = 0
    ungrouped: bool = False
    asleep: set[str] = field(default_factory=set)
    unwoken: dict[str, bool] = field(default_factory=dict)
    held: int = 0
    trial_cap: int | None = None
    pressure_cap: int | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    emptied: trio.Event | None = None  # of those who wait until nothing is in flight on it
    control_lock: trio.Lock = field(default_factory=trio.Lock)  # one weight load at a time
    pause_lock: trio.Lock = field(default_factory=trio.Lock)  # pauses and resumes land in order
    restoring: trio.CancelScope | None = None  # of the probe under way; an update supersedes it
    in_flight: dict[trio.CancelScope, None] = field(default_factory=dict)  # oldest first

    def tells_label(self, version: int | None) -> None:
        """Note the label that it reports, if any, while nobody sends it weights."""
        if version is not None:
            self.label_seen, self.loading = True, False

    @property
    def tells_restarts(self) -> bool:
        """Whether it would be found out, some time, if it were restarted."""
        return self.labelled or self.started is not None

    @property
    def allowed(self) -> int:
        """Requests it may have in flight now, where it is in service: the least of its caps."""
        caps = (self.cap, self.trial_cap, self.pressure_cap)
        return min(cap for cap in caps if cap is not None)

    def attached(self) -> Attachment:
        """Wait for an answer of the server in a ``with`` block. See ``Attachment``."""
        return Attachment(self)

    def cut_off(self) -> None:
        """End every wait for an answer of it: what it would answer is of no use any more."""
        for scope in tuple(self.in_flight):
            scope.cancel()


class Attachment:
    """A wait for an answer of a server, which lasts no longer than it is worth waiting for.

    A class and not a generator, because every request has one.

    Raises:
        TransportError: On leaving it, if the server was cut off meanwhile; the wait is cancelled.
    """

    __slots__ = ("_scope", "_server")

    def __init__(self, server: Server) -> None:
        self._server = server
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._server.in_flight[self._scope] = None
        self._scope.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        del self._server.in_flight[self._scope]
        caught = self._scope.__exit__(kind, error, traceback)
        if self._scope.cancelled_caught:
            raise TransportError(f"{self._server.address} was given up: {self._server.reason}")
        return bool(caught)


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
