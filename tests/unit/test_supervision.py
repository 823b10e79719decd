"""How servers go out of service, and how they come back: on virtual time, token by token exact."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import (
    ConfigError,
    NoServerAvailable,
    ServerError,
    TransportError,
    UsageError,
    WeightUpdateError,
)
from arealtrio.servers import Server, ServerState
from arealtrio.testing import EOS, checkpoint, made_by
from arealtrio.types import HttpRequest, HttpResponse, ModelRequest, ModelResponse
from arealtrio.weights import WeightUpdate, WeightUpdateResult, update_weights

from .faulty import faulty_engine, refuses, refuses_to_load
from .puppet import Deferred, settled

Clock = trio.testing.MockClock
GENERATE = "/inference/v1/generate"


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


def disk(version: int) -> WeightUpdate:
    return WeightUpdate.from_disk(checkpoint(version), version)


async def until(engine: RemoteEngine, holds: Callable[[], bool]) -> None:
    """Wait for a state of the pool, which says when it changes."""
    while not holds():
        await engine.pool.service_changed.wait()


async def until_states(engine: RemoteEngine, *wanted: str) -> None:
    await until(engine, lambda: states(engine) == list(wanted))


def check_exact(answer: ModelResponse, length: int = 100) -> None:
    """No token lost or made twice, and each by the weights that it names."""
    assert answer.output_tokens.tolist() == [EOS + length - 1 - i for i in range(length)]
    assert answer.versions_exact
    made = [made_by(float(logprob)) for logprob in answer.output_logprobs]
    assert answer.output_versions.tolist() == made


def no_check(answer: ModelResponse) -> None:
    assert answer.output_len == 100


class Traffic:
    """Generations that begin anew when they end, each answer checked."""

    def __init__(self, engine: RemoteEngine, check: Callable[[ModelResponse], None]) -> None:
        self.engine = engine
        self.check = check
        self.answers: list[ModelResponse] = []

    async def run(self) -> None:
        while True:
            answer = await self.engine.agenerate(ModelRequest([3]))
            self.check(answer)
            self.answers.append(answer)


@asynccontextmanager
async def traffic(
    engine: RemoteEngine, streams: int = 16, check: Callable[[ModelResponse], None] = check_exact
) -> AsyncIterator[Traffic]:
    carried = Traffic(engine, check)
    async with trio.open_nursery() as nursery:
        for _ in range(streams):
            nursery.start_soon(carried.run)
        yield carried
        nursery.cancel_scope.cancel()


def requests_of(engine: RemoteEngine) -> list[int]:
    return [row.requests for row in engine.statistics()]


# --- out of service -----------------------------------------------------------------------------


async def test_a_server_that_dies_is_ejected_and_comes_back_with_the_current_weights(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine) as carried:
        dead = faulty.fleet.servers[0]
        await trio.sleep(1)
        dead.die()
        await until_states(engine, "ejected", "ready")
        await update_weights(engine.pool, disk(1))
        asked = requests_of(engine)
        await trio.sleep(30)
        assert requests_of(engine)[0] == asked[0]
        assert "ConnectFailed" in engine.statistics()[0].reason
        dead.restart()
        await until_states(engine, "ready", "ready")
        assert [row.version for row in engine.statistics()] == [1, 1]
        await trio.sleep(30)
        assert requests_of(engine)[0] > asked[0] + 30
        assert engine.totals().failovers >= 8  # what ran there
        assert engine.statistics()[0].failovers == engine.totals().failovers
        assert engine.statistics()[0].ejections == 1
    assert any(set(a.output_versions.tolist()) == {1} for a in carried.answers)


async def test_what_waits_for_a_server_that_hangs_goes_on_elsewhere_once_it_is_out(
    autojump_clock: Clock,
) -> None:
    """Not after ``segment_timeout_s``, which is an hour."""
    async with faulty_engine() as (engine, faulty):
        answers: list[ModelResponse] = []

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest([3])))

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(generate)
            await trio.sleep(1)
            faulty.fleet.servers[0].hang()
            began = trio.current_time()
        assert len(answers) == 16
        for answer in answers:
            check_exact(answer)
        config = engine.config
        checks = config.eject_after_failures * (config.health_interval_s + config.health_timeout_s)
        assert trio.current_time() - began < 1.5 * checks
        assert engine.statistics()[0].ejections == 1


async def test_a_server_that_only_answers_health_checks_is_ejected_nonetheless(
    autojump_clock: Clock,
) -> None:
    """Its requests fail further apart than the health checks between them succeed."""
    async with faulty_engine(servers=3, health_interval_s=1.0) as (engine, faulty):
        broken = faulty.fleet.addresses[0]
        faulty.fault = refuses(GENERATE, broken, status=500)
        for _ in range(20):
            await trio.sleep(5)
            check_exact(await engine.agenerate(ModelRequest([3])))
        assert states(engine) == ["ejected", "ready", "ready"] or requests_of(engine)[0] < 10
        assert engine.statistics()[0].ejections >= 1


async def test_a_server_that_fails_its_health_checks_alone_is_ejected(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine):
        faulty.fault = refuses("/health", faulty.fleet.addresses[0], status=503)
        await until_states(engine, "ejected", "ready")
        assert "ServerError" in engine.statistics()[0].reason
        faulty.fault = lambda *_: None
        await until_states(engine, "ready", "ready")


@pytest.mark.parametrize(("servers", "kept"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
async def test_the_last_half_of_the_fleet_is_never_ejected_on_a_sign_that_can_be_wrong(
    servers: int, kept: int, autojump_clock: Clock
) -> None:
    async with faulty_engine(servers=servers, max_failovers=100) as (engine, faulty):
        faulty.fault = refuses("/health", status=503)
        await trio.sleep(300)
        assert states(engine).count("ready") == kept
        faulty.fault = lambda *_: None
        check_exact(await engine.agenerate(ModelRequest([3])))


async def test_stale_servers_count_as_out_when_the_last_half_is_kept(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=4) as (engine, faulty):
        pool = engine.pool
        faulty.fault = refuses_to_load(*faulty.fleet.addresses[:2])
        await update_weights(pool, disk(1))
        third = pool.servers[2]
        for _ in range(10):
            pool.ejection.failed(third, ServerError("storm", status=503))
        assert third.state is ServerState.READY


async def test_a_server_that_refuses_connections_is_ejected_though_it_is_the_last(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=1, no_server_grace_s=5.0) as (engine, faulty):
        faulty.fleet.servers[0].die()
        with pytest.raises(NoServerAvailable, match=r"server-0 is ejected \(ConnectFailed"):
            await engine.agenerate(ModelRequest([3]))
        assert states(engine) == ["ejected"]


async def test_without_any_server_waiters_are_told_why_after_the_grace_and_recover(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(no_server_grace_s=30.0) as (engine, faulty):
        for server in faulty.fleet:
            server.die()
        async with trio.open_nursery() as nursery:
            calls = [
                Deferred(nursery, engine.agenerate, ModelRequest([token])) for token in range(20)
            ]
            await until_states(engine, "ejected", "ejected")
            began = trio.current_time()
            for call in calls:
                await call.ended.wait()
            assert trio.current_time() - began == pytest.approx(30, abs=1)
        assert all(isinstance(call.error, NoServerAvailable) for call in calls)
        assert "no_server_grace_s=30: http://server-0 is ejected" in str(calls[0].error)
        assert "http://server-1 is ejected" in str(calls[0].error)
        assert engine.pool.waiting == 0
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, engine.agenerate, ModelRequest([3]))
            faulty.fleet.servers[1].restart()
        check_exact(call.value)


async def test_a_storm_of_refusals_from_every_server_is_outlived(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine) as carried:
        await trio.sleep(1)
        faulty.fault = refuses(GENERATE, status=503)
        await trio.sleep(40)
        faulty.fault = lambda *_: None
        answered = len(carried.answers)
        await trio.sleep(60)
        assert len(carried.answers) > answered + 16
        assert sum(requests_of(engine)) < 2500  # nor was it hammered meanwhile


# --- probation ----------------------------------------------------------------------------------


async def test_probes_come_at_growing_intervals_up_to_a_limit(autojump_clock: Clock) -> None:
    async with faulty_engine(probe_interval_max_s=8.0) as (engine, faulty), traffic(engine):
        faulty.fleet.servers[0].die()
        await until_states(engine, "ejected", "ready")
        times: list[float] = []

        def note(address: str, request: HttpRequest) -> HttpResponse | None:
            if address == faulty.fleet.addresses[0] and request.path == "/health":
                times.append(trio.current_time())
            return None

        faulty.fault = note
        await trio.sleep(60)
        gaps = [round(b - a) for a, b in itertools.pairwise(times)]
        assert gaps[:6] == [2, 4, 8, 8, 8, 8]


async def test_the_intervals_go_on_growing_where_it_comes_back_only_to_fail_again(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine):
        faulty.fault = refuses(GENERATE, faulty.fleet.addresses[0], status=500)
        await trio.sleep(400)
        asked = requests_of(engine)[0]
        assert asked < 20  # not one a second
        assert engine.statistics()[0].ejections < 12
        faulty.fault = lambda *_: None
        await until_states(engine, "ready", "ready")
        await trio.sleep(30)
        assert engine.pool.servers[0].probes == 0
        assert requests_of(engine)[0] > asked + 50


async def test_a_server_on_trial_may_have_one_more_for_each_that_went_well(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine):
        faulty.fleet.servers[0].die()
        await until_states(engine, "ejected", "ready")
        faulty.fleet.servers[0].restart()
        await until_states(engine, "ready", "ready")
        server = engine.pool.servers[0]
        for allowed in (1, 2, 4, 8):
            await settled()
            assert engine.pool.outstanding(server) == allowed
            await trio.sleep(2)  # the time of one answer
        assert server.trial_cap is None


async def test_one_failure_ends_a_trial(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        pool, server = engine.pool, engine.pool.servers[0]
        error = ServerError("no", status=500)
        for _ in range(3):
            pool.ejection.failed(server, error)
        await until_states(engine, "ready", "ready")
        pool.ejection.failed(server, error)
        assert server.state is ServerState.EJECTED
        assert engine.statistics()[0].ejections == 2


async def test_what_succeeds_from_before_an_ejection_does_not_shorten_the_trial(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, _):
        pool, server = engine.pool, engine.pool.servers[0]
        for _ in range(3):
            pool.ejection.failed(server, ServerError("no", status=500))
        for _ in range(5):
            pool.ejection.succeeded(server)
        assert (server.state, server.trial_cap) == (ServerState.EJECTED, 1)


async def test_a_new_cap_does_not_end_a_trial(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        pool, server = engine.pool, engine.pool.servers[0]
        for _ in range(3):
            pool.ejection.failed(server, ServerError("no", status=500))
        pool.fleet.set_cap(server.address, 4)
        assert (server.cap, server.trial_cap) == (4, 1)


# --- weights ------------------------------------------------------------------------------------


async def test_a_silent_restart_is_noticed_and_none_of_its_tokens_taken(
    autojump_clock: Clock,
) -> None:
    """It answers as before, but from its first weights and without our label."""
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        faulty.fleet.servers[0].restart()  # idle, so that no connection tells
        async with traffic(engine) as carried:
            await until_states(engine, "stale", "ready")
            assert "reports version None, not 1" in engine.statistics()[0].reason
            await until_states(engine, "ready", "ready")
            assert faulty.fleet.servers[0].scheduler.weight_version == "1"
            await trio.sleep(30)
    assert len(carried.answers) > 100
    assert {v for a in carried.answers for v in a.output_versions.tolist()} == {1}


async def test_a_silent_restart_is_noticed_where_answers_do_not_tell_versions(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(health_interval_s=5.0) as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        for server in engine.pool.servers:
            server.info = dataclasses.replace(server.info, token_in_token_out=False)
        await trio.sleep(30)
        assert states(engine) == ["ready", "ready"]
        faulty.fleet.servers[0].restart()
        await until_states(engine, "stale", "ready")
        assert "it was restarted" in engine.statistics()[0].reason
        await until_states(engine, "ready", "ready")
        assert faulty.fleet.servers[0].scheduler.weight_version == "1"


async def test_a_restart_under_load_gives_no_token_of_other_weights(
    autojump_clock: Clock,
) -> None:
    """The slots that its reset connections free are taken before it is out, and probed."""
    async with faulty_engine(servers=3) as (engine, faulty), traffic(engine, 30) as carried:
        await update_weights(engine.pool, disk(1))
        for number in range(9):
            await trio.sleep(7)
            faulty.fleet.servers[number % 3].restart()
        await trio.sleep(60)
    assert len(carried.answers) > 200
    assert any(set(a.output_versions.tolist()) == {1} for a in carried.answers)


async def test_weights_that_somebody_else_loads_are_noticed(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, disk(3))
        body = msgspec.json.encode({"new_version": "2"})
        stranger = HttpRequest("POST", "/update_weight_version", body)
        await engine.pool.send(engine.pool.servers[0], stranger, engine.config.control_limits(1.0))
        async with traffic(engine) as carried:
            await until_states(engine, "stale", "ready")
            await until_states(engine, "ready", "ready")
            await trio.sleep(10)
        assert {v for a in carried.answers for v in a.output_versions.tolist()} == {3}
        assert faulty.fleet.servers[0].scheduler.weight_version == "3"


async def test_a_server_that_takes_no_label_serves_on_though_it_reports_its_own_word(
    autojump_clock: Clock,
) -> None:
    """A vLLM without its development routes still reports "default" with its tokens."""
    no_route = refuses("/update_weight_version", status=404)
    async with faulty_engine(fault=no_route) as (engine, _):
        for _ in range(6):
            answer = await engine.agenerate(ModelRequest([3]))
            assert answer.output_len == 100
            assert answer.output_versions.tolist() == [0] * 100
            assert not answer.versions_exact
        assert states(engine) == ["ready", "ready"]


async def test_a_failed_first_update_keeps_a_server_out_until_its_weights_are_known(
    autojump_clock: Clock,
) -> None:
    """Version 0 is what it started with, and nobody can load that again."""
    async with faulty_engine() as (engine, faulty):
        faulty.fault = refuses_to_load()
        with pytest.raises(WeightUpdateError):
            await update_weights(engine.pool, disk(1))
        faulty.fault = lambda *_: None
        await trio.sleep(120)
        assert states(engine) == ["stale", "stale"]
        assert "returns with the next, or when it is restarted" in engine.statistics()[0].reason
        faulty.fleet.servers[0].restart()
        await until_states(engine, "ready", "stale")
        check_exact(await engine.agenerate(ModelRequest([3])))
        await update_weights(engine.pool, disk(2))
        assert states(engine) == ["ready", "ready"]


async def test_a_server_that_missed_an_update_is_given_it_and_returns(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine) as carried:
        await trio.sleep(1)
        faulty.fault = refuses_to_load(faulty.fleet.addresses[0])
        result = await update_weights(engine.pool, disk(1))
        assert result.updated == (faulty.fleet.addresses[1],)
        assert re.search("vLLM rejected", result.failed[faulty.fleet.addresses[0]])
        assert faulty.fleet.servers[0].generations == 0  # they went on, with what they had
        asked = requests_of(engine)[0]
        await trio.sleep(10)
        assert requests_of(engine)[0] == asked
        faulty.fault = lambda *_: None
        await until_states(engine, "ready", "ready")
        await trio.sleep(10)
        assert requests_of(engine)[0] > asked
    assert len(carried.answers) > 32


async def test_what_a_server_reports_after_its_weights_were_restored_is_held_to_them(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        lie = HttpResponse(200, {"content-type": "application/json"}, b'{"weight_version":"9"}')

        def lies(address: str, request: HttpRequest) -> HttpResponse | None:
            mine = address == faulty.fleet.addresses[0]
            return lie if mine and request.path == "/weight_info" else None

        faulty.fault = lies
        engine.pool.mark_stale(engine.pool.servers[0], "the test says so")
        await trio.sleep(60)
        assert states(engine) == ["stale", "ready"]
        assert "reports version 9 after it was given 1" in engine.statistics()[0].reason
        faulty.fault = lambda *_: None
        await until_states(engine, "ready", "ready")


async def test_after_a_label_alone_a_server_returns_only_if_it_has_not_lost_its_weights(
    autojump_clock: Clock,
) -> None:
    """Nobody but the trainer can give it them again."""
    async with faulty_engine() as (engine, faulty), traffic(engine, check=no_check):
        await update_weights(engine.pool, WeightUpdate.label(5))
        for server in engine.pool.servers:
            engine.pool.mark_stale(server, "the test says so")
        await until_states(engine, "ready", "ready")
        faulty.fleet.servers[0].die()
        await until_states(engine, "ejected", "ready")
        faulty.fleet.servers[0].restart()
        await trio.sleep(200)
        assert states(engine) == ["stale", "ready"]
        assert "can not be repeated" in engine.statistics()[0].reason
        await update_weights(engine.pool, disk(6))
        await until_states(engine, "ready", "ready")


async def test_nobody_restores_a_server_that_has_its_adapter_already_and_waits_for_the_others(
    autojump_clock: Clock,
) -> None:
    """It was labelled 1 again meanwhile, and so were its tokens, for as long as 2 was current."""
    async with faulty_engine(probe_interval_s=0.5) as (engine, faulty):
        await update_weights(engine.pool, WeightUpdate.lora("x", "/", 1))
        engine.pool.mark_stale(engine.pool.servers[1], "the test says so")
        first, load = faulty.fleet.servers[0], "/v1/load_lora_adapter"
        faulty.fleet.faults.plan("late", server=first, path=load, seconds=5.0)
        assert not (await update_weights(engine.pool, WeightUpdate.lora("x", "/", 2))).failed
        assert [server.scheduler.weight_version for server in faulty.fleet] == ["2", "2"]
        assert states(engine) == ["ready", "ready"]


async def test_a_label_of_before_does_not_name_what_the_trainer_sent_under_its_number(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, _):
        engine.pool.set_state(engine.pool.servers[1], ServerState.EJECTED, "the test says so")
        await update_weights(engine.pool, WeightUpdate.label(0))
        await trio.sleep(200)
        assert states(engine) == ["ready", "stale"]
        assert "of version 0, are not those of the update to 0" in engine.statistics()[1].reason
        await update_weights(engine.pool, disk(0))
        await until_states(engine, "ready", "ready")


async def test_a_restoration_under_way_gives_way_to_an_update(autojump_clock: Clock) -> None:
    async with faulty_engine(load_time_s=100.0) as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        engine.pool.mark_stale(engine.pool.servers[0], "the test says so")
        engine.pool.servers[0].labelled = False  # what it has is not trusted
        loading = trio.Event()

        def note(_: str, request: HttpRequest) -> HttpResponse | None:
            if request.path == "/collective_rpc":
                loading.set()
            return None

        faulty.fault = note
        await loading.wait()
        began = trio.current_time()
        result = await update_weights(engine.pool, disk(2))
        assert set(result.updated) == set(faulty.fleet.addresses)
        assert trio.current_time() - began < 250  # its own load, behind the one that was begun
        assert states(engine) == ["ready", "ready"]
        assert [s.scheduler.weight_version for s in faulty.fleet] == ["2", "2"]
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])))


async def test_updates_reach_every_server_in_one_order(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=3, load_time_s=1.0) as (engine, faulty):
        async with trio.open_nursery() as nursery:
            for version in (1, 2, 3):
                nursery.start_soon(update_weights, engine.pool, disk(version))
                await settled()
        assert engine.get_version() == 3
        assert [s.scheduler.weight_version for s in faulty.fleet] == ["3"] * 3


async def test_no_server_is_paused_by_an_update_that_reaches_none(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        for server in engine.pool.servers:
            engine.pool.set_state(server, ServerState.JOINING, "the test says so")
        faulty.asked.clear()
        with pytest.raises(WeightUpdateError, match="no server is in service"):
            await update_weights(engine.pool, disk(1))
        assert not any(path.startswith("/pause") for _, path in faulty.asked)


async def test_a_server_that_returned_while_an_update_was_under_way_has_missed_it(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(load_time_s=50.0) as (engine, _):
        engine.pool.set_state(engine.pool.servers[1], ServerState.EJECTED, "the test says so")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(update_weights, engine.pool, disk(1))
            await until_states(engine, "paused", "ready")
            assert engine.pool.servers[1].version == 0
        assert states(engine) == ["ready", "stale"]
        assert "missed the update to version 1" in engine.statistics()[1].reason
        await until_states(engine, "ready", "ready")
        assert [row.version for row in engine.statistics()] == [1, 1]


async def test_a_look_that_an_update_overtook_brings_no_server_back(
    autojump_clock: Clock,
) -> None:
    """It found the server well, with the weights that were current when it began."""
    async with faulty_engine() as (engine, faulty):
        late, other = faulty.fleet.addresses
        slow = trio.Event()

        async def hold(server: Server, version: int) -> None:
            await confirm(server, version)
            if server.address == late and version == 0:
                slow.set()
                await trio.sleep(30)

        confirm, engine.pool.confirm = engine.pool.confirm, hold  # type: ignore[method-assign]
        engine.pool.set_state(engine.pool.servers[0], ServerState.EJECTED, "the test says so")
        await slow.wait()
        result = await update_weights(engine.pool, disk(1))
        assert result.updated == (other,)
        await until(engine, lambda: states(engine)[0] == "ready")
        assert engine.statistics()[0].version == 1
        check_exact(await engine.agenerate(ModelRequest([3])))


async def test_a_look_that_a_pause_overtook_brings_no_server_back(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: 5.0 if path == "/health" else 0.0
        engine.pool.set_state(engine.pool.servers[0], ServerState.EJECTED, "the test says so")
        await trio.sleep(engine.config.probe_interval_s + 1)
        assert engine.pool.servers[0].restoring is not None
        async with engine.paused():
            await trio.sleep(100)
            assert states(engine) == ["ejected", "paused"]
        await until_states(engine, "ready", "ready")


async def test_what_an_ejected_server_still_generates_is_returned_before_it_loads(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        back = engine.pool.servers[0]
        running: list[int] = []

        def look(address: str, request: HttpRequest) -> None:
            if (address, request.path) == (back.address, "/collective_rpc"):
                running.append(len(faulty.fleet.servers[0].scheduler.running))

        async with trio.open_nursery() as nursery:
            calls = [Deferred(nursery, engine.agenerate, ModelRequest([t])) for t in range(4)]
            await trio.sleep(0.5)
            assert faulty.fleet.servers[0].scheduler.running
            faulty.fault = look
            faulty.asked.clear()
            engine.pool.set_state(back, ServerState.EJECTED, "the test says so")
            await update_weights(engine.pool, disk(2))
            await until_states(engine, "ready", "ready")
        assert set(running) == {0}
        for call in calls:
            check_exact(call.value)
        paths = [path for address, path in faulty.asked if address == back.address]
        pauses = [i for i, path in enumerate(paths) if path.startswith("/pause?mode=abort")]
        assert pauses[0] < paths.index("/collective_rpc")


# --- rolling updates ----------------------------------------------------------------------------


async def test_a_rolling_update_passes_by_who_went_out_of_service_before_its_turn(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=4, load_time_s=10.0) as (engine, faulty):
        first, ejected, removed, last = faulty.fleet.addresses
        results: list[WeightUpdateResult] = []

        async def update() -> None:
            update = WeightUpdate.from_disk(checkpoint(1), 1, rolling=True)
            results.append(await update_weights(engine.pool, update))

        faulty.asked.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(update)
            await trio.sleep(5)
            assert states(engine) == ["paused", "ready", "ready", "ready"]
            faulty.fleet.servers[1].die()
            engine.pool.set_state(engine.pool.servers[1], ServerState.EJECTED, "it died")
            engine.pool.fleet.remove(removed)
        assert results[0].updated == (first, last)
        assert results[0].failed == {}
        assert not [path for at, path in faulty.asked if at == removed and path != "/health"]
        loads = [at for at, path in faulty.asked if path == "/collective_rpc"]
        assert ejected not in loads
        faulty.fleet.servers[1].restart()
        await until_states(engine, "ready", "ready", "ready")
        assert [row.version for row in engine.statistics()] == [1, 1, 1]


async def test_a_server_removed_while_it_loads_is_not_counted(autojump_clock: Clock) -> None:
    async with faulty_engine(load_time_s=10.0) as (engine, faulty):
        results: list[WeightUpdateResult] = []

        async def update() -> None:
            results.append(await update_weights(engine.pool, disk(1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(update)
            await trio.sleep(5)
            engine.pool.fleet.remove(faulty.fleet.addresses[1])
        assert results[0].updated == faulty.fleet.addresses[:1]


async def test_an_update_of_no_server_at_all_fails(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=1) as (engine, faulty):
        engine.pool.fleet.remove(faulty.fleet.addresses[0])
        with pytest.raises(WeightUpdateError, match="no server is in service"):
            await update_weights(engine.pool, WeightUpdate.label(1))
        assert engine.get_version() == 0


# --- pauses -------------------------------------------------------------------------------------


async def test_a_server_goes_on_when_the_last_pause_that_holds_it_ends(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        async with engine.paused():
            await update_weights(engine.pool, disk(1))
            assert states(engine) == ["paused", "paused"]
            assert [s.scheduler.pause_mode for s in faulty.fleet] == ["keep", "keep"]
        assert states(engine) == ["ready", "ready"]
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, None]


@pytest.mark.parametrize("begins_after_s", [0.1, 0.4, 0.6])
async def test_a_pause_that_begins_while_another_ends_holds(
    begins_after_s: float, autojump_clock: Clock
) -> None:
    """Its own request must not overtake the resumption that is under way."""
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: 0.5 if path == "/resume" else 0.01
        ends = trio.Event()

        async def first() -> None:
            async with engine.paused():
                await ends.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(1)
            ends.set()
            await trio.sleep(begins_after_s)
            async with engine.paused() as failed:
                await trio.sleep(5)
                assert failed == {}
                assert [s.scheduler.pause_mode for s in faulty.fleet] == ["keep", "keep"]
                assert states(engine) == ["paused", "paused"]
        assert states(engine) == ["ready", "ready"]
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, None]
        assert not any(server.held for server in engine.pool.servers)


async def test_no_weights_are_loaded_into_a_server_that_a_pause_before_resumes(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: {"/resume": 0.5, "/collective_rpc": 0.5}.get(path, 0.05)
        paused: list[str | None] = []

        def look(address: str, request: HttpRequest) -> None:
            if request.path == "/collective_rpc":
                at = faulty.fleet.addresses.index(address)
                paused.append(faulty.fleet.servers[at].scheduler.pause_mode)

        async def pause() -> None:
            async with engine.paused():
                await trio.sleep(1)

        faulty.fault = look
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause)
            await trio.sleep(1.2)
            await update_weights(engine.pool, disk(1))
        assert paused
        assert set(paused) == {"keep"}
        assert states(engine) == ["ready", "ready"]


async def test_a_pause_that_is_cancelled_as_it_begins_leaves_the_end_of_another_alone(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: 0.5 if path == "/resume" else 0.0

        async def cut_short() -> None:
            await trio.sleep(1.1)
            with trio.move_on_after(0.1):
                async with engine.paused():
                    raise AssertionError("it waits for the other's end")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_short)
            async with engine.paused():
                await trio.sleep(1)
        assert states(engine) == ["ready", "ready"]
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, None]
        assert not any(server.held for server in engine.pool.servers)


async def test_the_end_of_a_pause_waits_for_no_other_that_begins(autojump_clock: Clock) -> None:
    """One that lets everything finish may take minutes; the other's release does not."""
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: 100.0 if path.endswith("mode=wait") else 0.0

        async def wait() -> None:
            async with engine.paused("wait"):
                pass

        async with trio.open_nursery() as nursery:
            async with engine.paused():
                nursery.start_soon(wait)
                await trio.sleep(1)
            assert trio.current_time() < 50
        assert states(engine) == ["ready", "ready"]


