"""Weight updates: what is in flight goes on, failures are named and out of service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import UsageError, WeightUpdateError
from arealtrio.servers import ServerState
from arealtrio.testing import (
    EOS,
    FixedLengths,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
    simulated_executor,
)
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest, ModelResponse
from arealtrio.weights import WeightUpdate, update_weights

from .faulty import Fault, faulty_engine, refuses, refuses_to_load, unreachable
from .puppet import Deferred, Instant, Puppet, check_counts, prompts, settled

Clock = trio.testing.MockClock


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


def disk(version: int, **more: Any) -> WeightUpdate:
    return WeightUpdate.from_disk(checkpoint(version), version, **more)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightUpdate.from_disk("", 1),
        lambda: WeightUpdate.from_disk("/x", -1),
        lambda: WeightUpdate.from_disk("/x", True),
        lambda: WeightUpdate.label(1.5),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_update_is_refused(make: Callable[[], WeightUpdate]) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("pause", ["keep", "abort", "wait"])
async def test_an_update_in_mid_run_reaches_every_server_and_token(
    pause: Any, autojump_clock: Clock
) -> None:
    async with faulty_engine(load_time_s=1.0) as (engine, faulty):
        answers: list[ModelResponse] = []

        async def generate(token: int) -> None:
            answers.append(await engine.agenerate(ModelRequest([token])))

        async with trio.open_nursery() as nursery:
            for token in range(8):
                nursery.start_soon(generate, token)
            await trio.sleep(0.5)
            result = await update_weights(engine.pool, disk(1, pause=pause))
        assert result.updated == faulty.fleet.addresses
        assert result.seconds >= 1
        assert engine.get_version() == 1
        assert [row.version for row in engine.statistics()] == [1, 1]
        assert all(row.outstanding == 0 for row in engine.statistics())
        for answer in answers:
            made = [made_by(float(logprob)) for logprob in answer.output_logprobs]
            assert answer.output_versions.tolist() == made
            assert answer.output_len == 100
            assert answer.versions_exact
            assert set(made) == ({0} if pause == "wait" else {0, 1})


@pytest.mark.parametrize("fault", [refuses_to_load, unreachable])
async def test_a_server_that_fails_is_named_takes_no_traffic_and_comes_back(
    fault: Callable[..., Fault], autojump_clock: Clock
) -> None:
    async with faulty_engine() as (engine, faulty):
        good, bad = faulty.fleet.addresses
        faulty.fault = fault(bad)
        result = await update_weights(engine.pool, disk(1))
        assert result.updated == (good,)
        assert list(result.failed) == [bad]
        assert engine.get_version() == 1
        assert states(engine) == ["ready", "stale"]
        for token in range(10):
            await engine.agenerate(ModelRequest([token]))
        assert engine.statistics()[1].requests == 0

        faulty.fault = lambda *_: None
        result = await update_weights(engine.pool, disk(2))
        assert set(result.updated) == {good, bad}
        assert states(engine) == ["ready", "ready"]
        async with trio.open_nursery() as nursery:
            for token in range(10):
                nursery.start_soon(engine.agenerate, ModelRequest([token]))
        assert engine.statistics()[1].requests == 5


async def test_cancelled_while_it_takes_out_a_server_that_failed_it_leaves_no_request_behind(
    autojump_clock: Clock,
) -> None:
    """They stayed frozen on a server that nobody resumes, until the limit of a segment."""
    async with faulty_engine(length=200) as (engine, faulty):
        answers: list[ModelResponse] = []

        async def generate(token: int) -> None:
            answers.append(await engine.agenerate(ModelRequest([token])))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for token in range(6):
                    nursery.start_soon(generate, token)
                await trio.sleep(1)
                faulty.fault = refuses_to_load(faulty.fleet.addresses[1])
                faulty.delay_s = lambda path: float("mode=abort" in path)
                with trio.move_on_after(0.5) as scope:
                    await update_weights(engine.pool, disk(1))
                assert scope.cancel_called
                assert states(engine)[1] == "stale"
        assert [answer.output_len for answer in answers] == [200] * 6


async def test_a_server_that_hangs_holds_up_one_update_and_no_other(autojump_clock: Clock) -> None:
    """Each paused all the others, for as long as it takes to give the one up that hangs."""
    async with simulated_executor(servers=4) as (executor, fleet):
        hung = fleet.servers[3]
        hung.hang()
        first = await executor.update_weights(disk(1))
        assert list(first.failed) == [hung.address]
        assert first.seconds > 1
        await trio.sleep(60)
        for version in (2, 3):
            result = await executor.update_weights(disk(version))
            assert result.seconds < 1
            assert "it does not answer" in result.failed[hung.address]
            assert len(result.updated) == 3
        hung.restart()
        await executor.engine.pool.wait_ready(100)
        assert hung.scheduler.weight_version == "3"


async def test_a_server_that_fails_its_health_checks_alone_takes_the_next_update(
    autojump_clock: Clock,
) -> None:
    """As an SGLang that is frozen does: its health check is a request for a token."""
    async with faulty_engine() as (engine, faulty):
        bad = faulty.fleet.addresses[1]
        faulty.fault = refuses("/collective_rpc", bad)
        await update_weights(engine.pool, disk(1))
        faulty.fault = refuses("/health", bad, status=503)
        await trio.sleep(200)
        assert states(engine) == ["ready", "stale"]
        assert not (await update_weights(engine.pool, disk(2))).failed
        assert states(engine) == ["ready", "ready"]


async def test_requests_wait_for_a_server_that_has_the_weights(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=1) as (engine, faulty):
        faulty.fault = refuses_to_load(*faulty.fleet.addresses)
        with pytest.raises(WeightUpdateError):
            await update_weights(engine.pool, disk(1))
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, engine.agenerate, ModelRequest([3]))
            await settled()
            assert engine.pool.waiting == 1
            faulty.fault = lambda *_: None
            await update_weights(engine.pool, disk(1))
        assert set(call.value.output_versions.tolist()) == {1}


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_during_a_rolling_update_a_request_may_insist_on_the_new_weights(
    dialect: Any, autojump_clock: Clock
) -> None:
    """One server has them, one loads them, and one still has the old ones."""
    settings = [SimulatedServerSettings(load_time_s=10.0, max_num_seqs=1, dialect=dialect)] * 3
    async with open_fleet(settings, lengths=FixedLengths(50)) as fleet:
        config = RolloutConfig(servers=fleet.addresses, backend=dialect, vocab_size=2 * EOS)
        async with open_engine(config, transport=fleet) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(update_weights, engine.pool, disk(1, rolling=True))
            while [row.version for row in engine.statistics()] != [1, 0, 0]:
                await engine.pool.service_changed.wait()
            assert engine.get_version() == 0
            newest = Deferred(nursery, lambda: engine.agenerate(ModelRequest([3]), min_version=1))
            await settled()
            any_of_them = Deferred(nursery, engine.agenerate, ModelRequest([4]))
            await settled()
            waits = Deferred(nursery, lambda: engine.agenerate(ModelRequest([5]), min_version=1))
            for call in (newest, any_of_them, waits):
                await call.ended.wait()
        servers = [call.value.segments[0].server for call in (newest, any_of_them, waits)]
        assert servers == [fleet.addresses[n] for n in (0, 2, 0)]
        for call, version in ((newest, 1), (any_of_them, 0), (waits, 1)):
            assert set(call.value.output_versions.tolist()) == {version}
        assert waits.value.wait_s > 0


async def test_if_all_fail_the_version_stays_and_the_next_update_brings_them_back(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.fault = refuses_to_load(*faulty.fleet.addresses)
        with pytest.raises(WeightUpdateError, match="reached 0 of the 1 servers") as caught:
            await update_weights(engine.pool, disk(1))
        assert set(caught.value.failed) == set(faulty.fleet.addresses)
        assert "the version stays 0" in str(caught.value)
        assert engine.get_version() == 0
        assert states(engine) == ["stale", "stale"]
        faulty.fault = lambda *_: None
        await update_weights(engine.pool, disk(1))
        assert states(engine) == ["ready", "ready"]
        assert all(server.scheduler.pause_mode is None for server in faulty.fleet)


async def test_below_min_updated_the_version_stays(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=3, min_updated=3) as (engine, faulty):
        faulty.fault = refuses_to_load(faulty.fleet.addresses[0])
        with pytest.raises(WeightUpdateError, match="reached 2 of the 3 servers"):
            await update_weights(engine.pool, disk(1))
        assert engine.get_version() == 0
        faulty.fault = lambda *_: None
        assert len((await update_weights(engine.pool, disk(1))).updated) == 3
        assert states(engine) == ["ready"] * 3


async def test_after_a_cancelled_update_no_server_serves_what_is_not_known(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(load_time_s=10.0) as (engine, faulty):
        with trio.move_on_after(1) as scope:
            await update_weights(engine.pool, disk(1))
        assert scope.cancelled_caught
        assert engine.get_version() == 0
        assert states(engine) == ["stale", "stale"]
        await update_weights(engine.pool, disk(2))
        assert all(server.scheduler.pause_mode is None for server in faulty.fleet)
        assert states(engine) == ["ready", "ready"]
        answer = await engine.agenerate(ModelRequest([3]))
        assert set(answer.output_versions.tolist()) == {2}


async def test_a_server_that_can_not_be_resumed_is_out_of_service(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        _, bad = faulty.fleet.addresses
        faulty.fault = unreachable(bad, path="/resume")
        await update_weights(engine.pool, disk(1))
        assert states(engine) == ["ready", "stale"]
        faulty.fault = lambda *_: None
        await update_weights(engine.pool, disk(2))
        assert states(engine) == ["ready", "ready"]
        async with trio.open_nursery() as nursery:
            for token in range(4):
                nursery.start_soon(engine.agenerate, ModelRequest([token]))
        assert [row.requests for row in engine.statistics()] == [2, 2]


async def test_a_label_alone_moves_the_version_and_the_servers_reports(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.asked.clear()
        result = await update_weights(engine.pool, WeightUpdate.label(7))
        assert result.version == engine.get_version() == 7
        assert not any("pause" in path for _, path in faulty.asked)
        answer = await engine.agenerate(ModelRequest([3]))
        assert set(answer.output_versions.tolist()) == {7}
        assert answer.versions_exact


async def test_a_label_brings_no_server_back_that_missed_the_weights(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        good, bad = faulty.fleet.addresses
        faulty.fault = refuses_to_load(bad)
        await update_weights(engine.pool, disk(1))
        result = await update_weights(engine.pool, WeightUpdate.label(2))
        assert result.updated == (good,)
        assert "a label alone does not mend that" in result.failed[bad]
        assert engine.get_version() == 2
        assert states(engine) == ["ready", "stale"]
        faulty.fault = lambda *_: None
        await trio.sleep(200)
        assert states(engine) == ["ready", "stale"]
        assert not (await update_weights(engine.pool, disk(3))).failed
        assert states(engine) == ["ready", "ready"]


async def test_a_label_brings_no_server_back_that_is_behind_though_it_is_sound(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        behind = engine.pool.servers[1]
        behind.version = behind.base_update = behind.update = 0
        engine.pool.mark_stale(behind, "the test says so")
        result = await update_weights(engine.pool, WeightUpdate.label(2))
        assert "it has version 0, not 1" in result.failed[behind.address]
        assert states(engine) == ["ready", "stale"]
        assert [s.scheduler.weight_version for s in faulty.fleet] == ["2", "1"]


async def test_a_label_resumes_no_server_that_a_pause_holds(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        await engine.pool.pausing.freeze(engine.pool.servers[1], "the test says so")
        async with engine.paused():
            await update_weights(engine.pool, WeightUpdate.label(1))
            assert [s.scheduler.pause_mode for s in faulty.fleet] == ["keep", "keep"]
            assert states(engine) == ["paused", "stale"]


@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_without_a_label_route_keeps_its_word(
    status: int, autojump_clock: Clock
) -> None:
    def no_route(_: str, request: HttpRequest) -> HttpResponse | None:
        if "weight_version" in request.path:
            return HttpResponse(status, {"content-type": "application/json"}, b'{"detail":"no"}')
        return None

    async with faulty_engine() as (engine, faulty):
        faulty.fault = no_route
        result = await update_weights(engine.pool, WeightUpdate.label(1))
        assert result.failed == {}
        assert engine.get_version() == 1


async def test_versions_may_go_back_for_a_recovery(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        await update_weights(engine.pool, disk(5))
        await update_weights(engine.pool, disk(3))
        assert engine.get_version() == 3
        assert set((await engine.agenerate(ModelRequest([3]))).output_versions.tolist()) == {3}


async def test_an_update_wakes_admission_at_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=2, consumer_batch_size=2) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        await settled()
        puppet.end_all()
        await executor.wait(2)
        result = await executor.update_weights(disk(1))
        assert result.version == 1
        assert executor._admission.running_members == 2  # in the same step
        check_counts(executor)


async def test_a_failed_update_changes_no_budget(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        await executor.rollout_batch(list(prompts(2)), Instant())
        before = executor.get_capacity(), executor.staleness_manager.charged
        with pytest.raises(WeightUpdateError):
            await executor.update_weights(WeightUpdate.from_disk("/no/such", 1))
        assert (executor.get_capacity(), executor.staleness_manager.charged) == before
        assert executor.get_version() == 0
        assert executor.engine.pool.servers[0].state is ServerState.STALE
