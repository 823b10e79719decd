"""SimulatedStream: an answer that arrives as it is made. Connection: what it arrives on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Self

import trio

from ..errors import ResponseTooLarge, TransportTimeout
from ..types import TimeLimits


class Connection:
    """One client's connection, until either side ends it.

    Attributes:
        is_cut: Whether the server has ended it, or never looks at it.
        end_wait: Ends what the client waits for now.
    """

    __slots__ = ("end_wait", "is_cut")

    def __init__(self) -> None:
        self.is_cut = False
        self.end_wait: Callable[[], None] = lambda: None

    def cut(self) -> None:
        """End it from the server's side."""
        self.is_cut = True
        self.end_wait()


class Pieces:
    """A body that is there already, in one piece."""

    def __init__(self, body: bytes) -> None:
        self._rest = body

    async def next(self) -> bytes:
        """The body, and then nothing."""
        await trio.lowlevel.checkpoint()
        piece, self._rest = self._rest, b""
        return piece


class SimulatedStream:
    """A ``StreamedResponse`` whose pieces are made while it is read, and their iterator.

    Not an async generator: those want closing, and a body left half-read needs none.

    Args:
        address: Of the server.
        status: The HTTP status.
        headers: Lower-case name to value.
        read: Gives the next piece; empty after the last. It raises TransportError if the connection
            breaks.
        limits: ``idle_s`` between two pieces, and ``total_s`` from the request on.
        deadline: When ``total_s`` passes.
        size_bytes_max: Largest body taken.

    Attributes:
        size_bytes: That have arrived.
        ended: Whether the end has.
    """

    def __init__(
        self,
        address: str,
        status: int,
        headers: Mapping[str, str],
        read: Callable[[], Awaitable[bytes]],
        limits: TimeLimits,
        deadline: float,
        size_bytes_max: int,
    ) -> None:
        self.status = status
        self.headers = headers
        self.size_bytes = 0
        self.ended = False
        self._address = address
        self._read = read
        self._limits = limits
        self._deadline = deadline
        self._size_bytes_max = size_bytes_max

    def chunks(self) -> AsyncIterator[bytes]:
        """See ``StreamedResponse``."""
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._next()
        self.ended = not piece
        if self.ended:
            raise StopAsyncIteration
        self.size_bytes += len(piece)
        if self.size_bytes > self._size_bytes_max:
            raise ResponseTooLarge(
                f"{self._address} streamed {self.size_bytes} bytes; "
                f"{self._size_bytes_max} are allowed"
            )
        return piece

    async def _next(self) -> bytes:
        idle = trio.current_time() + self._limits.idle_s
        with trio.move_on_at(min(idle, self._deadline)):
            return await self._read()
        name, seconds = "idle_s", self._limits.idle_s
        if self._deadline < idle:
            name, seconds = "total_s", self._limits.total_s
        raise TransportTimeout(
            f"{self._address}: nothing more came within {name} = {seconds:g} s", limit=name
        )