async def test_a_cancelled_pause_resumes_every_server(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.delay_s = lambda path: 0.5 if path == "/resume" else 0.0
        with trio.move_on_after(1) as scope:
            async with engine.paused():
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, None]
        assert states(engine) == ["ready", "ready"]


async def test_the_end_of_a_run_resumes_what_a_pause_still_holds(autojump_clock: Clock) -> None:
    """As when a trainer closes its controller within the block: nobody leaves that any more."""
    async with faulty_engine(servers=4, close_timeout_s=5.0) as (engine, faulty):
        async with open_engine(engine.config, transport=faulty) as other:
            scope = other.paused()
            await scope.__aenter__()
            other.pool.fleet.remove(faulty.fleet.addresses[1])
            await other.pool.pausing.freeze(
                other.pool.named(faulty.fleet.addresses[2]), "its weights"
            )
            faulty.fleet.servers[3].hang()
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(5.0)
        modes = [s.scheduler.pause_mode for s in faulty.fleet]
        assert modes[:3] == [None, None, "abort"]
        faulty.asked.clear()
        await scope.__aexit__(None, None, None)
        assert not faulty.asked


async def test_the_end_of_an_update_resumes_no_server_that_failed_it(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty):
        bad = faulty.fleet.addresses[1]
        faulty.fault = refuses_to_load(bad)
        faulty.asked.clear()
        await update_weights(engine.pool, disk(1))
        assert (bad, "/resume") not in faulty.asked
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, "abort"]
        assert states(engine) == ["ready", "stale"]


