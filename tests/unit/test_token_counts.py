"""Every token is counted once: kept, lost, made again, or thrown away with its generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from arealtrio.engine import RemoteEngine
from arealtrio.errors import RolloutError, TransportError
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest, ModelResponse

from .embedded_server import PROMPT, VOCAB_SIZE
from .fleet import Fleet, connected_engine
from .observed import Hook, observed_engine
from .test_engine import GREEDY

LENGTH = 200
GCONFIG = GREEDY.new(max_new_tokens=LENGTH)
EACH = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
NO_RETURN = {"probe_interval_s": 60.0, "probe_interval_max_s": 60.0, "vocab_size": VOCAB_SIZE}


def counted(engine: RemoteEngine) -> dict[str, int]:
    totals = engine.totals()
    names = ("generated", "kept", "regenerated", "lost", "discarded")
    return {name: getattr(totals, f"tokens_{name}") for name in names}


def counts(**others: int) -> dict[str, int]:
    """Nothing of all but these."""
    return {
        "generated": LENGTH, "kept": 0, "regenerated": 0, "lost": 0, "discarded": 0, **others,
    }  # fmt: skip


def streams(dialect: str) -> dict[str, Any]:
    return {} if dialect == "vllm" else {"incremental_streaming_output": True}


async def run(engine: RemoteEngine, answers: list[ModelResponse], **changes: Any) -> None:
    answers.append(await engine.agenerate(ModelRequest(PROMPT, GCONFIG.new(**changes))))


def read_so_far(tokens: int) -> Any:
    """Whether a server has a generation that holds so many tokens, its prompt's not counted."""
    return lambda s: any(len(r.token_ids) >= len(PROMPT) + tokens for r in s.running)


async def cut_off(engine: RemoteEngine, fleet: Fleet, tokens: int) -> None:
    """End the connection of a generation that has so many tokens."""
    engine.pool.named(await fleet.where(read_so_far(tokens))).cut_off()


