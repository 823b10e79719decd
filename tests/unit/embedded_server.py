"""A server to talk to, and a way to wait until its scheduler is in some state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.embedded.serve import RunningServer, ServerSettings, running_server

VOCAB_SIZE = 371  # as in the recordings, so that their requests can be sent as they are
MAX_MODEL_LEN = 1024
PROMPT = [300, 301, 302, 303, 304]
ENDLESS = {"ignore_eos": True, "max_tokens": MAX_MODEL_LEN, "temperature": 0}


def save_weights(root: Path, seed: int) -> Path:
    """Weights whose greedy answers differ from those of any other seed."""
    path = root / f"weights-{seed}"
    TinyModel.random(seed, vocab_size=VOCAB_SIZE, eos_id=2, output_scale=3.0).save(path)
    return path


class Watch:
    """Wakes whoever waits for a state of the scheduler, after every call that may change it."""

    def __init__(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scheduler = scheduler
        self._changed = trio.Event()
        for name in ("submit", "step", "abort", "discard", "pause", "resume", "load_weights"):
            monkeypatch.setattr(scheduler, name, self._watched(getattr(scheduler, name)))

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                self._changed.set()
                self._changed = trio.Event()

        return call

    async def until(self, holds: Callable[[Scheduler], bool]) -> None:
        while not holds(self.scheduler):
            await self._changed.wait()


@dataclass
class Line:
    """A running server, a client of it, and its weights by seed."""

    server: RunningServer
    client: httpx.AsyncClient
    watch: Watch
    weights: dict[int, Path]

    @property
    def scheduler(self) -> Scheduler:
        return self.server.scheduler

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **more)

    async def ok(self, path: str, body: Any = None, **more: Any) -> Any:
        answer = await self.post(path, body, **more)
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.content else None

    async def reload(self, seed: int) -> Any:
        kwargs = {"weights_path": str(self.weights[seed])}
        return await self.ok("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})


@asynccontextmanager
async def open_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[Line]:
    weights = {seed: save_weights(tmp_path, seed) for seed in (1, 2)}
    chosen = {"max_model_len": MAX_MODEL_LEN, **settings}
    async with running_server(ServerSettings(weights=weights[1], **chosen)) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            yield Line(server, client, Watch(server.scheduler, monkeypatch), weights)


def events(lines: Iterator[str] | list[str]) -> list[Any]:
    """Decode server-sent events; the last must say that it is the last."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [msgspec.json.decode(one) for one in data[:-1]]


def keys(value: Any) -> Any:
    """The keys of a JSON value, all the way down; of a list, those of its first item.

    Not of ``top_logprobs``, whose keys are tokens.
    """
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items() if key != "top_logprobs"}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return "value"
