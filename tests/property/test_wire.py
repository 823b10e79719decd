"""Laws of both dialects, for every question and for any bytes as an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.errors import InvalidRequest, ProtocolError, RequestRejected, ServerError
from arealtrio.types import GenerationHyperparameters, HttpResponse
from arealtrio.wire.dialect import Dialect, SegmentRequest, ServerInfo, VersionSpan
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.status import REASON_SIZE, reason_of
from arealtrio.wire.vllm import VllmDialect

from ..golden import exchange

INFOS = [ServerInfo(token_in_token_out=False), ServerInfo(token_in_token_out=True)]
DIALECTS: list[Dialect] = [VllmDialect(), SglangDialect()]
RECORDED = {
    "vllm": [("vllm-0.32.0", "completion_sampled_rl.json"), ("vllm-0.32.0", "generate_tito.json")],
    "sglang": [("sglang-0.5.23", "generate.json")],
}
ALLOWED = (ProtocolError, RequestRejected, ServerError)

both = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)


def answers_of(dialect: Dialect) -> st.SearchStrategy[bytes]:
    """Recorded answers with a few bytes changed, or any bytes."""
    recorded = st.sampled_from(
        [exchange.answer(server, name).body for server, name in RECORDED[dialect.name]]
    )
    change = st.tuples(st.integers(0, 10**6), st.binary(max_size=2), st.integers(0, 2))
    return st.binary(max_size=40) | st.tuples(recorded, st.lists(change, max_size=3)).map(damage)


def damage(args: tuple[bytes, list[tuple[int, bytes, int]]]) -> bytes:
    body, changes = args
    for place, new, removed in changes:
        at = place % (len(body) + 1)
        body = body[:at] + new + body[at + removed :]
    return body


@both
@given(data=st.data(), status=st.sampled_from([200, 200, 200, 404, 500, 301]))
def test_any_answer_is_read_whole_or_refused_by_name(
    dialect: Dialect, data: st.DataObject, status: int
) -> None:
    body = data.draw(answers_of(dialect))
    response = HttpResponse(status, {"content-type": "application/json"}, body)
    for info in INFOS:
        try:
            segment = dialect.parse_generate(response, info)
        except ALLOWED:
            continue
        assert status == 200
        assert len(segment.token_ids) == len(segment.logprobs)
        assert np.isfinite(segment.logprobs).all()
        if segment.versions:
            assert segment.versions[0].start == 0
            assert segment.versions[-1].end == len(segment.token_ids)
    for parse in (dialect.parse_control, dialect.parse_load, dialect.parse_weight_version):
        assert len(refusal(parse, response)) < 2 * REASON_SIZE


def refusal(parse: Callable[[HttpResponse], object], response: HttpResponse) -> str:
    """What it was refused with; empty where it was not."""
    try:
        parse(response)
    except ALLOWED as exc:
        return str(exc)
    return ""


@both
@given(cuts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**6)), max_size=6))
def test_spans_that_cover_the_tokens_are_read_as_sent(
    dialect: Dialect, cuts: list[tuple[int, int]]
) -> None:
    spans, expected, at = [], [], 0
    for size, version in cuts:
        spans.append({"version": str(version), "start": at, "end": at + size})
        if size:
            expected.append(VersionSpan(version, at, at + size))
        at += size
    segment = dialect.parse_generate(answer_with(dialect, at, spans), INFOS[1])
    assert segment.versions == tuple(expected)
    assert segment.token_ids.tolist() == list(range(at))


def answer_with(dialect: Dialect, count: int, spans: list[dict[str, Any]]) -> HttpResponse:
    ids = list(range(count))
    if dialect.name == "vllm":
        content = [{"token_id": token, "logprob": -0.5} for token in ids]
        choice = {"finish_reason": "stop", "token_ids": ids, "weight_versions": spans,
                  "logprobs": {"content": content}}  # fmt: skip
        body: dict[str, Any] = {"choices": [choice]}
    else:
        meta = {"finish_reason": {"type": "stop"}, "weight_versions": spans,
                "output_token_logprobs": [[-0.5, token, None] for token in ids]}  # fmt: skip
        body = {"output_ids": ids, "meta_info": meta}
    return HttpResponse(200, {}, json.dumps(body).encode())


segments = st.builds(
    SegmentRequest,
    request_id=st.text(st.characters(codec="ascii"), max_size=4) | st.just("r-1"),
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=40).map(
        lambda ids: np.array(ids, dtype=np.int32)
    ),
    max_new_tokens=st.integers(0, 50),
    min_new_tokens=st.integers(0, 50),
    gconfig=st.builds(
        GenerationHyperparameters,
        temperature=st.floats(0, 2),
        top_k=st.integers(1, 10**9),
        stop=st.lists(st.text(max_size=3), max_size=2).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 400), max_size=3).map(tuple),
    ),
    seed=st.none() | st.integers(0, 2**63 - 1),
)


@both
@given(segment=segments, info=st.sampled_from([*INFOS, ServerInfo(model="m", vocab_size=2**30)]))
def test_a_question_is_json_with_every_token_or_is_not_asked(
    dialect: Dialect, segment: SegmentRequest, info: ServerInfo
) -> None:
    try:
        request = dialect.generate(segment, info)
    except InvalidRequest:
        assert (
            len(segment.token_ids) == 0
            or not 0 <= segment.min_new_tokens <= segment.max_new_tokens
            or segment.max_new_tokens == 0
            or info.vocab_size is not None
            or not all("!" <= char <= "~" for char in segment.request_id)
            or not segment.request_id
        )
        return
    body = json.loads(request.body)
    (sent,) = (body[key] for key in ("prompt", "token_ids", "input_ids") if key in body)
    assert sent == segment.token_ids.tolist()
    sampling = body.get("sampling_params", body)
    assert sampling["temperature"] == segment.gconfig.temperature
    assert tuple(sampling["stop_token_ids"]) == segment.gconfig.stop_token_ids
    assert tuple(sampling.get("stop", ())) == segment.gconfig.stop
    (named,) = json.loads(dialect.abort(segment.request_id, info).body).values()
    assert segment.request_id in (named if isinstance(named, str) else named[0])
    for _, value in request.headers:
        assert value.isprintable()


@given(body=st.binary(max_size=300) | st.recursive(
    st.none() | st.text(max_size=300) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["error", "message", "detail", "msg", "loc", "x"]), inner, max_size=3),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_a_reason_is_one_short_line(body: bytes) -> None:
    reason = reason_of(HttpResponse(400, {}, body))
    assert 0 < len(reason) <= REASON_SIZE
    assert len(reason.splitlines()) == 1
