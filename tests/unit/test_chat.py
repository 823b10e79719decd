"""Chats with images: asked for in one piece, and exact tokens of prompt and answer come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from arealtrio.embedded.images import IMAGE_TOKENS, expanded, image_ids, placeholder, rendered
from arealtrio.embedded.scheduler import Scheduler
from arealtrio.engine import RemoteEngine
from arealtrio.errors import InvalidRequest, ProtocolError, RolloutError
from arealtrio.rows import trajectory_from_response
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    ModelResponse,
)
from arealtrio.wire.dialect import SegmentRequest, ServerInfo
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from ..golden import exchange
from .embedded_server import VOCAB_SIZE
from .fleet import connected_engine
from .observed import observed_engine
from .test_engine import GREEDY, check_lengths, greedy_answer

CAT, DOG = "data:image/png;base64,aaaa", "data:image/png;base64,bbbb"
HOLDER = placeholder(VOCAB_SIZE)
VLLM = VllmDialect()


def chat(*urls: str, text: str = "what is it?") -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "text", "text": text}, *images]},
    ]


# --- the wire -----------------------------------------------------------------------------------


def recorded(name: str) -> HttpResponse:
    return exchange.answer("vllm-0.32.0", name)


def test_a_recorded_chat_gives_the_tokens_of_prompt_and_answer() -> None:
    answer = VLLM.parse_generate(recorded("chat_logprobs.json"), ServerInfo(), chat=True)
    assert answer.token_ids.tolist() == [208, 273, 214, 326, 308, 325]
    assert answer.logprobs[0] == np.float32(-1.5735044479370117)
    assert answer.prompt_ids is not None
    assert answer.prompt_ids.tolist()[:4] == [1, 88, 86, 267]
    assert len(answer.prompt_ids) == 27
    assert (answer.stop_reason, answer.versions) == ("length", None)


def test_a_chat_without_token_ids_is_refused() -> None:
    with pytest.raises(ProtocolError, match="the prompt's token ids"):
        VLLM.parse_generate(recorded("chat_plain.json"), ServerInfo(), chat=True)


def edited(edit: Any) -> HttpResponse:
    body = json.loads(recorded("chat_logprobs.json").body)
    edit(body["choices"][0])
    return HttpResponse(200, {}, json.dumps(body).encode())


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["logprobs"]["content"].pop(),
        lambda c: c["token_ids"].reverse(),
        lambda c: c.update(logprobs=None),
        lambda c: c["logprobs"]["content"][0].update(token="dog"),
        lambda c: c["logprobs"]["content"][0].update(logprob=None),
        lambda c: c["logprobs"]["content"][0].update(logprob=-1e300),
        lambda c: c.update(finish_reason="error"),
    ],
)
def test_a_broken_chat_is_refused(edit: Any) -> None:
    with pytest.raises(ProtocolError):
        VLLM.parse_generate(edited(edit), ServerInfo(), chat=True)


def segment(messages: Any, ids: list[int] | None = None) -> SegmentRequest:
    return SegmentRequest(
        request_id="r-0000",
        token_ids=np.array(ids or [], dtype=np.int32),
        max_new_tokens=6,
        gconfig=GenerationHyperparameters(temperature=0.5, stop=("x",)),
        messages=tuple(messages),
    )


def test_a_chat_asks_for_what_the_recording_asked_for() -> None:
    request = VLLM.generate(segment(chat(CAT)), ServerInfo(model="tiny", token_in_token_out=True))
    body = json.loads(request.body)
    assert request.path == "/v1/chat/completions"
    assert request.headers == (("X-Request-Id", "r-0000"),)
    asked = exchange.question("vllm-0.32.0", "chat_logprobs.json")["json"]
    for name in ("logprobs", "return_token_ids", "return_tokens_as_token_ids"):
        assert body[name] == asked[name]
    assert body["messages"] == chat(CAT)
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (6, 0.5, ["x"])
    abort = VLLM.abort("r-0000", ServerInfo(token_in_token_out=True), chat=True)
    assert (abort.path, json.loads(abort.body)) == (
        "/abort_requests", {"request_ids": ["chatcmpl-r-0000"]},
    )  # fmt: skip


def test_messages_that_json_can_not_write_are_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequest, match="can not be written as JSON"):
        VLLM.generate(segment([{"role": "user", "content": object()}]), ServerInfo())


def test_sglang_is_sent_the_images_beside_the_tokens() -> None:
    dialect = SglangDialect()
    body = json.loads(dialect.generate(segment(chat(CAT, DOG), [5, 6]), ServerInfo()).body)
    assert (body["input_ids"], body["image_data"]) == ([5, 6], [CAT, DOG])
    with pytest.raises(InvalidRequest, match="needs its input_ids too"):
        dialect.generate(segment(chat(CAT)), ServerInfo())
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"file": "a.png"}}]}]
    with pytest.raises(InvalidRequest, match="image_url part"):
        dialect.generate(segment(broken, [5]), ServerInfo())


@pytest.mark.parametrize("messages", ["hello", [5], None, {"role": "user"}])
def test_what_is_no_chat_is_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="a sequence of mappings"):
        ModelRequest(messages=messages)


def test_areals_tokenizer_is_accepted_and_not_kept() -> None:
    request = ModelRequest(input_ids=[5], tokenizer=object())
    assert not hasattr(request, "tokenizer")


# --- end to end ---------------------------------------------------------------------------------

SEGMENTED = {"segment_tokens": 7, "streaming": True, "vocab_size": VOCAB_SIZE}  # not of a chat


async def test_a_chat_on_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    async with connected_engine(tmp_path, monkeypatch, 1, SEGMENTED) as (engine, fleet):
        for url in (CAT, DOG):
            answers[url] = await engine.agenerate(ModelRequest(gconfig=GREEDY, messages=chat(url)))
    for url, answer in answers.items():
        prompt = rendered(chat(url), VOCAB_SIZE)
        check_lengths(answer)
        assert answer.input_tokens.tolist() == prompt
        assert answer.output_tokens.tolist() == greedy_answer(fleet.weights[1], prompt, 40)
        assert (len(answer.segments), answer.stop_reason) == (1, "length")
        assert set(answer.output_versions.tolist()) == {0}
        assert answer.versions_exact
        row = trajectory_from_response(answer, 1.0)
        assert row.input_ids.tolist() == [*prompt, *answer.output_tokens.tolist()]
    assert answers[CAT].input_tokens.tolist() != answers[DOG].input_tokens.tolist()


async def test_a_chat_on_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [5, HOLDER, 7, HOLDER]
    async with observed_engine(
        tmp_path, monkeypatch, "sglang", 1, {"segment_tokens": 7}
    ) as (engine, observed):  # fmt: skip
        observed.forget()
        request = ModelRequest(prompt, GREEDY, messages=chat(DOG, CAT))
        answer = await engine.agenerate(request)
        (body,) = observed.bodies("/generate")
    assert body["image_data"] == [DOG, CAT]
    assert answer.input_tokens.tolist() == prompt
    seen = expanded(prompt, [DOG, CAT], VOCAB_SIZE)
    assert len(seen) == 2 + 2 * IMAGE_TOKENS
    assert answer.output_tokens.tolist() == greedy_answer(observed.weights[1], seen, 40)


async def test_experts_of_a_chat_are_of_the_tokens_that_the_server_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .test_experts import check_experts

    async with connected_engine(tmp_path, monkeypatch, 1, tell_experts=True) as (engine, _):
        gconfig = GREEDY.new(return_routed_experts=True)
        check_experts(await engine.agenerate(ModelRequest(gconfig=gconfig, messages=chat(CAT))))


async def run_long(engine: RemoteEngine, answers: list[ModelResponse]) -> None:
    gconfig = GREEDY.new(max_new_tokens=400)
    answers.append(await engine.agenerate(ModelRequest(gconfig=gconfig, messages=chat(CAT))))


async def test_a_chat_whose_server_fails_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[ModelResponse] = []
    async with (
        connected_engine(tmp_path, monkeypatch, 2, SEGMENTED) as (engine, fleet),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(run_long, engine, answers)
        engine.pool.named(await fleet.where(has_begun)).cut_off()
    (answer,) = answers
    prompt = rendered(chat(CAT), VOCAB_SIZE)
    assert answer.output_tokens.tolist() == greedy_answer(fleet.weights[1], prompt, 400)
    totals = engine.totals()
    assert (totals.failovers, totals.tokens_kept, totals.tokens_regenerated) == (1, 0, 400)


def has_begun(scheduler: Scheduler) -> bool:
    return any(sequence.output_length >= 5 for sequence in scheduler.running)


@pytest.mark.parametrize("inexact", [False, True])
async def test_a_chat_that_is_aborted_half_way_is_refused(
    inexact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"allow_inexact_resume": inexact}
    async with connected_engine(tmp_path, monkeypatch, 1, config) as (engine, fleet):
        with pytest.RaisesGroup(
            pytest.RaisesExc(RolloutError, match="uses messages.*mode='keep'$")
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_long, engine, [])
                await fleet.watch.until(has_begun)
                (server,) = fleet.servers.values()
                server.scheduler.abort()
        assert fleet.nothing_left()


async def test_a_cancelled_chat_is_aborted_by_its_own_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm", 1) as (engine, observed):
        observed.forget()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_long, engine, [])
            (watch,) = observed.watches.values()
            await watch.until(has_begun)
            (sequence,) = watch.scheduler.running
            nursery.cancel_scope.cancel()
    assert observed.bodies("/abort_requests") == [{"request_ids": [sequence.request_id]}]


# --- the made-up eyes -----------------------------------------------------------------------------


def test_an_image_is_the_same_tokens_wherever_it_is_seen() -> None:
    assert image_ids(CAT, 371) == image_ids(CAT, 371) != image_ids(DOG, 371)
    assert expanded([1, 370, 2], [CAT], 371) == [1, *image_ids(CAT, 371), 2]
    with pytest.raises(ValueError, match=r"1 image placeholder token\(s\) but 2"):
        expanded([370], [CAT, DOG], 371)


@pytest.mark.parametrize(
    "more",
    [{"stream": True}, {"messages": []}, {"messages": [{"role": "user"}]},
     {"messages": [{"role": "user", "content": [{"type": "audio_url"}]}]}],
)  # fmt: skip
async def test_the_embedded_chat_refuses_what_it_can_not_do(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 1) as (engine, _):
        body = json.dumps({"messages": chat(CAT), **more}).encode()
        answer = await engine.pool.send(
            engine.pool.servers[0],
            HttpRequest("POST", "/v1/chat/completions", body),
            engine.config.segment_limits(),
        )
        assert answer.status == 400
