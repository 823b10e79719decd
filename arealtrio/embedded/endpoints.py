"""Endpoints: the handlers of an application one by one, for whoever asks them in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

Handler: TypeAlias = Callable[[Scope, Receive], Coroutine[Any, Any, Response]]


class Endpoints:
    """An application, and the short way to its handlers.

    What its handlers answer an exception with is answered here, too. The way through the
    application, which looks at one route after the other, costs more than most answers.

    Args:
        app: The application.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._handlers = {
            (method, route.path): _alone(route.endpoint, app.exception_handlers)
            for route in app.routes
            if isinstance(route, Route)
            for method in route.methods or ()
        }
        self._apps = {route: _app_of(handler) for route, handler in self._handlers.items()}

    def of(self, method: str, path: str) -> ASGIApp:
        """What answers a request; the application, which refuses it, where nothing does.

        Args:
            method: Of the request.
            path: Its path, without a query.
        """
        return self._apps.get((method, path), self._app)

    def handler(self, method: str, path: str) -> Handler | None:
        """What makes the response to a request, and does not send it; None as for ``of``.

        Args:
            method: Of the request.
            path: Its path, without a query.
        """
        return self._handlers.get((method, path))


def _alone(
    endpoint: Callable[[Request], Awaitable[Response]], handlers: Mapping[Any, Any]
) -> Handler:
    async def respond(scope: Scope, receive: Receive) -> Response:
        request = Request(scope, receive)
        try:
            return await endpoint(request)
        except Exception as exc:
            handler = handlers.get(type(exc))
            if handler is None:
                raise
            response: Response = await handler(request, exc)
            return response

    return respond


def _app_of(handler: Handler) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await handler(scope, receive)
        await response(scope, receive, send)

    return answer
