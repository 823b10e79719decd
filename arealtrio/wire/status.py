"""What an answer's status says, and the server's own short reason for it.

A reason is the one part of a foreign body that reaches a message, so it is held to one line of
``REASON_SIZE`` characters, and the parts in which servers repeat the request are cut out of it: a
prompt can be a megabyte, and can be secret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from ..errors import ProtocolError, RequestRejected, ServerError
from ..types import HttpResponse

REASON_SIZE = 200  # characters
MASK = b"***"
REASON_DEPTH = 8  # a reason lies no deeper in what a server wraps it in

# What msgspec raises of bytes that are no JSON, or nest too deep to be read; of a ValidationError
# more can be said, so that is caught before.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# pydantic, which checks the requests of both servers, ends each line with what it was given: the
# first of its errors as dicts, the second of its own text.
_ECHOED_INPUT = re.compile(r", 'input':.*|, input_value=.*")


def check_status(response: HttpResponse, server: str) -> None:
    """Return if the status is 2xx, else raise the error that names who was wrong.

    Args:
        response: The answer.
        server: Kind of the server, for the message: ``vLLM``.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: On anything else: no dialect here knows redirects.
    """
    status = response.status
    if 200 <= status < 300:
        return
    if 400 <= status < 500:
        raise RequestRejected(
            f"{server} rejected the request ({status}): {reason_of(response)}", status=status
        )
    if status >= 500:
        raise ServerError(f"{server} failed ({status}): {reason_of(response)}", status=status)
    raise ProtocolError(f"expected an answer of {server}, not status {status}")


def masked(response: HttpResponse, secrets: Sequence[str]) -> HttpResponse:
    """Return an answer that repeats none of these: a gateway may say which key it refuses.

    Args:
        response: A refusal, or what is read for no more than whether it is one, and why.
        secrets: The longest first.
    """
    if not secrets:
        return response
    body = _respelled(response.body)
    for secret in secrets:
        body = body.replace(_quoted(secret), MASK).replace(secret.encode(), MASK)
    return msgspec.structs.replace(response, body=body)


def _respelled(body: bytes) -> bytes:
    """JSON without the escapes that it can do without, since those hide a key: ``a\\/b`` is a/b."""
    try:
        return msgspec.json.encode(msgspec.json.decode(body))
    except (*NOT_JSON, OverflowError):  # an integer that this msgspec reads and can not write
        return body


def _quoted(text: str) -> bytes:
    return msgspec.json.encode(text)[1:-1]


def raise_refusal(response: HttpResponse, server: str, reason: str) -> NoReturn:
    """Raise for a server that answers 2xx and says in the body that it did not do it."""
    raise ServerError(f"{server} answered {response.status} but failed: {_shorten(reason)}",
                      status=response.status)  # fmt: skip


def reason_of(response: HttpResponse) -> str:
    """The server's reason on one line of at most ``REASON_SIZE`` characters."""
    try:
        reason = _find_reason(msgspec.json.decode(response.body))
    except RecursionError:
        reason = ""
    except NOT_JSON:
        reason = _plain_text(response)
    return _shorten(reason) or "no reason given"


def kind_of_body(response: HttpResponse) -> str:
    """Say what a body seems to be, without repeating any of it."""
    if not response.body:
        return "an empty body"
    content_type = response.headers.get("content-type", "").partition(";")[0].strip()
    return f"{len(response.body)} bytes of {content_type or 'an unnamed type'}"


def _find_reason(body: Any, depth: int = 0) -> str:
    """Look where the two servers, and FastAPI under them, put their reason."""
    if depth > REASON_DEPTH:
        return ""
    if isinstance(body, str):
        return body
    if isinstance(body, list):  # FastAPI's own validation errors
        return "; ".join(_validation_error(item) for item in body)
    if isinstance(body, dict):
        for key in ("error", "message", "detail", "error_message"):
            if found := _find_reason(body.get(key), depth + 1):
                return found
    return ""


def _validation_error(item: Any) -> str:
    if not isinstance(item, dict):
        return ""
    location = item.get("loc")
    where = ".".join(map(_word, location)) if isinstance(location, list) else ""
    return f"{where}: {_word(item.get('msg', ''))}"


def _word(value: Any) -> str:
    """Of text and numbers alone: all else may be as deep as it likes."""
    return str(value) if isinstance(value, (str, int, float)) else ""


def _plain_text(response: HttpResponse) -> str:
    if "html" in response.headers.get("content-type", "") or response.body.lstrip()[:1] == b"<":
        return "an HTML page, as a proxy sends it"
    return response.body[: 4 * REASON_SIZE].decode("utf-8", "replace")


def _shorten(reason: str) -> str:
    line = " ".join(_ECHOED_INPUT.sub("", reason).split())
    return line if len(line) <= REASON_SIZE else line[: REASON_SIZE - 1] + "…"
