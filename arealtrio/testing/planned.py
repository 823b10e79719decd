"""Planned: faults that a test asks for, checked where it asks.

One that no event can fit would let a test pass without what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from ..checks import integer, shown, text
from ..errors import ConfigError
from .amounts import not_negative, positive, share
from .fault import AT_EXCHANGE, FaultKind, kind_of

if TYPE_CHECKING:
    from .server import SimulatedServer

_HOW: Final[Mapping[str, Callable[[str, object], float]]] = {
    "after_bytes": lambda name, value: integer(name, value, 0),
    "share": share,
    "seconds": not_negative,
    "status": lambda name, value: integer(name, value, 400, 599),
    "factor": positive,
}


class Planned:
    """Faults that a test asked for.

    Args:
        kind: What.
        server: To whom; None: to anybody.
        path: The request's path begins so.
        count: How many times.
        how: The rest; see ``Faults.plan``.

    Attributes:
        kind: What.
        count: How many are still to come.
        how: The rest.

    Raises:
        ConfigError: Nothing like that can happen.
    """

    def __init__(
        self,
        kind: FaultKind | str,
        server: SimulatedServer | str | None,
        path: str,
        count: int,
        how: Mapping[str, float],
    ) -> None:
        self.kind = kind_of(kind)
        self.count = integer("count", count, 1)
        self.how = {name: _checked(name, value) for name, value in how.items()}
        self._server = server
        self._address = None if server is None else _address_of(server)
        self._path = text("path", path)
        self._check_path()
        if self._at_request and self.how.get("share") == 1:
            raise ConfigError("after a share of 1 nothing of an answer is left to go wrong")

    @property
    def _at_request(self) -> bool:
        return self.kind in AT_EXCHANGE

    def _check_path(self) -> None:
        if self._path and not self._at_request:
            raise ConfigError(f"{self.kind} happens at no request, so path says nothing of it")
        if self._path and not self._path.startswith("/"):
            raise ConfigError(f"path begins with /, as every request's, not {shown(self._path)}")

    def check_among(self, servers: Iterable[SimulatedServer]) -> None:
        """Make sure that it can happen to one of these servers.

        Raises:
            ConfigError: It is for another.
        """
        known = [known for one in servers for known in (one, one.address)]
        if self._server is not None and self._server not in known:
            addresses = ", ".join(one for one in known if isinstance(one, str))
            raise ConfigError(
                f"{shown(self._address)} is no server of this fleet; there are {addresses}"
            )

    def fits(self, server: SimulatedServer, kinds: Iterable[FaultKind], path: str) -> bool:
        """Whether it is to happen at this event.

        Args:
            server: That has the event.
            kinds: What can happen at it.
            path: Of the request; empty where there is none.
        """
        fits = self.kind in kinds and path.startswith(self._path)
        return fits and self._address in (None, server.address)


def _address_of(server: SimulatedServer | str) -> str:
    return text("server", getattr(server, "address", server))


def _checked(name: str, value: float) -> float:
    check = _HOW.get(name)
    if check is None:
        raise ConfigError(f"{shown(name)} says nothing of a fault; there are {', '.join(_HOW)}")
    return check(name, value)
