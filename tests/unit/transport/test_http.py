"""What goes out is HTTP, and what comes back is the answer, however it is framed."""

from __future__ import annotations

import os
from collections.abc import Callable

import httpx
import pytest
import trio

from arealtrio.errors import TransportError, TransportTimeout, UsageError
from arealtrio.transport import ClientTransport, HttpTransport, Transport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import Peer, Script, StartServer, once, parts


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

    @pytest.mark.parametrize("over_httpx", [False, True])
    async def test_a_request_s_own_headers_win(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        limits: TimeLimits,
        over_httpx: bool,
    ) -> None:
        server = await start_server()
        request = HttpRequest("POST", "/", b"{}", (("X-Request-Id", "own"), ("a", "1"), ("a", "2")))
        async with httpx.AsyncClient() as client:
            chosen = ClientTransport(client) if over_httpx else transport
            await chosen.request(
                server.url, request, limits, headers=(("x-request-id", "of all"), ("b", "3"))
            )
        lines = server.requests[0].lower().split(b"\r\n")
        assert [line for line in lines if line.startswith((b"x-request", b"a:", b"b:"))] == [
            b"b: 3", b"x-request-id: own", b"a: 1", b"a: 2",
        ]  # fmt: skip

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
        ids=["length", "chunked", "until-close", "1.0", "close", "204", "304", "1xx", "500",
             "html"],
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
        ours: Transport = transport
        async with ours.stream(server.url, post, limits) as response:
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
