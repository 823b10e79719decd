"""A transport to servers whose streams go as a test says, token by token."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from arealtrio.types import HttpRequest, HttpResponse


def token_event(token: int, finish: str | None = None, **more: Any) -> bytes:
    content = [{"token_id": token, "logprob": -token / 8}]
    choice = {"token_ids": [token], "logprobs": {"content": content}, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"choices": [choice | more]}).encode()


Events = list[bytes | Callable[[], Awaitable[None]]]


@dataclass
class Scripted:
    """A transport to servers whose streams go as each test says; all else they answer well.

    Its tokens count up from the number of tokens in the question, as a server without any memory
    of the request would make them.
    """

    script: Callable[[int, dict[str, Any]], Events]  # which stream it is, counted from 0
    streams: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def request(self, base_url: str, request: HttpRequest, *_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if "abort" in request.path:
            self.aborted.append(base_url)
        if request.path == "/v1/models":
            return HttpResponse(200, {}, b'{"data":[{"id":"m","max_model_len":1000}]}')
        if request.path == "/inference/v1/generate":
            return HttpResponse(405, {}, b"")
        if request.path == "/weight_info":
            return HttpResponse(200, {}, b'{"weight_version":"0"}')
        if request.path.startswith(("/server_info", "/is_sleeping")):
            return HttpResponse(404, {}, b"")
        return HttpResponse(200, {}, b"")

    @asynccontextmanager
    async def stream(
        self, base_url: str, request: HttpRequest, *_: Any, **__: Any
    ) -> AsyncIterator[Any]:
        question = json.loads(request.body)
        self.streams.append((base_url, question))
        yield Stream(self.script(len(self.streams) - 1, question))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Stream:
    status = 200

    def __init__(self, events: Events) -> None:
        self.headers = {"content-type": "text/event-stream; charset=utf-8"}
        self._events = iter(events)

    def chunks(self) -> Stream:
        return self

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        for event in self._events:
            if isinstance(event, bytes):
                return event
            await event()
        raise StopAsyncIteration


def next_tokens(question: dict[str, Any]) -> list[int]:
    """What an undisturbed server would answer; each token says at which place it stands."""
    first, count = len(question["token_ids"]), question["sampling_params"]["max_tokens"]
    return list(range(100 + first, 100 + first + count))


def whole(question: dict[str, Any]) -> Events:
    *tokens, last = next_tokens(question)
    spans = [{"version": "0", "start": 0, "end": len(tokens) + 1}]
    ending = token_event(last, "length", weight_versions=spans)
    return [*map(token_event, tokens), ending, b"data: [DONE]\n\n"]
