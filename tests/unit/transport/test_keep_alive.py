"""When a connection is used again, when it is not, and when a request may be sent again."""

from __future__ import annotations

import resource

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from arealtrio.errors import TransportError
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import Peer, StartServer, once


class TestKeepAlive:
    async def test_one_task_uses_one_connection(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        for _ in range(20):
            await transport.request(server.url, post, limits)
        assert server.accepted == transport.statistics().opened == 1
        assert len(server.requests) == transport.statistics().requests == 20

    async def test_tasks_never_share_a_connection(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def echo(peer: Peer) -> None:
            while request := await peer.read_request():
                await wait_all_tasks_blocked()  # all of a round are in flight at once
                await peer.answer(request.partition(b"\r\n\r\n")[2])

        server = await start_server(echo)

        async def ask(number: int) -> None:
            for turn in range(3):
                body = b"%d/%d" % (number, turn)
                request = HttpRequest("POST", "/", body)
                assert (await transport.request(server.url, request, limits)).body == body

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(ask, number)
        assert server.accepted <= 16
        assert len(server.requests) == 48
        assert transport.statistics().idle == server.accepted

    @pytest.mark.parametrize(
        "data",
        [
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
            b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokjunk",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n"
            b"content-length: 3\r\n\r\nbad",
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\nok",
        ],
        ids=["close", "1.0", "garbage", "second-answer", "500"],
    )
    async def test_a_connection_that_is_not_clean_is_not_kept(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        data: bytes,
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(data)
            await peer.wait_closed()

        server = await start_server(script)
        for count in (1, 2):
            assert (await transport.request(server.url, post, limits)).body == b"ok"
            assert transport.statistics().idle == 0
            assert server.accepted == count

    async def test_one_closed_by_the_server_is_replaced_unseen(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        server.scripts = [once(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")]
        await transport.request(server.url, post, limits)
        await wait_all_tasks_blocked()
        assert transport.statistics().idle == 1
        assert (await transport.request(server.url, post, limits)).status == 200
        assert server.accepted == 2
        assert len(server.requests) == 2, "the second request arrived other than exactly once"

    async def test_one_with_unasked_bytes_is_replaced(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        said = trio.Event()

        async def chatty(peer: Peer) -> None:
            await peer.read_request()
            await peer.answer()
            await said.wait()
            await peer.say(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
            await peer.wait_closed()

        server = await start_server()
        server.scripts = [chatty]
        await transport.request(server.url, post, limits)
        said.set()
        await wait_all_tasks_blocked()
        assert (await transport.request(server.url, post, limits)).status == 200

    async def test_a_death_unseen_before_the_first_byte_is_retried_once(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The peer closes between the look and the send: here the look is made blind."""
        server = await start_server()

        async def reset_after_one(peer: Peer) -> None:
            await peer.read_request()
            await peer.answer()
            await peer.reset()

        server.scripts = [reset_after_one]
        await transport.request(server.url, post, limits)
        await wait_all_tasks_blocked()
        monkeypatch.setattr(
            "arealtrio.transport.connection.PlainConnection.is_quiet", lambda _: True
        )
        response = await transport.request(server.url, post, limits)
        assert response.status == 200
        assert transport.statistics().retried == 1
        assert len(server.requests) == 2

    async def test_nothing_is_sent_twice_once_a_byte_went_out(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        async def one_then_break(peer: Peer) -> None:
            await peer.read_request()
            await peer.answer()
            await peer.read_request()

        server = await start_server()
        server.scripts = [one_then_break]
        await transport.request(server.url, post, limits)
        with pytest.raises(TransportError, match="before the answer's headers") as caught:
            await transport.request(server.url, post, limits)
        assert caught.value.request_sent
        assert transport.statistics().retried == 0
        assert server.accepted == 1
        assert len(server.requests) == 2

    async def test_too_old_is_closed_at_the_next_use(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        server = await start_server()
        async with HttpTransport(keep_alive_s=0) as transport:
            await transport.request(server.url, post, limits)
            await transport.request(server.url, post, limits)
        assert server.accepted == 2

    async def test_those_to_one_server_make_room_for_those_to_another(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        """This process may hold no more descriptors than it holds; a fleet drains one server."""
        together = trio.Event()

        async def answer_all_at_once(peer: Peer) -> None:
            await peer.read_request()
            await together.wait()
            await peer.answer()
            await peer.wait_closed()

        first, second = await start_server(answer_all_at_once), await start_server()
        async with HttpTransport() as transport:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(transport.request, first.url, post, limits)
                await wait_all_tasks_blocked()
                together.set()
            assert transport.statistics().idle == 4
            with trio.socket.socket() as last:
                least = last.fileno()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
            try:
                assert (await transport.request(second.url, post, limits)).status == 200
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert transport.statistics().idle == 1

    async def test_idle_connections_are_bounded(
        self, start_server: StartServer, limits: TimeLimits, post: HttpRequest
    ) -> None:
        server = await start_server()
        async with HttpTransport(idle_per_origin=2) as transport:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(transport.request, server.url, post, limits)
            assert transport.statistics().idle == 2
            transport._pool._check()
