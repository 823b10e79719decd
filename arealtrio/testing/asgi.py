"""Ask an ASGI application one question in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

import trio

from ..embedded.endpoints import Handler
from ..types import HttpRequest, HttpResponse

Message: TypeAlias = MutableMapping[str, Any]
AsgiApp: TypeAlias = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[Message]],
        Callable[[Message], Awaitable[None]],
    ],
    Awaitable[None],
]


async def ask(
    app: AsgiApp, request: HttpRequest, headers: Sequence[tuple[str, str]] = ()
) -> HttpResponse:
    """Return the application's whole answer.

    Cancelling it cancels the application's handler, as a server does whose client has gone.

    Args:
        app: The application.
        request: The question.
        headers: Further headers, before the request's own.
    """
    question = [{"type": "http.request", "body": request.body, "more_body": False}]
    status, body = 500, bytearray()
    answer_headers: dict[str, str] = {}

    async def receive() -> Message:
        if not question:
            await trio.sleep_forever()  # the client never hangs up; it is cancelled
        return question.pop()

    async def send(message: Message) -> None:
        nonlocal status, answer_headers
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            status = message["status"]
            answer_headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            body.extend(message.get("body", b""))

    await app(_scope(request, headers), receive, send)
    return HttpResponse(status, answer_headers, bytes(body))


def ask_at_once(
    handler: Handler, request: HttpRequest, headers: Sequence[tuple[str, str]] = ()
) -> HttpResponse:
    """Return the whole answer of a handler that waits for nothing.

    Args:
        handler: Reads the question, and decides.
        request: The question.
        headers: Further headers, before the request's own.

    Raises:
        RuntimeError: It waits.
    """

    async def receive() -> Message:
        return {"type": "http.request", "body": request.body, "more_body": False}

    work = handler(_scope(request, headers), receive)
    try:
        work.send(None)
    except StopIteration as end:
        response = end.value
    else:
        work.close()
        raise RuntimeError(f"{request.method} {request.path} waits, and was to answer at once")
    answer_headers = {k.decode(): v.decode() for k, v in response.raw_headers}
    return HttpResponse(response.status_code, answer_headers, bytes(response.body))


def _scope(request: HttpRequest, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    path, _, query = request.path.partition("?")
    pairs = [("content-type", "application/json"), *headers, *request.headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in pairs],
        "server": ("simulated", 80),
        "client": ("simulated", 0),
    }
