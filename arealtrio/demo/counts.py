"""What the servers say of themselves: how many requests they have received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from ..errors import NoServerAvailable, ProtocolError, RolloutError
from ..transport import HttpTransport
from ..types import HttpRequest, TimeLimits
from ..wire import metrics

METRICS_TIMEOUT_S = 5.0
_REQUESTS_METRIC = "arealtrio_embedded:requests_total"


def requests_reported(addresses: Sequence[str]) -> dict[str, int]:
    """Ask each server how many generation requests it has received.

    Raises:
        NoServerAvailable: One does not answer, or is no embedded server.
    """
    return trio.run(_requests_reported, addresses)


async def _requests_reported(addresses: Sequence[str]) -> dict[str, int]:
    async with HttpTransport() as transport:
        return {url: await _ask(transport, url) for url in addresses}


async def _ask(transport: HttpTransport, url: str) -> int:
    limits, ask = TimeLimits.of(METRICS_TIMEOUT_S), HttpRequest("GET", "/metrics")
    try:
        page = await transport.request(url, ask, limits)
        samples = metrics.read_samples(page, "the server", {_REQUESTS_METRIC: True})
    except ProtocolError as exc:
        raise NoServerAvailable(
            f"server {url} is no embedded one; start one with: arealtrio serve"
        ) from exc
    except RolloutError as exc:
        raise NoServerAvailable(f"server {url} does not answer: {exc}") from exc
    return int(sum(samples[_REQUESTS_METRIC]))


def compared(
    requests: Mapping[str, int], before: Mapping[str, int], now: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Return each server's requests by the client's count and by its own.

    Args:
        requests: What the client sent, by address.
        before: What each server had received before it sent anything.
        now: What each has received.
    """
    return {
        address: {"requests": count, "requests_reported": now[address] - before[address]}
        for address, count in requests.items()
    }
