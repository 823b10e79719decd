"""Servers come, go, pause and change their caps through both faces, while rollouts run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.errors import ConfigError, NoServerAvailable, RolloutClosed, UsageError
from arealtrio.executor import open_executor
from arealtrio.testing import FixedLengths, SimulatedFleet, SimulatedServerSettings, open_fleet
from arealtrio.types import GenerationHyperparameters

from .puppet import Generates, Instant, prompts

SHORT = Generates(GenerationHyperparameters(max_new_tokens=50))


@contextmanager
def controller(named: int, **config: Any) -> Iterator[tuple[RolloutController, SimulatedFleet]]:
    """A controller that knows some of two servers in memory, which nobody runs."""
    fleet = SimulatedFleet([SimulatedServerSettings()] * 2)
    chosen = RolloutConfig(servers=fleet.addresses[:named], **config)
    with RolloutController(chosen, transport=fleet) as rollout:
        yield rollout, fleet


def states(rollout: RolloutController) -> dict[str, str]:
    return {row.address: row.state for row in rollout.statistics()}


def test_a_trainer_adds_removes_and_recaps_servers() -> None:
    with controller(named=1) as (rollout, fleet):
        first, second = fleet.addresses
        rollout.add_server(second, cap=3)
        rollout.wait_ready(10.0)
        assert states(rollout) == {first: "ready", second: "ready"}
        assert [row.cap for row in rollout.statistics()] == [8, 3]
        rollout.set_server_cap(first, 5)
        rollout.remove_server(second)
        assert [(row.address, row.cap) for row in rollout.statistics()] == [(first, 5)]
        with pytest.raises(UsageError, match="not in the pool"):
            rollout.remove_server(second)
        with pytest.raises(UsageError, match="is in the pool"):
            rollout.add_server(first)
        with pytest.raises(ConfigError):
            rollout.add_server("ftp://x")
        with pytest.raises(UsageError, match="a cap is"):
            rollout.set_server_cap(first, -1)
    with pytest.raises(RolloutClosed):
        rollout.add_server(second)


def test_a_cap_beyond_all_bounds_is_refused_where_it_is_named() -> None:
    with controller(named=1) as (rollout, fleet):
        first, second = fleet.addresses
        with pytest.raises(ConfigError, match="at most 1048576"):
            rollout.add_server(second, cap=2**20 + 1)
        assert states(rollout) == {first: "ready"}
        rollout.add_server(second, cap=2**20)
        rollout.wait_ready(10.0)


def test_a_server_that_was_drained_while_it_joined_gets_no_request() -> None:
    with controller(named=1) as (rollout, fleet):
        rollout.add_server(fleet.addresses[1])
        rollout.set_server_cap(fleet.addresses[1], 0)
        rollout.wait_ready(10.0)
        assert [(row.cap, row.allowed) for row in rollout.statistics()] == [(8, 8), (0, 0)]
        rollout.set_server_cap(fleet.addresses[1], 2)
        assert [row.allowed for row in rollout.statistics()] == [8, 2]


def test_wait_ready_says_who_is_not() -> None:
    with controller(named=1) as (rollout, _):
        rollout.add_server("http://nobody:1")
        with pytest.raises(NoServerAvailable, match=r"http://nobody:1 is joining \(ConnectFailed"):
            rollout.wait_ready(0.2)


def test_a_trainer_pauses_for_a_block() -> None:
    with controller(named=2) as (rollout, fleet):
        with rollout.paused() as failed:
            assert failed == {}
            assert set(states(rollout).values()) == {"paused"}
            assert [s.scheduler.pause_mode for s in fleet] == ["keep", "keep"]
        assert set(states(rollout).values()) == {"ready"}
        with suppress(ZeroDivisionError), rollout.paused("abort"):
            assert [s.scheduler.pause_mode for s in fleet] == ["abort", "abort"]
            raise ZeroDivisionError
        assert [s.scheduler.pause_mode for s in fleet] == [None, None]


async def test_the_executor_tells_and_pauses_as_the_controller_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_fleet(2) as fleet:
        config = RolloutConfig(servers=fleet.addresses)
        async with open_executor(config, transport=fleet) as executor:

            def states() -> set[str]:
                return {row.state for row in executor.statistics()}

            assert await executor.health() == dict.fromkeys(fleet.addresses)
            async with executor.paused("abort") as failed:
                assert (failed, states()) == ({}, {"paused"})
                assert [s.scheduler.pause_mode for s in fleet] == ["abort", "abort"]
            assert states() == {"ready"}
            executor.submit({"prompt_id": "p"}, Instant())
            await executor.wait(1)
            assert executor.rollout_counts()["accepted"] == 1
            with pytest.raises(UsageError, match="no ledger is kept"):
                executor.ledger_statistics()
        for call in (executor.statistics, executor.paused):
            with pytest.raises(RolloutClosed):
                call()


def test_a_mode_of_another_dialect_is_refused_in_the_trainers_thread() -> None:
    with controller(named=2) as (rollout, _):
        with pytest.raises(ConfigError, match="retract"), rollout.paused("retract"):
            raise AssertionError("it paused")
        assert set(states(rollout).values()) == {"ready"}


def test_duplicate_addresses_are_one_server_named_twice() -> None:
    with pytest.raises(ConfigError, match="named twice: http://a:1"):
        RolloutConfig(servers=["http://a:1", "http://a:1/"])


async def test_rollouts_go_on_while_the_fleet_is_exchanged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    servers = [SimulatedServerSettings(max_num_seqs=4)] * 3
    async with open_fleet(servers, lengths=FixedLengths(50)) as fleet:
        config = RolloutConfig(
            servers=fleet.addresses[:1], consumer_batch_size=40, max_concurrent_rollouts=12
        )
        async with open_executor(config, transport=fleet) as executor:
            for prompt in prompts(40):
                executor.submit(prompt, SHORT)
            await trio.sleep(0.5)
            for address in fleet.addresses[1:]:
                executor.add_server(address)
            await executor.wait_ready(60)
            executor.remove_server(fleet.addresses[0])
            executor.set_server_cap(fleet.addresses[1], 2)
            results = await executor.wait(40)
            assert all(result.group is not None for result in results)
            assert [row.address for row in executor.engine.statistics()] == [*fleet.addresses[1:]]
            assert all(row.requests for row in executor.engine.statistics())
            assert executor.engine.totals().failovers == 0
        with pytest.raises(RolloutClosed):
            executor.set_server_cap(fleet.addresses[1], 1)
        with pytest.raises(RolloutClosed):
            await executor.wait_ready(1)
