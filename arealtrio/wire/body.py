"""JSON bodies, read and written: what does not fit its type is a ProtocolError."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ..errors import InvalidRequest, ProtocolError
from ..types import INT32_MAX, HttpRequest, HttpResponse
from .status import NOT_JSON, check_status, kind_of_body

T = TypeVar("T")


def post(path: str, body: Any = None, headers: tuple[tuple[str, str], ...] = ()) -> HttpRequest:
    """A POST of ``body`` as JSON; None sends no body.

    Raises:
        InvalidRequest: If JSON can not hold it: a type that it lacks, text that is no UTF-8.
    """
    try:
        encoded = b"" if body is None else msgspec.json.encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidRequest(f"a request of {path} can not be written as JSON") from exc
    return HttpRequest("POST", path, encoded, headers)


def get(path: str) -> HttpRequest:
    """A GET."""
    return HttpRequest("GET", path)


def read(response: HttpResponse, shape: type[T], server: str, what: str) -> T:
    """Read a successful answer's JSON as ``shape``.

    Args:
        response: The answer.
        shape: A msgspec Struct (unknown fields are ignored), or another type msgspec decodes.
        server: Kind of the server, for the messages.
        what: What was asked for, for the messages.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: If the body is not JSON of that shape.
    """
    check_status(response, server)
    return decode(response.body, shape, response, f"{what} from {server}")


def read_if_there(response: HttpResponse, shape: type[T], server: str, what: str) -> T | None:
    """``read``, but None where the server does not have that route (404)."""
    return None if response.status == 404 else read(response, shape, server, what)


def known(limit: int | None) -> int | None:
    """A limit as a server tells it; None where it is none, such as 0 or -1 for what is not set."""
    return limit if limit is not None and 1 <= limit <= INT32_MAX else None


def decode(body: bytes, shape: type[T], response: HttpResponse, what: str) -> T:
    """Decode ``body``, a part of ``response``; ProtocolError says what was expected of whom."""
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as exc:  # names a type and a path, never a value
        raise ProtocolError(f"expected {what}: {exc}") from exc
    except NOT_JSON as exc:
        raise ProtocolError(f"expected {what} as JSON, got {kind_of_body(response)}") from exc
