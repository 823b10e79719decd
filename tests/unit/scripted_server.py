"""A real HTTP server whose every answer is a test's own bytes."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import trio

Answer: TypeAlias = Callable[[], Awaitable[bytes]]

GENERATE = ("/v1/completions", "/generate")  # of vLLM without a token route, and of SGLang


def http(body: bytes, status: int = 200, kind: bytes = b"application/json") -> bytes:
    """Return a whole answer."""
    head = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, kind, len(body)) + body


def at_once(answer: bytes) -> Answer:
    async def say() -> bytes:
        await trio.lowlevel.checkpoint()
        return answer

    return say


async def never() -> bytes:
    """Accept, and say nothing."""
    await trio.sleep_forever()
    raise AssertionError


class ScriptedServer:
    """As much of a vLLM or an SGLang as a pool asks for to take it in, and a test's own generation.

    Args:
        generation: Gives the answer to a generation.

    Attributes:
        asked: Generations that it was asked for.
        url: Where it listens.
    """

    def __init__(self, generation: Answer) -> None:
        self.generation = generation
        self.asked = 0
        self.url = ""

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Answer the requests of one connection."""
        try:
            buffer = bytearray()
            while (path := await _next_request(stream, buffer)) is not None:
                await stream.send_all(await self._answer(path))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client has gone

    async def _answer(self, path: str) -> bytes:
        if path in GENERATE:
            self.asked += 1
            return await self.generation()
        if path == "/v1/models":
            return http(b'{"object":"list","data":[{"id":"tiny"}]}')
        return http(b"") if path == "/health" else http(b'{"detail":"Not Found"}', 404)


async def _next_request(stream: trio.abc.Stream, buffer: bytearray) -> str | None:
    """Read one request; return its path, or None at the end of the connection."""
    while (end := buffer.find(b"\r\n\r\n")) < 0 or len(buffer) < end + 4 + _length(buffer[:end]):
        more = await stream.receive_some(65536)
        if not more:
            return None
        buffer += more
    head = bytes(buffer[:end])
    del buffer[: end + 4 + _length(head)]
    return head.split(b" ")[1].decode()


def _length(head: bytes | bytearray) -> int:
    for line in bytes(head).lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


@asynccontextmanager
async def scripted_server(
    generation: Answer, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """Serve for the length of a block, and break every connection off at its end."""
    server = ScriptedServer(generation)
    async with trio.open_nursery() as nursery:
        if tls is None:
            listeners = await nursery.start(trio.serve_tcp, server.handle, 0)
            port = listeners[0].socket.getsockname()[1]
        else:
            secure = await nursery.start(trio.serve_ssl_over_tcp, server.handle, 0, tls)
            port = secure[0].transport_listener.socket.getsockname()[1]
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        yield server
        nursery.cancel_scope.cancel()
