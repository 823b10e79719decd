"""The tokens of one generation as they arrive: events read one by one, kept until they are asked.

Both dialects stream server-sent events whose data is JSON; what an event says is the dialect's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np

from .._core.logprobs import Scanner
from ..errors import ProtocolError
from ..types import Float32Array, HttpResponse, Int32Array, StopReason
from . import body
from .dialect import SegmentResponse
from .events import EventReader
from .status import check_status
from .tokens import Column, scan
from .versions import Span, read_spans

LAST_EVENT: Final = b"[DONE]"

T = TypeVar("T")


class Failure(msgspec.Struct):
    """What a server says in mid-stream, where no status can be sent any more."""

    code: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """How a generation ended.

    Args:
        stop_reason: Why.
        spans: The server's weight-version spans over all tokens; None where it reports none.
        message: Its word on an abort.
    """

    stop_reason: StopReason
    spans: list[Span] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class News:
    """What one event adds.

    Args:
        token_ids: int32[n], the tokens that no event before it had.
        logprobs: float32[n].
        end: Set by the event that ends the generation.
    """

    token_ids: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    logprobs: Float32Array = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    end: End | None = None


ReadEvent: TypeAlias = Callable[[HttpResponse, int], News | None]
"""Reads one event's data, given how many tokens came before; None: it says nothing of tokens."""


class TokenStream:
    """A dialect's ``StreamParser``: what it is, is said there.

    Args:
        server: Kind of the server, for the messages.
        read: What an event says.
    """

    def __init__(self, server: str, read: ReadEvent) -> None:
        self.count = 0
        self._server = server
        self._read = read
        self._events = EventReader()
        self._ids: list[Int32Array] = []
        self._logprobs: list[Float32Array] = []
        self._end: End | None = None

    @property
    def complete(self) -> bool:
        """See ``StreamParser``."""
        return self._end is not None

    def feed(self, data: bytes) -> None:
        """See ``StreamParser``."""
        for event in self._events.feed(data):
            if event != LAST_EVENT:
                self._take(event)

    def _take(self, event: bytes) -> None:
        news = self._read(HttpResponse(200, {"content-type": "an event"}, event), self.count)
        if news is None:
            return
        if self._end is not None:
            raise ProtocolError(f"expected nothing after the last token from {self._server}")
        if len(news.token_ids):
            self._ids.append(news.token_ids)
            self._logprobs.append(news.logprobs)
            self.count += len(news.token_ids)
        self._end = news.end

    def arrived(self) -> SegmentResponse:
        """See ``StreamParser``."""
        return self._response(End("abort"))

    def answer(self) -> SegmentResponse:
        """See ``StreamParser``."""
        if self._end is None:
            raise ProtocolError(
                f"expected a finish reason from {self._server}, "
                f"the stream ended after {self.count} tokens without one"
            )
        return self._response(self._end)

    def _response(self, end: End) -> SegmentResponse:
        return SegmentResponse(
            token_ids=np.concatenate([np.empty(0, dtype=np.int32), *self._ids]),
            logprobs=np.concatenate([np.empty(0, dtype=np.float32), *self._logprobs]),
            stop_reason=end.stop_reason,
            versions=None if end.spans is None else read_spans(end.spans, self.count),
            message=end.message,
        )


def scan_event(
    scanner: Scanner, event: HttpResponse, shape: type[T], server: str
) -> tuple[dict[str, Column], T]:
    """Lift the lists out of one event's data, and read the rest of it as ``shape``.

    Raises:
        ProtocolError: If it is not JSON, or of another shape.
    """
    columns, rest = scan(scanner, event, server)
    return columns, body.decode(rest, shape, event, f"an event from {server}")


def check_failure(failure: Failure | None, event: HttpResponse, server: str) -> None:
    """Raise for an event that says the server failed, as if it had been an answer's status.

    Raises:
        RequestRejected: For a code of 4xx.
        ServerError: For every other.
    """
    if failure is None:
        return
    code = failure.code if isinstance(failure.code, int) else 500
    status = code if 400 <= code < 600 else 500
    check_status(HttpResponse(status, event.headers, event.body), server)