@EACH
async def test_an_undisturbed_answer(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in ({}, {"segment_tokens": 30}, {"streaming": True}):
        async with connected_engine(
            tmp_path, monkeypatch, 1, {**NO_RETURN, **config}, dialect=dialect, **streams(dialect)
        ) as (engine, _):
            await run(engine, [])
            assert counted(engine) == counts()


@EACH
async def test_a_server_that_dies_costs_its_segment_and_no_more(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**NO_RETURN, "segment_tokens": 30}
    async with connected_engine(
        tmp_path, monkeypatch, 2, config, dialect=dialect
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        nursery.start_soon(run, engine, [])
        await cut_off(engine, fleet, 70)  # 60 are there, and it is at work on the next 30
    assert counted(engine) == counts(kept=60, regenerated=30)


@EACH
async def test_a_stream_that_dies_costs_nothing_that_came(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**NO_RETURN, "streaming": True}
    answers: list[ModelResponse] = []
    async with connected_engine(
        tmp_path, monkeypatch, 2, config, dialect=dialect, **streams(dialect)
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        nursery.start_soon(run, engine, answers)
        await cut_off(engine, fleet, 70)
    kept = answers[0].segments[0].end if len(answers[0].segments) > 1 else 0
    assert counted(engine) == counts(kept=kept)


@EACH
async def test_a_stream_that_may_not_go_on_loses_what_came(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**NO_RETURN, "streaming": True}
    arrived: list[int] = []
    async with connected_engine(
        tmp_path, monkeypatch, 2, config, dialect=dialect, **streams(dialect)
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        note_arrivals(engine, arrived, monkeypatch)
        nursery.start_soon(run_penalised, engine)
        await cut_off(engine, fleet, 70)
    lost = arrived[0]
    assert counted(engine) == counts(lost=lost, regenerated=lost)


async def run_penalised(engine: RemoteEngine) -> None:
    await run(engine, [], frequency_penalty=0.1)


def note_arrivals(
    engine: RemoteEngine, arrived: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Note how many tokens had come when a request ended in failure."""
    ask = engine._ask

    async def noting(lease: Any, segment: Any, parser: Any) -> Any:
        try:
            return await ask(lease, segment, parser)
        except BaseException:
            arrived.append(parser.count)
            raise

    monkeypatch.setattr(engine, "_ask", noting)


@EACH
async def test_an_interrupted_answer_goes_on_and_nothing_is_made_again(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[ModelResponse] = []
    async with connected_engine(
        tmp_path, monkeypatch, 1, NO_RETURN, dialect=dialect
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        nursery.start_soon(run, engine, answers)
        url = await fleet.where(read_so_far(70))
        fleet.servers[url].scheduler.abort()
    assert counted(engine) == counts()
    assert engine.totals().interruptions == 1
    assert len(answers[0].segments) == 2


@EACH
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancelled_generation_throws_away_all_that_it_had(
    dialect: Any, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken is discarded; what had streamed in, and was not, is lost."""
    config = {**NO_RETURN, "segment_tokens": 50, "streaming": streaming}
    arrived: list[int] = []
    async with connected_engine(
        tmp_path, monkeypatch, 1, config, dialect=dialect, **streams(dialect)
    ) as (engine, fleet):  # fmt: skip
        if streaming:
            note_arrivals(engine, arrived, monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, engine, [])
            await fleet.where(read_so_far(120))  # in the third segment
            nursery.cancel_scope.cancel()
        lost = arrived[0] if streaming else 0
        assert counted(engine) == counts(generated=100, discarded=100, lost=lost)
        assert lost < 50
        assert engine.totals().aborts_sent == 1
        with trio.fail_after(5):
            await fleet.watch.until(lambda s: not s.running and not s.waiting)


def answered_once(hook: Any) -> Hook:
    """A hook for the first generation request alone."""
    left = [1]

    async def once(url: str, request: HttpRequest) -> HttpResponse | None:
        if request.method != "POST" or not request.path.endswith("generate") or not left:
            return None
        left.clear()
        answer: HttpResponse | None = await hook(url, request)
        return answer

    return once


@EACH
@pytest.mark.parametrize(("status", "again"), [(503, 0), (500, LENGTH)])
async def test_what_was_never_begun_is_not_made_again(
    status: int, again: int, dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(url: str, request: HttpRequest) -> HttpResponse:
        await trio.lowlevel.checkpoint()
        return HttpResponse(status, {}, b"")

    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, observed):
        observed.transport.hook = answered_once(refuse)
        await run(engine, [])
    assert counted(engine) == counts(regenerated=again)


@EACH
async def test_an_answer_that_comes_too_late_is_made_again(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when nobody waits any more; how long it was is not known here."""
    answers: list[HttpResponse] = []

    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, observed):

        async def too_late(url: str, request: HttpRequest) -> HttpResponse:
            limits = engine.config.segment_limits()
            answers.append(await observed.transport.request(url, request, limits))
            raise TransportError("it took longer than segment_timeout_s")

        observed.transport.hook = answered_once(too_late)
        await run(engine, [])
    assert len(answers) == 1
    assert counted(engine) == counts(regenerated=LENGTH)


@EACH
async def test_an_answer_that_is_not_believed_is_lost_whole(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of a version that no server was told to load."""
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, observed):

        async def of_version_7(url: str, request: HttpRequest) -> HttpResponse:
            limits = engine.config.segment_limits()
            answer = await observed.transport.request(url, request, limits)
            body = json.loads(answer.body)
            told = body["choices"][0] if "choices" in body else body["meta_info"]
            for span in told["weight_versions"]:
                span["version"] = "7"
            return HttpResponse(200, answer.headers, json.dumps(body).encode())

        observed.transport.hook = answered_once(of_version_7)
        await run(engine, [])
    assert counted(engine) == counts(lost=LENGTH, regenerated=LENGTH)


@EACH
async def test_a_generation_that_fails_for_good_discards_what_it_had(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**NO_RETURN, "segment_tokens": 50, "max_failovers": 0}
    async with connected_engine(
        tmp_path, monkeypatch, 2, config, dialect=dialect
    ) as (engine, fleet):  # fmt: skip
        with pytest.RaisesGroup(RolloutError, allow_unwrapped=True, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, engine, [])
                await cut_off(engine, fleet, 120)
    assert counted(engine) == counts(generated=100, discarded=100)
