"""The experts that tokens went through: read, joined over segments, and carried to a batch."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.embedded.experts import LAYERS, TOP_K, routed_experts
from arealtrio.engine import RemoteEngine
from arealtrio.errors import InvalidRequest, ProtocolError, WorkflowError
from arealtrio.experts import RoutedExperts
from arealtrio.rows import RowBuilder, trajectory_from_response
from arealtrio.trajectory import Batch, CollateBuffers, Group
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    ModelResponse,
    Trajectory,
)
from arealtrio.wire.dialect import ServerInfo
from arealtrio.wire.experts import read_int32, read_npy

from .embedded_server import PROMPT
from .fleet import Fleet, connected_engine
from .observed import observed_engine

DIALECTS = ("vllm", "sglang")
WIDTH = LAYERS * TOP_K
ROUTED = GenerationHyperparameters(
    greedy=True, max_new_tokens=40, ignore_eos=True, return_routed_experts=True
)
LONG = ROUTED.new(max_new_tokens=400)
EACH = pytest.mark.parametrize("dialect", DIALECTS)


def check_experts(response: ModelResponse) -> None:
    """Those of the whole sequence, as a server that read it in one piece would tell them."""
    whole = [*response.input_tokens.tolist(), *response.output_tokens.tolist()]
    told = response.routed_experts
    assert told is not None
    assert told.dtype.kind in "iu"
    np.testing.assert_array_equal(told, routed_experts(whole).reshape(-1, WIDTH))


# --- joining ------------------------------------------------------------------------------------


@given(
    prompt=st.integers(1, 5),
    segments=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    flat=st.booleans(),
    old=st.booleans(),
)
def test_segments_of_any_length_join_without_a_gap(
    prompt: int, segments: list[int], flat: bool, old: bool
) -> None:
    """Also those of a server too old to leave out what is there, in either server's shape."""
    ids = list(range(100, 100 + prompt + sum(segments)))
    joined, tokens = RoutedExperts(), prompt
    for count in segments:
        tokens += count
        told = routed_experts(ids[:tokens], 0 if old else joined.count)
        joined.take(told.reshape(-1) if flat else told, tokens, "s")
    np.testing.assert_array_equal(joined.joined(), routed_experts(ids).reshape(-1, WIDTH))


@pytest.mark.parametrize(
    "told",
    [np.zeros((4, 3, 2)), np.zeros((6, 3, 2)), np.zeros(7), np.zeros(0), np.zeros((0, 3, 2))],
)
def test_what_is_not_a_row_for_each_token_is_refused(told: Any) -> None:
    experts = RoutedExperts()
    with pytest.raises(ProtocolError, match=r"^s told"):
        experts.take(told.astype(np.int32), 6, "s")
    assert experts.count == 0


def test_a_segment_of_another_width_is_refused() -> None:
    experts = RoutedExperts()
    experts.take(np.zeros((5, 3, 2), dtype=np.uint8), 6, "s")
    for wrong in (np.zeros((4, 3, 3)), np.zeros(28)):
        with pytest.raises(ProtocolError):
            experts.take(wrong.astype(np.int32), 10, "s")
    assert experts.count == 5


# --- the wire -----------------------------------------------------------------------------------


def npy(array: Any) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array)
        return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_what_vllm_writes_is_read_as_it_is(dtype: Any) -> None:
    experts = np.arange(24).reshape(4, 3, 2).astype(dtype)
    read = read_npy(npy(experts), "vLLM")
    assert read is not None
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, experts)
    assert read_npy(None, "vLLM") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", npy(np.zeros((4, 3, 2)))[:40], npy(np.zeros((4, 3, 2))), npy(np.arange(4)),
     npy(np.array({}, dtype=object))],
)  # fmt: skip
def test_what_is_no_array_of_experts_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected routed experts from vLLM"):
        read_npy(content, "vLLM")


def test_what_sglang_writes_has_no_shape() -> None:
    experts = np.arange(24, dtype="<i4")
    read = read_int32(experts.tobytes(), "SGLang")
    assert read is not None
    np.testing.assert_array_equal(read, experts)
    assert read_int32(None, "SGLang") is None
    with pytest.raises(ProtocolError, match="as int32, got 7 bytes"):
        read_int32(b"1234567", "SGLang")


