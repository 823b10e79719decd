"""FaultKind: what can go wrong. Fault: one that did."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from ..checks import shown
from ..errors import ConfigError


class FaultKind(enum.StrEnum):
    """What can go wrong."""

    DEATH = "death"
    """The process dies: connections are reset, then refused, until it is started again."""
    RESTART = "restart"
    """It dies and is there again at once, with its first weights."""
    HANG = "hang"
    """It accepts and never answers, until it is started again."""
    SLOW = "slow"
    """It decodes at a fraction of its speed for a while."""
    PARTITION = "partition"
    """Nothing gets to some servers, and nothing from them, for a while; they do not notice."""
    RESET = "reset"
    """The connection is reset after some bytes of the answer."""
    TRUNCATED = "truncated"
    """The answer ends early and seems to be whole."""
    GARBAGE = "garbage"
    """In place of the answer, or of the rest of it, comes something else with status 200."""
    CLIENT_ERROR = "client_error"
    """A 4xx in place of an answer; the server never sees the request."""
    SERVER_ERROR = "server_error"
    """A 5xx in place of an answer; the server never sees the request."""
    LATE = "late"
    """The answer is held back."""
    LOST_ABORT = "lost_abort"
    """The server does not notice that a client left, and its abort is answered and not done, or
    not answered at all."""
    FAILED_LOAD = "failed_load"
    """Weights can not be read. vLLM dies of its next decode step then."""
    HALF_LOAD = "half_load"
    """An error after some tensors were replaced, or after all were."""
    WRONG_VERSION = "wrong_version"
    """Weights get another label than was asked for, or keep the old one."""


class Fault(NamedTuple):
    """One fault that happened.

    Args:
        time_s: When, on trio's clock.
        server: The address of the server that it happened to.
        kind: What it was.
        detail: The rest, for a reader.
    """

    time_s: float
    server: str
    kind: FaultKind
    detail: str

    def __str__(self) -> str:
        return f"{self.time_s:10.3f} s  {self.server}  {self.kind.value}  {self.detail}".rstrip()


def kind_of(name: FaultKind | str) -> FaultKind:
    """Return the kind of that name.

    Raises:
        ConfigError: There is none.
    """
    try:
        return FaultKind(name)
    except ValueError:
        raise ConfigError(f"{shown(name)} is no fault; there are {', '.join(FaultKind)}") from None


AT_EXCHANGE: Final = (
    FaultKind.DEATH, FaultKind.RESTART, FaultKind.HANG, FaultKind.SLOW, FaultKind.PARTITION,
    FaultKind.RESET, FaultKind.TRUNCATED, FaultKind.GARBAGE, FaultKind.CLIENT_ERROR,
    FaultKind.SERVER_ERROR, FaultKind.LATE,
)  # fmt: skip
AT_LOAD: Final = (FaultKind.FAILED_LOAD, FaultKind.HALF_LOAD)
AT_LABEL: Final = (FaultKind.WRONG_VERSION,)
AT_DEPARTURE: Final = (FaultKind.LOST_ABORT,)
OUTAGES: Final = frozenset(
    {FaultKind.DEATH, FaultKind.RESTART, FaultKind.HANG, FaultKind.SLOW, FaultKind.PARTITION}
)
STATUSES: Final = {
    FaultKind.CLIENT_ERROR: (400, 404, 413, 422, 429),
    FaultKind.SERVER_ERROR: (503, 500, 502, 504),
}