async def test_a_server_that_comes_back_waits_for_the_end_of_a_pause(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, _):
        engine.pool.set_state(engine.pool.servers[0], ServerState.EJECTED, "the test says so")
        async with engine.paused():
            await trio.sleep(200)
            assert states(engine) == ["ejected", "paused"]
        began = trio.current_time()
        await until_states(engine, "ready", "ready")
        assert trio.current_time() - began < 1  # at once, not at the next probe


async def test_a_pause_that_waits_may_take_as_long_as_an_update(autojump_clock: Clock) -> None:
    async with faulty_engine(length=5000) as (engine, _):
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, engine.agenerate, ModelRequest([3]))
            await trio.sleep(1)
            async with engine.paused("wait") as failed:
                assert failed == {}
                assert not call.pending  # 100 s later
        assert call.value.output_len == 5000
        assert len(call.value.segments) == 1


async def test_a_mode_of_another_dialect_pauses_nothing(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        with pytest.raises(ConfigError, match="retract"):
            async with engine.paused("retract"):
                raise AssertionError("it paused")
        assert states(engine) == ["ready", "ready"]


async def test_one_that_died_in_a_pause_is_out_and_comes_back_unpaused(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine) as carried:
        await trio.sleep(1)
        async with engine.paused():
            faulty.fleet.servers[0].die()
            await trio.sleep(5)
        assert states(engine) == ["stale", "ready"]
        assert "not resumed" in engine.statistics()[0].reason
        faulty.fleet.servers[0].restart()
        await until_states(engine, "ready", "ready")
        asked = requests_of(engine)[0]
        await trio.sleep(20)
        assert requests_of(engine)[0] > asked
    assert len(carried.answers) > 32


# --- membership ---------------------------------------------------------------------------------


async def test_a_server_is_added_while_rollouts_run_and_joins_when_it_is_up(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=2, named=1) as (engine, faulty), traffic(engine):
        await update_weights(engine.pool, disk(1))
        late = faulty.fleet.servers[1]
        late.die()  # it takes its time to start
        engine.pool.fleet.add(late.address)
        await trio.sleep(100)
        assert states(engine) == ["ready", "joining"]
        late.restart()
        began = trio.current_time()
        await until_states(engine, "ready", "ready")
        assert trio.current_time() - began <= 1.5  # a starting server is not put off
        await settled()
        assert [row.outstanding for row in engine.statistics()] == [8, 8]
        assert engine.statistics()[1].version == 1
        with pytest.raises(UsageError, match="is in the pool, ready"):
            engine.pool.fleet.add(late.address + "/")
        with pytest.raises(ConfigError):
            engine.pool.fleet.add("not a url")
        with pytest.raises(ConfigError):
            engine.pool.fleet.add("http://another:1", cap=0)


async def test_an_added_server_is_not_believed_to_have_weights_of_its_own_label(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=2, named=1) as (engine, faulty):
        await update_weights(engine.pool, disk(1))
        faulty.fleet.servers[1].scheduler.set_version("1")  # of another run
        engine.pool.fleet.add(faulty.fleet.addresses[1])
        await until_states(engine, "ready", "ready")
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])))


