"""Bytes in, one answer out. No I/O: a test feeds it by hand.

The grammar is llhttp's, through httptools. What is decided here is what the parser leaves open:
interim answers are skipped, sizes are bounded, and a connection is used again only where nothing
is left on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import httptools

from ..errors import ProtocolError

OVERHEAD_SIZE_BYTES_MAX: Final = 256 * 1024
"""Most bytes taken without a byte of body among them: a head, chunk extensions or trailers."""


@lru_cache(maxsize=1024)  # a server sends the same few names for ever
def _lower(name: bytes) -> str:
    return name.decode("latin-1").lower()


class ResponseParser:
    """The answers of one connection, one after the other.

    ``start()`` before each, ``feed()`` what arrives until ``complete``, ``finish()`` at the end
    of the stream.

    The parser and its callbacks refer to each other; ``close()`` cuts that cycle, so that a closed
    connection is freed at once and not by a garbage collection in the middle of a burst.
    """

    __slots__ = (
        "_body_expected",
        "_overhead_size_bytes",
        "_parser",
        "_pieces",
        "body_size_bytes",
        "complete",
        "excess",
        "head_complete",
        "keep_alive",
        "raw_headers",
        "status",
    )

    def __init__(self) -> None:
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self.start()

    def start(self, *, body_expected: bool = True) -> None:
        """Make ready for the next answer.

        Args:
            body_expected: False for the answer to ``HEAD``, which has a length but no body.
        """
        self.status = 0
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.head_complete = False
        self.complete = False
        self.keep_alive = False
        self.excess = False  # bytes came after the answer's end: nobody knows whose
        self.body_size_bytes = 0
        self._pieces: list[bytes] = []
        self._body_expected = body_expected
        self._overhead_size_bytes = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Take what arrived, and keep no reference to it.

        Raises:
            ProtocolError: It is not HTTP, or its head is beyond all measure.
        """
        assert self._parser is not None, "fed after close"
        self._overhead_size_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            raise ProtocolError("the server switches protocols, which nobody asked for") from exc
        except httptools.HttpParserCallbackError:
            raise  # a callback below failed: our bug, not the server's
        except httptools.HttpParserError as exc:
            if not self.complete:
                raise ProtocolError(f"the server's answer is not HTTP: {_reason(exc)}") from exc
            self.excess = True
        if self._overhead_size_bytes > OVERHEAD_SIZE_BYTES_MAX:
            raise ProtocolError(
                f"the server sent {self._overhead_size_bytes} bytes of head and no body"
            )

    def finish(self) -> bool:
        """The connection ended; return whether the answer is whole.

        Without a length and without chunks the end of the connection is the end of the body
        (RFC 9112, 6.3). httptools does not hand on llhttp's own word on it.
        """
        if self.head_complete and not self.complete:
            names = {_lower(name): value for name, value in self.raw_headers}
            coding = names.get("transfer-encoding")
            delimited = "content-length" in names if coding is None else _is_chunked(coding)
            self.complete = not delimited
        self.keep_alive = False
        return self.complete

    def take_body(self) -> bytes:
        """What arrived of the body since the last call; possibly nothing."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def headers(self) -> Mapping[str, str]:
        """Lower-case names; a repeated header's values are joined with ``, `` (RFC 9110, 5.3)."""
        joined: dict[str, str] = {}
        for raw_name, raw_value in self.raw_headers:
            name, value = _lower(raw_name), raw_value.decode("latin-1")
            joined[name] = f"{joined[name]}, {value}" if name in joined else value
        return joined

    def content_length(self) -> int:
        """The announced size of the body in bytes; 0 where none is announced."""
        for name, value in self.raw_headers:
            if _lower(name) == "content-length":
                return int(value)
        return 0

    def close(self) -> None:
        """Cut the reference cycle; the parser takes nothing more."""
        self._parser = None

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A status line starts: the answer's, or the next one's after an interim answer."""
        if self.complete:
            self.excess = True
        else:
            self.raw_headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; after the body it is a trailer, which no dialect uses."""
        if not self.head_complete:
            self.raw_headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there. ``should_keep_alive`` is only true to the head in this callback."""
        assert self._parser is not None
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return
        self.head_complete = True
        self.keep_alive = self._parser.should_keep_alive()
        if not self._body_expected:
            # httptools can not be told to skip the body, so this connection is not used again.
            self.complete, self.keep_alive = True, False

    def on_body(self, data: bytes) -> None:
        """A piece of the body, freed of its transfer coding."""
        if not self.complete:
            self._overhead_size_bytes = 0
            self.body_size_bytes += len(data)
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """The end of the answer, or of an interim one (1xx) that the answer follows."""
        self.complete = self.head_complete


def _is_chunked(coding: bytes) -> bool:
    return coding.lower().rstrip().endswith(b"chunked")


def _reason(exc: httptools.HttpParserError) -> str:
    """llhttp's own short word; its messages name the rule that was broken, never the data."""
    return str(exc) or type(exc).__name__
