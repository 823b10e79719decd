"""Reasons: short, on one line, and without what the server repeats of the request."""

from __future__ import annotations

import json

import pytest

from arealtrio.errors import ProtocolError, RequestRejected, ServerError
from arealtrio.types import HttpResponse
from arealtrio.wire.status import REASON_SIZE, check_status, masked, reason_of


def rejected(body: object, content_type: str = "application/json") -> str:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return reason_of(HttpResponse(400, {"content-type": content_type}, payload))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "too long", "code": 400}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"message": "too long", "success": False}, "too long"),
        ({"detail": "Not Found"}, "Not Found"),
        ("too long", "too long"),
        ({"detail": [{"loc": ["body", 0], "msg": "too long", "input": "secret"}]},
         "body.0: too long"),
        ({"detail": ["x", {"msg": 1}]}, "; : 1"),
        ({"error": {"message": "1 error:\n {'msg': 'bad', 'input': 'secret', 'ctx': {}}"}},
         "1 error: {'msg': 'bad'"),
        ({"error": {"message": "1 error for X\nprompt\n  bad [type=t, input_value='secret, in…', "
                               "input_type=str]\n    For help visit"}},
         "1 error for X prompt bad [type=t For help visit"),
        ({"error": {"code": 400}}, "no reason given"),
        ({}, "no reason given"),
        (3, "no reason given"),
        (b"", "no reason given"),
        (b"plain\n words", "plain words"),
        (b"\xff", "\ufffd"),
        (b"<html>secret</html>", "an HTML page, as a proxy sends it"),
    ],
)  # fmt: skip
def test_the_reason_is_found_where_servers_put_it(body: object, reason: str) -> None:
    assert rejected(body) == reason


def test_a_page_is_named_by_its_type_too() -> None:
    assert "HTML" in rejected(b"Gateway secret", content_type="text/html; charset=utf-8")


@pytest.mark.parametrize("body", [{"message": "x" * 100_000}, b"x" * 100_000])
def test_a_long_reason_is_cut(body: object) -> None:
    reason = rejected(body)
    assert len(reason) == REASON_SIZE
    assert reason.endswith("…")


@pytest.mark.parametrize(
    ("key", "spelled"),
    [
        ("sk/ab+cdefg==", rb"sk/ab+cdefg=="),
        ("sk/ab+cdefg==", rb"sk\/ab+cdefg=="),
        ("sk/ab+cdefg==", rb"sk/ab\u002Bcdefg\u003d\u003d"),
        ('sk"ab\\cdefg', rb"sk\"ab\\cdefg"),
        ("clé-secrète", rb"cl\u00e9-secr\u00e8te"),
        ("clé-secrète", "clé-secrète".encode()),
    ],
)
def test_a_key_is_masked_however_json_spells_it(key: str, spelled: bytes) -> None:
    body = b'{"error":{"message":"no key %b of ours"}}' % spelled
    reason = reason_of(masked(HttpResponse(401, {}, body), [key]))
    assert reason == "no key *** of ours"


@pytest.mark.parametrize(
    "body", [b"no key sk/ab+cdefg of ours", b"[" * 10_000, b"", b"\xff", b"[%d]" % 10**400]
)
def test_what_is_no_json_is_masked_as_it_is(body: bytes) -> None:
    answer = masked(HttpResponse(401, {}, body), ["sk/ab+cdefg"])
    assert answer.body == body.replace(b"sk/ab+cdefg", b"***")


def test_without_a_key_an_answer_is_not_touched() -> None:
    answer = HttpResponse(200, {}, b'{"a" : "b\\/c"}')
    assert masked(answer, ()) is answer


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_success_says_nothing(status: int) -> None:
    check_status(HttpResponse(status, {}, b"whatever"), "vLLM")


@pytest.mark.parametrize(
    ("status", "expected"),
    [(100, ProtocolError), (302, ProtocolError), (400, RequestRejected), (404, RequestRejected),
     (429, RequestRejected), (499, RequestRejected), (500, ServerError), (503, ServerError),
     (599, ServerError)],
)  # fmt: skip
def test_the_class_says_who(status: int, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=str(status)) as caught:
        check_status(HttpResponse(status, {}, b""), "vLLM")
    assert type(caught.value) is expected
    assert "vLLM" in str(caught.value)
