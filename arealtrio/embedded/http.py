"""What both faces need of HTTP: JSON answers, events, bodies, and clients that go away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Send

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
    """
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > BODY_LIMIT_BYTES:
            raise BodyTooLarge
    return bytes(raw)


def json_response(body: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


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


async def send_more(send: Send, body: bytes) -> None:
    """Send a part of a stream; an empty one is not sent, because it would say nothing."""
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


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
