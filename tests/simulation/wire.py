"""WatchedTransport: sees every request that leaves for a server, and what becomes of it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from arealtrio.errors import RequestRejected, TransportError
from arealtrio.transport import RESPONSE_SIZE_BYTES_MAX
from arealtrio.types import HttpRequest, HttpResponse, TimeLimits

from . import invariants as hold
from .history import History

_ID = re.compile(rb'"(?:request_id|rid)":\s*"([^"]+)"')
_LABEL = ("/weight_info", "/model_info")
_INTEGER_LABEL = re.compile(rb'"weight_version":\s*"\d+"')
_GENERATE = ("/v1/completions", "/inference/v1/generate", "/generate")


class WatchedTransport:
    """Passes everything on, and remembers which requests were refused, given up and aborted.

    Args:
        transport: What really carries them.
        history: Of the run.
    """

    def __init__(self, transport: Any, history: History) -> None:
        self._transport = transport
        self._history = history
        self._refused: dict[str, str] = {}  # stem of an id -> server
        self._given_up: dict[str, str] = {}  # request id -> server
        self._aborted: set[tuple[str, bytes]] = set()

    async def request(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> HttpResponse:
        """See ``Transport``."""
        with self._seen(base_url, request) as request_id:
            response: HttpResponse = await self._transport.request(
                base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
            )
            self._answered(request_id, response.status, base_url)
            if request.path in _LABEL and not _tells_a_label(response.body):
                self._is_in_doubt(base_url)
            return response

    @asynccontextmanager
    async def stream(
        self,
        base_url: str,
        request: HttpRequest,
        limits: TimeLimits,
        *,
        headers: Sequence[tuple[str, str]] = (),
        size_bytes_max: int = RESPONSE_SIZE_BYTES_MAX,
    ) -> AsyncIterator[Any]:
        """See ``Transport``."""
        with self._seen(base_url, request) as request_id:
            async with self._transport.stream(
                base_url, request, limits, headers=headers, size_bytes_max=size_bytes_max
            ) as response:
                self._answered(request_id, response.status, base_url)
                yield response

    async def aclose(self) -> None:
        """See ``Transport``."""
        await self._transport.aclose()

    @contextmanager
    def _seen(self, base_url: str, request: HttpRequest) -> Iterator[str]:
        if "abort" in request.path:
            self._aborted.add((base_url, request.body))
        request_id = _id_of(request)
        if request_id:
            self._history.check(hold.refused_once, request_id, self._refused)
        try:
            yield request_id
        except BaseException as exc:
            if request.path in _LABEL:
                self._is_in_doubt(base_url)
            unsent = isinstance(exc, TransportError) and not exc.request_sent
            if request_id and not unsent:
                self._given_up[request_id] = base_url
            raise

    def _answered(self, request_id: str, status: int, base_url: str) -> None:
        if (
            request_id
            and 400 <= status < 500
            and RequestRejected("", status=status).is_of_the_content
        ):
            self._refused[request_id.rpartition("-")[0]] = base_url

    def _is_in_doubt(self, base_url: str) -> None:
        """Whoever refused may be another process than was asked: the request may go elsewhere."""
        self._refused = {stem: at for stem, at in self._refused.items() if at != base_url}

    def closed(self) -> None:
        """The executor has ended: whatever it gave up, it has aborted."""
        left = {
            request_id
            for request_id, server in self._given_up.items()
            if not any(server == to and request_id.encode() in body for to, body in self._aborted)
        }
        self._given_up.clear()
        self._aborted.clear()
        self._history.check(hold.i9_aborted, left)


def _tells_a_label(body: bytes) -> bool:
    """Whether it can be read, to its end, and has the label of one that was given weights."""
    try:
        json.loads(body)
    except ValueError:
        return False
    return _INTEGER_LABEL.search(body) is not None


def _id_of(request: HttpRequest) -> str:
    """The id of a request that generates; empty for any other."""
    if request.path.partition("?")[0] not in _GENERATE:
        return ""
    found = _ID.search(request.body)
    return found[1].decode() if found else ""
