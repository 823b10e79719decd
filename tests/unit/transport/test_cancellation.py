"""Cancelled or closed anywhere, nothing stays open."""

from __future__ import annotations

import gc
import weakref

import psutil
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from arealtrio.errors import RolloutClosed, UsageError
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import Peer, Script, StartServer, once, silent, silent_and_deaf


class TestCancellation:
    @pytest.mark.parametrize(
        ("script", "body"),
        [
            (silent, b"{}"),
            (silent_and_deaf, b"x" * 20_000_000),
            (None, b"{}"),
        ],
        ids=["first-byte", "sending", "body"],
    )
    async def test_cancelled_anywhere_nothing_stays_open(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        script: Script | None,
        body: bytes,
    ) -> None:
        async def half(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            await peer.wait_closed()
            closed.set()

        closed = trio.Event()
        server = await start_server(half if script is None else script)
        async with trio.open_nursery() as nursery:
            request = HttpRequest("POST", "/", body)
            nursery.start_soon(transport.request, server.url, request, limits)
            await wait_all_tasks_blocked()
            assert transport.statistics().active == 1
            nursery.cancel_scope.cancel()
        statistics = transport.statistics()
        assert (statistics.active, statistics.idle, statistics.opened) == (0, 0, 1)
        if script is None:
            await closed.wait()

    async def test_cancelled_while_connecting(
        self,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async def never(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(trio, "open_tcp_stream", never)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.request, "http://a.invalid", post, limits)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not transport._connecting
        assert transport.statistics().opened == 0

    async def test_cancelled_before_nothing_is_sent(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        await transport.request(server.url, post, limits)
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.request(server.url, post, limits)
        assert scope.cancelled_caught
        assert len(server.requests) == 1
        assert transport.statistics().idle == 1

    async def test_cancelled_in_a_stream_body(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server(once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"))
        with trio.CancelScope() as scope:
            async with transport.stream(server.url, post, limits):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert transport.statistics().active == 0


class TestClose:
    async def test_requests_in_flight_end_with_a_clear_error(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        server = await start_server(silent)
        caught: list[RolloutClosed] = []

        async def ask(url: str) -> None:
            with pytest.raises(RolloutClosed, match="the transport was closed") as excinfo:
                await transport.request(url, post, limits)
            caught.append(excinfo.value)

        async with HttpTransport() as transport, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, server.url)
            await wait_all_tasks_blocked()
            assert transport.statistics().active == 3
            await transport.aclose()
        assert len(caught) == 3
        assert transport.statistics().active == 0

    async def test_closed_between_the_arrival_of_bytes_and_their_reading(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        """Whether the reader or the closer runs first is chance, so it is tried some times."""
        for _ in range(10):
            async with HttpTransport() as transport:

                async def script(peer: Peer, transport: HttpTransport = transport) -> None:
                    await peer.read_request()
                    await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")
                    await wait_all_tasks_blocked()
                    await peer.say(b"half")
                    await transport.aclose()
                    await peer.wait_closed()

                server = await start_server(script)
                with pytest.raises(RolloutClosed, match="the transport was closed"):
                    await transport.request(server.url, post, limits)

    async def test_closed_before_the_rest_of_a_large_body_goes_out(
        self, start_server: StartServer, limits: TimeLimits
    ) -> None:
        """Whether the sender or the closer runs first is chance, so it is tried some times."""

        class Watch(trio.abc.Instrument):
            def task_spawned(self, task: trio.lowlevel.Task) -> None:
                if "_send_rest" in task.name:
                    sender_is_about_to_start.set()

        async def close(transport: HttpTransport) -> None:
            await sender_is_about_to_start.wait()
            await transport.aclose()

        server = await start_server(silent_and_deaf)
        request = HttpRequest("POST", "/", b"x" * 20_000_000)
        watch = Watch()
        trio.lowlevel.add_instrument(watch)
        for _ in range(10):
            sender_is_about_to_start = trio.Event()
            async with HttpTransport() as transport, trio.open_nursery() as nursery:
                nursery.start_soon(close, transport)
                with pytest.raises(RolloutClosed, match="the transport was closed"):
                    await transport.request(server.url, request, limits)
        trio.lowlevel.remove_instrument(watch)

    async def test_closed_while_connecting(
        self, limits: TimeLimits, post: HttpRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def never(*_: object) -> None:
            await trio.sleep_forever()

        async def ask() -> None:
            with pytest.raises(RolloutClosed, match=r"a\.invalid"):
                await transport.request("http://a.invalid", post, limits)

        monkeypatch.setattr(trio, "open_tcp_stream", never)
        async with HttpTransport() as transport, trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            await transport.aclose()

    async def test_closed_inside_a_stream(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server(once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"))
        async with transport.stream(server.url, post, limits) as response:
            await transport.aclose()
            chunks = response.chunks()
            with pytest.raises(RolloutClosed):
                _ = [chunk async for chunk in chunks]

    async def test_used_after_close(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest
    ) -> None:
        await transport.aclose()
        await transport.aclose()
        with pytest.raises(UsageError, match="closed"):
            await transport.request("http://127.0.0.1:1", post, limits)
        assert transport.statistics().requests == 0

    async def test_cancelled_close_closes(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        await transport.request(server.url, post, limits)
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.aclose()
        assert transport.statistics().idle == 0

    async def test_no_socket_outlives_the_transport(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        server = await start_server()
        port = int(server.url.rpartition(":")[2])

        def ours() -> int:
            connections = psutil.Process().net_connections("tcp")
            return sum(1 for one in connections if one.raddr and one.raddr.port == port)

        async with HttpTransport() as transport:
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(transport.request, server.url, post, limits)
            assert ours() > 0
        assert ours() == 0

    async def test_a_closed_connection_is_freed_without_the_collector(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        server = await start_server()
        gc.collect()
        gc.disable()
        try:
            async with HttpTransport() as transport:
                await transport.request(server.url, post, limits)
                (idle,) = transport._pool._idle.values()
                alive = weakref.ref(idle[0])
            assert alive() is None
        finally:
            gc.enable()

    async def test_repr_shows_the_pool(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        await transport.request(server.url, post, limits)
        assert repr(transport) == "<HttpTransport: 0 active, 1 idle, 1 opened>"