# --- end to end ---------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("segment_tokens", [None, 7])
async def test_experts_come_with_the_tokens(
    dialect: Any, segment_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"segment_tokens": segment_tokens, "streaming": True}  # which gives them up for it
    async with observed_engine(
        tmp_path, monkeypatch, dialect, 2, config, tell_experts=True,
        **({} if dialect == "vllm" else {"incremental_streaming_output": True}),
    ) as (engine, observed):  # fmt: skip
        observed.forget()
        answer = await engine.agenerate(ModelRequest(PROMPT, ROUTED))
        check_experts(answer)
        plain = await engine.agenerate(
            ModelRequest(PROMPT, ROUTED.new(return_routed_experts=False))
        )
        assert plain.routed_experts is None
        assert plain.output_tokens.tolist() == answer.output_tokens.tolist()
    path = {"vllm": "/inference/v1/generate", "sglang": "/generate"}[dialect]
    starts = [
        body.get("routed_experts_start_len", 0)
        if dialect == "sglang"
        else body["sampling_params"].get("routed_experts_prompt_start", 0)
        for body in observed.bodies(path)
    ]
    joints = range(0, 40, segment_tokens) if segment_tokens else [0]
    assert starts == [max(0, len(PROMPT) + joint - 1) if joint else 0 for joint in joints]


async def test_the_other_route_of_vllm_tells_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(
        tmp_path, monkeypatch, 1, {"segment_tokens": 9}, tell_experts=True
    ) as (engine, _):
        server = engine.pool.servers[0]
        server.info = ServerInfo(model="tiny", tells_experts=None)
        check_experts(await engine.agenerate(ModelRequest(PROMPT, ROUTED)))


