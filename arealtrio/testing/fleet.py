"""SimulatedFleet: inference servers in memory, reached through the ``Transport`` protocol."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, NoReturn

import trio

from ..checks import integer, items, shown
from ..errors import ConfigError, ConnectFailed, ResponseTooLarge, UsageError
from ..transport import RESPONSE_SIZE_BYTES_MAX
from ..types import HttpRequest, HttpResponse, TimeLimits
from .faults import Faults
from .lengths import Lengths, LogNormalLengths
from .server import SimulatedServer
from .settings import SimulatedServerSettings
from .stream import SimulatedStream
from .timetable import Timetable

DEFAULT_LENGTHS = LogNormalLengths.with_tail(median=40, p99=360, longest=2000)


class Exchange(NamedTuple):
    """One event of a trace: a request that a server got, or what became of it.

    Args:
        time_s: When, on trio's clock.
        server: Its address.
        request: Method and path.
        outcome: Empty for its arrival; else the status, the name of the error, or ``left`` where a
            client left a stream before its end.
        size_bytes: Of the request's body, or the answer's.
    """

    time_s: float
    server: str
    request: str
    outcome: str
    size_bytes: int


class SimulatedFleet:
    """A ``Transport`` whose servers are in memory, on trio's clock: no socket, no thread.

    Under ``trio.testing.MockClock(autojump_threshold=0)`` a whole training run takes milliseconds.
    Make one with ``open_fleet``. Everything it does follows from its seed and trio's schedule.

    Args:
        servers: One record for each server; their addresses are ``http://server-0``, ….
        lengths: Of the answers.
        seed: Of the lengths.
        faults: What goes wrong; None: nothing but what is asked for.
        traced: Whether to keep every exchange in ``trace``.

    Attributes:
        servers: The servers, in order.
        faults: What goes wrong.
        trace: What happened so far, where ``traced``.

    Raises:
        ConfigError: An argument is of another type, or a fault is planned for a server that is not
            there.
    """

    def __init__(
        self,
        servers: Sequence[SimulatedServerSettings],
        *,
        lengths: Lengths = DEFAULT_LENGTHS,
        seed: int = 0,
        faults: Faults | None = None,
        traced: bool = False,
    ) -> None:
        servers = _checked(servers, lengths, faults)
        rng = random.Random(seed)
        self.faults = faults or Faults.none()
        self._timetable = Timetable()
        self.servers = tuple(
            SimulatedServer(
                f"http://server-{index}", settings, lengths, rng, self.faults, self._timetable
            )
            for index, settings in enumerate(servers)
        )
        self.trace: list[Exchange] = []
        self._traced = traced
        self._by_address = {server.address: server for server in self.servers}
        self._closed = False
        self._nursery: trio.Nursery | None = None
        self.faults.bind(self.servers, self._call_later)

    @property
    def addresses(self) -> tuple[str, ...]:
        """For ``RolloutConfig(servers=…)``."""
        return tuple(self._by_address)

    def __iter__(self) -> Iterator[SimulatedServer]:
        return iter(self.servers)

    def start(self, nursery: trio.Nursery) -> None:
        """Let the servers run in a nursery; ``open_fleet`` does that."""
        self._nursery = nursery
        nursery.start_soon(self._timetable.run)

    def _call_later(self, seconds: float, function: Callable[[], None]) -> None:
        async def wait_and_call() -> None:
            await trio.sleep(seconds)
            function()

        if self._nursery is not None:
            self._nursery.start_soon(wait_and_call)

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        """See ``Transport.request``."""
        server = self._by_address.get(base_url) or await self._nobody(base_url)
        self._check_open()
        self._note(server, request, "", len(request.body))
        mishap = self.faults.on_exchange(server, request) if self.faults.active else None
        try:
            response = await server.request(request, limits, headers, mishap)
        except BaseException as exc:
            self._note(server, request, type(exc).__name__, 0)
            raise
        self._note(server, request, str(response.status), len(response.body))
        if len(response.body) > size_bytes_max:
            raise ResponseTooLarge(
                f"{base_url} answered {len(response.body)} bytes; {size_bytes_max} are allowed"
            )
        return response

    @asynccontextmanager
    async def stream(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AsyncIterator[SimulatedStream]:
        """See ``Transport.stream``. The pieces arrive as they are made."""
        server = self._by_address.get(base_url) or await self._nobody(base_url)
        self._check_open()
        self._note(server, request, "", len(request.body))
        mishap = self.faults.on_exchange(server, request) if self.faults.active else None
        size_bytes, outcome = 0, "left"
        try:
            async with server.stream(request, limits, headers, mishap, size_bytes_max) as stream:
                yield stream
                size_bytes = stream.size_bytes
                outcome = str(stream.status) if stream.ended else outcome
        except BaseException as exc:
            outcome = type(exc).__name__
            raise
        finally:
            self._note(server, request, outcome, size_bytes)

    async def _nobody(self, base_url: str) -> NoReturn:
        self._check_open()
        await trio.lowlevel.checkpoint()
        raise ConnectFailed(f"no simulated server has the address {base_url}")

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the simulated fleet is closed")

    async def aclose(self) -> None:
        """Refuse every further request. Those in flight end with the tasks that wait for them."""
        self._closed = True
        await trio.lowlevel.checkpoint()

    def _note(
        self, server: SimulatedServer, request: HttpRequest, outcome: str, size_bytes: int
    ) -> None:
        if self._traced:
            what = f"{request.method} {request.path}"
            self.trace.append(
                Exchange(trio.current_time(), server.address, what, outcome, size_bytes)
            )


def _checked(
    servers: Sequence[SimulatedServerSettings], lengths: Lengths, faults: Faults | None
) -> tuple[SimulatedServerSettings, ...]:
    """The servers' records; raises ConfigError where an argument is of another type."""
    records: list[SimulatedServerSettings] = []
    for record in items("servers", servers, "SimulatedServerSettings"):
        if not isinstance(record, SimulatedServerSettings):
            raise ConfigError(f"a server is given as SimulatedServerSettings, not {shown(record)}")
        records.append(record)
    if isinstance(lengths, type) or not callable(getattr(lengths, "draw", None)):
        raise ConfigError(f"lengths must be such as FixedLengths(100), not {shown(lengths)}")
    if faults is not None and not isinstance(faults, Faults):
        raise ConfigError(f"faults must be Faults or None, not {shown(faults)}")
    return tuple(records)


