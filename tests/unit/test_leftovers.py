"""Servers that a run before left paused or asleep: taken up, and never waited for in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import make_dialect, open_engine
from arealtrio.errors import NoServerAvailable, WeightUpdateError
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    open_fleet,
)
from arealtrio.types import HttpRequest, ModelRequest
from arealtrio.weights import WeightUpdate, update_weights
from arealtrio.wire.dialect import Dialect

from .faulty import faulty_engine, refuses
from .observed import observed_engine
from .test_supervision import check_exact, disk, states, until_states

Clock = trio.testing.MockClock
both_dialects = pytest.mark.parametrize("dialect", ["vllm", "sglang"])


def two_of(dialect: Any) -> list[SimulatedServerSettings]:
    return [SimulatedServerSettings(dialect=dialect)] * 2


def config_for(fleet: SimulatedFleet, dialect: Any, **more: Any) -> RolloutConfig:
    return RolloutConfig(servers=fleet.addresses, backend=dialect, vocab_size=50_000, **more)


def asleep(dialect: Dialect, *, keep_weights: bool) -> HttpRequest:
    request = dialect.sleep(dialect.memory_tags, keep_weights=keep_weights)
    assert request is not None
    return request


async def tell(fleet: SimulatedFleet, config: RolloutConfig, *requests: HttpRequest) -> None:
    """Leave every server as a run does that was killed after these requests."""
    for address in fleet.addresses:
        for request in requests:
            answer = await fleet.request(address, request, config.control_limits(5.0))
            assert answer.status == 200


@both_dialects
@pytest.mark.parametrize("mode", ["keep", "abort"])
async def test_a_run_goes_on_where_the_one_before_was_killed_in_a_pause(
    dialect: str, mode: Any, autojump_clock: Clock
) -> None:
    async with open_fleet(two_of(dialect), lengths=FixedLengths(20)) as fleet:
        config = config_for(fleet, dialect)
        await tell(fleet, config, make_dialect(dialect).pause(mode))
        async with open_engine(config, transport=fleet) as engine:
            with trio.fail_after(60):
                check_exact(await engine.agenerate(ModelRequest([3])), 20)


@both_dialects
async def test_a_run_goes_on_where_the_update_before_had_failed(
    dialect: str, autojump_clock: Clock
) -> None:
    """It had left every server frozen; with the path mended, the trainer is started again."""
    async with open_fleet(two_of(dialect), lengths=FixedLengths(20)) as fleet:
        config = config_for(fleet, dialect)
        async with open_engine(config, transport=fleet) as engine:
            with pytest.raises(WeightUpdateError):
                await update_weights(engine.pool, WeightUpdate.from_disk("/no/such/path", 1))
        async with open_engine(config, transport=fleet) as engine:
            await update_weights(engine.pool, disk(1))
            with trio.fail_after(60):
                check_exact(await engine.agenerate(ModelRequest([3])), 20)


async def test_what_was_left_asleep_is_woken_and_serves_once_it_has_weights(
    autojump_clock: Clock,
) -> None:
    """Whether it was told to keep them, or to forget them, nobody knows."""
    vllm = make_dialect("vllm")
    async with open_fleet(two_of("vllm"), lengths=FixedLengths(20)) as fleet:
        config = config_for(fleet, "vllm", no_server_grace_s=5.0)
        await tell(fleet, config, vllm.pause("abort"), asleep(vllm, keep_weights=False))
        async with open_engine(config, transport=fleet) as engine:
            assert not any(server.asleep for server in fleet)
            assert states(engine) == ["stale", "stale"]
            assert "found asleep" in engine.statistics()[0].reason
            with pytest.raises(NoServerAvailable, match="returns with the next"):
                await engine.agenerate(ModelRequest([3]))
            fleet.servers[1].restart()
            await until_states(engine, "stale", "ready")
            await update_weights(engine.pool, disk(1))
            assert states(engine) == ["ready", "ready"]
            check_exact(await engine.agenerate(ModelRequest([3])), 20)


@pytest.mark.parametrize("request_before", ["pause", "sleep"])
async def test_a_server_that_is_added_is_taken_up_likewise(
    request_before: str, autojump_clock: Clock
) -> None:
    async with faulty_engine(named=1) as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        late = faulty.fleet.addresses[1]
        vllm = engine.pool.dialect
        left = vllm.pause("keep") if request_before == "pause" else asleep(vllm, keep_weights=True)
        await faulty.fleet.request(late, left, engine.config.control_limits(5.0))
        engine.pool.fleet.add(late)
        await engine.pool.wait_ready(60)
        assert faulty.fleet.servers[1].scheduler.pause_mode is None
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])))


async def test_a_server_without_development_routes_needs_none_of_it(autojump_clock: Clock) -> None:
    absent = ("/resume", "/is_sleeping", "/update_weight_version", "/weight_info")

    def fault(address: str, request: HttpRequest) -> Any:
        return refuses("", status=404)(address, request) if request.path in absent else None

    async with faulty_engine(fault=fault) as (engine, _):
        assert (await engine.agenerate(ModelRequest([3]))).output_len == 100


async def test_a_paused_sglang_does_not_answer_health_checks_and_is_taken_up_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its health check generates a token, which a pause holds back."""
    config = {"probe_interval_s": 0.02}
    slow = {"health_time_s": 0.005}
    async with observed_engine(tmp_path, monkeypatch, "sglang", 2, config, **slow) as (
        engine,
        seen,
    ):
        bad = seen.urls[1]
        seen.servers[bad].faults.failing_loads = 1
        result = await update_weights(engine.pool, WeightUpdate.from_disk(seen.weights[2], 1))
        assert list(result.failed) == [bad]
        await engine.pool.wait_ready(5)
        for server in engine.pool.servers:
            pause = engine.pool.dialect.pause("keep")
            await engine.pool.control(server, pause, 5)
        async with open_engine(engine.config, transport=seen.transport) as other:
            assert states(other) == ["ready", "ready"]
