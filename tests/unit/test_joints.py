"""Where one segment ends and the next begins: who keeps a slot, who gives it up, and who moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    open_fleet,
)
from arealtrio.types import ModelRequest, ModelResponse

LENGTH = 40
TOKEN_TIME_S = 0.01


@asynccontextmanager
async def joined(
    caps: list[int], **config: Any
) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    """Answers of 40 tokens, of 10 at a time: three joints each."""
    settings = [
        SimulatedServerSettings(max_num_seqs=cap, token_time_s=TOKEN_TIME_S) for cap in caps
    ]
    async with open_fleet(settings, lengths=FixedLengths(LENGTH)) as fleet:
        chosen = RolloutConfig(servers=fleet.addresses, **({"segment_tokens": 10} | config))
        async with open_engine(chosen, transport=fleet) as engine:
            yield engine, fleet


class Answers(list[ModelResponse]):
    """What many generations gave."""

    async def collect(self, engine: RemoteEngine, number: int = 0) -> None:
        self.append(await engine.agenerate(ModelRequest([number + 1, 7])))


def homes(answer: ModelResponse) -> list[str]:
    """The servers of an answer's segments, one after the other, without repetition."""
    servers = [segment.server for segment in answer.segments]
    return [s for n, s in enumerate(servers) if n == 0 or s != servers[n - 1]]


def joints(engine: RemoteEngine) -> tuple[int, int]:
    totals = engine.totals()
    return totals.joints_kept, totals.joints_moved


async def test_a_generation_keeps_its_slot_whoever_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """So its prefix stays where it is, and it ends no later than without segments."""
    answers = Answers()
    async with joined([2, 2]) as (engine, _):
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(answers.collect, engine, number)
        assert joints(engine) == (12 * 3, 0)
        assert engine.totals().affinity_moves == 0
    assert all(len(homes(answer)) == 1 and len(answer.segments) == 4 for answer in answers)
    longest_s = max(answer.latency_s - answer.wait_s for answer in answers)
    assert longest_s == pytest.approx(LENGTH * TOKEN_TIME_S, rel=0.2)


async def test_a_straggler_moves_to_a_server_with_clearly_less_to_do_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Eight run on one server when an empty one joins: two move, and none moves twice."""
    answers = Answers()
    async with joined([8, 8]) as (engine, _):
        late = engine.pool.servers[1]
        engine.pool.fleet.set_cap(late.address, 0)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(answers.collect, engine, number)
            await trio.sleep(1.5 * 10 * TOKEN_TIME_S)  # in the second segment
            engine.pool.fleet.set_cap(late.address, 8)
        # From 8 and 0 to 6 and 2; one more would not find half of a cap between them.
        kept, moved = joints(engine)
        assert (kept + moved, moved) == (8 * 3, 2)
    assert sorted(len(homes(answer)) for answer in answers) == [1] * 6 + [2] * 2


async def test_nobody_moves_between_servers_that_are_nearly_alike(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers = Answers()
    async with joined([8, 8]) as (engine, _):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(answers.collect, engine, number)
        assert joints(engine) == (15, 0)


async def test_a_slot_that_a_lower_cap_takes_away_is_given_up_at_the_joint(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers = Answers()
    async with joined([4]) as (engine, fleet):
        server = engine.pool.servers[0]
        (simulated,) = fleet
        most: list[int] = []
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(answers.collect, engine, number)
            await trio.sleep(5 * TOKEN_TIME_S)
            engine.pool.fleet.set_cap(server.address, 1)
            await trio.sleep(10 * TOKEN_TIME_S)  # they are through their first joint
            simulated.on_change = lambda s: most.append(s.generations)
        assert max(most) == 1
    assert len(answers) == 4


@pytest.mark.parametrize("how", ["remove", "pause", "stale"])
async def test_a_server_that_takes_nothing_now_is_left_at_the_joint(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    answers = Answers()
    async with joined([4, 4], probe_interval_s=60.0) as (engine, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers.collect, engine)
            await trio.sleep(5 * TOKEN_TIME_S)
            (first,) = [s for s in engine.pool.servers if engine.pool.outstanding(s)]
            if how == "remove":
                engine.pool.fleet.remove(first.address)
            elif how == "stale":
                engine.pool.mark_stale(first, "the test says so")
            else:
                nursery.start_soon(pause_one, engine, first)
        (answer,) = answers
        assert homes(answer) != [first.address]
        assert homes(answer)[0] == first.address
        assert joints(engine) == (2, 0)


async def pause_one(engine: RemoteEngine, server: Any) -> None:
    async with engine.pool.pausing.paused("wait", [server]):
        await trio.sleep(100 * TOKEN_TIME_S)


async def test_the_next_segment_is_held_to_the_weights_the_server_has_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A slot that is kept is pinned anew: the versions of what comes are those of now."""
    from arealtrio.testing import checkpoint
    from arealtrio.weights import WeightUpdate, update_weights

    answers = Answers()
    async with joined([4]) as (engine, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers.collect, engine)
            await trio.sleep(5 * TOKEN_TIME_S)
            await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(1), 1))
        (answer,) = answers
        versions = answer.output_versions.tolist()
        assert versions == sorted(versions)
        assert set(versions) == {0, 1}
        assert answer.versions_exact


async def test_a_generation_that_is_cancelled_at_a_joint_leaves_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with joined([1]) as (engine, fleet):
        with trio.move_on_after(10 * TOKEN_TIME_S):  # the joint's own moment
            await engine.agenerate(ModelRequest([1, 7]))
        assert [row.outstanding for row in engine.statistics()] == [0]
        assert engine.pool.waiting == 0
        await trio.testing.wait_all_tasks_blocked()
        assert [server.generations for server in fleet] == [0]


@pytest.mark.parametrize("how", ["moved", "failed over"])
async def test_a_session_follows_an_answer_that_ended_elsewhere(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    """The next turn finds its prefix where the last one ended."""
    async with joined([4, 4]) as (engine, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn, engine, "s")
            await trio.sleep(5 * TOKEN_TIME_S)
            (first,) = [s for s in engine.pool.servers if engine.pool.outstanding(s)]
            if how == "moved":
                engine.pool.fleet.set_cap(first.address, 1)  # it is full now, the other is empty
            else:
                first.cut_off()
        engine.pool.fleet.set_cap(first.address, 4)
        again = await turn(engine, "s")
        assert homes(again) != [first.address]
        totals = engine.totals()
        assert (totals.affinity_moves, totals.affinity_hits) == (1, 1)
        assert (totals.joints_moved, totals.failovers) == ((1, 0) if how == "moved" else (0, 1))


async def turn(engine: RemoteEngine, session: str) -> ModelResponse:
    return await engine.agenerate(ModelRequest([5, 7], session=session))
