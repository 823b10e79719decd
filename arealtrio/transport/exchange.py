"""One request and its answer on one connection: named limits, error mapping, release."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

import trio

from ..errors import (
    ArealTrioError,
    ProtocolError,
    ResponseTooLarge,
    RolloutClosed,
    TransportError,
    TransportTimeout,
    UsageError,
)
from ..types import HttpResponse, TimeLimits
from .connection import Connection
from .pool import Pool


class Exchange:
    """Owns ``connection`` until ``release()``, which is synchronous and may be called twice.

    Args:
        pool: Where the connection goes back to.
        connection: Active in the pool; nothing outstanding on it.
        limits: Of the whole exchange.
        deadline: ``trio.current_time()`` at which ``limits.total_s`` passes.
        size_bytes_max: Largest body taken.
        method: Of the request: it decides whether the answer has a body, and names the exchange in
            errors.
        path: Names the exchange in errors.
    """

    __slots__ = (
        "_answered",
        "_connection",
        "_deadline",
        "_limits",
        "_method",
        "_parser",
        "_path",
        "_pool",
        "_released",
        "_scope",
        "_send_error",
        "_sent",
        "_sent_event",
        "_size_bytes_max",
        "_some_sent",
    )

    def __init__(
        self,
        pool: Pool,
        connection: Connection,
        limits: TimeLimits,
        deadline: float,
        size_bytes_max: int,
        method: str,
        path: str,
    ) -> None:
        self._pool: Final = pool
        self._connection: Final = connection
        self._parser: Final = connection.parser
        self._limits: Final = limits
        self._deadline: Final = deadline
        self._size_bytes_max: Final = size_bytes_max
        self._method: Final = method
        self._path: Final = path
        self._some_sent = False
        self._sent = False
        self._answered = False  # whether a byte of the answer is there
        self._released = False
        self._scope: trio.CancelScope | None = None  # of the wait in progress
        self._sent_event: trio.Event | None = None  # only where the request needs more than a write
        self._send_error: BaseException | None = None
        self._parser.start(body_expected=method != "HEAD")

    # The answer.

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._parser.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case name to joined values."""
        return self._parser.headers()

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers as they came."""
        return self._parser.raw_headers

    async def start(self, head: bytes, body: bytes) -> None:
        """Send the request and read the answer's head.

        If it does not succeed, also by cancellation, the connection is closed.

        Raises:
            TransportError: Among others with ``request_sent=False``, which allows a second try.
        """
        try:
            sent = self._send_nowait(head, body)
            if sent == len(head) + len(body):
                self._sent = True
                await self._read_head()
            else:
                await self._read_head_while_sending(memoryview(head + body)[sent:])
        except BaseException:
            self._give_up()
            raise

    async def response(self) -> HttpResponse:
        """Read to the end and return the whole answer."""
        while not self._parser.complete:
            await self._bounded(self._read_on)
        return HttpResponse(self.status, self.headers, self._parser.take_body())

    def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces; see StreamedResponse."""
        return _Chunks(self)

    async def next_chunk(self) -> bytes:
        """The next piece of the body; empty at its end."""
        if self._released:
            raise UsageError("the body of an answer is read before its `async with` is left")
        while True:
            body = self._parser.take_body()
            if body or self._parser.complete:
                return body
            await self._bounded(self._read_some)

    def release(self) -> None:
        """Give the connection back if nothing is outstanding on it, else close it.

        Nor is it kept after a 5xx: uvicorn, and with it vLLM, answers an exception of the
        application with a 500 that promises to keep the connection, and then closes it. The next
        request would race with that close, and lose.
        """
        if self._released:
            return
        parser = self._parser
        if (
            self._sent
            and parser.complete
            and parser.keep_alive
            and parser.status < 500
            and not parser.excess
            and not self._connection.closed
        ):
            self._released = True
            self._pool.put(self._connection, trio.current_time())
        else:
            self._give_up()

    def _give_up(self) -> None:
        if not self._released:
            self._released = True
            self._pool.discard(self._connection)

    # Sending.

    def _send_nowait(self, head: bytes, body: bytes) -> int:
        try:
            sent = self._connection.send_nowait(head, body)
        except OSError as exc:
            raise TransportError(
                f"{self}: the connection was dead before the request went out", request_sent=False
            ) from exc
        self._some_sent = sent > 0
        return sent

    async def _read_head_while_sending(self, rest: memoryview) -> None:
        """A server may answer before it has read all of a large body, and not read the rest.

        So both directions are served at once, until the status is known: on an error status the
        rest is not sent, on success it is, before the answer's body is read.
        """
        failure: ArealTrioError | None = None
        self._sent_event = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest, rest)
            try:
                await self._read_head()
                if self.status < 300:
                    await self._bounded(self._sent_event.wait)
            except ArealTrioError as exc:
                failure = exc  # raised below: from in here it would come out in an ExceptionGroup
            nursery.cancel_scope.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it refers to this frame through its traceback

    async def _send_rest(self, rest: memoryview) -> None:
        """Send, and leave the word on an error to the reader: the answer may be on its way."""
        assert self._sent_event is not None
        self._some_sent = True
        try:
            await self._connection.send(rest, self._extend)
            self._sent = True
            self._extend()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._send_error = exc
        self._sent_event.set()

    # Waiting, each wait under the limit of its phase.

    async def _read_head(self) -> None:
        while not self._parser.head_complete:
            await self._bounded(self._read_some)

    async def _read_on(self) -> None:
        """Read to the end, in one scope whose deadline moves: a scope costs as much as a read.

        A scope whose deadline passed while there was something to read would cancel the next wait
        all the same, so it ends there, for the caller to open another.
        """
        assert self._scope is not None
        while not self._parser.complete and not self._scope.cancel_called:
            await self._read_some()
            self._extend()

    async def _read_some(self) -> None:
        """Feed the parser what arrives next, or the end of the stream."""
        data = await self._receive()
        self._answered = True
        if not data:
            self._end_of_stream()
            return
        try:
            self._parser.feed(data)
        except ProtocolError as exc:
            raise ProtocolError(f"{self}: {exc}") from exc.__cause__
        if self._parser.head_complete:
            self._check_size()

    async def _receive(self) -> bytes | memoryview:
        try:
            return await self._connection.receive()
        except trio.ClosedResourceError as exc:
            raise self._closed_by_us() from exc
        except (OSError, trio.BrokenResourceError) as exc:
            if self._connection.closed:  # after its bytes arrived, and before they were read
                raise self._closed_by_us() from exc
            raise self._broken_off(exc) from exc

    async def _bounded(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Wait, or raise what limit was passed; on return that may have happened just then."""
        if self._connection.closed:
            raise self._closed_by_us()
        # trio does not cancel a wait that is ready at once, so a flood would outrun its deadline.
        now = trio.current_time()
        if now < self._deadline:
            with trio.CancelScope(deadline=self._next_deadline(now)) as self._scope:
                await operation()
                return
        raise self._timed_out()

    def _phase(self) -> tuple[str, float]:
        if self._sent and not self._answered:
            return "first_byte_s", self._limits.first_byte_s
        return "idle_s", self._limits.idle_s

    def _next_deadline(self, now: float) -> float:
        return min(now + self._phase()[1], self._deadline)

    def _extend(self) -> None:
        """Something went out or came in: the reader's wait starts anew."""
        if self._scope is not None:
            self._scope.deadline = self._next_deadline(trio.current_time())

    # What went wrong.

    def __str__(self) -> str:
        route = self._path.partition("?")[0]  # a query may hold a secret
        return f"{self._method} {route} of {self._connection.origin.url}"

    def _timed_out(self) -> TransportTimeout:
        name, seconds = self._phase()
        what = "no answer came" if name == "first_byte_s" else "nothing more came"
        if not self._sent:
            what = "the server took no more of the request"
        if trio.current_time() >= self._deadline:
            name, seconds = "total_s", self._limits.total_s
        message = f"{self}: {what} within {name} = {seconds:g} s"
        return TransportTimeout(message, request_sent=self._some_sent, limit=name)

    def _check_size(self) -> None:
        size = max(self._parser.body_size_bytes, self._parser.content_length())
        if size > self._size_bytes_max and self._method != "HEAD":
            raise ResponseTooLarge(
                f"{self}: an answer of {size} bytes or more, and {self._size_bytes_max} are allowed"
            )

    def _end_of_stream(self) -> None:
        if not self._parser.finish():
            raise self._broken_off(self._send_error) from self._send_error

    def _broken_off(self, exc: BaseException | None) -> TransportError:
        reason = f" ({type(exc).__name__})" if exc is not None else ""
        if self._parser.head_complete:
            where = f"after {self._parser.body_size_bytes} bytes of the answer's body"
        else:
            where = "before the answer's headers were whole"
        return TransportError(f"{self}: the server closed the connection {where}{reason}")

    def _closed_by_us(self) -> RolloutClosed:
        return RolloutClosed(f"{self}: the transport was closed while this request was in flight")


class _Chunks:
    """Not an async generator: those want closing, and a body left half-read needs none."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._exchange.next_chunk()
        if not chunk:
            raise StopAsyncIteration
        return chunk
