"""A server that says exactly the bytes a test gives it, on a real loopback socket."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

import trio

from arealtrio.types import TimeLimits

Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"
Script: TypeAlias = "Callable[[Peer], Awaitable[None]]"
Wrap: TypeAlias = "Callable[[trio.SocketStream], trio.SSLStream[trio.SocketStream]]"


class Peer:
    """The server's end of one connection."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def read_request(self) -> bytes:
        """One whole request; empty where the client closed before one."""
        head, _, rest = (await self._read_until(b"\r\n\r\n")).partition(b"\r\n\r\n")
        if not head:
            return b""
        size = next(
            (
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        body = bytearray(rest)
        while len(body) < size:
            more = await self._more()
            if not more:
                return b""
            body += more
        self._buffer = bytes(body[size:])
        return head + b"\r\n\r\n" + bytes(body[:size])

    async def say(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, body: bytes = b"ok", *, headers: bytes = b"") -> None:
        await self.say(
            b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body)
        )

    async def wait_closed(self) -> None:
        """Return when the client has closed its end."""
        try:
            while await self.stream.receive_some():
                pass
        except (trio.BrokenResourceError, OSError):
            return

    async def reset(self) -> None:
        """Close so that the client sees a reset, not an end."""
        raw = self.stream if isinstance(self.stream, trio.SocketStream) else None
        assert raw is not None, "only without TLS"
        raw.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.socket.close()

    async def _read_until(self, mark: bytes) -> bytes:
        data, self._buffer = self._buffer, b""
        while mark not in data:
            more = await self._more()
            if not more:
                return b""
            data += more
        return data

    async def _more(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some())
        except trio.BrokenResourceError:
            return b""


class ScriptedServer:
    """Runs ``script`` for every connection it accepts; ``scripts`` are for the first ones."""

    def __init__(self, script: Script, nursery: trio.Nursery) -> None:
        self.script = script
        self.scripts: list[Script] = []
        self.accepted = 0
        self.requests: list[bytes] = []
        self.url = ""
        self._nursery = nursery

    async def start(self, wrap: Wrap | None = None) -> None:
        listeners = await self._nursery.start(
            trio.serve_tcp, lambda stream: self._serve(wrap(stream) if wrap else stream), 0
        )
        port = listeners[0].socket.getsockname()[1]
        self.url = f"https://localhost:{port}" if wrap else f"http://127.0.0.1:{port}"

    async def _serve(self, stream: Stream) -> None:
        script = self.scripts.pop(0) if self.scripts else self.script
        self.accepted += 1
        async with trio.open_nursery() as nursery:
            peer = RecordingPeer(stream, self.requests)
            # The client hangs up, as many of these tests want it to.
            with contextlib.suppress(trio.BrokenResourceError):
                await script(peer)
            nursery.cancel_scope.cancel()
            await trio.aclose_forcefully(stream)


class RecordingPeer(Peer):
    """Notes each request that arrives whole."""

    def __init__(self, stream: Stream, requests: list[bytes]) -> None:
        super().__init__(stream)
        self._requests = requests

    async def read_request(self) -> bytes:
        request = await super().read_request()
        if request:
            self._requests.append(request)
        return request


async def serve_ok(peer: Peer) -> None:
    """Answer every request with 200 and ``ok`` until the client closes."""
    while await peer.read_request():
        await peer.answer()


class StartServer(Protocol):
    """Start a server that runs ``script`` on every connection."""

    async def __call__(self, script: Script = ..., wrap: Wrap | None = None) -> ScriptedServer: ...


SHORT_S = 0.05  # a limit that is meant to pass: loopback sockets do not run on a virtual clock


def once(data: bytes) -> Script:
    """Answer one request with ``data`` and close."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.say(data)

    return script


def parts(data: bytes) -> Script:
    """Answer one request byte by byte and close."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        for index in range(len(data)):
            await peer.say(data[index : index + 1])
            await trio.lowlevel.checkpoint()

    return script


def after_one_answer(script: Script) -> Script:
    """Answer the first request, so that its connection is kept, and go on with ``script``."""

    async def both(peer: Peer) -> None:
        await peer.read_request()
        await peer.answer()
        await script(peer)

    return both


async def silent(peer: Peer) -> None:
    await peer.read_request()
    await peer.wait_closed()


async def silent_and_deaf(_peer: Peer) -> None:
    await trio.sleep_forever()


def limits_with(**limits: float) -> TimeLimits:
    return TimeLimits(
        **{"connect_s": 30, "first_byte_s": 30, "idle_s": 30, "total_s": 30, **limits}
    )
