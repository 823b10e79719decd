"""Serve the embedded server over HTTP, inside a trio program or as a process of its own.

hypercorn does the HTTP side on trio; this module gives it a socket, runs the decode loop beside it,
and ends both together.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from starlette.applications import Starlette

from .areal_app import areal_app
from .connections import GRACE_S, Connections
from .engine import Engine
from .faults import Faults
from .model import TinyModel
from .scheduler import Scheduler
from .settings import DialectName, ServerSettings
from .sglang_app import sglang_app
from .tensors import Tensor
from .vllm_app import vllm_app

__all__ = ["GRACE_S", "RunningServer", "ServerSettings", "main", "running_server", "serve"]

BACKLOG = 1024  # connections the kernel holds until they are accepted
_APPS: dict[DialectName, Callable[[Engine, ServerSettings], Starlette]] = {
    "vllm": vllm_app,
    "sglang": sglang_app,
}
_LOG = logging.getLogger("arealtrio.embedded")


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that accepts connections.

    Args:
        url: Its base URL, without a slash at the end.
        scheduler: What it runs; for looking only.
        stop: Set it to end the server: requests in flight are answered with what they have.
        stopped: Set when it has ended, for whatever reason.
        faults: What a test wants to go wrong; all off.
        announced: Tensors that weight updates over the trainer's network named, in their order.
    """

    url: str
    scheduler: Scheduler
    stop: trio.Event
    stopped: trio.Event
    faults: Faults
    announced: list[Tensor]


async def serve(
    settings: ServerSettings,
    *,
    task_status: trio.TaskStatus[RunningServer] = trio.TASK_STATUS_IGNORED,
) -> bool:
    """Serve until told to stop, or until broken weights or a request have killed the engine.

    Cancelling ends it at once and resets the connections; ``RunningServer.stop`` ends it with
    answers, within ``GRACE_S``. Either way no task, socket or request is left.

    Args:
        settings: What to serve.
        task_status: For ``nursery.start``; gets the running server once it listens.

    Returns:
        True if it was told to stop; False if the engine died.

    Raises:
        OSError: The address is taken, or the weights cannot be read.
        ValueError: The weights are not sound.
    """
    engine, listener = await _prepare(settings)
    await _serve(engine, listener, settings, task_status=task_status)
    return engine.scheduler.state != "dead"


async def _serve(
    engine: Engine,
    listener: socket.socket,
    settings: ServerSettings,
    *,
    task_status: trio.TaskStatus[RunningServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    server = RunningServer(
        url=_url(listener),
        scheduler=engine.scheduler,
        stop=trio.Event(),
        stopped=trio.Event(),
        faults=engine.faults,
        announced=engine.announced,
    )
    app = (areal_app if settings.areal else _APPS[settings.dialect])(engine, settings)
    try:
        with listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_decode, engine, server.stop)
                await nursery.start(Connections(app, listener).run, server.stop)
                task_status.started(server)
    finally:
        server.stopped.set()


async def _decode(engine: Engine, stop: trio.Event) -> None:
    """Run the engine until the server stops; when the engine dies, the server follows.

    At the end everything in flight is aborted, so that every handler can answer.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_engine, engine, stop)
        await stop.wait()
        nursery.cancel_scope.cancel()
    engine.abort()


async def _run_engine(engine: Engine, stop: trio.Event) -> None:
    await engine.run()
    _LOG.error("the engine died; the server stops")
    stop.set()


async def _prepare(settings: ServerSettings) -> tuple[Engine, socket.socket]:
    """Do what can fail for an ordinary reason, before any nursery wraps the reason in a group."""
    model = await trio.to_thread.run_sync(TinyModel.load, settings.weights)
    scheduler = Scheduler(
        model,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        logprobs_mode=settings.reported_logprobs,
        seed=settings.seed,
    )
    engine = Engine(scheduler, TinyModel.load, token_time_s=settings.token_time_s)
    return engine, await _listen(settings)


async def _listen(settings: ServerSettings) -> socket.socket:
    """Bind before serving: so port 0 has a number, and a taken address is an ordinary OSError."""
    family, _, _, _, address = (
        await trio.socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    )[0]
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def running_server(settings: ServerSettings) -> AsyncIterator[RunningServer]:
    """Serve in the background of a block, on the caller's trio loop.

    Leaving the block stops the server with answers to what is in flight, within ``GRACE_S``; a
    cancelled block ends it at once.

    Args:
        settings: What to serve; port 0 suits tests.

    Raises:
        OSError: The address is taken, or the weights cannot be read.
        ValueError: The weights are not sound.
    """
    engine, listener = await _prepare(settings)
    left_with: BaseException | None = None
    async with trio.open_nursery() as nursery:
        server: RunningServer = await nursery.start(_serve, engine, listener, settings)
        try:
            yield server
        except BaseException as exc:  # noqa: BLE001 - raised again below, unwrapped
            left_with = exc
        finally:
            server.stop.set()
    if left_with is not None:
        raise left_with


def main(
    settings: ServerSettings,
    *,
    on_listening: Callable[[str], None] | None = None,
    exit_with_parent: bool = False,
) -> int:
    """Serve in this process until SIGTERM, SIGINT or the end of the engine; return its exit code.

    Args:
        settings: What to serve.
        on_listening: Called with the URL once it accepts connections.
        exit_with_parent: Also end when standard input reaches its end, which is when the process
            that holds the other end of the pipe has died. Start it with ``stdin=PIPE``.

    Returns:
        0 after a signal, 1 if the engine died.
    """
    return trio.run(_run, settings, on_listening, exit_with_parent)


async def _run(
    settings: ServerSettings, on_listening: Callable[[str], None] | None, exit_with_parent: bool
) -> int:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with running_server(settings) as server:
            if on_listening is not None:
                on_listening(server.url)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_on_signal, signals, server.stop)
                if exit_with_parent:
                    nursery.start_soon(_stop_at_end_of_input, server.stop)
                await server.stopped.wait()
                nursery.cancel_scope.cancel()
    return 1 if server.scheduler.state == "dead" else 0


async def _stop_on_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for _ in signals:
        stop.set()


async def _stop_at_end_of_input(stop: trio.Event) -> None:
    """Nobody writes to that pipe; its end is the news. One that is closed has ended, too."""
    if sys.stdin is not None:
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as pipe:
            while await pipe.receive_some():
                pass
    stop.set()
