"""A few numbers out of a Prometheus page, without a parser for the other thousand lines.

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

_LARGEST = 1e300  # so that a page's samples can be added up


@lru_cache(maxsize=16)
def _samples(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """Match ``name{labels} value timestamp`` lines; labels may hold anything but a line's end."""
    alternatives = "|".join(map(re.escape, names))
    return re.compile(
        rf"^({alternatives})(?:\{{.*\}})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*$".encode(), re.MULTILINE
    )


def read_samples(
    response: HttpResponse, server: str, names: Mapping[str, bool]
) -> dict[str, list[float]]:
    """Read each metric's values, one for each set of labels (engines, models, finish reasons).

    Args:
        response: The answer to ``GET /metrics``.
        server: Kind of the server, for the messages.
        names: Metric name to whether it must be there; one that need not be has no values then,
            since SGLang shows a counter only once it was raised.

    Returns:
        A list for each of ``names``.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: If a metric that must be there is not, or a value is not a finite number.
    """
    check_status(response, server)
    values: dict[str, list[float]] = {name: [] for name in names}
    for match in _samples(tuple(names)).finditer(response.body):
        name = match[1].decode()
        values[name].append(_number(match[2], name, server))
    for name, required in names.items():
        if required and not values[name]:
            raise ProtocolError(
                f"expected metric {name} from {server}, got {kind_of_body(response)} without it"
            )
    return values


def _number(text: bytes, name: str, server: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise ProtocolError(f"expected a number as metric {name} from {server}") from exc
    if not abs(value) <= _LARGEST:
        raise ProtocolError(f"expected a finite number as metric {name} from {server}")
    return value
