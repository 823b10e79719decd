"""Mishap: what becomes of one answer on its way to the client."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from ..embedded.http import json_response
from ..errors import TransportError
from ..types import HttpResponse
from .fault import FaultKind

STREAM_SIZE_BYTES: Final = 16_384
"""What a share of a stream is a share of: how long it will be is not known beforehand."""
PAGE: Final = b"<html><head><title>Welcome</title></head><body>It works!</body></html>"

REFUSALS: Final = (FaultKind.CLIENT_ERROR, FaultKind.SERVER_ERROR)


@dataclass(slots=True)
class Mishap:
    """One answer that goes wrong. Used for one exchange, and logged when it has happened.

    Args:
        kind: ``reset``, ``truncated``, ``garbage``, ``client_error``, ``server_error`` or ``late``.
        address: Of the server.
        happened: Called once, with the details, if it comes to that: a stream may end before.
        hold: Waits for so many seconds.
        after_bytes: Of the answer, before it goes wrong; None: ``share`` says.
        share: Of the answer, in [0, 1), or of ``STREAM_SIZE_BYTES`` of a stream.
        seconds: That a late answer is held back.
        status: Of a refusal.
    """

    kind: FaultKind
    address: str
    happened: Callable[[str], None]
    hold: Callable[[float], Awaitable[None]]
    after_bytes: int | None = None
    share: float = 0.5
    seconds: float = 20.0
    status: int = 503
    _passed: int = field(default=0, init=False)  # bytes of a stream
    _over: bool = field(default=False, init=False)

    def refusal(self) -> HttpResponse | None:
        """What is answered in the server's place, if it never sees the request."""
        if self.kind not in REFUSALS:
            return None
        self.happened(str(self.status))
        error = {"message": "a test asked for this", "type": "fault", "code": self.status}
        body = bytes(json_response({"error": error}).body)
        return HttpResponse(self.status, {"content-type": "application/json"}, body)

    async def befall(self, response: HttpResponse) -> HttpResponse:
        """Return what arrives of a whole answer.

        Raises:
            TransportError: The connection is reset.
        """
        size = len(response.body)
        after = int(self.share * size) if self.after_bytes is None else self.after_bytes
        if self.kind is FaultKind.LATE:
            await self._hold()
        elif after < max(size, 1):
            return self._cut(response, after)
        return response

    def _cut(self, response: HttpResponse, after: int) -> HttpResponse:
        where = f"after {after} of {len(response.body)} bytes"
        self.happened(where)
        if self.kind is FaultKind.RESET:
            raise TransportError(f"{self.address} reset the connection {where}")
        body = response.body[:after]
        if self.kind is FaultKind.GARBAGE:
            return HttpResponse(200, {"content-type": "text/html"}, body + PAGE)
        return HttpResponse(response.status, response.headers, body)

    async def next_piece(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return what arrives of a stream's next piece; empty at its end.

        Args:
            read: Gives the next piece that the server sends.

        Raises:
            TransportError: The connection is reset.
        """
        if self._over:
            return b""
        if self._passed >= self._limit():
            if self.kind is not FaultKind.LATE:
                return self._break_off()
            await self._hold()
            self.after_bytes = 2**63
        piece = (await read())[: self._limit() - self._passed]
        self._passed += len(piece)
        self._over = not piece
        return piece

    def _limit(self) -> int:
        if self.after_bytes is not None:
            return self.after_bytes
        return 0 if self.kind is FaultKind.LATE else math.ceil(self.share * STREAM_SIZE_BYTES)

    def _break_off(self) -> bytes:
        where = f"after {self._passed} bytes of a stream"
        self.happened(where)
        self._over = True
        if self.kind is FaultKind.RESET:
            raise TransportError(f"{self.address} reset the connection {where}")
        return PAGE if self.kind is FaultKind.GARBAGE else b""

    async def _hold(self) -> None:
        self.happened(f"by {self.seconds:.3g} s")
        await self.hold(self.seconds)
