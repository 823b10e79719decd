"""Both ways to meet httpx: our pool under an httpx client, and a user's own client under us."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeVar

import httpx
import trio

from ..errors import (
    ConfigError,
    ConnectFailed,
    InvalidRequest,
    ProtocolError,
    ResponseTooLarge,
    TransportError,
    TransportTimeout,
)
from ..types import HttpRequest, HttpResponse, TimeLimits
from .exchange import Exchange
from .http import HttpTransport
from .interface import RESPONSE_SIZE_BYTES_MAX, StreamedResponse
from .origin import Origin, all_headers, request_head

T = TypeVar("T")


class HttpxTransport(httpx.AsyncBaseTransport):
    """Our pool under httpx: ``httpx.AsyncClient(transport=HttpxTransport())``, on trio.

    For clients that are written to httpx (the openai package is one): the cost per request no
    longer grows with the requests in flight. HTTP/1.1, no proxies. httpx's ``connect`` time-out is
    kept as it is, ``read`` and ``write`` both as ``read``; ``pool`` has no meaning, for nothing
    waits for a connection. An upload from a generator is collected before it is sent.

    Args:
        transport: The pool to use, closed together with this object; None: a fresh one.
        size_bytes_max: Largest body taken.
    """

    def __init__(
        self,
        transport: HttpTransport | None = None,
        *,
        size_bytes_max: int = 2**30,
    ) -> None:
        self._transport: Final = transport if transport is not None else HttpTransport()
        self._size_bytes_max: Final = size_bytes_max

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; raises httpx's own exceptions."""
        body = await request.aread()
        with _to_httpx(request):
            question = HttpRequest(request.method, request.url.raw_path.decode("ascii"), body)
            exchange = await self._transport.begin(
                f"{request.url.scheme}://{request.url.netloc.decode('ascii')}",
                question,
                _head(request, question),
                _limits(request),
                self._size_bytes_max,
            )
        return httpx.Response(
            exchange.status,
            headers=exchange.raw_headers,
            stream=_Body(exchange, request),
            request=request,
        )

    async def aclose(self) -> None:
        """Close the pool."""
        await self._transport.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: Exchange, request: httpx.Request) -> None:
        self._exchange = exchange
        self._request = request

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self  # not a generator: one left half-way would have to be closed

    async def __anext__(self) -> bytes:
        with _to_httpx(self._request):
            chunk = await self._exchange.next_chunk()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        self._exchange.release()


def _head(request: httpx.Request, question: HttpRequest) -> bytes:
    """httpx's own headers, except that the body, now whole, has a length."""
    kept = [
        (name, value)
        for name, value in request.headers.raw
        if name.lower() not in (b"transfer-encoding", b"content-length")
    ]
    if question.body or question.method not in ("GET", "HEAD", "OPTIONS", "DELETE"):
        kept.append((b"Content-Length", b"%d" % len(question.body)))
    return request_head(question.method, question.path, kept) + b"\r\n"


def _limits(request: httpx.Request) -> TimeLimits:
    named: Mapping[str, float | None] = request.extensions.get("timeout", {})
    connect, read = (
        math.inf if named.get(name) is None else float(named[name] or 0)
        for name in ("connect", "read")
    )
    return TimeLimits(connect_s=connect, first_byte_s=read, idle_s=read, total_s=math.inf)


@contextmanager
def _to_httpx(request: httpx.Request) -> Iterator[None]:
    """Our errors as httpx's, for those who catch httpx's."""
    try:
        yield
    except TransportTimeout as exc:
        kind = httpx.ConnectTimeout if exc.limit == "connect_s" else httpx.ReadTimeout
        raise kind(str(exc), request=request) from exc
    except ConnectFailed as exc:
        raise httpx.ConnectError(str(exc), request=request) from exc
    except ProtocolError as exc:
        raise httpx.RemoteProtocolError(str(exc), request=request) from exc
    except TransportError as exc:
        broken = httpx.ReadError if exc.request_sent else httpx.WriteError
        raise broken(str(exc), request=request) from exc
    except InvalidRequest as exc:
        raise httpx.LocalProtocolError(str(exc), request=request) from exc
    except ConfigError as exc:
        raise httpx.UnsupportedProtocol(str(exc), request=request) from exc


