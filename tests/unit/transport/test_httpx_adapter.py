"""httpx over our pool, and our protocol over a user's httpx client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from arealtrio.errors import (
    ArealTrioError,
    ConfigError,
    ConnectFailed,
    InvalidRequest,
    ResponseTooLarge,
    TransportError,
    TransportTimeout,
)
from arealtrio.transport import ClientTransport, HttpTransport, HttpxTransport, Transport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import SHORT_S, Peer, StartServer, after_one_answer, limits_with, once, silent


@pytest.fixture
async def client(transport: HttpTransport) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=HttpxTransport(transport), timeout=30) as client:
        yield client


class TestHttpxTransport:
    async def test_a_request_and_its_answer(
        self, start_server: StartServer, client: httpx.AsyncClient, transport: HttpTransport
    ) -> None:
        server = await start_server(
            once(
                b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
                b'Content-Length: 11\r\n\r\n{"n": true}'
            )
        )
        response = await client.post(
            server.url + "/a", params={"q": "1 2"}, json={"x": 1}, headers={"X-Y": "z"}
        )
        assert response.json() == {"n": True}
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert response.http_version == "HTTP/1.1"
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"POST /a?q=1+2 HTTP/1.1"
        assert b"Host: " + server.url.removeprefix("http://").encode() in lines
        assert b"X-Y: z" in lines
        assert body == b'{"x":1}'
        assert transport.statistics().active == 0

    async def test_connections_are_reused(
        self, start_server: StartServer, client: httpx.AsyncClient
    ) -> None:
        server = await start_server()
        for _ in range(5):
            assert (await client.get(server.url)).text == "ok"
        assert server.accepted == 1

    async def test_an_answer_is_streamed(
        self, start_server: StartServer, client: httpx.AsyncClient, transport: HttpTransport
    ) -> None:
        more = trio.Event()

        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n")
            await more.wait()
            await peer.say(b"1\r\nc\r\n0\r\n\r\n")
            await peer.wait_closed()

        server = await start_server(script)
        async with client.stream("GET", server.url) as response:
            pieces = response.aiter_bytes()
            assert await anext(pieces) == b"ab"
            more.set()
            assert [piece async for piece in pieces] == [b"c"]
        assert transport.statistics().idle == 1

    async def test_an_upload_from_a_generator_gets_a_length(
        self, start_server: StartServer, client: httpx.AsyncClient
    ) -> None:
        async def upload() -> AsyncIterator[bytes]:
            yield b"ab"
            yield b"c"

        server = await start_server()
        await client.post(server.url, content=upload())
        assert b"transfer-encoding" not in server.requests[0].lower()
        assert server.requests[0].endswith(b"Content-Length: 3\r\n\r\nabc")

    async def test_head_and_empty_post(
        self, start_server: StartServer, client: httpx.AsyncClient
    ) -> None:
        server = await start_server()
        server.scripts = [once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")]
        assert (await client.head(server.url)).headers["content-length"] == "9"
        assert (await client.post(server.url)).text == "ok"
        assert b"Content-Length: 0" in server.requests[1]

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"<html>", httpx.RemoteProtocolError),
            (b"", httpx.ReadError),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab", httpx.ReadError),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n", httpx.ReadError),
        ],
    )
    async def test_errors_are_httpx_errors(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        data: bytes,
        error: type[Exception],
    ) -> None:
        server = await start_server(once(data))
        pool = HttpxTransport(transport, size_bytes_max=100)
        async with httpx.AsyncClient(transport=pool) as client:
            with pytest.raises(error) as caught:
                await client.get(server.url)
        assert isinstance(caught.value.__cause__, ArealTrioError)
        assert transport.statistics().active == 0

    async def test_time_outs_are_httpx_time_outs(
        self,
        start_server: StartServer,
        client: httpx.AsyncClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        server = await start_server(silent)
        with pytest.raises(httpx.ReadTimeout):
            await client.get(server.url, timeout=httpx.Timeout(None, read=SHORT_S))

        async def never(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(trio, "open_tcp_stream", never)
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("http://a.invalid", timeout=httpx.Timeout(None, connect=SHORT_S))

    async def test_no_connection(self, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1")
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1")
        with pytest.raises(httpx.LocalProtocolError):
            await client.get("http://127.0.0.1:1", headers={"a": "b\r\nc: d"})

    async def test_cancelled_nothing_stays_open(
        self, start_server: StartServer, client: httpx.AsyncClient, transport: HttpTransport
    ) -> None:
        server = await start_server(silent)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, server.url)
            await wait_all_tasks_blocked()
            assert transport.statistics().active == 1
            nursery.cancel_scope.cancel()
        assert transport.statistics().active == transport.statistics().idle == 0


class TestClientTransport:
    async def test_a_request_and_its_answer(
        self, start_server: StartServer, client: httpx.AsyncClient, limits: TimeLimits
    ) -> None:
        server = await start_server(
            once(b"HTTP/1.1 201 Created\r\nX-A: 1\r\nX-A: 2\r\ncontent-length: 2\r\n\r\nok")
        )
        ours: Transport = ClientTransport(client)
        request = HttpRequest("POST", "/x", b"{}", (("a", "b"),))
        response = await ours.request(server.url, request, limits, headers=(("c", "d"),))
        assert (response.status, response.body) == (201, b"ok")
        assert response.headers == {"x-a": "1, 2", "content-length": "2"}
        assert server.requests[0].startswith(b"POST /x HTTP/1.1\r\n")
        assert b"content-type: application/json" in server.requests[0].lower()
        assert b"\r\na: b" in server.requests[0]
        assert b"\r\nc: d" in server.requests[0]

    async def test_the_client_stays_open(
        self, start_server: StartServer, client: httpx.AsyncClient
    ) -> None:
        server = await start_server()
        await ClientTransport(client).aclose()
        assert (await client.get(server.url)).status_code == 200

    @pytest.mark.parametrize("name", ["first_byte_s", "idle_s", "total_s"])
    async def test_limits(
        self,
        start_server: StartServer,
        client: httpx.AsyncClient,
        transport: HttpTransport,
        post: HttpRequest,
        name: str,
    ) -> None:
        async def half(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na")
            await peer.wait_closed()

        script = after_one_answer(half if name == "idle_s" else silent)
        server = await start_server(script)
        await client.get(server.url)  # so that connecting takes none of the time
        limits = limits_with(**{"connect_s": SHORT_S, name: SHORT_S})
        with pytest.raises(TransportTimeout, match=f"{name} = ") as caught:
            # connect_s is granted on top of first_byte_s, because httpx does both in one call.
            await ClientTransport(client).request(server.url, post, limits)
        assert caught.value.limit == name
        assert transport.statistics().active == 0

    async def test_size(
        self, start_server: StartServer, client: httpx.AsyncClient, limits: TimeLimits
    ) -> None:
        server = await start_server()
        ours = ClientTransport(client)
        with pytest.raises(ResponseTooLarge):
            await ours.request(server.url, HttpRequest("GET", "/"), limits, size_bytes_max=1)

    @pytest.mark.parametrize(
        ("theirs", "ours", "sent"),
        [
            (httpx.ConnectError("no"), ConnectFailed, False),
            (httpx.ConnectTimeout("no"), TransportTimeout, False),
            (httpx.PoolTimeout("no"), TransportTimeout, False),
            (httpx.ReadTimeout("no"), TransportTimeout, True),
            (httpx.ReadError("no"), TransportError, True),
            (httpx.RemoteProtocolError("no"), TransportError, True),
            (httpx.LocalProtocolError("no"), InvalidRequest, None),
            (httpx.UnsupportedProtocol("no"), ConfigError, None),
        ],
    )
    async def test_errors_are_ours(
        self,
        limits: TimeLimits,
        theirs: Exception,
        ours: type[Exception],
        sent: bool | None,
    ) -> None:
        def fail(_: httpx.Request) -> httpx.Response:
            raise theirs

        async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as client:
            with pytest.raises(ours) as caught:
                await ClientTransport(client).request("http://a", HttpRequest("GET", "/"), limits)
        assert caught.value.__cause__ is theirs
        assert getattr(caught.value, "request_sent", None) is sent

    @pytest.mark.parametrize("value", ["s3cret-kéy", " s3cret-key\t"])
    async def test_a_header_that_http_can_send_is_sent(
        self, start_server: StartServer, limits: TimeLimits, value: str
    ) -> None:
        server = await start_server()
        async with httpx.AsyncClient() as client:
            ours = ClientTransport(client)
            await ours.request(server.url, HttpRequest("GET", "/"), limits, headers=(("k", value),))
        assert b"\r\nk: %b\r\n" % value.strip().encode("latin-1") in server.requests[0]

    @pytest.mark.parametrize(
        ("base_url", "request_", "ours"),
        [
            ("", HttpRequest("GET", "/", headers=(("k", "s3cret\n"),)), InvalidRequest),
            ("", HttpRequest("GET", "/", headers=(("k", "s3cret\x0b"),)), InvalidRequest),
            ("", HttpRequest("GET", "/", headers=(("k", "s3cret€"),)), InvalidRequest),
            ("", HttpRequest("GET", "/a\n"), InvalidRequest),
            ("", HttpRequest("GET", "/" + "a" * 70_000), InvalidRequest),
            ("http://[::1", HttpRequest("GET", "/"), ConfigError),
            ("http://u:s3cret@a", HttpRequest("GET", "/"), ConfigError),
            ("ftp://u:s3cret@a", HttpRequest("GET", "/"), ConfigError),
            ("http://127.0.0.1:1", HttpRequest("GET", "/?key=s3cret"), ConnectFailed),
            ("http://a..b", HttpRequest("GET", "/"), ConnectFailed),
        ],
    )
    async def test_what_can_not_be_sent_is_named_without_its_secrets(
        self,
        start_server: StartServer,
        limits: TimeLimits,
        base_url: str,
        request_: HttpRequest,
        ours: type[ArealTrioError],
    ) -> None:
        server = await start_server()
        async with httpx.AsyncClient() as client:
            with pytest.raises(ours) as caught:
                await ClientTransport(client).request(base_url or server.url, request_, limits)
        assert "s3cret" not in str(caught.value)
