"""Each kind of fault against the production engine: what somebody sees to whom it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arealtrio import (
    ConfigError,
    ConnectFailed,
    GenerationHyperparameters,
    ModelRequest,
    ModelResponse,
    ProtocolError,
    RemoteEngine,
    RequestRejected,
    RolloutConfig,
    RolloutError,
    ServerError,
    TransportError,
    TransportTimeout,
    UsageError,
    WeightUpdate,
    WeightUpdateError,
    WorkflowExecutor,
    open_engine,
)
from arealtrio.testing import (
    EOS,
    TORN,
    FaultKind,
    Faults,
    FixedLengths,
    ServerCondition,
    SimulatedFleet,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
    run_virtually,
    simulated_executor,
)
from arealtrio.types import HttpRequest, TimeLimits

HEALTH = HttpRequest("GET", "/health")
LIMITS = TimeLimits.of(30.0)
ONE_A_SECOND = SimulatedServerSettings(max_num_seqs=4, token_time_s=1.0)
GENERATE = "/inference/v1/generate"


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@asynccontextmanager
async def engine_on(
    servers: int = 1, length: int = 5, faults: Faults | None = None, **config: Any
) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    """Answers take a second a token; nobody asks about health meanwhile."""
    defaults = {"health_interval_s": 1000.0, "probe_interval_s": 1.0, "max_failovers": 3}
    async with open_fleet(
        [ONE_A_SECOND] * servers, lengths=FixedLengths(length), faults=faults
    ) as fleet:
        settings = RolloutConfig(**{**defaults, **config, "servers": fleet.addresses})
        async with open_engine(settings, transport=fleet) as engine:
            yield engine, fleet


async def generate(engine: RemoteEngine, **gconfig: Any) -> ModelResponse:
    return await engine.agenerate(ModelRequest([1, 2], GenerationHyperparameters(**gconfig)))


def countdown(length: int) -> list[int]:
    return list(range(EOS + length - 1, EOS - 1, -1))


def kinds(fleet: SimulatedFleet) -> list[str]:
    return [fault.kind.value for fault in fleet.faults.log]


# --- one answer ------------------------------------------------------------------------------

ANSWERED_WRONG: list[tuple[str, Any, type[RolloutError], str]] = [
    ("reset", {"after_bytes": 100}, TransportError, "after 100 of"),
    ("reset", {"after_bytes": 0}, TransportError, "after 0 of"),
    ("truncated", {"after_bytes": 100}, ProtocolError, "expected"),
    ("truncated", {"after_bytes": 0}, ProtocolError, "expected"),
    ("garbage", {"after_bytes": 0}, ProtocolError, "expected"),
    ("garbage", {"share": 0.9}, ProtocolError, "expected"),
    ("server_error", {}, ServerError, "503"),
    ("server_error", {"status": 500}, ServerError, "500"),
    ("client_error", {"status": 422}, RequestRejected, "422"),
]


@pytest.mark.parametrize(("kind", "how", "error", "words"), ANSWERED_WRONG)
async def test_an_answer_that_goes_wrong_is_an_error_of_its_kind(
    autojump_clock: MockClock,
    kind: str,
    how: Any,
    error: type[RolloutError],
    words: str,
) -> None:
    async with engine_on(max_failovers=0) as (engine, fleet):
        fleet.faults.plan(kind, path=GENERATE, **how)
        with pytest.raises(error, match=words):
            await generate(engine)
        assert kinds(fleet) == [kind]
        assert (await generate(engine)).output_tokens.tolist() == countdown(5)


@pytest.mark.parametrize(
    ("kind", "how"), [(k, h) for k, h, e, _ in ANSWERED_WRONG if e is not RequestRejected]
)
async def test_another_server_makes_it_again(
    autojump_clock: MockClock, kind: str, how: Any
) -> None:
    async with engine_on(servers=2) as (engine, fleet):
        fleet.faults.plan(kind, path=GENERATE, **how)
        response = await generate(engine)
        assert response.output_tokens.tolist() == countdown(5)
        assert engine.totals().failovers == 1
        assert [server.orphans for server in fleet] == [0, 0]


async def test_an_answer_that_is_smaller_is_not_reset(autojump_clock: MockClock) -> None:
    async with engine_on() as (engine, fleet):
        fleet.faults.plan("reset", path=GENERATE, after_bytes=10**9)
        assert (await generate(engine)).output_len == 5
        assert kinds(fleet) == []


async def test_a_late_answer_comes_late(autojump_clock: MockClock) -> None:
    async with engine_on() as (engine, fleet):
        fleet.faults.plan("late", path=GENERATE, seconds=7)
        assert (await generate(engine)).latency_s == 12.0


async def test_an_answer_that_is_too_late_is_asked_for_elsewhere(autojump_clock: MockClock) -> None:
    async with engine_on(servers=2, segment_timeout_s=10) as (
        engine,
        fleet,
    ):
        fleet.faults.plan("late", path=GENERATE, seconds=100)
        response = await generate(engine)
        assert response.latency_s == 15.0
        assert engine.totals().failovers == 1


# --- a server that is gone -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["death", "hang", "restart"])
async def test_a_generation_outlives_its_server(autojump_clock: MockClock, kind: str) -> None:
    async with engine_on(servers=2, segment_timeout_s=60) as (engine, fleet):
        async with trio.open_nursery() as nursery:
            answers: list[ModelResponse] = []

            async def ask() -> None:
                answers.append(await generate(engine))

            nursery.start_soon(ask)
            await trio.sleep(2.5)
            (busy,) = [server for server in fleet if server.generations]
            fleet.faults.plan(kind, server=busy, seconds=200)
            with trio.move_on_after(0.25), suppress(ConnectFailed):
                await fleet.request(busy.address, HEALTH, LIMITS)
        assert kinds(fleet) == [kind]
        assert answers[0].output_tokens.tolist() == countdown(5)
        up_again = ServerCondition.UP if kind == "restart" else busy.condition
        assert busy.condition is up_again
        await trio.sleep(300)
        assert busy.condition is ServerCondition.UP
        assert all(s.state == "ready" for s in engine.statistics())


async def test_a_slow_server_gets_its_speed_back(autojump_clock: MockClock) -> None:
    async with engine_on() as (engine, fleet):
        fleet.faults.plan("slow", path=GENERATE, factor=4, seconds=100)
        assert (await generate(engine)).latency_s == 20.0
        await trio.sleep(100)
        assert (await generate(engine)).latency_s == 5.0


@pytest.mark.parametrize("first", ["partition", "slow", "death"])
@pytest.mark.parametrize("second", ["partition", "slow", "hang"])
async def test_what_begins_meanwhile_lets_no_outage_last_for_ever(
    autojump_clock: MockClock, first: str, second: str
) -> None:
    async with open_fleet([ONE_A_SECOND]) as fleet:
        (server,) = fleet
        for kind in (first, second):
            fleet.faults.plan(kind, seconds=30, factor=4)
            with trio.move_on_after(1), suppress(ConnectFailed):
                await fleet.request(server.address, HEALTH, LIMITS)
        await trio.sleep(60)
        assert kinds(fleet) == [first, second]
        assert server.undisturbed
        assert server.pace.speed == 1.0


# --- partitions ------------------------------------------------------------------------------


async def test_nothing_gets_through_a_partition(autojump_clock: MockClock) -> None:
    async with engine_on(segment_timeout_s=60) as (_, fleet):
        (server,) = fleet.faults.partition(*fleet, for_s=20)
        with pytest.raises(TransportTimeout, match="connect_s = 3 s") as caught:
            await fleet.request(server.address, HEALTH, TimeLimits.of(30.0, connect_s=3.0))
        assert not caught.value.request_sent
        assert server.isolated
        await trio.sleep(17.5)
        assert not server.isolated
        assert (await fleet.request(server.address, HEALTH, LIMITS)).status == 200


async def test_what_was_made_behind_a_partition_arrives_after_it(
    autojump_clock: MockClock,
) -> None:
    async with engine_on(length=5) as (engine, fleet), trio.open_nursery() as nursery:

        async def cut() -> None:
            await trio.sleep(2.5)
            fleet.faults.partition(fleet.addresses[0])
            await trio.sleep(10)
            fleet.faults.heal()

        nursery.start_soon(cut)
        response = await generate(engine)
        assert response.latency_s == 12.5
        assert response.output_tokens.tolist() == countdown(5)


async def test_a_server_behind_a_partition_does_not_notice_that_its_client_left(
    autojump_clock: MockClock,
) -> None:
    async with engine_on(length=1000) as (engine, fleet):
        (server,) = fleet
        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate, engine)
                await trio.sleep(1)
                fleet.faults.partition(server)
        assert (server.generations, server.orphans) == (0, 1)
        assert len(server.scheduler.running) == 1
        fleet.faults.heal(server)
        assert server.orphans == len(server.scheduler.running) == 0


# --- aborts ----------------------------------------------------------------------------------


async def test_an_abort_can_get_lost(autojump_clock: MockClock) -> None:
    """Its slot stays taken on the server, and an answer takes no longer than its own abort."""
    async with engine_on(length=100) as (engine, fleet):
        (server,) = fleet
        for number in range(1, 5):
            fleet.faults.plan("lost_abort")
            with trio.move_on_after(3):
                await generate(engine)
            assert (server.generations, server.orphans) == (0, number)
        assert kinds(fleet) == ["lost_abort"] * 4
        assert trio.current_time() >= 12.0
        assert [s.outstanding for s in engine.statistics()] == [0]
        assert len(server.scheduler.running) == 4
        response = await generate(engine)  # it waits in the server until an orphan has ended
        assert response.output_len == 100
        assert response.latency_s > 150
        assert server.orphans == 0


# --- weights ---------------------------------------------------------------------------------


@asynccontextmanager
async def updating(**config: Any) -> AsyncIterator[tuple[WorkflowExecutor, SimulatedFleet]]:
    async with simulated_executor(
        servers=[ONE_A_SECOND] * 2,
        lengths=FixedLengths(6),
        health_interval_s=1000.0,
        probe_interval_s=1.0,
        **config,
    ) as (executor, fleet):
        yield executor, fleet


async def update(executor: WorkflowExecutor, version: int) -> dict[str, str]:
    result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
    return dict(result.failed)


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
async def test_no_token_of_weights_that_failed_to_load_is_delivered(
    autojump_clock: MockClock, share: float | None
) -> None:
    """The update lands in the middle of two answers, one on each server."""
    async with updating() as (executor, fleet):
        answers: list[ModelResponse] = []

        async def ask() -> None:
            answers.append(await generate(executor.engine))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.sleep(2.5)
            how: Any = {} if share is None else {"share": share}
            fleet.faults.plan("failed_load" if share is None else "half_load", **how)
            failed = await update(executor, 1)
            assert len(failed) == 1
        for answer in answers:
            made = [made_by(float(logprob)) for logprob in answer.output_logprobs]
            assert answer.output_tokens.tolist() == countdown(6)
            assert made == answer.output_versions.tolist() == [0] * 2 + [1] * 4
        (address,) = failed
        (server,) = [one for one in fleet if one.address == address]
        if share is None:
            fleet.faults.stop()  # vLLM died of it, and nobody restarts a planned death
        await trio.sleep(100)
        assert server.scheduler.weight_version == "1"
        assert [s.state for s in executor.engine.statistics()] == ["ready", "ready"]


async def test_weights_that_were_loaded_by_half_make_tokens_of_no_version(
    autojump_clock: MockClock,
) -> None:
    async with open_fleet([ONE_A_SECOND]) as fleet:
        fleet.faults.plan("half_load", share=0.5)
        body = (
            b'{"method": "reload_weights", "kwargs": {"weights_path": "/simulated/checkpoint-1"}}'
        )
        answer = await fleet.request(
            fleet.addresses[0], HttpRequest("POST", "/collective_rpc", body), LIMITS
        )
        assert answer.status == 500
        model = fleet.servers[0].scheduler.model
        assert made_by(model.logprob) == TORN  # type: ignore[attr-defined]


async def test_a_wrong_label_is_noticed(autojump_clock: MockClock) -> None:
    async with updating() as (executor, fleet):
        fleet.faults.plan("wrong_version")
        failed = await update(executor, 1)
        assert kinds(fleet) == ["wrong_version"]
        assert list(failed) == [fleet.faults.log[0].server]
        for _ in range(3):
            answer = await generate(executor.engine)
            assert answer.versions_exact
            assert answer.output_versions.tolist() == [1] * 6
        await trio.sleep(100)
        assert [server.scheduler.weight_version for server in fleet] == ["1", "1"]


async def test_an_update_that_fails_everywhere_leaves_the_version(
    autojump_clock: MockClock,
) -> None:
    async with updating() as (executor, fleet):
        fleet.faults.plan("half_load", count=2)
        with pytest.raises(WeightUpdateError):
            await update(executor, 1)
        assert executor.get_version() == 0
        assert await update(executor, 2) == {}
        assert (await generate(executor.engine)).output_versions.tolist() == [2] * 6


# --- chance ----------------------------------------------------------------------------------


async def play(faults: Faults) -> list[str]:
    """A few generations and an update; return what went wrong."""
    async with updating(faults=faults) as (executor, fleet):
        for version in range(1, 6):
            for _ in range(10):
                with suppress(RolloutError):
                    await generate(executor.engine)
            with suppress(WeightUpdateError):
                await update(executor, version)
        return [str(fault) for fault in fleet.faults.log]


def test_chance_follows_from_the_seed() -> None:
    first, again, other = (run_virtually(play, Faults.all(seed), seed=1) for seed in (3, 3, 4))
    assert first == again != other
    assert first


async def test_nothing_goes_wrong_unasked(autojump_clock: MockClock) -> None:
    assert await play(Faults.none()) == []


async def test_chance_leaves_a_server_to_work_on(autojump_clock: MockClock) -> None:
    rates = {"death": 0.02, "hang": 0.02, "partition": 0.02}
    async with open_fleet(3, faults=Faults(1, rates=rates)) as fleet:
        for _ in range(300):
            for server in fleet:
                with trio.move_on_after(0.5), suppress(TransportError):
                    await fleet.request(server.address, HEALTH, LIMITS)
                assert any(one.undisturbed for one in fleet)
        assert min(fleet.faults.counts()[kind] for kind in rates) > 3
        assert len({fault.server for fault in fleet.faults.log}) == 3


async def test_stop_mends_everything(autojump_clock: MockClock) -> None:
    async with open_fleet(4) as fleet, trio.open_nursery() as nursery:
        dead, hung, slow, cut = fleet
        dead.die()
        hung.hang()
        slow.slow_down(5)
        fleet.faults.partition(cut)
        fleet.faults.plan("late", server=slow, seconds=1000)
        fleet.faults.plan("death", count=100, server=dead)
        held: list[float] = []

        async def ask() -> None:
            await fleet.request(slow.address, HEALTH, TimeLimits.of(2000.0))
            held.append(trio.current_time())

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert not held
        fleet.faults.stop()
        await wait_all_tasks_blocked()
        assert held == [0.0]
        assert all(server.undisturbed for server in fleet)
        assert slow.pace.speed == 1.0
        assert not fleet.faults.active
        for server in fleet:
            assert (await fleet.request(server.address, HEALTH, LIMITS)).status == 200


async def test_an_outage_that_ended_is_not_ended_again(autojump_clock: MockClock) -> None:
    """The restart that was due after the first death does not end the second one."""
    async with open_fleet(1) as fleet:
        (server,) = fleet
        fleet.faults.plan("death", seconds=10)
        with pytest.raises(ConnectFailed):
            await fleet.request(server.address, HEALTH, LIMITS)
        server.restart()
        server.die()
        await trio.sleep(20)
        assert server.condition is ServerCondition.DOWN


def test_the_log_is_readable() -> None:
    faults = Faults(7, rates={"reset": 0.25})
    assert repr(faults) == "Faults(7, rates={'reset': 0.25})"
    assert faults.counts()["reset"] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Faults(rates={"resets": 0.1}),
        lambda: Faults(rates={"reset": 1.1}),
        lambda: Faults(rates={"reset": float("nan")}),
        lambda: Faults(rates={"reset": 0.6, "late": 0.6}),
        lambda: Faults(outage_s=(0, 1)),
        lambda: Faults(late_s=(2, 1)),
        lambda: Faults(rates={"reset": "x"}),  # type: ignore[arg-type]
        lambda: Faults(rates=["reset"]),  # type: ignore[arg-type]
        lambda: Faults(outage_s=3),  # type: ignore[arg-type]
        lambda: Faults(late_s=(1, 2, 3)),  # type: ignore[arg-type]
        lambda: Faults(spare=-1),
        lambda: Faults().plan("nothing"),
    ],
)
def test_what_is_no_fault_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("death", {"count": 0}, "count must be"),
        ("death", {"count": -2}, "count must be"),
        ("death", {"count": 1.5}, "count must be"),
        ("death", {"path": None}, "path must be text"),
        ("death", {"path": "inference"}, "path begins with /"),
        ("failed_load", {"path": "/inference"}, "failed_load happens at no request"),
        ("reset", {"after_byte": 10}, "'after_byte' says nothing .* there are after_bytes"),
        ("reset", {"after_bytes": -1}, "after_bytes must be"),
        ("reset", {"share": 1}, "share of 1"),
        ("half_load", {"share": 1.5}, "share must be"),
        ("late", {"seconds": float("nan")}, "seconds must be"),
        ("late", {"seconds": -1}, "seconds must be"),
        ("server_error", {"status": 200}, "status must be"),
        ("slow", {"factor": 0}, "factor must be above 0"),
        ("slow", {"factor": -1}, "factor must be above 0"),
        ("slow", {"factor": "4"}, "factor must be"),
        ("death", {"server": 3}, "server must be text"),
        ("death", {"server": "http://server_0"}, "'http://server_0' is no server .* http://serv"),
    ],
)
async def test_a_plan_that_can_never_happen_is_refused(
    autojump_clock: MockClock, kind: str, changes: Any, words: str
) -> None:
    async with open_fleet(2) as fleet:
        with pytest.raises(ConfigError, match=words):
            fleet.faults.plan(kind, **changes)
        assert not fleet.faults.active


async def test_a_plan_for_a_server_that_never_comes_is_refused_with_the_fleet(
    autojump_clock: MockClock,
) -> None:
    faults = Faults()
    faults.plan("death", server="http://server-2")
    with pytest.raises(ConfigError, match="'http://server-2' is no server of this fleet"):
        async with open_fleet(2, faults=faults):
            pass
    async with open_fleet(3, faults=faults) as fleet:
        with pytest.raises(ConnectFailed):
            await fleet.request("http://server-2", HEALTH, LIMITS)
        assert kinds(fleet) == ["death"]
        async with open_fleet(3) as another:
            with pytest.raises(ConfigError, match="'http://server-0' is no server of this fleet"):
                fleet.faults.plan("death", server=another.servers[0])


@pytest.mark.parametrize("for_s", [-1, float("nan"), "3"])
async def test_a_partition_lasts_for_some_seconds(autojump_clock: MockClock, for_s: Any) -> None:
    async with open_fleet(1) as fleet:
        with pytest.raises(ConfigError, match="for_s"):
            fleet.faults.partition(*fleet, for_s=for_s)
        assert not fleet.servers[0].isolated


async def test_faults_belong_to_one_fleet(autojump_clock: MockClock) -> None:
    faults = Faults(1)
    async with open_fleet(1, faults=faults):
        with pytest.raises(UsageError):
            async with open_fleet(1, faults=faults):
                pass
        with pytest.raises(UsageError):
            faults.partition("http://elsewhere")


def test_every_kind_has_an_event_and_a_rate() -> None:
    assert set(Faults.all(0).rates) == set(FaultKind)


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_sglang_that_is_given_weights_while_it_sleeps_dies_as_a_real_one_does(
    autojump_clock: MockClock, restarted: bool
) -> None:
    """And comes back where chance would bring it back, also after the end of all faults."""
    faults = Faults(7, rates={"failed_load": 1e-9} if restarted else None)
    sglang = SimulatedServerSettings(dialect="sglang")
    async with open_fleet([sglang], faults=faults) as fleet:
        (server,) = fleet
        sleep = HttpRequest("POST", "/release_memory_occupation", b'{"tags": ["weights"]}')
        load = HttpRequest(
            "POST", "/update_weights_from_disk", b'{"model_path": "%s"}' % checkpoint(1).encode()
        )
        assert (await fleet.request(server.address, sleep, LIMITS)).status == 200
        assert server.asleep
        faults.stop()
        assert (await fleet.request(server.address, load, LIMITS)).status == 500
        await wait_all_tasks_blocked()
        assert not server.undisturbed
        await trio.sleep(60)
        assert server.undisturbed is restarted
        assert not server.asleep
