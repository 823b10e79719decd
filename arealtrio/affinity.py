"""Affinity: which server holds the prefix of a session in its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Affinity:
    """Remembers each session's home: the server that last began to generate for it.

    It only says who would be best. Nobody waits for a home without a free slot: the request goes
    where least is outstanding, and the session moves there, since that server has the prefix now.
    What is said of a server that left is forgotten when it is next asked for.

    Args:
        size: Sessions remembered, the least recently used forgotten first; 0 remembers none.
        serves: Whether the server of an address is in service.

    Attributes:
        hits: Requests that ran at their session's home.
        spills: Requests that found their home in service and full, and ran elsewhere.
        moves: Sessions that got another home: by a spill, because theirs had left, or because a
            request of theirs went on elsewhere.
    """

    def __init__(self, size: int, serves: Callable[[str], bool]) -> None:
        self.hits = 0
        self.spills = 0
        self.moves = 0
        self._size = size
        self._serves = serves
        self._homes: OrderedDict[str, str] = OrderedDict()  # session -> address; last used last

    def __len__(self) -> int:
        """Sessions remembered."""
        return len(self._homes)

    def home(self, session: str | None) -> str | None:
        """The server to prefer for a session; None where there is none in service."""
        address = None if session is None else self._homes.get(session)
        return address if address is not None and self._serves(address) else None

    def follow(self, session: str | None, address: str) -> None:
        """Note that a session's request ended elsewhere than it began: its prefix is there now."""
        if session is not None and self._homes.get(session, address) != address:
            self.moves += 1
            self._homes[session] = address

    def settle(self, session: str | None, address: str) -> None:
        """Note where a session's request runs."""
        if session is None or not self._size:
            return
        previous = self._homes.get(session)
        if previous == address:
            self.hits += 1
        elif previous is not None:
            self.moves += 1
            self.spills += self._serves(previous)
        self._homes[session] = address
        self._homes.move_to_end(session)
        if len(self._homes) > self._size:
            self._homes.popitem(last=False)
