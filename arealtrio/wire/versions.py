"""Weight-version labels and spans, which both servers write alike.

The servers' labels are free strings (both start with ``default``); ours are integers, sent as
``str(version)``. Anything that we did not write reads as None: unknown, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..errors import ProtocolError
from ..types import INT32_MAX
from .dialect import VersionSpan

_DIGITS_MAX = len(str(INT32_MAX))


class Span(msgspec.Struct, frozen=True):
    """A span as the servers write it."""

    version: str
    start: int
    end: int


def read_label(label: str | None) -> int | None:
    """The version that a label of ours names; None for every other label."""
    if label is None or not 0 < len(label) <= _DIGITS_MAX or not label.isascii():
        return None
    if not label.isdigit() or (label[0] == "0" and label != "0"):
        return None
    version = int(label)
    return version if version <= INT32_MAX else None


def read_spans(spans: Sequence[Span], token_count: int) -> tuple[VersionSpan, ...]:
    """Check that ``spans`` cover ``token_count`` tokens exactly and in order, and drop empty ones.

    vLLM opens a span when the label changes, so one is empty when an update lands just before the
    end; it says nothing about any token.

    Raises:
        ProtocolError: If there is a gap, an overlap, or an end that is not the tokens' end.
    """
    covered = 0
    found = []
    for span in spans:
        if span.start != covered or span.end < span.start:
            raise ProtocolError(
                f"expected a weight-version span from token {covered} on, "
                f"got {span.start} to {span.end}"
            )
        covered = span.end
        if span.end > span.start:
            found.append(VersionSpan(read_label(span.version), span.start, span.end))
    if covered != token_count:
        raise ProtocolError(
            f"expected weight-version spans over {token_count} tokens, they cover {covered}"
        )
    return tuple(found)
