"""Each named limit ends what it is named for, and nothing outlasts it: a server that hangs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import TransportTimeout, WeightUpdateError
from arealtrio.testing import (
    EOS,
    FixedLengths,
    SimulatedServer,
    SimulatedServerSettings,
    checkpoint,
    open_fleet,
)
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest
from arealtrio.weights import WeightUpdate, update_weights

from .faulty import Faulty

Clock = trio.testing.MockClock
EACH = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
LENGTH = 100  # tokens; 2 s undisturbed
LOADS = ("/collective_rpc", "/update_weights_from_disk")


@asynccontextmanager
async def one_server(
    dialect: Any, **limits: Any
) -> AsyncIterator[tuple[RemoteEngine, Faulty, SimulatedServer]]:
    """An engine on one server that nobody looks after, so that no health check ends a wait."""
    alone: dict[str, Any] = {
        "health_interval_s": 1e4,
        "probe_interval_s": 1e4,
        "probe_interval_max_s": 1e4,
    }
    settings = [SimulatedServerSettings(dialect=dialect)]
    async with open_fleet(settings, lengths=FixedLengths(LENGTH)) as fleet:
        config = RolloutConfig(
            servers=fleet.addresses,
            backend=dialect,
            vocab_size=2 * EOS,
            max_failovers=0,
            **alone,
            **limits,
        )
        faulty = Faulty(fleet)
        async with open_engine(config, transport=faulty) as engine:
            yield engine, faulty, fleet.servers[0]


async def took_s(act: Callable[[], Any]) -> float:
    began = trio.current_time()
    await act()
    return trio.current_time() - began


@EACH
async def test_a_generation_in_one_piece_ends_at_the_limit_of_a_segment(
    dialect: str, autojump_clock: Clock
) -> None:
    async with one_server(dialect, segment_timeout_s=77.0, abort_timeout_s=3.0) as (
        engine,
        _,
        server,
    ):
        server.hang()

        async def fails() -> None:
            with pytest.raises(TransportTimeout):
                await engine.agenerate(ModelRequest([5]))

        assert await took_s(fails) == pytest.approx(77 + 3)  # what it hangs on is aborted, too
        assert [row.outstanding for row in engine.statistics()] == [0]


@EACH
@pytest.mark.parametrize(("hangs_after_s", "limit_s"), [(0.0, 11.0), (1.0, 13.0)])
async def test_a_stream_ends_at_the_limits_of_its_first_byte_and_between_two(
    dialect: str, hangs_after_s: float, limit_s: float, autojump_clock: Clock
) -> None:
    limits = {"first_byte_timeout_s": 11.0, "idle_timeout_s": 13.0, "abort_timeout_s": 3.0}
    async with one_server(dialect, streaming=True, **limits) as (engine, _, server):
        if not hangs_after_s:
            server.hang()

        async def fails() -> None:
            with pytest.raises(TransportTimeout):
                await engine.agenerate(ModelRequest([5]))

        async def hangs_later() -> None:
            await trio.sleep(hangs_after_s)
            server.hang()

        async with trio.open_nursery() as nursery:
            if hangs_after_s:
                nursery.start_soon(hangs_later)
            assert await took_s(fails) == pytest.approx(hangs_after_s + limit_s + 3, abs=0.05)


@EACH
async def test_an_abort_outlasts_a_cancellation_for_its_own_limit_and_no_longer(
    dialect: str, autojump_clock: Clock
) -> None:
    async with one_server(dialect, abort_timeout_s=3.0) as (engine, faulty, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.agenerate, ModelRequest([5]))
            await trio.sleep(1)
            faulty.asked.clear()
            server.hang()
            nursery.cancel_scope.cancel()
            cancelled = trio.current_time()
        assert trio.current_time() - cancelled == pytest.approx(3)
        assert [path for _, path in faulty.asked if "abort" in path] != []
        assert engine.totals().aborts_sent == 1
        assert [row.outstanding for row in engine.statistics()] == [0]


@EACH
async def test_a_pause_ends_at_its_limit_on_both_sides(dialect: str, autojump_clock: Clock) -> None:
    async with one_server(dialect, control_timeout_s=5.0) as (engine, _, server):
        server.hang()
        began = trio.current_time()
        async with engine.paused() as failed:
            assert trio.current_time() - began == pytest.approx(5)
            assert list(failed) == [server.address]
        assert trio.current_time() - began == pytest.approx(5 + 5)
        assert [row.state for row in engine.statistics()] == ["stale"]


@EACH
async def test_an_update_ends_at_its_limit(dialect: str, autojump_clock: Clock) -> None:
    limits = {"update_timeout_s": 50.0, "control_timeout_s": 5.0, "abort_timeout_s": 3.0}
    async with one_server(dialect, **limits) as (engine, faulty, server):

        def hang_while_loading(_: str, request: HttpRequest) -> HttpResponse | None:
            if request.path in LOADS:
                server.hang()
            return None

        faulty.fault = hang_while_loading

        async def fails() -> None:
            with pytest.raises(WeightUpdateError, match=server.address):
                await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(1), 1))

        assert await took_s(fails) == pytest.approx(50 + 3)  # what it may still make is aborted
        assert engine.get_version() == 0


@EACH
async def test_a_health_check_ends_at_its_limit(dialect: str, autojump_clock: Clock) -> None:
    async with one_server(dialect, health_timeout_s=4.0) as (engine, _, server):
        server.hang()
        began = trio.current_time()
        found = await engine.pool.health()
        assert trio.current_time() - began == pytest.approx(4)
        assert found[server.address] is not None


def test_every_limit_is_finite_and_bounds_each_part_of_an_exchange() -> None:
    config = RolloutConfig(connect_timeout_s=9.0, segment_timeout_s=100.0)
    for limits in (
        config.segment_limits(),
        config.segment_limits(streamed=True),
        config.control_limits(config.control_timeout_s),
        config.control_limits(config.update_timeout_s),
        config.control_limits(config.health_timeout_s),
    ):
        assert limits.connect_s <= 9.0
        assert max(limits.connect_s, limits.first_byte_s, limits.idle_s) <= limits.total_s <= 600
