"""ServerKind: servers that are alike; a fleet is one or more kinds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..config import CAP_MAX
from ..errors import ConfigError

SERVERS_MAX = 100_000
"""Of one kind: each is a task and some records, so more would only be a slip of the pen."""
_KIND = re.compile(r"(\d+)x(\d+)@(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class ServerKind:
    """Servers that are alike.

    Args:
        count: How many, at least 1.
        slots: Answers that one decodes at once (vLLM's ``max_num_seqs``), at least 1.
        tokens_per_s: Of one answer, alone on its server; above 0.

    Raises:
        ConfigError: If a value is out of its range.
    """

    count: int
    slots: int
    tokens_per_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.count <= SERVERS_MAX:
            raise ConfigError(f"{self}: there are 1 to {SERVERS_MAX} servers of a kind")
        if not 1 <= self.slots <= CAP_MAX:
            raise ConfigError(f"{self}: a server has 1 to {CAP_MAX} slots")
        if not 0 < self.tokens_per_s < math.inf:
            raise ConfigError(f"{self}: tokens per second must be finite and above 0")

    def __str__(self) -> str:
        """As ``fleet`` reads it."""
        return f"{self.count}x{self.slots}@{self.tokens_per_s:g}"


def fleet(text: str) -> tuple[ServerKind, ...]:
    """Read a fleet, such as ``4x8@50,4x24@80``: count × slots @ tokens per second of one answer.

    Args:
        text: One or more kinds, with commas between them.

    Raises:
        ConfigError: If it is not written like that, or a value is out of its range.
    """
    return tuple(_kind(part.strip()) for part in text.split(","))


def _kind(text: str) -> ServerKind:
    found = _KIND.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text!r} is no kind of server; write count x slots @ tokens per second, as in 8x16@50"
        )
    return ServerKind(int(found[1]), int(found[2]), float(found[3]))