@asynccontextmanager
async def open_fleet(
    servers: int | Sequence[SimulatedServerSettings] = 4,
    *,
    lengths: Lengths = DEFAULT_LENGTHS,
    seed: int = 0,
    faults: Faults | None = None,
    traced: bool = False,
) -> AsyncIterator[SimulatedFleet]:
    """Run simulated servers for the length of the block.

    Args:
        servers: How many default ones, or one record for each.
        lengths: Of the answers.
        seed: Of the lengths.
        faults: What goes wrong, in ``fleet.faults`` afterwards; None: nothing unasked.
        traced: Whether to keep every exchange in ``fleet.trace``.

    Raises:
        ConfigError: ``servers`` is neither, another argument is of another type, or a fault is
            planned for a server that is not there.
    """
    if not isinstance(servers, Iterable):
        servers = [SimulatedServerSettings()] * integer("servers", servers, 0)
    fleet = SimulatedFleet(servers, lengths=lengths, seed=seed, faults=faults, traced=traced)
    left_with: BaseException | None = None
    async with trio.open_nursery() as nursery:
        fleet.start(nursery)
        try:
            yield fleet
        except BaseException as exc:  # noqa: BLE001 - raised again below, unwrapped
            left_with = exc
        nursery.cancel_scope.cancel()
    if left_with is not None:
        raise left_with
