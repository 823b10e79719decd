"""Embedded servers of either dialect behind real sockets, and every request to them noted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arealtrio.config import RolloutConfig
from arealtrio.embedded.serve import RunningServer, ServerSettings, running_server
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, HttpResponse

from .embedded_server import MAX_MODEL_LEN, VOCAB_SIZE, Watch, save_weights

Hook = Callable[[str, HttpRequest], Awaitable[HttpResponse | None]]
POLLED = ("/health", "/metrics")


class ObservedTransport(HttpTransport):
    """Real HTTP; notes what is sent, and lets ``hook`` answer, or raise, in a server's place."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, HttpRequest]] = []
        self.hook: Hook | None = None

    async def request(self, base_url: str, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if request.path not in POLLED:
            self.asked.append((base_url, request))
        if self.hook is not None and (answer := await self.hook(base_url, request)) is not None:
            return answer
        return await super().request(base_url, request, *args, **kwargs)


@dataclass
class Observed:
    """Servers by address, what they were asked, and the directories of two different weights."""

    servers: dict[str, RunningServer]
    watches: dict[str, Watch]
    weights: dict[int, Path]
    transport: ObservedTransport = field(default_factory=ObservedTransport)

    @property
    def urls(self) -> list[str]:
        return list(self.servers)

    def paths(self, url: str) -> list[str]:
        """What one server was asked for, in order."""
        return [request.path for base_url, request in self.transport.asked if base_url == url]

    def bodies(self, path: str) -> list[Any]:
        """The bodies of the requests for one path, of all servers."""
        asked = [request for _, request in self.transport.asked if request.path == path]
        return [msgspec.json.decode(request.body) for request in asked]

    def forget(self) -> None:
        self.transport.asked.clear()


@asynccontextmanager
async def running_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: Any, count: int = 2, **settings: Any
) -> AsyncIterator[Observed]:
    weights = {seed: save_weights(tmp_path, seed) for seed in (1, 2)}
    chosen = {"max_model_len": MAX_MODEL_LEN, "dialect": dialect, **settings}
    async with AsyncExitStack() as stack:
        servers = {}
        for _ in range(count):
            one = ServerSettings(weights=weights[1], **chosen)
            server = await stack.enter_async_context(running_server(one))
            servers[server.url] = server
        watches = {url: Watch(one.scheduler, monkeypatch) for url, one in servers.items()}
        yield Observed(servers, watches, weights)


@asynccontextmanager
async def observed_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dialect: Any,
    count: int = 2,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[RemoteEngine, Observed]]:
    async with running_servers(tmp_path, monkeypatch, dialect, count, **settings) as observed:
        chosen = RolloutConfig(
            servers=observed.urls, backend=dialect, vocab_size=VOCAB_SIZE, **(config or {})
        )
        try:
            async with open_engine(chosen, transport=observed.transport) as engine:
                yield engine, observed
        finally:
            await observed.transport.aclose()
