"""The transport over our own connection pool."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from ..checks import finite, integer
from ..errors import (
    ConfigError,
    ConnectFailed,
    RolloutClosed,
    TransportError,
    TransportTimeout,
    UsageError,
)
from ..types import HttpRequest, HttpResponse, TimeLimits
from .connection import RECEIVE_SIZE_BYTES, Connection, connect, lacks_descriptors
from .exchange import Exchange
from .interface import RESPONSE_SIZE_BYTES_MAX, StreamedResponse
from .origin import Origin
from .pool import Pool, TransportStatistics

ORIGINS_MAX: Final = 4096
"""Parsed addresses remembered."""


class HttpTransport:
    """HTTP/1.1 with a connection per request in flight; a Transport.

    The cost of a request does not depend on how many are in flight: no queue inside (admission and
    server caps bound the requests above), idle connections last in first out, parsing by llhttp.
    A request is sent a second time only if no byte of it went out the first time, on a kept
    connection that was dead; anything else could generate twice. A cancelled or failed exchange
    closes its connection, at once and without an await.

    Use as ``async with HttpTransport() as transport:`` or call ``aclose()``.

    Args:
        ssl_context: For https; None: the system's trust store, made at the first https request.
        server_ssl_contexts: By address, for servers that need another: a client's certificate of
            their own, or another authority. No path is looked at; a connection is never shared
            between addresses.
        keep_alive_s: How long an unused connection is kept. Stay below the server's own time
            (uvicorn, and with it vLLM and SGLang: 5 s), or a request may meet the closing half-way.
        idle_per_origin: Unused connections kept for one server at most; choose at least the
            requests in flight to one server, else bursts reconnect.

    Raises:
        ConfigError: An argument is out of its range, or ``server_ssl_contexts`` names an address
            that is not one of https.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        server_ssl_contexts: Mapping[str, ssl.SSLContext] | None = None,
        keep_alive_s: float = 4.0,
        idle_per_origin: int = 1024,
    ) -> None:
        kept_s = finite("keep_alive_s", keep_alive_s)
        if kept_s < 0:
            raise ConfigError("keep_alive_s must not be negative")
        self._ssl_context = ssl_context
        self._server_ssl_contexts = _by_place(server_ssl_contexts or {})
        self._pool: Final = Pool(kept_s, integer("idle_per_origin", idle_per_origin, 0))
        self._buffer: Final = memoryview(bytearray(RECEIVE_SIZE_BYTES))
        self._origins: dict[str, Origin] = {}  # base_url -> its parsed form
        self._connecting: set[trio.CancelScope] = set()
        self._closed = False
        self._opened = self._requests = self._retried = 0

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        """See ``Transport.request``."""
        origin = self._origin(base_url)
        head = origin.head(request, headers)
        exchange = await self._begin(origin, request, head, limits, size_bytes_max)
        try:
            return await exchange.response()
        finally:
            exchange.release()

    @asynccontextmanager
    async def stream(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AsyncIterator[StreamedResponse]:
        """See ``Transport.stream``."""
        origin = self._origin(base_url)
        head = origin.head(request, headers)
        exchange = await self._begin(origin, request, head, limits, size_bytes_max)
        try:
            yield exchange
        finally:
            exchange.release()

    async def begin(
        self,
        base_url: str,
        request: HttpRequest,
        head: bytes,
        limits: TimeLimits,
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> Exchange:
        """Send a request whose head is already written; for adapters under other HTTP clients.

        Args:
            base_url: The server.
            request: Its method, path and body are used, its headers are not.
            head: All of the request's bytes before its body.
            limits: In seconds.
            size_bytes_max: Largest body taken.

        Returns:
            The exchange, its head read; the caller owes it a ``release()``.
        """
        return await self._begin(self._origin(base_url), request, head, limits, size_bytes_max)

    def statistics(self) -> TransportStatistics:
        """What it has done and holds now."""
        return TransportStatistics(
            opened=self._opened,
            idle=self._pool.idle_count,
            active=self._pool.active_count,
            requests=self._requests,
            retried=self._retried,
        )

    async def aclose(self) -> None:
        """See ``Transport.aclose``. Cancelled, everything is closed all the same."""
        self._closed = True
        self._pool.close()
        for scope in self._connecting:
            scope.cancel()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> HttpTransport:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<HttpTransport: {now.active} active, {now.idle} idle, {now.opened} opened>"

    async def _begin(
        self,
        origin: Origin,
        request: HttpRequest,
        head: bytes,
        limits: TimeLimits,
        size_bytes_max: int,
    ) -> Exchange:
        await trio.lowlevel.checkpoint_if_cancelled()  # nothing is sent for a cancelled call
        if self._closed:
            raise UsageError("this transport is closed: open another one")
        self._requests += 1
        now = trio.current_time()
        deadline = now + limits.total_s
        begin = partial(self._start, request, head, limits, deadline, size_bytes_max)
        kept = self._pool.take(origin, now)
        if kept is not None:
            try:
                return await begin(kept)
            except TransportError as exc:
                if exc.request_sent or isinstance(exc, TransportTimeout):
                    raise
                self._retried += 1
        try:
            fresh = await self._connect(origin, limits, deadline)
        except ConnectFailed as exc:
            if not lacks_descriptors(exc):
                raise
            # Load that moved from other servers left connections to them behind, unused.
            self._pool.close_idle()
            fresh = await self._connect(origin, limits, deadline)
        return await begin(fresh)

    async def _start(
        self,
        request: HttpRequest,
        head: bytes,
        limits: TimeLimits,
        deadline: float,
        size_bytes_max: int,
        connection: Connection,
    ) -> Exchange:
        exchange = Exchange(
            self._pool, connection, limits, deadline, size_bytes_max, request.method, request.path
        )
        await exchange.start(head, request.body)
        return exchange

    async def _connect(self, origin: Origin, limits: TimeLimits, deadline: float) -> Connection:
        context = self._context(origin) if origin.tls else None
        scope = trio.CancelScope(deadline=min(trio.current_time() + limits.connect_s, deadline))
        self._connecting.add(scope)
        try:
            with scope:
                connection = await connect(origin, context, self._buffer)
        finally:
            self._connecting.discard(scope)
        if scope.cancelled_caught:
            raise self._not_connected(origin, limits, deadline)
        if self._closed:  # between the last step of the handshake and here
            connection.close()
            raise self._not_connected(origin, limits, deadline)
        self._opened += 1
        self._pool.add(connection)
        return connection

    def _not_connected(
        self, origin: Origin, limits: TimeLimits, deadline: float
    ) -> RolloutClosed | TransportTimeout:
        if self._closed:
            return RolloutClosed(f"the transport was closed while it connected to {origin.url}")
        name = "total_s" if trio.current_time() >= deadline else "connect_s"
        seconds = getattr(limits, name)
        message = f"no connection to {origin.url} within {name} = {seconds:g} s"
        return TransportTimeout(message, request_sent=False, limit=name)

    def _context(self, origin: Origin) -> ssl.SSLContext:
        own = self._server_ssl_contexts.get((origin.host, origin.port))
        if own is not None:
            return own
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context

    def _origin(self, base_url: str) -> Origin:
        origin = self._origins.get(base_url)
        if origin is None:
            origin = Origin(base_url)
            if len(self._origins) >= ORIGINS_MAX:
                self._origins.clear()  # their idle connections age and are swept
            self._origins[base_url] = origin
        return origin


def _by_place(contexts: Mapping[str, ssl.SSLContext]) -> dict[tuple[str, int], ssl.SSLContext]:
    found = {}
    for base_url, context in contexts.items():
        origin = Origin(base_url)
        if not origin.tls:
            raise ConfigError(f"server_ssl_contexts names {base_url}, which is not of https")
        found[origin.host, origin.port] = context
    return found
