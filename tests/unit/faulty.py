"""A transport in front of simulated servers that lets single requests go wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import msgspec
import trio

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import ConnectFailed
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    open_fleet,
)
from arealtrio.transport import RESPONSE_SIZE_BYTES_MAX
from arealtrio.types import HttpRequest, HttpResponse, TimeLimits

Fault: TypeAlias = Callable[[str, HttpRequest], HttpResponse | None]


class Faulty:
    """A transport in front of a fleet: ``fault`` may answer, or raise, in a server's place.

    ``delay_s`` says how long a request is held back before.
    """

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        self.asked: list[tuple[str, str]] = []
        self.fault: Fault = lambda *_: None
        self.delay_s: Callable[[str], float] = lambda _: 0.0  # by path

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        self.asked.append((base_url, request.path))
        await trio.sleep(self.delay_s(request.path))
        answer = self.fault(base_url, request)
        if answer is not None:
            return answer
        return await self.fleet.request(
            base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
        )

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        return self.fleet.stream(*args, **kwargs)

    async def aclose(self) -> None:
        await self.fleet.aclose()


def refuses(path: str, *addresses: str, status: int = 400) -> Fault:
    """Answer an error to every request of a path, on these servers or on all."""
    error = {"message": "no", "type": "x", "param": None, "code": status}
    body = msgspec.json.encode({"error": error})

    def fault(address: str, request: HttpRequest) -> HttpResponse | None:
        if request.path.startswith(path) and (not addresses or address in addresses):
            return HttpResponse(status, {"content-type": "application/json"}, body)
        return None

    return fault


def refuses_to_load(*addresses: str) -> Fault:
    return refuses("/collective_rpc", *addresses)


def unreachable(*addresses: str, path: str = "") -> Fault:
    def fault(address: str, request: HttpRequest) -> HttpResponse | None:
        if address in addresses and request.path.startswith(path):
            raise ConnectFailed(f"{address} refused the connection")
        return None

    return fault


@asynccontextmanager
async def faulty_engine(
    servers: int = 2,
    load_time_s: float = 0.0,
    length: int = 100,
    named: int | None = None,
    fault: Fault | None = None,
    **config: Any,
) -> AsyncIterator[tuple[RemoteEngine, Faulty]]:
    """Connect to simulated servers.

    Args:
        servers: How many there are.
        load_time_s: Of their weights.
        length: Of their answers, in tokens.
        named: How many of them the configuration names; None: all.
        fault: In force from the start.
        config: Of the run.
    """
    settings = [SimulatedServerSettings(load_time_s=load_time_s)] * servers
    async with open_fleet(settings, lengths=FixedLengths(length)) as fleet:
        faulty = Faulty(fleet)
        faulty.fault = fault or faulty.fault
        chosen = RolloutConfig(servers=fleet.addresses[:named], **config)
        async with open_engine(chosen, transport=faulty) as engine:
            yield engine, faulty
