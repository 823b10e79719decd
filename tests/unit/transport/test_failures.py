"""Every way for an exchange to fail, and whose word it gets."""

from __future__ import annotations

import resource

import pytest
import trio

from arealtrio.errors import (
    ConfigError,
    ConnectFailed,
    InvalidRequest,
    ProtocolError,
    ResponseTooLarge,
    TransportError,
)
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import Peer, StartServer, once


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


class TestNoConnection:
    async def test_a_refused_port(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest
    ) -> None:
        with trio.socket.socket() as sock:
            await sock.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"  # bound, and nobody listens
            with pytest.raises(ConnectFailed, match=f"{url}: Connection refused$") as caught:
                await transport.request(url, post, limits)
        assert not caught.value.request_sent
        assert isinstance(caught.value.__cause__, OSError)

    async def test_no_descriptor_left(
        self, transport: HttpTransport, limits: TimeLimits, post: HttpRequest
    ) -> None:
        """It is this process that fails, and nothing is wrong with the server."""
        held = trio.socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held.fileno(), hard))
        try:
            with pytest.raises(ConnectFailed, match="Too many open files"):
                await transport.request("http://127.0.0.1:1", post, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            held.close()

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
    def test_arguments_out_of_range(self, arguments: dict[str, int]) -> None:
        with pytest.raises(ConfigError):
            HttpTransport(**arguments)  # type: ignore[arg-type]
