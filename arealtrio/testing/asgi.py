"""Ask an ASGI application one question in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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


def endpoints(app: Starlette) -> dict[tuple[str, str], AsgiApp]:
    """Each route of an application by itself, by method and path.

    What its handlers answer an exception with is answered here, too. The way through the
    application, which looks at one route after the other, costs more than most answers.
    """
    return {
        (method, route.path): _alone(route.endpoint, app.exception_handlers)
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }


def _alone(
    endpoint: Callable[[Request], Awaitable[Response]], handlers: Mapping[Any, Any]
) -> AsgiApp:
    async def answer(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as exc:
            handler = handlers.get(type(exc))
            if handler is None:
                raise
            response = await handler(request, exc)
        await response(scope, receive, send)

    return answer


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
