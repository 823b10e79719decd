"""A few embedded servers, the engine connected to them, and a way to wait for what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from arealtrio.config import RolloutConfig
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.embedded.serve import RunningServer, ServerSettings, running_server
from arealtrio.engine import RemoteEngine, open_engine

from .embedded_server import MAX_MODEL_LEN, Watch, save_weights


@dataclass
class Fleet:
    """Running servers by address, and the directories of two different weights."""

    watches: dict[str, Watch]
    weights: dict[int, Path]
    servers: dict[str, RunningServer]

    @property
    def urls(self) -> list[str]:
        return list(self.watches)

    @property
    def watch(self) -> Watch:
        """Of the only server."""
        (watch,) = self.watches.values()
        return watch

    async def where(self, holds: Callable[[Scheduler], bool]) -> str:
        """The address of the first server whose scheduler is in some state, once one is."""
        found: list[str] = []

        async def watch(url: str, cancel: trio.CancelScope) -> None:
            await self.watches[url].until(holds)
            found.append(url)
            cancel.cancel()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for url in self.urls:
                    nursery.start_soon(watch, url, nursery.cancel_scope)
        return found[0]

    def nothing_left(self) -> bool:
        """Whether no server runs or holds a request (invariant I9)."""
        schedulers = [watch.scheduler for watch in self.watches.values()]
        return all(not s.running and not s.waiting for s in schedulers)


@asynccontextmanager
async def running_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int = 1, **settings: Any
) -> AsyncIterator[Fleet]:
    weights = {seed: save_weights(tmp_path, seed) for seed in (1, 2)}
    chosen = {"max_model_len": MAX_MODEL_LEN, **settings}
    async with AsyncExitStack() as stack:
        watches, servers = {}, {}
        for _ in range(count):
            settings_of_one = ServerSettings(weights=weights[1], **chosen)
            server = await stack.enter_async_context(running_server(settings_of_one))
            watches[server.url] = Watch(server.scheduler, monkeypatch)
            servers[server.url] = server
        yield Fleet(watches, weights, servers)


@asynccontextmanager
async def connected_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int = 1,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[RemoteEngine, Fleet]]:
    chosen = {"backend": settings.get("dialect", "vllm"), **(config or {})}
    async with (
        running_fleet(tmp_path, monkeypatch, count, **settings) as fleet,
        open_engine(RolloutConfig(servers=fleet.urls, **chosen)) as engine,
    ):
        yield engine, fleet
