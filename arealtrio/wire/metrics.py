"""Three numbers out of a Prometheus page, without a parser for the other thousand lines.

A page of either server is about 70 KB, asked for at every health interval of every server, so it is
searched by one compiled expression instead of being turned into objects.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from ..errors import ProtocolError
from ..types import HttpResponse
from .status import check_status, kind_of_body


@lru_cache(maxsize=16)
def _samples(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """Match ``name{labels} value timestamp`` lines; labels may hold anything but a line's end."""
    alternatives = "|".join(map(re.escape, names))
    return re.compile(
        rf"^({alternatives})(?:\{{.*\}})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*$".encode(), re.MULTILINE
    )


def sum_samples(response: HttpResponse, server: str, names: Mapping[str, bool]) -> tuple[int, ...]:
    """Add up each metric over all its labels (engines, models, finish reasons).

    Args:
        response: The answer to ``GET /metrics``.
        server: Kind of the server, for the messages.
        names: Metric name to whether it must be there; a counter that need not be counts as 0,
            since SGLang shows a counter only once it was raised.

    Returns:
        The sums, in the order of ``names``.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: If a metric that must be there is not, or a value is not a number.
    """
    check_status(response, server)
    sums: dict[str, float] = {}
    for match in _samples(tuple(names)).finditer(response.body):
        name = match[1].decode()
        sums[name] = sums.get(name, 0.0) + _number(match[2], name, server)
    for name, required in names.items():
        if required and name not in sums:
            raise ProtocolError(
                f"expected metric {name} from {server}, got {kind_of_body(response)} without it"
            )
    return tuple(int(sums.get(name, 0.0)) for name in names)


def _number(text: bytes, name: str, server: str) -> float:
    try:
        value = float(text)
        int(value)
    except (ValueError, OverflowError) as exc:
        raise ProtocolError(f"expected a number as metric {name} from {server}") from exc
    return value
