"""Look over the library's shoulder: what the servers answered, and what the engine made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import trio

from arealtrio.transport import (
    RESPONSE_SIZE_BYTES_MAX,
    HttpTransport,
    StreamedResponse,
    Transport,
)
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest, ModelResponse, TimeLimits
from arealtrio.workflow import Engine, RolloutWorkflow

TOKEN_ROUTE = "/inference/v1/generate"


class Recorder:
    """A Transport that keeps each generation's answers, as they arrived, under its id.

    Args:
        inner: Does the work.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.choices: dict[str, dict[int, Mapping[str, Any]]] = {}  # rid -> segment -> its answer
        self.asked: dict[str, int] = {}  # server -> segments asked for
        self.answered: dict[str, int] = {}  # server -> segments answered with tokens
        self.busy_s: dict[str, float] = {}  # server -> what its segments took, summed, in seconds
        self._changed = trio.Event()

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        generation = request.method == "POST" and request.path == TOKEN_ROUTE
        if generation:
            self._count(self.asked, base_url)
        begun_s = trio.current_time()
        try:
            answer = await self._inner.request(
                base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
            )
        finally:
            if generation:
                took_s = trio.current_time() - begun_s
                self.busy_s[base_url] = self.busy_s.get(base_url, 0.0) + took_s
        if generation and answer.status == 200:
            (choice,) = json.loads(answer.body)["choices"]
            rid, _, segment = dict(request.headers)["X-Request-Id"].rpartition("-")
            self.choices.setdefault(rid, {})[int(segment)] = choice
            self._count(self.answered, base_url)
        return answer

    def stream(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        return self._inner.stream(
            base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
        )

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def until(self, holds: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Return in the turn in which ``holds()`` of what is recorded here.

        How fast the servers are plays no part, and nothing is asked of them: a look from outside
        may come when all has ended.
        """
        with trio.fail_after(limit_s):
            while not holds():
                await self._changed.wait()

    def _count(self, counts: dict[str, int], server: str) -> None:
        counts[server] = counts.get(server, 0) + 1
        self._changed.set()
        self._changed = trio.Event()

    def segments_of(self, rid: str) -> list[Mapping[str, Any]]:
        """Return the answers that one generation was put together from, in order."""
        numbered = self.choices.get(rid, {})
        return [numbered[number] for number in sorted(numbered)]

    def tokens_told(self, rid: str) -> list[int]:
        """Return the tokens the servers gave for one generation."""
        return [token for choice in self.segments_of(rid) for token in choice["token_ids"]]

    def versions_told(self, rid: str) -> list[int]:
        """Return the version that the servers themselves report for each of these tokens."""
        return [
            int(span["version"])
            for choice in self.segments_of(rid)
            for span in choice["weight_versions"]
            for _ in range(span["start"], span["end"])
        ]


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record real HTTP; closed on leaving, when no trio run is left that could do it."""
    recorder = Recorder(HttpTransport())
    try:
        yield recorder
    finally:
        trio.run(recorder.aclose)


class SpyWorkflow:
    """Another workflow, and every generation it asks for.

    Args:
        inner: The workflow.
    """

    def __init__(self, inner: RolloutWorkflow) -> None:
        self._inner = inner
        self.responses: list[ModelResponse] = []

    async def arun_episode(self, engine: Engine, data: dict[str, Any], /) -> Any:
        return await self._inner.arun_episode(_SpyEngine(engine, self.responses), data)


class _SpyEngine:
    def __init__(self, inner: Engine, responses: list[ModelResponse]) -> None:
        self._inner = inner
        self._responses = responses

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        response = await self._inner.agenerate(request)
        self._responses.append(response)
        return response

    def get_version(self) -> int:
        return self._inner.get_version()
