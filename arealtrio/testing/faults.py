"""Faults: what goes wrong in a simulated fleet, when, and what did.

Chance is drawn at events (a request arrives, weights are loaded, a client leaves), from one stream
of numbers for each server, and never from time. So the same seed and the same order of events give
the same faults, whatever the clock is, and more servers leave the faults of the others as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

import trio

from ..checks import finite, integer, items, shown
from ..errors import ConfigError, UsageError
from ..types import HttpRequest
from .amounts import not_negative, share
from .fault import (
    AT_DEPARTURE,
    AT_EXCHANGE,
    AT_LABEL,
    AT_LOAD,
    OUTAGES,
    STATUSES,
    Fault,
    FaultKind,
    kind_of,
)
from .mishap import Mishap
from .planned import Planned

if TYPE_CHECKING:
    from .server import SimulatedServer


_EVENTS: Final = (AT_EXCHANGE, AT_LOAD, AT_LABEL, AT_DEPARTURE)

MILD: Final = MappingProxyType({
    FaultKind.DEATH: 0.0005, FaultKind.SLOW: 0.001, FaultKind.RESET: 0.002,
    FaultKind.SERVER_ERROR: 0.002, FaultKind.LATE: 0.004,
})  # fmt: skip
ALL: Final = MappingProxyType({
    FaultKind.DEATH: 0.002, FaultKind.RESTART: 0.001, FaultKind.HANG: 0.001,
    FaultKind.SLOW: 0.002, FaultKind.PARTITION: 0.001, FaultKind.RESET: 0.004,
    FaultKind.TRUNCATED: 0.002, FaultKind.GARBAGE: 0.002, FaultKind.CLIENT_ERROR: 0.001,
    FaultKind.SERVER_ERROR: 0.004, FaultKind.LATE: 0.004, FaultKind.LOST_ABORT: 0.2,
    FaultKind.FAILED_LOAD: 0.05, FaultKind.HALF_LOAD: 0.05, FaultKind.WRONG_VERSION: 0.05,
})  # fmt: skip


class Faults:
    """Decides what goes wrong in one fleet.

    Three ways lead to a fault: chance (``rates``), a plan (``plan``), and a call, here
    (``partition``) or on a server (``die``, ``hang``, ``restart``, ``slow_down``).

    Args:
        seed: Of all its chance. The same seed and the same events give the same faults.
        rates: The probability of each kind, in [0, 1], at every event that it can happen at: a
            request that a server gets; for ``failed_load`` and ``half_load`` a load of weights, for
            ``wrong_version`` a labelling, for ``lost_abort`` a client that leaves before its
            generation ends. Kinds that are not named do not happen.
        outage_s: Shortest and longest seconds until a dead or hung server is started again, and
            that a slow one stays slow or a partition lasts; a finite pair above 0.
        late_s: Shortest and longest seconds that a late answer is held back.
        spare: So many servers chance leaves undisturbed at any moment: none of the kinds that put a
            server out of order for a while begins where fewer would be left. With at least 1, what
            waits for a healthy server always gets one.

    Attributes:
        log: The faults that happened, in order.

    Raises:
        ConfigError: A rate or a range is not one, or the rates at one event exceed 1 together.

    Example:
        ``open_fleet(8, seed=7, faults=Faults(7, rates={"death": 0.01, "reset": 0.02}))``
    """

    def __init__(
        self,
        seed: int = 0,
        rates: Mapping[FaultKind, float] | Mapping[str, float] | None = None,
        *,
        outage_s: tuple[float, float] = (1.0, 30.0),
        late_s: tuple[float, float] = (0.1, 20.0),
        spare: int = 1,
    ) -> None:
        self.seed = seed
        self.rates = _checked({} if rates is None else rates)
        self.log: list[Fault] = []
        self._restarts_broken = FaultKind.FAILED_LOAD in self.rates  # also after ``stop``
        self._outage_s = _range("outage_s", outage_s)
        self._late_s = _range("late_s", late_s)
        self._spare = integer("spare", spare, 0)
        self._planned: list[Planned] = []
        self._streams: dict[str, random.Random] = {}
        self._servers: tuple[SimulatedServer, ...] = ()
        self._later: Callable[[float, Callable[[], None]], None] = lambda *_: None
        self._stopped = trio.Event()
        self._quiet = 0

    @classmethod
    def none(cls) -> Self:
        """Nothing goes wrong by chance."""
        return cls()

    @classmethod
    def mild(cls, seed: int) -> Self:
        """What a well-kept cluster does to a run: deaths, resets, 5xx, slow and late answers."""
        return cls(seed, MILD)

    @classmethod
    def all(cls, seed: int) -> Self:
        """Every kind, far more often than in life."""
        return cls(seed, ALL)

    def __repr__(self) -> str:
        rates = {kind.value: rate for kind, rate in self.rates.items()}
        return f"Faults({self.seed}, rates={rates})"

    @property
    def active(self) -> bool:
        """Whether anything can still go wrong by chance or by plan."""
        return bool((self.rates and not self._quiet) or self._planned)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let nothing go wrong by chance for the length of the block."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def counts(self) -> dict[str, int]:
        """How often each kind happened, by its name."""
        counted = dict.fromkeys((kind.value for kind in FaultKind), 0)
        for fault in self.log:
            counted[fault.kind.value] += 1
        return counted

    # --- by hand -----------------------------------------------------------------------------

    def plan(
        self,
        kind: FaultKind | str,
        *,
        server: SimulatedServer | str | None = None,
        path: str = "",
        count: int = 1,
        **how: float,
    ) -> None:
        """Let a fault happen at the next events that it fits; planned faults go before chance.

        Args:
            kind: What.
            server: To whom, by itself or by address; None: to whoever has the event.
            path: The request's path begins so. Loads, labels and departures have none.
            count: How many times, at least 1.
            how: Of ``Mishap``: ``after_bytes``, ``share``, ``seconds``, ``status``. ``seconds`` is
                also how long an outage lasts; without it, a planned one lasts until somebody ends
                it. ``share`` is also that of the weights which a ``half_load`` replaces before it
                fails: 0.5 leaves some old, 1 is an error after all of them. ``factor``, above 0: by
                how much a slow server is slower.

        Raises:
            ConfigError: It can never happen: there is no such kind, server or ``how``, or a value
                is out of its range. For which server it is, is looked at as soon as there is a
                fleet.
        """
        planned = Planned(kind, server, path, count, how)
        if self._servers:
            planned.check_among(self._servers)
        self._planned.append(planned)

    def partition(
        self, *servers: SimulatedServer | str, for_s: float | None = None
    ) -> tuple[SimulatedServer, ...]:
        """Cut servers off: nothing gets to them, and nothing from them.

        They do not notice: what they work on goes on, also after its client has given up, and
        answers that were made meanwhile arrive afterwards, if somebody still waits.

        Args:
            servers: Which, by themselves or by address.
            for_s: Seconds, at least 0; None: until ``heal``.

        Returns:
            The servers.

        Raises:
            ConfigError: ``for_s`` is no finite number of seconds.
            UsageError: A server is not of the fleet.
        """
        if for_s is not None:
            not_negative("for_s", for_s)
        chosen = tuple(self._find(server) for server in servers)
        for server in chosen:
            server.isolate()
            self.note(server, FaultKind.PARTITION, _for(for_s))
            self._end_later(for_s, server.rejoin, partial(getattr, server, "partitions"))
        return chosen

    def heal(self, *servers: SimulatedServer | str) -> None:
        """End the partition of these servers, or of all."""
        for server in [self._find(server) for server in servers] or self._servers:
            server.rejoin()

    def stop(self) -> None:
        """Let nothing go wrong any more, and mend every server, at once.

        Partitions end, dead and hung servers are started, slow ones get their speed back, answers
        that were held back arrive. Weights that were loaded by half, and wrong labels, stay for the
        client to put right: that is what a test wants to see.
        """
        self.rates = {}
        self._planned.clear()
        self._stopped.set()
        for server in self._servers:
            server.mend()

    # --- chance, at each event ---------------------------------------------------------------

    def bind(
        self,
        servers: Iterable[SimulatedServer],
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        """Belong to a fleet; the fleet calls it.

        Args:
            servers: Of the fleet.
            later: Calls a function after so many seconds.

        Raises:
            ConfigError: A fault is planned for a server that the fleet has not.
            UsageError: It belongs to another fleet.
        """
        if self._servers:
            raise UsageError("these faults belong to another fleet; make one Faults for each")
        servers = tuple(servers)
        for planned in self._planned:
            planned.check_among(servers)
        self._servers = servers
        self._later = later

    def on_exchange(self, server: SimulatedServer, request: HttpRequest) -> Mishap | None:
        """A request is on its way: do to the server what is due, and return what the answer gets.

        A partition, a death, … acts before the request arrives.
        """
        drawn = self._draw(server, AT_EXCHANGE, request.path)
        if drawn is None:
            return None
        kind, how = drawn
        if kind in OUTAGES:
            self._put_out_of_order(server, kind, how)
            return None
        return self._mishap(server, kind, how)

    def on_load(self, server: SimulatedServer) -> float | None:
        """Weights are about to be loaded: say what share of them will be before that fails.

        Returns:
            0: they can not be read; 1: all are replaced, and the answer is an error all the same;
            between: some are. None: it does not fail.
        """
        drawn = self._draw(server, AT_LOAD)
        if drawn is None:
            return None
        kind, how = drawn
        share = 0.0 if kind is FaultKind.FAILED_LOAD else how.get("share", 0.5)
        self.note(server, kind, f"after {share:.0%} of the weights")
        return share

    def on_label(self, server: SimulatedServer, asked: str) -> str:
        """Weights are being labelled: return the label that they get."""
        drawn = self._draw(server, AT_LABEL)
        if drawn is None:
            return asked
        old = server.scheduler.weight_version
        ahead = f"{int(asked) + 1}" if asked.isdecimal() else "1"
        label = self._stream(server).choice([old, ahead])  # "default" is said by new processes only
        self.note(server, drawn[0], f"{label} for {asked}")
        return label

    def on_departure(self, server: SimulatedServer) -> bool:
        """A client left before its generation ended: say whether the server misses that."""
        drawn = self._draw(server, AT_DEPARTURE)
        if drawn is not None:
            self.note(server, drawn[0], "")
        return drawn is not None

    def on_lost_abort(self, server: SimulatedServer) -> bool:
        """An abort that is not done came: say whether it is answered all the same."""
        return self._stream(server).random() < 0.5

    def on_broken(self, server: SimulatedServer) -> None:
        """A server died of its weights: start it again some time, unless it was asked for."""
        if self._restarts_broken:
            seconds = self._stream(server).uniform(*self._outage_s)
            self.note(server, FaultKind.DEATH, f"of its weights, for {seconds:.3g} s")
            self._end_later(seconds, server.restart, partial(getattr, server, "outages"))

    async def hold(self, seconds: float) -> None:
        """Wait so long, or until ``stop``."""
        with trio.move_on_after(seconds):
            await self._stopped.wait()

    def note(self, server: SimulatedServer, kind: FaultKind, detail: str) -> None:
        """Log a fault that happened."""
        self.log.append(Fault(trio.current_time(), server.address, kind, detail))

    def _draw(
        self, server: SimulatedServer, kinds: tuple[FaultKind, ...], path: str = ""
    ) -> tuple[FaultKind, Mapping[str, float]] | None:
        if self._planned and (planned := self._next_planned(server, kinds, path)) is not None:
            return planned.kind, planned.how
        if not self.rates or self._quiet:
            return None
        at = self._stream(server).random()
        for kind in kinds:
            at -= self.rates.get(kind, 0.0)
            if at < 0:
                return (kind, self._how(server, kind)) if self._allowed(server, kind) else None
        return None

    def _next_planned(
        self, server: SimulatedServer, kinds: tuple[FaultKind, ...], path: str
    ) -> Planned | None:
        for planned in self._planned:
            if planned.fits(server, kinds, path):
                planned.count -= 1
                if not planned.count:
                    self._planned.remove(planned)
                return planned
        return None

    def _how(self, server: SimulatedServer, kind: FaultKind) -> dict[str, float]:
        """The rest of what chance decides."""
        stream = self._stream(server)
        if kind in OUTAGES:
            return {"seconds": stream.uniform(*self._outage_s), "factor": stream.uniform(2, 10)}
        if kind is FaultKind.HALF_LOAD:
            return {"share": stream.choice((0.5, 1.0))}
        return {
            "share": stream.random(),
            "seconds": stream.uniform(*self._late_s),
            "status": stream.choice(STATUSES.get(kind, (200,))),
        }

    def _allowed(self, server: SimulatedServer, kind: FaultKind) -> bool:
        """Whether enough servers are left undisturbed."""
        if kind not in OUTAGES or kind in (FaultKind.RESTART, FaultKind.SLOW):
            return True
        return sum(one.undisturbed for one in self._servers if one is not server) >= self._spare

    def _put_out_of_order(
        self, server: SimulatedServer, kind: FaultKind, how: Mapping[str, float]
    ) -> None:
        seconds = how.get("seconds")
        if kind is FaultKind.PARTITION:
            self.partition(*self._side_of(server), for_s=seconds)
            return
        self.note(server, kind, "" if kind is FaultKind.RESTART else _for(seconds))
        if kind is FaultKind.RESTART:
            server.restart()
        elif kind is FaultKind.SLOW:
            server.slow_down(how.get("factor", 4.0))
            self._end_later(seconds, server.speed_up, partial(getattr, server, "paces"))
        else:
            (server.die if kind is FaultKind.DEATH else server.hang)()
            self._end_later(seconds, server.restart, partial(getattr, server, "outages"))

    def _side_of(self, server: SimulatedServer) -> list[SimulatedServer]:
        """A server, and by chance some others, as many as may be missed."""
        others = [one for one in self._servers if one is not server and one.undisturbed]
        most = max(0, len(others) - self._spare)
        if not self.rates or not most:
            return [server]
        stream = self._stream(server)
        return [server, *stream.sample(others, stream.randint(0, min(most, len(others) // 3)))]

    def _mishap(self, server: SimulatedServer, kind: FaultKind, how: Mapping[str, float]) -> Mishap:
        status = int(how.get("status", STATUSES.get(kind, (200,))[0]))
        after = how.get("after_bytes")
        return Mishap(
            kind,
            server.address,
            happened=lambda detail: self.note(server, kind, detail),
            hold=self.hold,
            after_bytes=None if after is None else int(after),
            share=how.get("share", 0.5),
            seconds=how.get("seconds", self._late_s[1]),
            status=status,
        )

    def _end_later(
        self, seconds: float | None, end: Callable[[], None], changes: Callable[[], int]
    ) -> None:
        """End what is wrong with a server in time, unless it ended meanwhile and began again.

        Args:
            seconds: None: somebody else will.
            end: Ends it.
            changes: Counts what begins or ends of its kind. Of another kind something may begin
                meanwhile, and makes no difference: a server may die while it is cut off.
        """
        if seconds is None:
            return
        before = changes()

        def end_it() -> None:
            if changes() == before:
                end()

        self._later(seconds, end_it)

    def _stream(self, server: SimulatedServer) -> random.Random:
        stream = self._streams.get(server.address)
        if stream is None:
            stream = random.Random(f"{self.seed} faults {server.address}")
            self._streams[server.address] = stream
        return stream

    def _find(self, server: SimulatedServer | str) -> SimulatedServer:
        for one in self._servers:
            if server in (one, one.address):
                return one
        raise UsageError(f"{server} is not of the fleet that these faults belong to")


def _checked(rates: Mapping[FaultKind, float] | Mapping[str, float]) -> dict[FaultKind, float]:
    if not isinstance(rates, Mapping):
        raise ConfigError(f"rates are probabilities by kind of fault, not {shown(rates)}")
    checked = {kind_of(name): share(f"the rate of {name}", rate) for name, rate in rates.items()}
    for kinds in _EVENTS:
        if sum(checked.get(kind, 0.0) for kind in kinds) > 1:
            raise ConfigError(f"the rates of {', '.join(kinds)} are more than 1 together")
    return {kind: rate for kind, rate in checked.items() if rate}


def _range(name: str, pair: tuple[float, float]) -> tuple[float, float]:
    ends = [finite(name, end) for end in items(name, pair, "two numbers of seconds")]
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise ConfigError(f"{name} is a shortest and a longest number of seconds above 0")
    return ends[0], ends[1]


def _for(seconds: float | None) -> str:
    return "" if seconds is None else f"for {seconds:.3g} s"
