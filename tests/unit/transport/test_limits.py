"""Each named limit passes and says so."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arealtrio.errors import TransportTimeout
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import SHORT_S, Peer, StartServer, after_one_answer, limits_with, silent, silent_and_deaf


class TestLimits:
    @pytest.mark.parametrize("name", ["first_byte_s", "total_s"])
    async def test_no_answer(
        self, start_server: StartServer, transport: HttpTransport, post: HttpRequest, name: str
    ) -> None:
        server = await start_server(after_one_answer(silent))
        await transport.request(server.url, post, limits_with())  # connecting takes its own time
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

    @pytest.mark.parametrize("jump_s", [0.7, 2])
    async def test_what_arrived_counts_and_the_idle_limit_starts_anew(
        self,
        start_server: StartServer,
        transport: HttpTransport,
        post: HttpRequest,
        mock_clock: MockClock,
        jump_s: float,
    ) -> None:
        """A busy process comes back to bytes and a passed limit at once: it was not the server."""

        async def script(peer: Peer) -> None:
            await peer.read_request()
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
            for _ in range(4):
                await wait_all_tasks_blocked()
                mock_clock.jump(jump_s)
                await peer.say(b"x")

        server = await start_server(script)
        response = await transport.request(server.url, post, limits_with(idle_s=1))
        assert response.body == b"xxxx"
        assert trio.current_time() == pytest.approx(4 * jump_s, abs=0.01)

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
        """Sending takes longer than the limit, because the server does not read before it passed.

        What the server gets to see is no part of it: the kernel may drop what a closed connection
        still had to deliver.
        """
        reading = trio.Event()

        async def script(peer: Peer) -> None:
            await trio.sleep(2 * SHORT_S)
            reading.set()
            await peer.read_request()
            await peer.wait_closed()

        server = await start_server(script)
        request = HttpRequest("POST", "/", b"x" * 20_000_000)
        with pytest.raises(TransportTimeout, match="no answer came within first_byte_s") as caught:
            await transport.request(server.url, request, limits_with(first_byte_s=SHORT_S))
        assert reading.is_set()
        assert caught.value.request_sent

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
        server.scripts = [after_one_answer(silent)]
        await transport.request(server.url, post, limits)
        with pytest.raises(TransportTimeout):
            await transport.request(server.url, post, limits_with(first_byte_s=SHORT_S))
        assert (server.accepted, len(server.requests)) == (1, 2)
