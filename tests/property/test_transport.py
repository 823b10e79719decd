"""Any valid answer, cut anywhere, is read as h11 reads it whole."""

from __future__ import annotations

from itertools import pairwise

import h11
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.errors import ProtocolError
from arealtrio.transport.parsing import ResponseParser

TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_.!~", min_size=1, max_size=12)
VALUE = st.text('abcdefXYZ0189 ,;="/:()', max_size=20).map(str.strip)
FRAMING = {
    "content-length",
    "transfer-encoding",
    "connection",
    "upgrade",
    "keep-alive",
    "proxy-connection",
}
HEADERS = st.lists(
    st.tuples(TOKEN.filter(lambda name: name.lower() not in FRAMING), VALUE), max_size=6
)
PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=5)


def head(status: int, version: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/{version} {status} Reason", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """The bytes of one valid answer, up to the end of the connection."""
    interim = b"".join(
        head(draw(st.sampled_from([100, 102, 103])), "1.1", draw(HEADERS))
        for _ in range(draw(st.integers(0, 2)))
    )
    status = draw(st.sampled_from([200, 201, 204, 206, 301, 304, 400, 404, 429, 500, 503, 599]))
    headers, pieces = draw(HEADERS), draw(PIECES)
    if status in (204, 304):
        return interim + head(status, "1.1", headers)
    framing = draw(st.sampled_from(["length", "chunked", "close", "1.0"]))
    if framing == "length":
        headers.insert(draw(st.integers(0, len(headers))),
                       ("Content-Length", str(len(b"".join(pieces)))))  # fmt: skip
        return interim + head(status, "1.1", headers) + b"".join(pieces)
    if framing == "chunked":
        headers.append(("Transfer-Encoding", "chunked"))
        extension = draw(st.sampled_from([b"", b";a=b"]))
        body = b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces)
        trailer = draw(st.sampled_from([b"", b"x-trailer: 1\r\n"]))
        return interim + head(status, "1.1", headers) + body + b"0\r\n" + trailer + b"\r\n"
    version = "1.0" if framing == "1.0" else "1.1"
    return interim + head(status, version, headers) + b"".join(pieces)


def read_by_h11(data: bytes) -> tuple[int, dict[str, str], bytes]:
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(data)
    reader.receive_data(b"")
    status, body = 0, b""
    headers: dict[str, str] = {}
    while True:
        event = reader.next_event()
        if isinstance(event, h11.Response):
            status = event.status_code
            for raw_name, raw_value in event.headers:
                name, value = raw_name.decode(), raw_value.decode()
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return status, headers, body


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


@given(data=answers(), draw=st.data())
def test_any_valid_answer_cut_anywhere_is_what_h11_reads(data: bytes, draw: st.DataObject) -> None:
    parser = ResponseParser()
    body = b""
    for part in cut(data, draw.draw(st.lists(st.integers(0, len(data)), max_size=20))):
        parser.feed(part)
        body += parser.take_body()
    assert parser.complete or parser.finish()
    assert (parser.status, parser.headers(), body) == read_by_h11(data)
    assert not parser.excess


@given(first=answers(), second=answers())
def test_answers_on_one_connection_do_not_touch_each_other(first: bytes, second: bytes) -> None:
    parser = ResponseParser()
    parser.feed(first)
    if not (parser.complete and parser.keep_alive):
        return
    parser.start()
    for index in range(len(second)):
        parser.feed(second[index : index + 1])
    assert parser.complete or parser.finish()
    assert (parser.status, parser.headers(), parser.take_body()) == read_by_h11(second)


@given(data=answers(), rest=st.binary(min_size=1, max_size=30))
def test_what_follows_an_answer_never_changes_it(data: bytes, rest: bytes) -> None:
    alone, followed = ResponseParser(), ResponseParser()
    alone.feed(data)
    if not alone.complete:
        return  # it ends with the connection, so there is nothing after it
    followed.feed(data + rest)
    assert followed.complete
    assert followed.take_body() == alone.take_body()
    assert (followed.status, followed.headers()) == (alone.status, alone.headers())
    # A blank line after an answer is forgiven (RFC 9112, 2.2); anything else is noticed.
    assert followed.excess or not rest.strip(b"\r\n")


@given(data=answers(), place=st.integers(0, 10**6))
def test_a_truncated_answer_is_never_taken_for_a_whole_one(data: bytes, place: int) -> None:
    parser = ResponseParser()
    part = data[: place % len(data)]
    parser.feed(part)
    whole = read_by_h11(data)
    if parser.finish():
        assert parser.status == whole[0]
        delimited = whole[1].keys() & {"content-length", "transfer-encoding"}
        assert not delimited or parser.take_body() == whole[2]


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_end_in_an_answer_or_a_named_error(data: bytes) -> None:
    parser = ResponseParser()
    try:
        parser.feed(data)
    except ProtocolError:
        return
    parser.finish()
    assert parser.complete <= (200 <= parser.status <= 999)
