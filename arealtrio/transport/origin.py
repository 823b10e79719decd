"""Where a request goes, and the bytes of its head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

from ..checks import shown
from ..errors import ConfigError, InvalidRequest
from ..types import HttpRequest

HEADS_MAX: Final = 1024
"""Request heads remembered per origin. The routes of a server are few; ids in a path are not."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_TARGET: Final = re.compile(r"/[\x21-\x7e]*")
_DEFAULT_HEADERS: Final = (("user-agent", "arealtrio"), ("accept-encoding", "identity"))


class Origin:
    """One server address, parsed once. Compared by identity: a transport keeps one for each URL.

    Args:
        base_url: ``http://host:port`` or ``https://host:port``, with or without a path before the
            request's own.

    Raises:
        ConfigError: It is not such an address.
    """

    __slots__ = ("_heads", "_prefix", "authority", "host", "port", "tls", "url")

    def __init__(self, base_url: str) -> None:
        parts = _split(base_url)
        assert parts.hostname is not None
        self.url: Final = base_url
        self.tls: Final = parts.scheme == "https"
        self.host: Final = parts.hostname
        self.port: Final = parts.port or _DEFAULT_PORTS[parts.scheme]
        self.authority: Final = parts.netloc
        self._prefix: Final = parts.path.rstrip("/")
        # (method, path, headers) -> the head up to the value of content-length
        self._heads: dict[tuple[object, ...], bytes] = {}

    def head(self, request: HttpRequest, headers: Sequence[tuple[str, str]]) -> bytes:
        """The request's head, encoded once per route and completed with the body's length.

        Raises:
            InvalidRequest: A part of it can not be written as HTTP.
        """
        key = (request.method, request.path, request.headers, tuple(headers))
        start = self._heads.get(key)
        if start is None:
            start = self._remember(key, self._encode(request, headers))
        if not request.body and request.method == "GET":
            return start + b"\r\n"
        return b"%bcontent-length: %d\r\n\r\n" % (start, len(request.body))

    def _remember(self, key: tuple[object, ...], start: bytes) -> bytes:
        if len(self._heads) >= HEADS_MAX:
            self._heads.clear()
        self._heads[key] = start
        return start

    def _encode(self, request: HttpRequest, headers: Sequence[tuple[str, str]]) -> bytes:
        given = [(name.lower(), value) for name, value in all_headers(request, headers)]
        named = {name for name, _ in given}
        lines = [("host", self.authority), *_DEFAULT_HEADERS]
        if request.method != "GET":
            lines.append(("content-type", "application/json"))
        lines = [line for line in lines if line[0] not in named] + given
        if named & {"content-length", "transfer-encoding"}:
            raise InvalidRequest("the body's framing is the transport's business, not a header's")
        encoded = [(_name(name), _value(name, value)) for name, value in lines]
        return request_head(request.method, self._prefix + request.path, encoded)


def all_headers(request: HttpRequest, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Further headers and the request's own, which win: vLLM takes the first id that it is told."""
    own = {name.lower() for name, _ in request.headers}
    return [*(pair for pair in headers if pair[0].lower() not in own), *request.headers]


def _name(name: str) -> bytes:
    try:
        return name.encode("latin-1")
    except UnicodeEncodeError as exc:
        raise InvalidRequest("the name of a header is not latin-1 text") from exc


def _value(name: str, value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"the value of header {name!r} is not latin-1 text") from exc


def request_head(method: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Write a request's head, without the empty line that ends it.

    Raises:
        InvalidRequest: The method, the target or a header holds what would end it early.
    """
    if not _TOKEN.fullmatch(method):
        raise InvalidRequest(f"{method!r} is not an HTTP method")
    if not _TARGET.fullmatch(target):
        raise InvalidRequest(
            "a request's path starts with / and holds no space or control character"
        )
    block = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    # One scan of the whole block: a line break inside a value would be one too many.
    if b"\0" in block or not block.count(b"\r") == block.count(b"\n") == len(headers):
        raise InvalidRequest("a header holds a line break or a NUL")
    for name, _ in headers:
        if not _TOKEN.fullmatch(name.decode("latin-1")):
            raise InvalidRequest(f"{name!r} is not the name of a header")
    return b"%b %b HTTP/1.1\r\n%b" % (method.encode(), target.encode(), block)


def _split(base_url: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:  # not repeated, nor chained: it may hold a secret
        raise ConfigError("that is not a server's address: write http://host:port") from None
    if parts.username is not None or parts.password is not None:
        # Not repeated in the message: it holds a secret.
        raise ConfigError("a server's address holds no user name; send an authorization header")
    fit = parts.scheme in _DEFAULT_PORTS and parts.hostname and port != 0
    if not fit or parts.query or parts.fragment or not base_url.isascii() or " " in base_url:
        raise ConfigError(
            f"{shown(base_url)} is not a server's address: write http://host:port or https://host:port"
        )
    return parts
