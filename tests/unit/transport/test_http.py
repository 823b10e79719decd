"""The pool against scripted bytes on loopback sockets."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arealtrio.errors import (
    ConfigError,
    ConnectFailed,
    InvalidRequest,
    ProtocolError,
    ResponseTooLarge,
    RolloutClosed,
    TransportError,
    TransportTimeout,
    UsageError,
)
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

if TYPE_CHECKING:
    from tests.unit.transport.conftest import Peer, Script, StartServer

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


async def silent(peer: Peer) -> None:
    await peer.read_request()
    await peer.wait_closed()


async def silent_and_deaf(_peer: Peer) -> None:
    await trio.sleep_forever()


class TestAnswers:
    async def test_a_request_arrives_as_http_and_its_answer_comes_back(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        server = await start_server(once(b"HTTP/1.1 201 Created\r\nX-A: 1\r\nx-a: 2\r\n"
                                         b"Content-Length: 4\r\n\r\nbody"))  # fmt: skip
        request = HttpRequest("POST", "/a?b=c", b"{}", (("x-rid", "7"),))
        response = await transport.request(
            server.url, request, limits, headers=(("Authorization", "Bearer t"),)
        )
        assert response.status == 201
        assert response.headers == {"x-a": "1, 2", "content-length": "4"}
        assert response.body == b"body"
        lines = server.requests[0].split(b"\r\n")
        assert lines[0] == b"POST /a?b=c HTTP/1.1"
        assert b"host: " + server.url.removeprefix("http://").encode() in lines
        assert b"content-length: 2" in lines
        assert b"content-type: application/json" in lines
        assert b"authorization: Bearer t" in lines
        assert b"x-rid: 7" in lines
        assert lines[-1] == b"{}"

    async def test_a_base_url_may_have_a_path(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        await transport.request(server.url + "/v1/", post, limits)
        assert server.requests[0].startswith(b"POST /v1/generate HTTP/1.1\r\n")

    async def test_get_has_no_body(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        server = await start_server()
        await transport.request(server.url, HttpRequest("GET", "/health"), limits)
        assert b"content-" not in server.requests[0]

    @pytest.mark.parametrize(
        ("data", "body"),
        [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
             b"2;e=1\r\nab\r\n1\r\nc\r\n0\r\nx-trailer: 1\r\n\r\n", b"abc"),
            (b"HTTP/1.1 200 OK\r\n\r\nabc", b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
            (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
            (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
            (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", b""),
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
             b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
            (b"HTTP/1.1 500 Oops\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
            (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 13\r\n\r\n"
             b"<html></html>", b"<html></html>"),
        ],
        ids=["length", "chunked", "until-close", "1.0", "close", "204", "304", "1xx", "500", "html"],
    )  # fmt: skip
    @pytest.mark.parametrize("how", [once, parts])
    async def test_every_framing_whole_or_byte_by_byte(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        data: bytes,
        body: bytes,
        how: Callable[[bytes], Script],
    ) -> None:
        server = await start_server(how(data))
        response = await transport.request(server.url, post, limits)
        assert response.status == int(data.rpartition(b"HTTP/1.")[2][2:5])
        assert response.body == body
        assert "link" not in response.headers
        assert "x-trailer" not in response.headers

    async def test_head_has_a_length_and_no_body(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n")
            await peer.wait_closed()

        server = await start_server(script)
        response = await transport.request(server.url, HttpRequest("HEAD", "/"), limits)
        assert (response.status, response.body) == (200, b"")

    async def test_a_large_body_both_ways(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def echo(peer: Peer) -> None:
            while request := await peer.read_request():
                await peer.answer(request.partition(b"\r\n\r\n")[2])

        server = await start_server(echo)
        body = os.urandom(5_000_000)
        for _ in range(2):
            request = HttpRequest("POST", "/", body)
            assert (await transport.request(server.url, request, limits)).body == body
        assert server.accepted == 1

    async def test_stream_hands_out_pieces_as_they_come(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        more = trio.Event()

        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n")
            await more.wait()
            await peer.say(b"1\r\nc\r\n0\r\n\r\n")
            assert not await peer.read_request()

        server = await start_server(script)
        async with transport.stream(server.url, post, limits) as response:
            assert response.status == 200
            assert response.headers == {"transfer-encoding": "chunked"}
            chunks = response.chunks()
            assert await anext(chunks) == b"ab"
            more.set()
            assert [chunk async for chunk in chunks] == [b"c"]
        assert transport.statistics().idle == 1

    async def test_a_stream_left_early_closes_its_connection(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server(once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"))
        async with transport.stream(server.url, post, limits) as response:
            pass
        assert transport.statistics().idle == transport.statistics().active == 0
        with pytest.raises(UsageError, match="async with"):
            await anext(response.chunks())


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
        ],
        ids=["close", "1.0", "garbage", "second-answer"],
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


class TestBrokenAnswers:
    @pytest.mark.parametrize(
        ("data", "where"),
        [
            (b"", "headers"),
            (b"HTTP/1.1 200 OK\r\nconte", "headers"),
            (b"HTTP/1.1 100 Continue\r\n\r\n", "headers"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", "after 3 bytes"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "after 3 bytes"),
        ],
        ids=["nothing", "head", "interim", "length", "chunked"],
    )
    async def test_a_truncated_answer_is_a_transport_error(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        data: bytes,
        where: str,
    ) -> None:
        server = await start_server(once(data))
        with pytest.raises(TransportError, match=where) as caught:
            await transport.request(server.url, post, limits)
        assert caught.value.request_sent
        assert server.url in str(caught.value)
        assert server.accepted == 1

    async def test_a_reset_is_a_transport_error(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.reset()

        server = await start_server(script)
        with pytest.raises(TransportError, match="ConnectionResetError"):
            await transport.request(server.url, post, limits)

    @pytest.mark.parametrize(
        "data",
        [
            b"<html>no</html>",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        ],
    )
    async def test_what_is_not_http_is_a_protocol_error(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        data: bytes,
    ) -> None:
        server = await start_server(once(data))
        with pytest.raises(ProtocolError, match=server.url):
            await transport.request(server.url, post, limits)

    async def test_an_endless_head_is_a_protocol_error(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\n")
            while True:
                await peer.say(b"x-more: " + b"y" * 8000 + b"\r\n")

        server = await start_server(script)
        with pytest.raises(ProtocolError, match="bytes of head"):
            await transport.request(server.url, post, limits)

    @pytest.mark.parametrize(
        "head", [b"content-length: 101\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n65\r\n"]
    )
    async def test_a_body_above_the_limit_is_refused(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
        head: bytes,
    ) -> None:
        server = await start_server(once(b"HTTP/1.1 200 OK\r\n" + head + b"x" * 101))
        with pytest.raises(ResponseTooLarge, match="100 are allowed"):
            await transport.request(server.url, post, limits, size_bytes_max=100)

    async def test_a_body_at_the_limit_is_taken(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        post: HttpRequest,
    ) -> None:
        server = await start_server()
        response = await transport.request(server.url, post, limits, size_bytes_max=2)
        assert response.body == b"ok"


class TestEarlyAnswers:
    BODY = b"x" * 20_000_000  # more than the socket buffers hold

    async def test_an_error_that_comes_while_the_body_goes_out(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.stream.receive_some(1000)
            await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
            await trio.sleep_forever()

        server = await start_server(script)
        response = await transport.request(server.url, HttpRequest("POST", "/", self.BODY), limits)
        assert (response.status, response.body) == (413, b"big")
        assert transport.statistics().idle == 0, "half a request is on that connection"

    async def test_a_success_that_comes_early_still_gets_the_whole_body(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def script(peer: Peer) -> None:
            first = await peer.stream.receive_some(10)
            await peer.say(b"HTTP/1.1 100 Continue\r\n\r\n")
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
            peer._buffer = bytes(first)
            await peer.read_request()
            await peer.say(b"ok")
            await peer.wait_closed()

        server = await start_server(script)
        response = await transport.request(server.url, HttpRequest("POST", "/", self.BODY), limits)
        assert response.body == b"ok"
        assert server.requests[0].endswith(self.BODY)
        assert transport.statistics().idle == 1

    async def test_a_peer_that_dies_while_the_body_goes_out(
        self, start_server: StartServer, transport: HttpTransport, limits: TimeLimits
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.stream.receive_some(1000)
            await peer.reset()

        server = await start_server(script)
        with pytest.raises(TransportError) as caught:
            await transport.request(server.url, HttpRequest("POST", "/", self.BODY), limits)
        assert caught.value.request_sent
        assert not isinstance(caught.value, TransportTimeout)


def limits_with(**limits: float) -> TimeLimits:
    return TimeLimits(
        **{"connect_s": 30, "first_byte_s": 30, "idle_s": 30, "total_s": 30, **limits}
    )


class TestLimits:
    @pytest.mark.parametrize("name", ["first_byte_s", "total_s"])
    async def test_no_answer(
        self, start_server: StartServer, transport: HttpTransport, post: HttpRequest, name: str
    ) -> None:
        server = await start_server(silent)
        with pytest.raises(TransportTimeout, match=f"{name} = {SHORT_S}") as caught:
            await transport.request(server.url, post, limits_with(**{name: SHORT_S}))
        assert caught.value.limit == name
        assert caught.value.request_sent
        assert server.url in str(caught.value)
        assert transport.statistics().idle == 0

    @pytest.mark.parametrize("name", ["idle_s", "total_s"])
    @pytest.mark.parametrize(
        "start", [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na"]
    )
    async def test_half_an_answer(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        post: HttpRequest,
        name: str,
        start: bytes,
    ) -> None:
        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(start)
            await peer.wait_closed()

        server = await start_server(script)
        with pytest.raises(TransportTimeout, match=name) as caught:
            await transport.request(server.url, post, limits_with(**{name: SHORT_S}))
        assert caught.value.limit == name

    async def test_a_flood_does_not_outrun_the_total(
        self, start_server: StartServer, transport: HttpTransport
    ) -> None:
        async def flood(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                await peer.say(b"x" * 65536)

        server = await start_server(flood)
        request = HttpRequest("POST", "/", b"{}")
        short = limits_with(total_s=SHORT_S)
        with pytest.raises(TransportTimeout, match="total_s"):
            await transport.request(server.url, request, short, size_bytes_max=2**40)

    async def test_a_server_that_takes_no_more_of_the_request(
        self, start_server: StartServer, transport: HttpTransport
    ) -> None:
        server = await start_server(silent_and_deaf)
        request = HttpRequest("POST", "/", b"x" * 20_000_000)
        with pytest.raises(TransportTimeout, match="took no more of the request within idle_s"):
            await transport.request(server.url, request, limits_with(idle_s=SHORT_S))

    async def test_the_first_byte_counts_from_the_last_of_a_large_request(
        self, start_server: StartServer, transport: HttpTransport
    ) -> None:
        server = await start_server(silent)
        request = HttpRequest("POST", "/", b"x" * 20_000_000)
        with pytest.raises(TransportTimeout, match="first_byte_s"):
            await transport.request(server.url, request, limits_with(first_byte_s=SHORT_S))
        assert server.requests[0].endswith(request.body)

    @pytest.mark.parametrize("name", ["connect_s", "total_s"])
    async def test_no_connection_in_time(
        self,
        transport: HttpTransport,
        post: HttpRequest,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
        autojump_clock: MockClock,
    ) -> None:
        async def never(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(trio, "open_tcp_stream", never)
        with pytest.raises(TransportTimeout, match=f"{name} = 7 s") as caught:
            await transport.request("http://a.invalid", post, limits_with(**{name: 7}))
        assert caught.value.limit == name
        assert not caught.value.request_sent
        assert trio.current_time() == pytest.approx(autojump_clock.current_time(), abs=1)

    async def test_a_timed_out_request_is_not_sent_again(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        post: HttpRequest,
        limits: TimeLimits,
    ) -> None:
        server = await start_server()

        async def one_then_silence(peer: Peer) -> None:
            await peer.read_request()
            await peer.answer()
            await silent(peer)

        server.scripts = [one_then_silence]
        await transport.request(server.url, post, limits)
        with pytest.raises(TransportTimeout):
            await transport.request(server.url, post, limits_with(first_byte_s=SHORT_S))
        assert (server.accepted, len(server.requests)) == (1, 2)


class TestNoConnection:
    async def test_a_refused_port(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest
    ) -> None:
        with trio.socket.socket() as sock:
            await sock.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"  # bound, and nobody listens
            with pytest.raises(ConnectFailed, match=url) as caught:
                await transport.request(url, post, limits)
        assert not caught.value.request_sent
        assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid"])
    async def test_a_name_that_does_not_resolve(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest, host: str
    ) -> None:
        with pytest.raises(ConnectFailed, match=host):
            await transport.request(f"http://{host}", post, limits)

    @pytest.mark.parametrize(
        "url",
        ["", "localhost:8000", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://a:0",
         "http://a/?q=1", "http://a#f", "http://ä", "http://a b", "http://u:p@a"],
    )  # fmt: skip
    async def test_what_is_not_an_address_is_your_configuration(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest, url: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            await transport.request(url, post, limits)
        assert "u:p" not in str(caught.value)

    @pytest.mark.parametrize(
        "request_",
        [
            HttpRequest("GET /", "/"),
            HttpRequest("GET", "no-slash"),
            HttpRequest("GET", "/a b"),
            HttpRequest("GET", "/\r\nx: y"),
            HttpRequest("GET", "/", headers=(("a", "b\r\nc: d"),)),
            HttpRequest("GET", "/", headers=(("a\r\nb", "c"),)),
            HttpRequest("GET", "/", headers=(("a b", "c"),)),
            HttpRequest("GET", "/", headers=(("a", "b\0"),)),
            HttpRequest("GET", "/", headers=(("a", "€"),)),
            HttpRequest("GET", "/", headers=(("Content-Length", "7"),)),
        ],
    )
    async def test_a_request_that_is_not_http_goes_nowhere(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        request_: HttpRequest,
    ) -> None:
        server = await start_server()
        with pytest.raises(InvalidRequest):
            await transport.request(server.url, request_, limits)
        assert server.accepted == 0

    @pytest.mark.parametrize("arguments", [{"keep_alive_s": -1}, {"idle_per_origin": -1}])
    def test_arguments_out_of_range(self, arguments: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            HttpTransport(**arguments)


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
        script: Script,
        body: bytes,
    ) -> None:
        async def half(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            await peer.wait_closed()
            closed.set()

        closed = trio.Event()
        server = await start_server(script or half)
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
        caught = []

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
