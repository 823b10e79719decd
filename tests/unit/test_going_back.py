"""Weights that go back: a trainer that takes up an older checkpoint, while rollouts run or not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import RolloutError, WeightUpdateError
from arealtrio.servers import ServerState
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    checkpoint,
    open_fleet,
)
from arealtrio.types import GenerationHyperparameters, HttpRequest, HttpResponse, ModelRequest
from arealtrio.weights import WeightUpdate, update_weights

from .observed import observed_engine

Clock = trio.testing.MockClock
TOKEN_TIME_S = 0.01
LENGTH = 100


@asynccontextmanager
async def at_version_5(
    servers: int = 2, cap: int = 4, **config: Any
) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    settings = [SimulatedServerSettings(max_num_seqs=cap, token_time_s=TOKEN_TIME_S)] * servers
    async with open_fleet(settings, lengths=FixedLengths(LENGTH)) as fleet:
        chosen = RolloutConfig(servers=fleet.addresses, probe_interval_s=0.5, **config)
        async with open_engine(chosen, transport=fleet) as engine:
            await go_to(engine, 5)
            yield engine, fleet


async def go_to(engine: RemoteEngine, version: int, **how: Any) -> None:
    await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(version), version, **how))


async def versions_of_an_answer(engine: RemoteEngine, **more: Any) -> set[int]:
    answer = await engine.agenerate(ModelRequest([5, 6]), **more)
    assert answer.versions_exact
    return set(answer.output_versions.tolist())


async def expect_failure(engine: RemoteEngine, caught: list[str], **more: Any) -> None:
    with pytest.raises(RolloutError) as failure:
        await engine.agenerate(ModelRequest([5, 6]), **more)
    caught.append(str(failure.value))


def states(engine: RemoteEngine) -> list[tuple[str, int]]:
    return [(row.state, row.version) for row in engine.statistics()]


@pytest.mark.parametrize("rolling", [False, True])
async def test_an_idle_pool_goes_back_and_on(rolling: bool, autojump_clock: Clock) -> None:
    async with at_version_5() as (engine, _):
        await go_to(engine, 3, rolling=rolling)
        assert (engine.get_version(), engine.pool.newest_told) == (3, 3)
        assert states(engine) == [("ready", 3), ("ready", 3)]
        assert await versions_of_an_answer(engine, min_version=3) == {3}
        await go_to(engine, 4)
        assert await versions_of_an_answer(engine, min_version=4) == {4}


@pytest.mark.parametrize("config", [{}, {"segment_tokens": 10}, {"streaming": True}])
@pytest.mark.parametrize("pause", ["keep", "abort"])
@pytest.mark.parametrize("min_version", [0, 5])
async def test_what_was_begun_before_ends_with_the_reason_and_no_server_is_blamed(
    min_version: int, pause: Any, config: dict[str, Any], autojump_clock: Clock
) -> None:
    caught: list[str] = []
    async with at_version_5(eject_after_failures=1, **config) as (engine, _):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(endure, engine, min_version, caught)
            await trio.sleep(35 * TOKEN_TIME_S)
            await go_to(engine, 3, pause=pause)
        assert states(engine) == [("ready", 3), ("ready", 3)]
        assert [row.ejections for row in engine.statistics()] == [0, 0]
        assert await versions_of_an_answer(engine) == {3}
    words = "needs weights of version 5, and the servers went back to 3"
    assert all(words in text for text in caught)
    if min_version or "segment_tokens" in config or pause == "abort":  # they had tokens of 5
        assert len(caught) == 4


async def endure(engine: RemoteEngine, min_version: int, caught: list[str]) -> None:
    """Generate; what was made anew as a whole is of the version that was gone back to."""
    try:
        assert await versions_of_an_answer(engine, min_version=min_version) == {3}
    except RolloutError as exc:
        caught.append(str(exc))


async def test_what_waits_for_weights_that_are_given_up_is_told_so(autojump_clock: Clock) -> None:
    caught: list[str] = []
    async with at_version_5(servers=1, cap=1) as (engine, _):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(expect_failure_from_5, engine, caught)
            await trio.sleep(TOKEN_TIME_S)
            assert engine.pool.waiting == 2
            await go_to(engine, 3)
            await expect_failure(engine, caught, min_version=5)  # nor is it waited for anew
        assert (len(caught), engine.pool.waiting) == (4, 0)
        assert await versions_of_an_answer(engine, min_version=3) == {3}


async def expect_failure_from_5(engine: RemoteEngine, caught: list[str]) -> None:
    await expect_failure(engine, caught, min_version=5)


@pytest.mark.parametrize("state", [ServerState.EJECTED, ServerState.STALE])
async def test_a_server_that_was_away_returns_with_what_the_others_went_back_to(
    state: ServerState, autojump_clock: Clock
) -> None:
    """It has newer weights, and they are not to serve any more."""
    async with at_version_5(probe_interval_max_s=0.5) as (engine, fleet):
        away = engine.pool.servers[0]
        fleet.servers[0].hang()
        engine.pool.set_state(away, state, "the test says so")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_to, engine, 3)
            await trio.sleep(1)
            fleet.servers[0].restart() if state is ServerState.STALE else None
        if state is ServerState.EJECTED:
            fleet.servers[0].mend()
        await engine.pool.wait_ready(60)
        assert states(engine) == [("ready", 3), ("ready", 3)]
        for _ in range(4):
            assert await versions_of_an_answer(engine) == {3}


async def test_a_server_that_was_merely_ejected_returns_with_it_too(autojump_clock: Clock) -> None:
    """It kept its weights of version 5, under our label: it looks as if it missed nothing."""
    async with at_version_5(probe_interval_max_s=0.5) as (engine, _):
        away = engine.pool.servers[0]
        engine.pool.set_state(away, ServerState.EJECTED, "the test says so")
        await go_to(engine, 3)
        await engine.pool.wait_ready(60)
        assert states(engine) == [("ready", 3), ("ready", 3)]
        for _ in range(4):
            assert await versions_of_an_answer(engine) == {3}


async def test_a_going_back_that_fails_leaves_no_server_behind(autojump_clock: Clock) -> None:
    """One took the older weights: it serves again when it has those of the pool."""
    async with at_version_5(min_updated=2, control_timeout_s=1.0) as (engine, fleet):
        fleet.servers[1].hang()
        with pytest.raises(WeightUpdateError, match="the version stays 5"):
            await go_to(engine, 3)
        assert engine.get_version() == 5
        assert states(engine)[0] == ("stale", 3)
        assert "missed the update to version 5: it has 3" in engine.statistics()[0].reason
        fleet.servers[1].restart()
        await engine.pool.wait_ready(120)
        assert states(engine) == [("ready", 5), ("ready", 5)]
        assert await versions_of_an_answer(engine, min_version=5) == {5}


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_a_server_that_was_not_resumed_has_its_label_when_it_returns(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"probe_interval_s": 0.05}
    gconfig = GenerationHyperparameters(greedy=True, max_new_tokens=20, ignore_eos=True)
    async with observed_engine(tmp_path, monkeypatch, dialect, 2, config) as (engine, observed):
        refused: list[str] = []

        async def refuse_to_resume(url: str, request: HttpRequest) -> HttpResponse | None:
            await trio.lowlevel.checkpoint()
            if request.path in ("/resume", "/continue_generation") and not refused:
                refused.append(url)
                return HttpResponse(500, {}, b"")
            return None

        observed.transport.hook = refuse_to_resume
        update = WeightUpdate.from_disk(str(observed.weights[2]), 1)
        await update_weights(engine.pool, update)
        away = engine.pool.named(refused[0])
        assert (away.state, away.frozen) == (ServerState.STALE, True)
        assert "not resumed" in away.reason
        await engine.pool.wait_ready(30)
        for _ in range(2):  # one on each
            answer = await engine.agenerate(ModelRequest([5, 6], gconfig), min_version=1)
            assert set(answer.output_versions.tolist()) == {1}
            assert answer.versions_exact
    labels = [server.scheduler.weight_version for server in observed.servers.values()]
    assert labels == ["1", "1"]
