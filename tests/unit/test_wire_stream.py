"""Streams of both dialects, on those that were recorded, split at every byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from arealtrio.errors import ProtocolError, RequestRejected, ServerError
from arealtrio.types import GenerationHyperparameters, as_token_ids
from arealtrio.wire.dialect import Dialect, SegmentRequest, SegmentResponse, ServerInfo, VersionSpan
from arealtrio.wire.events import EventReader
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from ..golden import exchange

VLLM, SGLANG = VllmDialect(), SglangDialect()


def recorded_completion() -> bytes:
    path = exchange.ROOT / "vllm-0.32.0" / "stream_completion.json"
    lines = json.loads(path.read_bytes())["response"]["sse_lines_with_time"]
    return b"".join(line.encode() + b"\n\n" for _, line in lines)


def recorded(server: str, name: str) -> bytes:
    return exchange.answer(server, name).body + b"\n\n"


STREAMS: dict[str, tuple[Dialect, bytes, list[int], tuple[VersionSpan, ...] | None]] = {
    "vllm-completions": (VLLM, recorded_completion(), [326, 151, 173, 179, 101], None),
    "vllm-tokens": (
        VLLM,
        recorded("vllm-0.32.0", "generate_tito_stream.txt"),
        [272, 331, 101],
        (VersionSpan(None, 0, 3),),
    ),
    "sglang": (
        SGLANG,
        recorded("sglang-0.5.23", "generate_stream.txt"),
        [326, 151, 173],
        (VersionSpan(None, 0, 3),),
    ),
}


def read(dialect: Dialect, *pieces: bytes) -> SegmentResponse:
    parser = dialect.stream_parser()
    for piece in pieces:
        parser.feed(piece)
    return parser.answer()


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_is_read_wherever_it_is_split(name: str) -> None:
    dialect, stream, ids, versions = STREAMS[name]
    whole = read(dialect, stream)
    assert whole.token_ids.tolist() == ids
    assert whole.token_ids.dtype == np.int32
    assert whole.logprobs.dtype == np.float32
    assert whole.versions == versions
    assert whole.stop_reason == "length"
    for at in range(len(stream) + 1):
        answer = read(dialect, stream[:at], stream[at:])
        assert answer.token_ids.tolist() == ids
        np.testing.assert_array_equal(answer.logprobs, whole.logprobs)
        assert answer.versions == versions
    np.testing.assert_array_equal(
        read(dialect, *(stream[i : i + 1] for i in range(len(stream)))).logprobs, whole.logprobs
    )


@pytest.mark.parametrize("name", STREAMS)
def test_what_arrived_before_a_stream_broke_is_there_and_is_a_prefix(name: str) -> None:
    dialect, stream, ids, _ = STREAMS[name]
    parser, seen = dialect.stream_parser(), set()
    for at in range(len(stream)):
        arrived = parser.arrived()
        assert parser.count == len(arrived.token_ids) == len(arrived.logprobs)
        assert arrived.token_ids.tolist() == ids[: parser.count]
        assert (arrived.stop_reason, arrived.versions) == ("abort", None)
        seen.add(parser.count)
        if not parser.complete:
            with pytest.raises(ProtocolError, match=f"after {parser.count} tokens"):
                parser.answer()
        parser.feed(stream[at : at + 1])
    assert seen == set(range(len(ids) + 1))
    assert parser.complete


def vllm_event(ids: list[int], finish: str | None = None, **more: Any) -> dict[str, Any]:
    content = [{"token_id": i, "logprob": -float(i)} for i in ids]
    choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": finish, **more}
    return {"choices": [choice]}


def sglang_event(
    ids: list[int], total: int, finish: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    pairs = [[-float(i), i, None] for i in ids]
    meta = {"finish_reason": finish, "completion_tokens": total, "output_token_logprobs": pairs}
    return {"output_ids": ids, "meta_info": {**meta, **more}}


def stream_of(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


LENGTH = {"type": "length", "length": 3}


def test_an_incremental_stream_gives_what_a_cumulative_one_gives() -> None:
    incremental = stream_of(sglang_event([5], 1), sglang_event([6, 7], 3, LENGTH))
    cumulative = stream_of(sglang_event([5], 1), sglang_event([5, 6, 7], 3, LENGTH))
    for stream in (incremental, cumulative):
        answer = read(SGLANG, stream)
        assert answer.token_ids.tolist() == [5, 6, 7]
        assert answer.logprobs.tolist() == [-5, -6, -7]


def test_lists_of_one_event_may_be_shortened_each_for_itself() -> None:
    event = sglang_event([5, 6, 7], 3, LENGTH) | {"output_ids": [6, 7]}
    answer = read(SGLANG, stream_of(sglang_event([5], 1), event))
    assert answer.token_ids.tolist() == [5, 6, 7]


def test_the_last_event_may_bring_no_token() -> None:
    spans = [{"version": "1", "start": 0, "end": 2}]
    bare = {"choices": [{"token_ids": [], "logprobs": None, "finish_reason": "stop",
                         "weight_versions": spans}]}  # fmt: skip
    answer = read(VLLM, stream_of(vllm_event([5, 6]), bare))
    assert (answer.token_ids.tolist(), answer.stop_reason) == ([5, 6], "stop")
    assert answer.versions == (VersionSpan(1, 0, 2),)
    ending = sglang_event([], 2, {"type": "stop", "matched": 6})
    assert read(SGLANG, stream_of(sglang_event([5, 6], 2), ending)).token_ids.tolist() == [5, 6]


def test_a_request_aborted_in_the_queue_brings_nothing() -> None:
    abort = {"type": "abort", "message": "Abort before prefill"}
    answer = read(SGLANG, stream_of(sglang_event([9, 9], 2, abort)))  # tokens of another request
    assert (answer.token_ids.tolist(), answer.stop_reason) == ([], "abort")
    assert answer.message == "Abort before prefill"
    assert read(VLLM, stream_of(vllm_event([], "abort"))).token_ids.tolist() == []


def failing(code: Any) -> dict[str, Any]:
    return {"error": {"message": "it broke", "type": "x", "code": code}}


@pytest.mark.parametrize("dialect", [VLLM, SGLANG], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    ("code", "expected"),
    [(500, ServerError), (503, ServerError), (400, RequestRejected), (None, ServerError),
     ("internal", ServerError), (200, ServerError)],
)  # fmt: skip
def test_a_failure_in_mid_stream_is_classed_by_its_code_and_keeps_what_came(
    dialect: Dialect, code: Any, expected: type[Exception]
) -> None:
    parser = dialect.stream_parser()
    first = vllm_event([5]) if dialect is VLLM else sglang_event([5], 1)
    with pytest.raises(expected, match="it broke"):
        parser.feed(stream_of(first, failing(code)))
    assert parser.arrived().token_ids.tolist() == [5]
    assert not parser.complete


@pytest.mark.parametrize("dialect", [VLLM, SGLANG], ids=lambda dialect: dialect.name)
def test_a_failure_in_words_alone_is_the_servers(dialect: Dialect) -> None:
    parser = dialect.stream_parser()
    with pytest.raises(ServerError, match="it broke"):
        parser.feed(stream_of({"error": "it broke"}))


BROKEN = [
    (VLLM, b"data: {\n\n", "JSON"),
    (VLLM, stream_of({"choices": [{}]}), "finish_reason"),
    (VLLM, stream_of({"choices": vllm_event([1])["choices"] * 2}), "1 choice"),
    (VLLM, stream_of(vllm_event([1], "length"), vllm_event([2])), "nothing after the last token"),
    (VLLM, stream_of(vllm_event([1], "error")), "finish reason"),
    (VLLM, stream_of(vllm_event([1]) | {"choices": [{"token_ids": [1], "finish_reason": None}]}),
     "a logprob for every token"),
    (SGLANG, stream_of(sglang_event([1], 1, {"type": "stop", "matched": "NaN happened"})),
     "not numbers"),
    (SGLANG, stream_of(sglang_event([1, 2], 2), sglang_event([1], 1)), "never go back"),
    (SGLANG, stream_of(sglang_event([1], 1), sglang_event([1, 2, 3], 5)), "5 tokens or the last 4"),
    (SGLANG, stream_of({"output_ids": [1]}), "meta_info"),
    (SGLANG, stream_of({"meta_info": {}, "output_ids": [1]}), "completion_tokens"),
    (SGLANG, stream_of(sglang_event([1], 1) | {"output_ids": [2]}), "those of others"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "stream", "words"), BROKEN)
def test_a_stream_that_follows_no_dialect_is_refused(
    dialect: Dialect, stream: bytes, words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        dialect.stream_parser().feed(stream)


def test_spans_that_do_not_cover_the_tokens_are_refused() -> None:
    spans = [{"version": "1", "start": 0, "end": 1}]
    parser = VLLM.stream_parser()
    parser.feed(stream_of(vllm_event([5, 6], "length", weight_versions=spans)))
    with pytest.raises(ProtocolError, match="spans over 2 tokens"):
        parser.answer()


@pytest.mark.parametrize("tito", [True, False])
def test_a_streamed_question_asks_for_the_same_and_to_be_streamed(tito: bool) -> None:
    segment = SegmentRequest(
        request_id="r",
        token_ids=as_token_ids([1, 2]),
        max_new_tokens=3,
        gconfig=GenerationHyperparameters(),
    )
    info = ServerInfo(token_in_token_out=tito)
    ask: Callable[..., Any]
    for ask in (VLLM.generate, SGLANG.generate):
        whole, streamed = ask(segment, info), ask(segment, info, stream=True)
        assert whole.path == streamed.path
        body = json.loads(streamed.body)
        assert body.pop("stream") is True
        expected = json.loads(whole.body)
        assert expected.pop("stream", False) is False
        assert body == expected


# --- server-sent events -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata:b\r\n\r\n", [b"a", b"b"]),
        (b": ping\n\nevent: x\nid: 1\ndata: a\n\n", [b"a"]),
        (b"data: a\ndata:  b\n\n", [b"a\n b"]),
        (b"\n\n\ndata: a\n\n\n", [b"a"]),
        (b"data: a\n", []),  # no empty line: the event is not whole
        (b"data: a", []),
        (b"data\n\n", [b""]),
    ],
)
def test_events_are_read_wherever_they_are_split(stream: bytes, events: list[bytes]) -> None:
    for at in range(len(stream) + 1):
        reader = EventReader()
        assert reader.feed(stream[:at]) + reader.feed(stream[at:]) == events