async def test_a_removed_server_finishes_what_it_has_and_gets_no_more(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine() as (engine, _):
        calls: list[Deferred] = []
        async with trio.open_nursery() as nursery:
            for token in range(16):
                calls.append(Deferred(nursery, engine.agenerate, ModelRequest([token])))
            await trio.sleep(1)
            leaving = engine.pool.servers[0]
            engine.pool.fleet.remove(leaving.address)
            assert states(engine) == ["draining", "ready"]
            asked = leaving.requests
            for token in range(8):
                calls.append(Deferred(nursery, engine.agenerate, ModelRequest([token])))
            await until(engine, lambda: states(engine) == ["ready"])
        assert leaving.state is ServerState.GONE
        assert leaving.requests == asked
        for call in calls:
            check_exact(call.value)
            assert len(call.value.segments) == 1
        engine.pool.fleet.add(leaving.address)  # and may come again
        await until_states(engine, "ready", "ready")


async def test_removing_a_paused_server_resumes_what_it_holds(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        async with trio.open_nursery() as nursery:
            calls = [Deferred(nursery, engine.agenerate, ModelRequest([t])) for t in range(4)]
            await trio.sleep(1)
            async with engine.paused():
                engine.pool.fleet.remove(engine.pool.servers[0].address)
        for call in calls:
            check_exact(call.value)
        assert states(engine) == ["ready"]


async def test_a_pause_covers_a_server_that_is_leaving(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine, 4):
        await trio.sleep(1)
        engine.pool.fleet.remove(engine.pool.servers[0].address)
        async with engine.paused():
            assert [s.scheduler.pause_mode for s in faulty.fleet] == ["keep", "keep"]
        assert [s.scheduler.pause_mode for s in faulty.fleet] == [None, None]


async def test_the_last_server_removed_leaves_waiters_a_reason(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=1, no_server_grace_s=5.0) as (engine, _):
        engine.pool.fleet.remove(engine.pool.servers[0].address)
        with pytest.raises(NoServerAvailable, match="there is none"):
            await engine.agenerate(ModelRequest([3]))


async def test_a_cap_changes_while_rollouts_run(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine):
        await settled()
        assert [row.outstanding for row in engine.statistics()] == [8, 8]
        engine.pool.fleet.set_cap(faulty.fleet.addresses[0], 2)
        engine.pool.fleet.set_cap(faulty.fleet.addresses[1], 10)
        await trio.sleep(5)
        assert [row.outstanding for row in engine.statistics()] == [2, 10]
        engine.pool.fleet.set_cap(faulty.fleet.addresses[0], 0)
        await trio.sleep(5)
        assert [row.outstanding for row in engine.statistics()] == [0, 10]
        for wrong in (-1, 1.5, True, 2**21):
            with pytest.raises(UsageError, match="a cap is an integer"):
                engine.pool.fleet.set_cap(faulty.fleet.addresses[0], wrong)  # type: ignore[arg-type]
        assert engine.statistics()[0].cap == 0
        with pytest.raises(UsageError, match="not in the pool"):
            engine.pool.fleet.set_cap("http://nobody:1", 1)


async def test_a_cap_changes_no_probe_of_a_server_that_is_out(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        server = engine.pool.servers[0]
        faulty.fleet.servers[0].die()
        engine.pool.mark_stale(server, "the test says so")
        await settled()
        probes = server.probes
        faulty.asked.clear()
        for cap in range(1, 11):
            engine.pool.fleet.set_cap(server.address, cap)
            await settled()
        assert not faulty.asked
        assert server.probes == probes


async def test_a_look_that_a_pause_forbids_puts_no_server_off(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=2, named=1) as (engine, faulty):
        async with engine.paused():
            late = engine.pool.fleet.add(faulty.fleet.addresses[1])
            await trio.sleep(100)
            assert late.probes == 0
            assert states(engine) == ["paused", "joining"]
        await settled()
        assert states(engine) == ["ready", "ready"]


async def test_wait_ready_waits_for_a_server_where_there_is_none(autojump_clock: Clock) -> None:
    async with faulty_engine(servers=1) as (engine, faulty):
        engine.pool.fleet.remove(faulty.fleet.addresses[0])
        with pytest.raises(NoServerAvailable, match="there is no server"):
            await engine.pool.wait_ready(5.0)
        engine.pool.fleet.add(faulty.fleet.addresses[0])
        await engine.pool.wait_ready(5.0)
        assert states(engine) == ["ready"]


async def test_wait_ready_names_what_is_not_and_ignores_what_is_leaving(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(servers=3) as (engine, faulty), traffic(engine, 24):
        await settled()
        engine.pool.fleet.remove(faulty.fleet.addresses[2])
        await engine.pool.wait_ready(1.0)
        faulty.fleet.servers[0].die()
        await until(engine, lambda: states(engine)[0] == "ejected")
        with pytest.raises(NoServerAvailable, match="server-0 is ejected") as caught:
            await engine.pool.wait_ready(5.0)
        assert "server-2" not in str(caught.value)
        faulty.fleet.servers[0].restart()
        await engine.pool.wait_ready(60.0)


# --- looking after does not get in the way ------------------------------------------------------


async def test_a_slow_health_check_blocks_no_generation(autojump_clock: Clock) -> None:
    async with faulty_engine(health_interval_s=1.0) as (engine, faulty):
        faulty.delay_s = lambda path: 9.0 if path == "/health" else 0.0
        async with traffic(engine) as carried:
            await trio.sleep(60)
        assert states(engine) == ["ready", "ready"]
        assert len(carried.answers) >= 16 * (60 // 2 - 1)  # 100 tokens of 20 ms each


async def test_an_idle_pool_asks_for_health_and_labels_alone(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, faulty):
        faulty.asked.clear()
        await trio.sleep(101)
        assert {path for _, path in faulty.asked} == {"/health", "/weight_info"}
        assert len(faulty.asked) == 40
        assert states(engine) == ["ready", "ready"]


def test_what_is_attached_is_given_up_when_its_server_is_cut_off() -> None:
    async def main() -> str:
        async with faulty_engine(servers=1) as (engine, _):
            server: Server = engine.pool.servers[0]
            try:
                with server.attached():
                    server.cut_off()
                    await trio.sleep_forever()
            except TransportError as exc:
                assert not server.in_flight
                return str(exc)
        return "nothing was raised"

    assert "was given up" in trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
