"""What both faces need of HTTP: JSON answers, events, bodies, and clients that go away.

A request for tokens is a ``Reply`` of its dialect, which knows nothing of HTTP: ``whole_answer``
and ``EventStream`` carry it over HTTP, a simulated server hands on what it says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
import trio
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .engine import Generation

BODY_LIMIT_BYTES = 64 * 1024 * 1024
LAST_EVENT = b"data: [DONE]\n\n"

# What msgspec raises of a body that is no JSON, or nests too deep to be read.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class BodyTooLarge(Exception):
    """A request body is above ``BODY_LIMIT_BYTES``."""


async def read_body(request: Request) -> bytes:
    """Read a whole body.

    Raises:
        BodyTooLarge: It is above the limit; the rest is left unread.
        ClientDisconnect: The client has gone before its end.
    """
    raw, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        raw += message.get("body", b"")
        if len(raw) > BODY_LIMIT_BYTES:
            raise BodyTooLarge
        more = message.get("more_body", False)
    return bytes(raw)


def query_of(request: Request) -> QueryParams:
    """The fields of a query. Clients ask with the same few again and again."""
    return _parsed_query(request.scope["query_string"])


@lru_cache(maxsize=64)
def _parsed_query(query: bytes) -> QueryParams:
    return QueryParams(query)


def json_bytes(body: Any) -> bytes:
    """Write JSON."""
    return msgspec.json.encode(body)


def json_response(body: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(json_bytes(body), status, media_type="application/json")


def detail(text: str) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Make a handler that answers an HTTP exception the way FastAPI does."""

    async def answer(_: Request, exc: Exception) -> Response:
        headers = getattr(exc, "headers", None)
        response = json_response({"detail": text}, exc.status_code)  # type: ignore[attr-defined]
        response.headers.update(headers or {})
        return response

    return answer


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client has gone away."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
        yield
        nursery.cancel_scope.cancel()


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def never_answer(request: Request) -> Response:
    """Hold a request until its client gives up; see ``Faults.silent``."""
    async with until_disconnect(request.receive):
        await trio.sleep_forever()
    return Response()


class Reply(Protocol):
    """One request for tokens, from its arrival until it is answered or its client has left.

    Leaving its ``with`` block releases all that it holds, also in a cancelled scope.
    """

    @property
    def streamed(self) -> bool:
        """Whether it asks for a stream of events."""

    @property
    def generation(self) -> Generation | None:
        """Its sequences; None before it has got to the scheduler."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def release(self) -> None:
        """Drop what is unfinished; harmless twice."""

    def start(self) -> bool:
        """Get to the scheduler, unless something holds it back. False: only ``wait`` tells when.

        True where it is refused, too: then it has no generation, and ``answer`` raises.
        """

    async def wait(self) -> None:
        """Return when ``answer`` knows what to say."""

    def answer(self) -> Any:
        """The whole answer as plain data; raises the dialect's error where it refuses."""

    async def next_events(self) -> bytes:
        """The next events of a stream as soon as there are any; empty after the last.

        A reader slower than the engine gets fewer, longer pieces, so nothing piles up.
        """


async def whole_answer(request: Request, reply: Reply) -> Response:
    """Answer in one piece; what was asked for is dropped if the client goes."""
    with reply:
        async with until_disconnect(request.receive):
            await reply.wait()
        return json_response(reply.answer())


class EventStream(Response):
    """Answer in server-sent events, until the last or until the client goes.

    Starlette's own streaming response takes an async generator, whose clean-up after a cancelled
    ``send`` waits for the garbage collector; here the ``with`` block releases at once.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events; the ASGI interface."""
        with self._reply:
            async with until_disconnect(receive):
                await send({"type": "http.response.start", "status": self.status_code,
                            "headers": self.raw_headers})  # fmt: skip
                while events := await self._reply.next_events():
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
