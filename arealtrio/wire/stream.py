"""The tokens of one generation as they arrive: events read one by one, kept until they are asked.

Both dialects stream server-sent events whose data is JSON; what an event says is the dialect's. An
event brings a token or a few, so it is decoded into Python objects: for so few that takes a quarter
of what making arrays takes, which is what answers in one piece are scanned into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np

from ..errors import ProtocolError
from ..types import INT32_MAX, HttpResponse, StopReason
from .dialect import SegmentResponse
from .events import EventReader
from .status import NOT_JSON, check_status, masked
from .versions import Span, read_spans

LAST_EVENT: Final = b"[DONE]"

TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]
Logprob: TypeAlias = float | None  # None is null, which is refused

T = TypeVar("T")


class Failure(msgspec.Struct):
    """What a server says in mid-stream, where no status can be sent any more."""

    code: Any = None

    @classmethod
    def of(cls, told: Failure | str) -> Failure:
        """One in words alone, as gateways write it, has no code."""
        return cls() if isinstance(told, str) else told


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
        token_ids: The tokens that no event before it had.
        logprobs: Of each of them.
        end: Set by the event that ends the generation.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[Logprob] = ()
    end: End | None = None


ReadEvent: TypeAlias = Callable[[bytes, int], News | Failure | None]
"""Reads one event's data, given how many tokens came before; None: it says nothing of tokens."""


class TokenStream:
    """A dialect's ``StreamParser``: what it is, is said there.

    Args:
        server: Kind of the server, for the messages.
        read: What an event says.
        secrets: Keys that no error may repeat, the longest first.
    """

    def __init__(self, server: str, read: ReadEvent, secrets: Sequence[str] = ()) -> None:
        self._server = server
        self._read = read
        self._secrets = secrets
        self._events = EventReader()
        self._ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._end: End | None = None

    @property
    def count(self) -> int:
        """See ``StreamParser``."""
        return len(self._ids)

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
        news = self._read(event, len(self._ids))
        if isinstance(news, Failure):
            _check_failure(news, event, self._server, self._secrets)
        elif news is not None:
            self._add(news)

    def _add(self, news: News) -> None:
        if self._end is not None:
            raise ProtocolError(f"expected nothing after the last token from {self._server}")
        if len(news.token_ids) != len(news.logprobs) or None in news.logprobs:
            raise ProtocolError(f"expected a logprob for every token from {self._server}")
        self._ids += news.token_ids
        self._logprobs += news.logprobs
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
        with np.errstate(over="ignore"):  # looked at below
            logprobs = np.array(self._logprobs, dtype=np.float32)
        if not np.isfinite(logprobs).all():
            raise ProtocolError(f"expected logprobs within float32 from {self._server}")
        return SegmentResponse(
            token_ids=np.array(self._ids, dtype=np.int32),
            logprobs=logprobs,
            stop_reason=end.stop_reason,
            versions=None if end.spans is None else read_spans(end.spans, self.count),
            message=end.message,
        )


def decode_event(decoder: msgspec.json.Decoder[T], event: bytes, server: str) -> T:
    """Read one event's data.

    Raises:
        ProtocolError: If it is not JSON, or of another shape.
    """
    try:
        return decoder.decode(event)
    except msgspec.ValidationError as exc:  # names a type and a path, never a value
        raise ProtocolError(f"expected an event from {server}: {exc}") from exc
    except NOT_JSON as exc:
        raise ProtocolError(
            f"expected an event from {server} as JSON, got {len(event)} bytes that are none"
        ) from exc


def _check_failure(failure: Failure, event: bytes, server: str, secrets: Sequence[str]) -> None:
    """Raise for an event that says the server failed, as if it had been an answer's status.

    Raises:
        RequestRejected: For a code of 4xx.
        ServerError: For every other.
    """
    code = failure.code if isinstance(failure.code, int) else 500
    status = code if 400 <= code < 600 else 500
    check_status(masked(HttpResponse(status, {}, event), secrets), server)
