"""The long lists of an answer as arrays, checked: one length, every logprob there."""

from __future__ import annotations

from typing import TypeAlias

from .._core import vectors
from .._core.logprobs import Scanner
from ..errors import ProtocolError
from ..types import Float32Array, HttpResponse, Int32Array
from .status import check_status, kind_of_body

Lists: TypeAlias = tuple[Int32Array | None, Float32Array | None]
Column: TypeAlias = Lists | None  # None: not in the answer, or null

NOTHING: Lists = (None, None)


def scan(scanner: Scanner, response: HttpResponse, server: str) -> tuple[dict[str, Column], bytes]:
    """Lift the lists out of a successful answer; what is left is small JSON for a Struct.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: If the body is not JSON, or a list is of another shape.
    """
    check_status(response, server)
    try:
        return scanner.scan(response.body)
    except ValueError as exc:  # says what and where, and nothing of the body
        raise ProtocolError(
            f"expected a generation from {server} as JSON, got {kind_of_body(response)}: {exc}"
        ) from exc


def check_tokens(
    ids: Int32Array | None, logprobs: Float32Array | None, server: str
) -> tuple[Int32Array, Float32Array]:
    """Return both if they are there, of one length, and no logprob is null.

    Raises:
        ProtocolError: Otherwise; tokens without logprobs are of no use to a trainer.
    """
    if ids is None or logprobs is None:
        missing = "token ids" if ids is None else "logprobs"
        raise ProtocolError(f"expected token ids and logprobs from {server}, got no {missing}")
    if len(ids) != len(logprobs):
        raise ProtocolError(
            f"expected as many logprobs as tokens from {server}, "
            f"got {len(logprobs)} for {len(ids)} tokens"
        )
    if vectors.has_nan(logprobs):
        raise ProtocolError(f"expected a logprob for every token from {server}, got null")
    return ids, logprobs


def check_same(ids: Int32Array | None, described: Int32Array | None, server: str) -> None:
    """Raise if the list of ids does not name the tokens that have the logprobs.

    Raises:
        ProtocolError: If the two differ.
    """
    if ids is None or described is None:
        return
    if ids.tobytes() != described.tobytes():  # both are int32; the quickest for short and long
        raise ProtocolError(f"expected logprobs of the tokens from {server}, got those of others")
