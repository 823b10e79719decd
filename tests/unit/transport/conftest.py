"""A server to be scripted, and the pool that asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits

from .peer import Script, ScriptedServer, StartServer, Wrap, serve_ok


@pytest.fixture
async def start_server(nursery: trio.Nursery) -> StartServer:
    async def start(script: Script = serve_ok, wrap: Wrap | None = None) -> ScriptedServer:
        server = ScriptedServer(script, nursery)
        await server.start(wrap)
        return server

    return start


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    """A pool; afterwards nothing may be left of it."""
    async with HttpTransport() as transport:
        yield transport
        transport._pool._check()
        assert transport.statistics().active == 0, "a connection is still in use"
    assert transport.statistics().idle == 0


@pytest.fixture
def limits() -> TimeLimits:
    return TimeLimits.of(30)


@pytest.fixture
def post() -> HttpRequest:
    return HttpRequest("POST", "/generate", b'{"x": 1}')
