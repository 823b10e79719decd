"""TLS with real handshakes."""

from __future__ import annotations

import ssl

import pytest
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from arealtrio.errors import (
    ConfigError,
    ConnectFailed,
    RolloutClosed,
    TransportError,
    TransportTimeout,
)
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import SHORT_S, Peer, StartServer, Wrap, limits_with, once, silent


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def wrap(authority: trustme.CA) -> Wrap:
    """The server's side of TLS, with a certificate for ``localhost``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return lambda stream: trio.SSLStream(stream, context, server_side=True, https_compatible=True)


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_requests_share_one_session(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
) -> None:
    async def echo(peer: Peer) -> None:
        while request := await peer.read_request():
            await peer.answer(request.partition(b"\r\n\r\n")[2])

    server = await start_server(echo, wrap)
    async with HttpTransport(ssl_context=trusting) as transport:
        for body in (b"{}", b"x" * 1_000_000, b""):
            response = await transport.request(server.url, HttpRequest("POST", "/", body), limits)
            assert response.body == body
        assert transport.statistics().idle == 1
    assert server.accepted == 1


async def test_a_certificate_nobody_vouches_for(
    start_server: StartServer, wrap: Wrap, limits: TimeLimits, post: HttpRequest
) -> None:
    server = await start_server(wrap=wrap)
    async with HttpTransport() as transport:  # trusts the system's authorities
        with pytest.raises(ConnectFailed, match="certificate verify failed") as caught:
            await transport.request(server.url, post, limits)
        assert transport.statistics().opened == transport.statistics().active == 0
    assert not caught.value.request_sent
    assert not server.requests


async def test_a_certificate_for_another_name(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
) -> None:
    server = await start_server(wrap=wrap)
    url = server.url.replace("localhost", "127.0.0.1")
    async with HttpTransport(ssl_context=trusting) as transport:
        with pytest.raises(ConnectFailed, match="IP address mismatch"):
            await transport.request(url, post, limits)


async def test_a_server_that_does_not_speak_tls(
    start_server: StartServer, limits: TimeLimits, post: HttpRequest
) -> None:
    async def plain(peer: Peer) -> None:
        await peer.stream.receive_some()
        await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = await start_server(plain)
    url = server.url.replace("http://", "https://")
    async with HttpTransport() as transport:
        with pytest.raises(ConnectFailed, match="no TLS session"):
            await transport.request(url, post, limits)


async def test_the_handshake_counts_as_connecting(
    start_server: StartServer, post: HttpRequest
) -> None:
    server = await start_server(silent)
    url = server.url.replace("http://", "https://")
    async with HttpTransport() as transport:
        with pytest.raises(TransportTimeout, match="connect_s") as caught:
            await transport.request(url, post, limits_with(connect_s=SHORT_S))
    assert not caught.value.request_sent


async def test_a_session_closed_by_the_server_is_replaced(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
) -> None:
    server = await start_server(wrap=wrap)
    server.scripts = [once(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")]
    async with HttpTransport(ssl_context=trusting) as transport:
        await transport.request(server.url, post, limits)
        await wait_all_tasks_blocked()
        assert (await transport.request(server.url, post, limits)).body == b"ok"
    assert server.accepted == len(server.requests) == 2


async def test_a_truncated_answer(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
) -> None:
    server = await start_server(once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"), wrap)
    async with HttpTransport(ssl_context=trusting) as transport:
        with pytest.raises(TransportError, match="after 2 bytes"):
            await transport.request(server.url, post, limits)
        assert transport.statistics().active == 0


async def test_cancelled_in_a_session(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
) -> None:
    gone = trio.Event()

    async def script(peer: Peer) -> None:
        await silent(peer)
        gone.set()

    server = await start_server(script, wrap)
    async with HttpTransport(ssl_context=trusting) as transport:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.request, server.url, post, limits)
                while not server.requests:
                    await wait_all_tasks_blocked()
                scope.cancel()
        assert transport.statistics().active == transport.statistics().idle == 0
        await gone.wait()


@pytest.mark.parametrize("turns", range(4))
async def test_closed_between_the_arrival_of_bytes_and_their_reading(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
    turns: int,
) -> None:
    """A session that has taken several records lets others run before it gives the second."""
    for _ in range(3):  # who runs first within a turn is chance
        async with HttpTransport(ssl_context=trusting) as transport:

            async def script(peer: Peer, transport: HttpTransport = transport) -> None:
                await peer.read_request()
                await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\n" + b"x" * 60_000)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                await transport.aclose()
                await peer.wait_closed()

            server = await start_server(script, wrap)
            with pytest.raises(RolloutClosed, match="the transport was closed"):
                await transport.request(server.url, post, limits)


async def test_a_server_may_need_another_authority_and_a_certificate_of_ours(
    start_server: StartServer,
    wrap: Wrap,
    trusting: ssl.SSLContext,
    limits: TimeLimits,
    post: HttpRequest,
) -> None:
    theirs = trustme.CA()
    demanding = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    demanding.minimum_version = ssl.TLSVersion.TLSv1_2
    demanding.verify_mode = ssl.CERT_REQUIRED
    theirs.issue_cert("localhost").configure_cert(demanding)
    theirs.configure_trust(demanding)
    own = ssl.create_default_context()
    theirs.configure_trust(own)
    theirs.issue_cert("trainer@example.org").configure_cert(own)

    async def echo(peer: Peer) -> None:
        while request := await peer.read_request():
            await peer.answer(request.partition(b"\r\n\r\n")[2])

    usual = await start_server(echo, wrap)
    strict = await start_server(
        echo,
        lambda stream: trio.SSLStream(stream, demanding, server_side=True, https_compatible=True),
    )
    contexts = {strict.url + "/base": own}
    async with HttpTransport(ssl_context=trusting, server_ssl_contexts=contexts) as transport:
        for server in (usual, strict):
            response = await transport.request(server.url, post, limits)
            assert response.body == post.body
    async with HttpTransport(ssl_context=trusting) as transport:
        with pytest.raises(ConnectFailed, match=r"(?i)certificate"):
            await transport.request(strict.url, post, limits)


def test_a_context_for_what_is_not_https_is_refused() -> None:
    with pytest.raises(ConfigError, match="http://a:1, which is not of https"):
        HttpTransport(server_ssl_contexts={"http://a:1": ssl.create_default_context()})
