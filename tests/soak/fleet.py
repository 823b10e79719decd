"""Embedded servers as processes that are killed and started again, each on its own port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from arealtrio.transport import HttpTransport
from arealtrio.types import HttpResponse, TimeLimits
from arealtrio.wire.dialect import Dialect

START_LIMIT_S = 60.0
IDLE_LIMIT_S = 15.0  # for a server to end what nobody waits for any more
LOOK_S = 0.2
LISTENING = b"listening on "


class ServerProcess:
    """One server. It ends with this process, whose end its standard input tells.

    Args:
        weights: What it starts with.
        options: Further arguments of ``python -m arealtrio.embedded``.
    """

    def __init__(self, weights: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "arealtrio.embedded", "--exit-with-parent"]
        self._command += ["--weights", str(weights), *options]
        self._process: trio.Process | None = None
        self.url = ""
        self.up = False
        """Whether it listens."""

    async def start(self) -> None:
        """Start it, on the port it had before, and return when it listens."""
        port = self.url.rpartition(":")[2] or "0"
        self._process = await trio.lowlevel.open_process(
            [*self._command, "--port", port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        with trio.fail_after(START_LIMIT_S):
            self.url = await self._listening()
        self.up = True

    async def _listening(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise RuntimeError("a server ended instead of listening")
            line += piece
        return line.removeprefix(LISTENING).decode().strip()

    async def kill(self) -> None:
        """Send SIGKILL, and return when it is gone; also if cancelled."""
        self.up = False
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


@asynccontextmanager
async def server_processes(
    count: int, weights: Path, options: Sequence[str]
) -> AsyncIterator[tuple[ServerProcess, ...]]:
    """Run servers around a block, which may kill and start them as it likes."""
    servers = tuple(ServerProcess(weights, *options) for _ in range(count))
    try:
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(server.start)
        yield servers
    finally:
        for server in servers:
            await server.kill()


async def in_flight(servers: Sequence[ServerProcess], dialect: Dialect) -> int:
    """Requests that servers hold whose clients have gone, once they had time to let go of them."""
    limits = TimeLimits.of(IDLE_LIMIT_S)
    async with HttpTransport() as transport:

        async def held(server: ServerProcess) -> int:
            answer: HttpResponse = await transport.request(server.url, dialect.load(), limits)
            load = dialect.parse_load(answer)
            return load.running + load.waiting

        left = 0
        with trio.move_on_after(IDLE_LIMIT_S):
            while left := sum([await held(server) for server in servers]):  # noqa: ASYNC110
                await trio.sleep(LOOK_S)  # another program's state, which nothing tells of
        return left
