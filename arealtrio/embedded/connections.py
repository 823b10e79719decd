"""Serve an ASGI application to every connection of one listening socket, and end when told to.

hypercorn speaks HTTP on each connection; accepting them and ending them is done here. Its own
``hypercorn.trio.serve`` writes under a shield, so one client that stops reading would hold a server
for ever, cancelled or not; whoever holds the sockets can cut such a connection.
"""

from __future__ import annotations

import logging
import socket
import sys
from contextlib import suppress
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, Framework
from hypercorn.utils import wrap_app
from starlette.applications import Starlette

GRACE_S = 0.25  # for answers already made to be written after the server was told to stop
KEEP_ALIVE_S = 75.0  # longer than a client keeps an idle connection, so that it closes first
_LOG = logging.getLogger("arealtrio.embedded")


class Connections:
    """The connections of one listening socket.

    Args:
        app: Answers the requests.
        listener: Bound and listening; closed when ``run`` ends.
    """

    def __init__(self, app: Starlette, listener: socket.socket) -> None:
        self._config = _config()
        self._app = wrap_app(cast(Framework, app), self._config.wsgi_max_body_size, "asgi")
        self._listener = listener
        self._context = WorkerContext(None)

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until ``stop`` is set, then let handlers finish for ``GRACE_S``, then cut the rest.

        Cancelling cuts at once. Either way no connection is left.
        """
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        async with listener, trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(self._accept, listener, handlers)
                task_status.started()
                await stop.wait()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()  # ends idle connections, and busy ones when done
            handlers.cancel_scope.deadline = trio.current_time() + GRACE_S

    async def _accept(self, listener: trio.SocketListener, handlers: trio.Nursery) -> None:
        await trio.serve_listeners(self._handle, [listener], handler_nursery=handlers)

    async def _handle(self, stream: trio.SocketStream) -> None:
        state = ConnectionState({})
        plain = cast("trio.SSLStream[trio.SocketStream]", stream)  # it takes both, and says one
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cut_when_cancelled, stream)
            try:
                await TCPServer(self._app, self._config, self._context, state, plain)
            except Exception:  # noqa: BLE001  the boundary of a connection: none ends the others
                _LOG.exception("a connection failed")
            nursery.cancel_scope.cancel()


async def _cut_when_cancelled(stream: trio.SocketStream) -> None:
    """Wake a write under its shield: it finds its connection broken, and ends."""
    try:
        await trio.sleep_forever()
    finally:
        with suppress(OSError):  # closed already
            stream.socket.shutdown(socket.SHUT_RDWR)


def _config() -> Config:
    """Quiet: no access log, and errors go to this package's logger."""
    config = Config()
    config.accesslog = None
    config.errorlog = _LOG
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = sys.maxsize
    config.include_server_header = False
    return config