class ClientTransport:
    """A Transport over a user's own ``httpx.AsyncClient``: their proxies, certificates, hooks.

    Costs what that client costs; give it a transport of its own (``HttpxTransport``) or expect
    httpx's pool to slow down beyond a hundred requests in flight. The client's own time-outs are
    replaced by the limits of each request. The client stays open at ``aclose()``: whoever opened
    it closes it.

    Args:
        client: An open client, used in the trio run that this transport is used in.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client: Final = client

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
        async with self.stream(
            base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
        ) as response:
            pieces = [chunk async for chunk in response.chunks()]
            return HttpResponse(response.status, response.headers, b"".join(pieces))

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
        Origin(base_url).head(request, headers)  # raises as ours would, and repeats no secret
        route = request.path.partition("?")[0]  # a query may hold a secret
        clock = _Clock(f"{request.method} {route} of {base_url}", limits)
        with _from_httpx(clock.what):
            question = self._build(base_url, request, headers, limits)
        response = await clock.bounded(
            lambda: self._client.send(question, stream=True), "first_byte_s", limits.connect_s
        )
        try:
            yield _ClientStream(response, clock, size_bytes_max)
        finally:
            # Its checkpoints may be cancelled; httpx has then dropped the connection itself.
            await response.aclose()

    async def aclose(self) -> None:
        """Nothing: the client is its opener's."""
        await trio.lowlevel.checkpoint()

    def _build(
        self,
        base_url: str,
        request: HttpRequest,
        headers: Sequence[tuple[str, str]],
        limits: TimeLimits,
    ) -> httpx.Request:
        given = all_headers(request, headers)
        if request.body and "content-type" not in {name.lower() for name, _ in given}:
            given.append(("content-type", "application/json"))
        return self._client.build_request(
            request.method,
            base_url.rstrip("/") + request.path,
            # Bytes, since httpx takes text for ASCII; stripped, since h11 refuses an outer space.
            headers=[(_latin(name), _latin(value.strip(" \t"))) for name, value in given],
            content=request.body or None,
            timeout=httpx.Timeout(None, connect=limits.connect_s, pool=limits.connect_s),
        )


class _Clock:
    """The limits of one exchange over httpx, which knows no total and no first byte."""

    def __init__(self, what: str, limits: TimeLimits) -> None:
        self.what: Final = what
        self._limits: Final = limits
        self._deadline: Final = trio.current_time() + limits.total_s

    async def bounded(
        self, operation: Callable[[], Awaitable[T]], name: str, extra_s: float = 0.0
    ) -> T:
        seconds = getattr(self._limits, name)
        deadline = min(trio.current_time() + seconds + extra_s, self._deadline)
        if trio.current_time() < self._deadline:
            with trio.CancelScope(deadline=deadline), _from_httpx(self.what):
                return await operation()
        if trio.current_time() >= self._deadline:
            name, seconds = "total_s", self._limits.total_s
        raise TransportTimeout(f"{self.what}: no answer within {name} = {seconds:g} s", limit=name)


class _ClientStream:
    def __init__(self, response: httpx.Response, clock: _Clock, size_bytes_max: int) -> None:
        self._response = response
        self._clock = clock
        self._size_bytes_max = size_bytes_max

    @property
    def status(self) -> int:
        return self._response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        joined = self._response.headers
        return {name.lower(): ", ".join(joined.get_list(name)) for name in joined}

    async def chunks(self) -> AsyncIterator[bytes]:
        size = 0
        self._check_size(int(self._response.headers.get("content-length", 0)))
        pieces = self._response.aiter_bytes()
        while True:
            try:
                chunk = await self._clock.bounded(lambda: anext(pieces), "idle_s")
            except StopAsyncIteration:
                return
            size += len(chunk)
            self._check_size(size)
            yield chunk

    def _check_size(self, size: int) -> None:
        if size > self._size_bytes_max:
            raise ResponseTooLarge(
                f"{self._clock.what}: an answer of {size} bytes or more, "
                f"and {self._size_bytes_max} are allowed"
            )


def _latin(text: str) -> bytes:
    return text.encode("latin-1")


@contextmanager
def _from_httpx(what: str) -> Iterator[None]:
    """httpx's errors as ours.

    No message of httpx's holds a payload, but that of a header it can not write: it repeats a key.
    """
    try:
        yield
    except (httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        message = f"{what}: no connection within connect_s"
        raise TransportTimeout(message, request_sent=False, limit="connect_s") from exc
    except httpx.TimeoutException as exc:
        raise TransportTimeout(
            f"{what}: {type(exc).__name__} of the client", limit="idle_s"
        ) from exc
    except (httpx.ConnectError, UnicodeError) as exc:  # UnicodeError: as in connect()
        raise ConnectFailed(f"{what}: {exc}") from exc
    except httpx.LocalProtocolError as exc:
        raise InvalidRequest(f"{what}: the client can not write it as HTTP") from exc
    except httpx.InvalidURL as exc:
        raise InvalidRequest(f"{what}: {exc}") from exc
    except httpx.UnsupportedProtocol as exc:
        raise ConfigError(f"{what}: {exc}") from exc
    except httpx.HTTPError as exc:
        raise TransportError(f"{what}: {type(exc).__name__}: {exc}") from exc
