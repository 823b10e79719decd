"""Servers that are started again behind the pool's back: found out, and nothing lost by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from arealtrio.testing import (
    FixedLengths,
    SimulatedServerSettings,
    checkpoint,
    simulated_executor,
)
from arealtrio.types import (
    GenerationHyperparameters,
    ModelRequest,
)
from arealtrio.weights import WeightUpdate, update_weights

from .faulty import faulty_engine
from .puppet import settled
from .test_supervision import check_exact, disk, traffic, until_states

Clock = trio.testing.MockClock
both_dialects = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
ADAPTED = GenerationHyperparameters(max_new_tokens=20, lora_name="x")


# --- what it does not refuse --------------------------------------------------------------------


@both_dialects
async def test_a_restarted_server_makes_no_long_answers_that_are_thrown_away(
    dialect: str, autojump_clock: Clock
) -> None:
    """The first whole answer would tell; a long one takes minutes."""
    servers = [SimulatedServerSettings(dialect=dialect)] * 2  # type: ignore[arg-type]
    lengths = FixedLengths(5000)
    async with simulated_executor(servers=servers, lengths=lengths) as (executor, fleet):
        engine = executor.engine
        await update_weights(engine.pool, disk(1))
        async with engine.paused():
            fleet.servers[1].restart()
        began = trio.current_time()
        async with traffic(engine, 4, lambda answer: check_exact(answer, 5000)):
            await until_states(engine, "ready", "stale")
            assert trio.current_time() - began <= engine.config.health_interval_s
            assert "it was restarted" in engine.statistics()[1].reason
            await settled()
            assert fleet.servers[1].generations == 0
            await until_states(engine, "ready", "ready")
            assert fleet.servers[1].scheduler.weight_version == "1"
            await trio.sleep(150)


async def test_a_restart_under_an_adapter_is_noticed_by_an_idle_pool(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(1), 1))
        await update_weights(engine.pool, WeightUpdate.lora("x", tmp_path, 2))
        faulty.fleet.servers[0].restart()
        await until_states(engine, "stale", "ready")
        await until_states(engine, "ready", "ready")
        assert faulty.fleet.servers[0].scheduler.weight_version == "2"
        for _ in range(4):
            await engine.agenerate(ModelRequest([3], ADAPTED))
