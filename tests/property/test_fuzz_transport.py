"""Bytes that are almost HTTP, addresses and headers that are almost right: read, or one error."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio.errors import ConfigError, InvalidRequest, ProtocolError
from arealtrio.transport.origin import Origin
from arealtrio.transport.parsing import ResponseParser
from arealtrio.types import HttpRequest

from .fuzzing import ODD_TEXTS, changed, check_message, cut_places, pieces
from .test_transport import answers

MANY = 4 * settings().max_examples
HEADERS = [
    b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    b"Upgrade: x\r\nConnection: upgrade\r\n",
    b": \r\n", b"\xff\xfe: \x00\r\n", b"a" * 70_000 + b": b\r\n",
]  # fmt: skip


@settings(max_examples=MANY)
@given(data=st.data(), cuts=cut_places)
def test_what_is_almost_http_is_read_or_refused_wherever_it_is_cut(
    data: st.DataObject, cuts: list[int]
) -> None:
    stream = data.draw(answers())
    if data.draw(st.booleans()):
        line, end, rest = stream.partition(b"\r\n")
        stream = line + end + data.draw(st.sampled_from(HEADERS)) + rest
    if data.draw(st.booleans()):
        stream = changed(data.draw, stream)
    parser = ResponseParser()
    try:
        for piece in pieces(stream, cuts):
            parser.feed(piece)
    except ProtocolError as exc:
        check_message(exc)
        return
    whole = parser.finish()
    assert parser.content_length() >= 0
    assert all(name == name.lower() for name in parser.headers())
    assert len(parser.take_body()) == parser.body_size_bytes
    assert not whole or 200 <= parser.status <= 999


texts = st.text(max_size=6) | st.sampled_from(ODD_TEXTS)


@given(address=texts, path=texts, name=texts, value=texts, method=texts | st.just("POST"))
def test_any_head_can_be_written_or_is_refused(
    address: str, path: str, name: str, value: str, method: str
) -> None:
    try:
        origin = Origin(address)
    except ConfigError as exc:
        check_message(exc)
        origin = Origin("http://a:1")
    try:
        head = origin.head(HttpRequest(method, path), [(name, value)])
    except InvalidRequest:
        return
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n\r\n") == 1
