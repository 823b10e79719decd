"""What a transport is: requests go in as data, answers come out as data.

Every room above speaks to this protocol, so a whole run can be carried by the real pool, by a
user's own ``httpx.AsyncClient`` or by a fleet in memory on a virtual clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ..types import HttpRequest, HttpResponse, TimeLimits

RESPONSE_SIZE_BYTES_MAX = 64 * 2**20
"""Default bound of one answer: about 40 times what 32,768 tokens with log-probabilities take."""


class StreamedResponse(Protocol):
    """An answer whose body is still arriving; valid inside its ``async with`` only."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case name to value; a repeated header's values are joined with ``, ``."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces that arrive, none of them empty; the end means it is whole.

        Raises:
            TransportTimeout: ``idle_s`` passed without a piece, or ``total_s`` passed.
            TransportError: The server broke off before the end.
            ResponseTooLarge: More than ``size_bytes_max`` arrived.
        """


class Transport(Protocol):
    """Sends one request to one server. Any number of tasks may use one transport at once."""

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        """Send ``request`` and return the whole answer, whatever its status.

        Cancelled, it leaves no connection in use and sends nothing more; what the server does with
        a request that it already has is the server's business, so abort it by its id.

        Args:
            base_url: The server, ``http://host:port`` or ``https://…``, with or without a path.
            request: What to ask.
            limits: In seconds; each is named in the error that it causes.
            headers: Further headers, such as an authorization; they go before the request's own,
                and one that the request names itself is left out.
            size_bytes_max: Largest body taken; a larger one is refused while it arrives.

        Raises:
            ConnectFailed: No connection was made; nothing was sent.
            TransportTimeout: A limit passed; its ``limit`` says which.
            TransportError: The exchange broke off; ``request_sent`` says whether the server may
                have the request.
            ResponseTooLarge: The body is larger than ``size_bytes_max``.
            ProtocolError: What arrived is not HTTP.
            RolloutClosed: The transport was closed meanwhile.
            UsageError: The transport was closed before.
            ConfigError: ``base_url`` is not the address of a server.
            InvalidRequest: The request can not be written as HTTP; nothing was sent.
        """

    def stream(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        """Like ``request``, entered once status and headers are there, before the body is.

        Leaving before the body's end gives the connection up; leaving after it keeps it.
        """

    async def aclose(self) -> None:
        """Close every connection; requests in flight end with RolloutClosed. Harmless twice."""
