"""A streamed answer is the whole one, however it is cut into events and the events into reads."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.errors import ProtocolError, RequestRejected, ServerError
from arealtrio.types import HttpResponse
from arealtrio.wire.dialect import Dialect, SegmentResponse, ServerInfo
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

INFO = ServerInfo(token_in_token_out=True)
Json = dict[str, Any]

tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 0, width=32)), max_size=12)
reasons = st.sampled_from(["stop", "length", "abort"])


class Completions:
    """``/v1/completions``, which reports no versions."""

    dialect: Dialect = VllmDialect()

    def message(self, part: list[Any], _: list[Any], reason: str | None, spans: Any) -> Json:
        ids, logprobs = [i for i, _ in part], [p for _, p in part]
        written = [f"token_id:{i}" for i in ids]
        columns = {"token_logprobs": logprobs, "tokens": written, "text_offset": [0] * len(ids)}
        return {"choices": [{"token_ids": ids, "logprobs": columns, "finish_reason": reason}]}


class TokenRoute:
    dialect: Dialect = VllmDialect()

    def message(self, part: list[Any], _: list[Any], reason: str | None, spans: Any) -> Json:
        content = [{"token_id": i, "logprob": p, "rank": 1} for i, p in part]
        choice = {"token_ids": [i for i, _ in part], "logprobs": {"content": content}}
        ended = {"finish_reason": reason, "weight_versions": spans}
        return {"request_id": "r", "choices": [choice | ended]}


class Incremental:
    """SGLang's ``/generate`` with ``--incremental-streaming-output``."""

    dialect: Dialect = SglangDialect()

    def shown(self, part: list[Any], so_far: list[Any]) -> list[Any]:
        return part

    def message(self, part: list[Any], so_far: list[Any], reason: str | None, spans: Any) -> Json:
        shown = self.shown(part, so_far)
        meta = {
            "finish_reason": reason and {"type": reason},
            "completion_tokens": len(so_far),
            "output_token_logprobs": [[p, i, None] for i, p in shown],
            "weight_versions": spans,
        }
        return {"text": "", "output_ids": [i for i, _ in shown], "meta_info": meta}


class Cumulative(Incremental):
    """SGLang's default, which repeats everything in each event."""

    def shown(self, part: list[Any], so_far: list[Any]) -> list[Any]:
        return so_far


routes = pytest.mark.parametrize(
    "route",
    [Completions(), TokenRoute(), Incremental(), Cumulative()],
    ids=lambda r: type(r).__name__,
)


def spans_of(count: int, cuts: list[int]) -> list[Json]:
    edges = [0, *sorted(cut % (count + 1) for cut in cuts), count]
    return [
        {"version": str(version), "start": start, "end": end}
        for version, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def events_of(route: Any, answer: list[Any], cuts: list[int], reason: str, spans: Any) -> bytes:
    edges = [0, *sorted(cut % (len(answer) + 1) for cut in cuts), len(answer)]
    messages = [
        route.message(answer[start:end], answer[:end], None, None)
        for start, end in itertools.pairwise(edges)
    ]
    messages[-1] = route.message(answer[edges[-2] :], answer, reason, spans)
    return b"".join(b"data: %b\n\n" % json.dumps(m).encode() for m in messages)


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


def same(left: SegmentResponse, right: SegmentResponse) -> None:
    np.testing.assert_array_equal(left.token_ids, right.token_ids)
    np.testing.assert_array_equal(left.logprobs, right.logprobs)
    assert (left.stop_reason, left.versions) == (right.stop_reason, right.versions)


cut_places = st.lists(st.integers(0, 10**5), max_size=6)


@routes
@given(answer=tokens, reason=reasons, event_cuts=cut_places, cuts=cut_places, span_cuts=cut_places)
def test_a_stream_says_what_the_whole_answer_says(
    route: Any, answer: list[Any], reason: str, event_cuts: list[int], cuts: list[int],
    span_cuts: list[int],
) -> None:  # fmt: skip
    spans = spans_of(len(answer), span_cuts)
    whole = json.dumps(route.message(answer, answer, reason, spans)).encode()
    expected = route.dialect.parse_generate(HttpResponse(200, {}, whole), INFO)
    parser = route.dialect.stream_parser()
    for piece in pieces_of(events_of(route, answer, event_cuts, reason, spans), cuts):
        before = parser.count
        parser.feed(piece)
        assert before <= parser.count <= len(answer)
        arrived = parser.arrived()
        assert arrived.token_ids.tolist() == [i for i, _ in answer[: parser.count]]
    assert parser.complete
    same(parser.answer(), expected)


@routes
@given(data=st.data())
def test_a_damaged_stream_is_read_or_refused_by_name(route: Any, data: st.DataObject) -> None:
    answer = data.draw(tokens)
    stream = bytearray(events_of(route, answer, data.draw(cut_places), "length", None))
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 255)), min_size=1, max_size=3)
    ):
        stream[place % len(stream)] = byte
    parser = route.dialect.stream_parser()
    try:
        for piece in pieces_of(bytes(stream), data.draw(cut_places)):
            parser.feed(piece)
        found = parser.answer()
    except (ProtocolError, ServerError, RequestRejected):
        found = parser.arrived()
    assert len(found.token_ids) == len(found.logprobs) == parser.count
    assert np.isfinite(found.logprobs).all()
