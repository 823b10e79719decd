"""One TCP or TLS connection: bytes out, bytes in, closed without an await."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Callable
from typing import Final, Protocol

import trio

from ..errors import ConnectFailed
from .origin import Origin
from .parsing import ResponseParser

RECEIVE_SIZE_BYTES: Final = 512 * 1024
"""Per read of a plain socket: an answer of 4,096 tokens with logprobs. Read into one buffer that a
transport's connections share, because memory of that size is mapped and unmapped by glibc each
time, which costs more than the reads it saves."""

TLS_RECEIVE_SIZE_BYTES: Final = 65536
"""Per read of a TLS session, whose stream makes its own buffers."""

SEND_SIZE_BYTES: Final = 65536
"""Per write of a body that does not go out at once: the steps by which its progress is seen."""

_KEEP_ALIVE_PROBE_S: Final = 60
"""A generation may be silent for minutes; routers forget silent flows, a dead host stays quiet."""


class Connection(Protocol):
    """What an exchange needs of a connection. Used by one task at a time, but closed by any."""

    origin: Origin
    parser: ResponseParser
    idle_since: float  # trio.current_time() of its return to the pool
    closed: bool

    def send_nowait(self, head: bytes, body: bytes) -> int:
        """Send what goes out without waiting; return the number of bytes of it.

        Raises:
            OSError: The connection is broken; no byte went out.
        """

    async def send(self, data: memoryview, progress: Callable[[], None]) -> None:
        """Send all of ``data``, calling ``progress`` after each part of it."""

    async def receive(self) -> bytes | memoryview:
        """Wait for bytes and return them; empty at the end of the stream. Always a checkpoint.

        They are to be used before the next await: the memory may be every connection's.
        """

    def is_quiet(self) -> bool:
        """Whether the peer neither closed it nor sent anything: whether it may be used again."""

    def close(self) -> None:
        """Close now; who waits on it gets ``trio.ClosedResourceError``. May be called twice."""


class PlainConnection:
    """A plain non-blocking socket: a third of the cost per request of a stream over a trio socket.

    Args:
        origin: The server at its other end.
        sock: Connected; this object closes it.
        buffer: Read into, ``RECEIVE_SIZE_BYTES`` long; shared with connections of the same thread.
    """

    __slots__ = ("__weakref__", "_buffer", "_sock", "closed", "idle_since", "origin", "parser")

    def __init__(self, origin: Origin, sock: socket.socket, buffer: memoryview) -> None:
        sock.setblocking(False)
        self.origin = origin
        self.parser = ResponseParser()
        self.idle_since = 0.0
        self.closed = False
        self._sock: Final = sock
        self._buffer: Final = buffer

    def send_nowait(self, head: bytes, body: bytes) -> int:
        """See Connection."""
        try:
            return self._sock.sendmsg((head, body)) if body else self._sock.send(head)
        except BlockingIOError:
            return 0

    async def send(self, data: memoryview, progress: Callable[[], None]) -> None:
        """See Connection."""
        if self.closed:  # by another task, before this one's first step
            raise trio.ClosedResourceError("this connection was closed")
        while data:
            await trio.lowlevel.wait_writable(self._sock)
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                continue
            progress()

    async def receive(self) -> memoryview:
        """See Connection."""
        while True:
            # Wait first: an answer is hardly ever there already, and a flood of data has to let
            # other tasks run, so the try before the wait would be a wasted call or a missed turn.
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._buffer[: self._sock.recv_into(self._buffer)]
            except BlockingIOError:
                continue

    def is_quiet(self) -> bool:
        """See Connection."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # end of file, or bytes that nobody asked for

    def close(self) -> None:
        """See Connection."""
        if not self.closed:
            self.closed = True
            self.parser.close()
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class TlsConnection:
    """A TLS session over a trio stream.

    Args:
        origin: The server at its other end.
        stream: After its handshake; this object closes it.
    """

    __slots__ = ("__weakref__", "_stream", "closed", "idle_since", "origin", "parser")

    def __init__(self, origin: Origin, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.origin = origin
        self.parser = ResponseParser()
        self.idle_since = 0.0
        self.closed = False
        self._stream: Final = stream

    def send_nowait(self, head: bytes, body: bytes) -> int:  # noqa: ARG002
        """Nothing: what is written to a TLS session is written by ``send``."""
        return 0

    async def send(self, data: memoryview, progress: Callable[[], None]) -> None:
        """See Connection."""
        for start in range(0, len(data), SEND_SIZE_BYTES):
            await self._stream.send_all(data[start : start + SEND_SIZE_BYTES])
            progress()

    async def receive(self) -> bytes:
        """See Connection."""
        data = await self._stream.receive_some(TLS_RECEIVE_SIZE_BYTES)
        if self.closed:  # it lets others run once more after the bytes are there
            raise trio.ClosedResourceError("this connection was closed")
        return bytes(data)

    def is_quiet(self) -> bool:
        """See Connection. Any record counts: after a whole answer it is the peer's closing."""
        poll = select.poll()
        poll.register(self._stream.transport_stream.socket.fileno(), select.POLLIN)
        return not self._stream.pending() and not poll.poll(0)

    def close(self) -> None:
        """Close the socket without the closing message, as HTTP allows where lengths are known."""
        if not self.closed:
            self.closed = True
            self.parser.close()
            self._stream.transport_stream.socket.close()


async def connect(origin: Origin, context: ssl.SSLContext | None, buffer: memoryview) -> Connection:
    """Open a connection: names resolved, addresses raced (RFC 8305), TLS where the origin wants it.

    Cancelled, it leaves no socket open.

    Args:
        origin: Where to.
        context: For TLS; not None where ``origin.tls``.
        buffer: See PlainConnection.

    Raises:
        ConnectFailed: The name is unknown, no address answers, or the TLS handshake failed.
    """
    try:
        stream = await trio.open_tcp_stream(origin.host, origin.port)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA can not encode
        raise ConnectFailed(f"no connection to {origin.url}: {_why(exc)}") from exc
    try:
        _probe_when_silent(stream)
        if origin.tls:
            assert context is not None
            return await _handshake(origin, stream, context)
        return PlainConnection(origin, socket.socket(fileno=stream.socket.detach()), buffer)
    except BaseException:
        stream.socket.close()
        raise


def lacks_descriptors(error: ConnectFailed) -> bool:
    """Whether nothing but this process's own limit on descriptors kept a connection from opening.

    Args:
        error: What ``connect`` raised.
    """
    cause = error.__cause__  # of the look-up of a name, or of all addresses together
    told = cause and cause.__cause__
    attempts = told.exceptions if isinstance(told, ExceptionGroup) else (cause,)
    return any(getattr(attempt, "errno", None) == errno.EMFILE for attempt in attempts)


def _why(exc: Exception) -> str:
    """What each address said, once: trio's own words are that all attempts failed."""
    if not isinstance(exc.__cause__, ExceptionGroup):
        return str(exc)
    said = (getattr(attempt, "errno", None) for attempt in exc.__cause__.exceptions)
    return ", ".join(dict.fromkeys(os.strerror(number) for number in said if number)) or str(exc)


async def _handshake(
    origin: Origin, stream: trio.SocketStream, context: ssl.SSLContext
) -> Connection:
    session = trio.SSLStream(stream, context, server_hostname=origin.host, https_compatible=True)
    try:
        await session.do_handshake()
    except (trio.BrokenResourceError, OSError, ssl.CertificateError) as exc:
        reason = exc.__cause__ or exc
        raise ConnectFailed(f"no TLS session with {origin.url}: {reason}") from exc
    return TlsConnection(origin, session)


def _probe_when_silent(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):  # macOS spells the first one TCP_KEEPALIVE; its default serves
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEP_ALIVE_PROBE_S)