@EACH
async def test_a_generation_that_goes_on_elsewhere_has_them_all(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is aborted, which tells experts, and its server then dies, which tells none."""
    config = {"vocab_size": 371, "segment_tokens": 100}
    async with connected_engine(
        tmp_path, monkeypatch, 2, config, dialect=dialect, tell_experts=True
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        answers: list[ModelResponse] = []
        nursery.start_soon(collect, engine, LONG, answers)
        url = await server_with(fleet, 5)
        fleet.servers[url].scheduler.abort()
        url = await server_with(fleet, 130)
        engine.pool.named(url).cut_off()
    check_experts(answers[0])
    assert answers[0].output_len == 400
    totals = engine.totals()
    assert (totals.interruptions, totals.failovers) == (1, 1)


async def collect(
    engine: RemoteEngine, gconfig: GenerationHyperparameters, answers: list[ModelResponse]
) -> None:
    answers.append(await engine.agenerate(ModelRequest(PROMPT, gconfig)))


async def server_with(fleet: Fleet, tokens: int) -> str:
    """The server that runs a generation of so many tokens, when one does."""
    return await fleet.where(
        lambda s: any(len(r.token_ids) - len(PROMPT) >= tokens for r in s.running)
    )


@EACH
async def test_a_server_that_can_not_tell_them_is_named_before_anything_is_sent(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1) as (engine, observed):
        observed.forget()
        with pytest.raises(InvalidRequest, match=r"127\.0\.0\.1.*--enable-return-routed-experts"):
            await engine.agenerate(ModelRequest(PROMPT, ROUTED))
        assert observed.transport.asked == []


@EACH
async def test_a_server_that_does_not_tell_them_is_an_error_as_with_logprobs(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(
        tmp_path, monkeypatch, dialect, 1, {"max_failovers": 0}, tell_experts=True
    ) as (engine, observed):

        async def hook(url: str, request: HttpRequest) -> HttpResponse | None:
            if not request.path.endswith("generate"):
                return None
            observed.transport.hook = None
            answer: HttpResponse = await observed.transport.request(url, request, *limits)
            return HttpResponse(answer.status, answer.headers, without_experts(answer.body))

        limits = (engine.config.segment_limits(),)
        observed.transport.hook = hook
        with pytest.raises(ProtocolError, match="did not tell the experts"):
            await engine.agenerate(ModelRequest(PROMPT, ROUTED))


def without_experts(body: bytes) -> bytes:
    answer = json.loads(body)
    (answer["choices"][0] if "choices" in answer else answer["meta_info"]).pop("routed_experts")
    return json.dumps(answer).encode()


@EACH
async def test_aborted_tokens_without_experts_are_made_again(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(
        tmp_path, monkeypatch, dialect, 1, tell_experts=True
    ) as (engine, observed):  # fmt: skip
        limits = (engine.config.segment_limits(),)
        scheduler = next(iter(observed.servers.values())).scheduler

        async def hook(url: str, request: HttpRequest) -> HttpResponse | None:
            if not request.path.endswith("generate"):
                return None
            observed.transport.hook = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(abort_soon)
                answer: HttpResponse = await observed.transport.request(url, request, *limits)
            return HttpResponse(answer.status, answer.headers, without_experts(answer.body))

        async def abort_soon() -> None:
            (watch,) = observed.watches.values()
            await watch.until(lambda s: any(r.output_length >= 5 for r in s.running))
            scheduler.abort()

        observed.transport.hook = hook
        answer = await engine.agenerate(ModelRequest(PROMPT, LONG))
    check_experts(answer)
    totals = engine.totals()
    assert totals.tokens_lost == totals.tokens_regenerated >= 5
    assert (totals.interruptions, totals.tokens_generated) == (1, 400)


# --- to the trainer -----------------------------------------------------------------------------


def response(prompt: list[int], output: list[int], told: bool = True) -> ModelResponse:
    whole = [*prompt, *output]
    return ModelResponse(
        rid="r",
        input_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        output_logprobs=np.full(len(output), -0.5, dtype=np.float32),
        output_versions=np.zeros(len(output), dtype=np.int32),
        stop_reason="stop",
        routed_experts=routed_experts(whole).reshape(-1, WIDTH) if told else None,
    )


def test_a_row_has_a_line_of_experts_for_each_token() -> None:
    row = trajectory_from_response(response([5, 6], [7, 8]), 1.0)
    experts = row.extras["routed_experts"]
    assert experts.dtype == np.uint8
    np.testing.assert_array_equal(experts[:-1], routed_experts([5, 6, 7, 8]).reshape(-1, WIDTH))
    assert not experts[-1].any()


def test_of_several_turns_each_token_keeps_what_its_own_turn_told() -> None:
    row = RowBuilder().append_response(response([5, 6], [7, 8])).append_prompt([9])
    second = response([5, 6, 7, 8, 9], [10])
    assert second.routed_experts is not None
    second.routed_experts[:3] = 99  # what the second turn says of the first is not taken
    experts = row.append_response(second).append_prompt([11]).build(1.0).extras["routed_experts"]
    expected = routed_experts([5, 6, 7, 8, 9, 10]).reshape(-1, WIDTH)
    np.testing.assert_array_equal(experts[:5], expected)
    assert (experts.shape, int(experts[5:].max())) == ((7, WIDTH), 0)


def test_a_row_whose_last_turn_told_none_has_none() -> None:
    row = RowBuilder().append_response(response([5], [7]))
    row.append_response(response([5, 7], [8], told=False))
    assert "routed_experts" not in row.build(1.0).extras


def batch(*rows: Trajectory) -> Batch:
    group = Group.of([rows], number=0, permit_version=0, prompt_id="p", task_id="t")
    return Batch(groups=(group,), version=0)


@pytest.mark.parametrize("buffers", [None, CollateBuffers(1)])
def test_a_batch_collates_them(buffers: CollateBuffers | None) -> None:
    rows = [trajectory_from_response(response([5, 6], output), 0.0) for output in ([7], [8, 9, 4])]
    padded = batch(*rows).padded(buffers=buffers)["routed_experts"]
    assert padded.shape == (2, 5, WIDTH)
    assert padded.dtype == np.uint8
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(padded[b, : len(row)], row.extras["routed_experts"])
        assert not padded[b, len(row) :].any()
    packed = batch(*rows).packed(buffers=buffers)["routed_experts"]
    expected = np.concatenate([row.extras["routed_experts"] for row in rows])
    np.testing.assert_array_equal(packed, expected)


def test_rows_of_other_widths_make_no_batch() -> None:
    rows = [trajectory_from_response(response([5], [7]), 0.0) for _ in range(2)]
    other = (
        RowBuilder().append_prompt([5, 7]).build(0.0, extras={"routed_experts": np.ones((2, 3))})
    )
    with pytest.raises(WorkflowError, match="widths"):
        batch(rows[0], other).padded()
    with pytest.raises(WorkflowError, match="a matrix with a row for each"):
        RowBuilder().append_prompt([5, 7]).build(0.0, extras={"wrong": np.ones((3, 2))})


def test_base64_of_another_kind_is_no_generation() -> None:
    from arealtrio.wire.sglang import SglangDialect

    meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, 1, None]],
            "routed_experts": "not base64!"}  # fmt: skip
    body = json.dumps({"output_ids": [1], "meta_info": meta}).encode()
    with pytest.raises(ProtocolError):
        SglangDialect().parse_generate(HttpResponse(200, {}, body), ServerInfo())
    meta["routed_experts"] = base64.b64encode(bytes(8)).decode()
    body = json.dumps({"output_ids": [1], "meta_info": meta}).encode()
    told = SglangDialect().parse_generate(HttpResponse(200, {}, body), ServerInfo()).routed_experts
    assert told is not None
    assert told.tolist() == [0, 0]
