"""Our connection pool and a real server's habits."""

from __future__ import annotations

import pytest

from arealtrio.errors import RolloutError
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, TimeLimits
from arealtrio.wire.vllm import VllmDialect

from .server import VllmServer

pytestmark = pytest.mark.real_servers

DIALECT = VllmDialect()
LIMITS = TimeLimits.of(60.0)


def reload(server: VllmServer, model: str) -> HttpRequest:
    requests = DIALECT.load_weights(str(server.models / model), 1)
    return next(request for request in requests if b"reload_weights" in request.body)


async def test_the_connection_that_a_500_closed_is_not_used_again(vllm_server: VllmServer) -> None:
    """After a 500 vLLM closes its side without saying so; the next request would meet a reset."""
    bad, good = (reload(vllm_server, name) for name in ("no-such-model", "tiny-1"))
    async with HttpTransport() as transport:

        async def control(request: HttpRequest) -> None:
            DIALECT.parse_control(await transport.request(vllm_server.url, request, LIMITS))

        for _ in range(5):
            with pytest.raises(RolloutError, match="500"):
                await control(bad)
            await control(good)


async def test_a_kept_connection_serves_again(vllm_server: VllmServer) -> None:
    async with HttpTransport() as transport:
        for _ in range(3):
            answer = await transport.request(vllm_server.url, DIALECT.health(), LIMITS)
            DIALECT.parse_health(answer)
        assert transport.statistics().opened == 1
