"""The public test kit: servers in memory that answer, stop, die and hang as real ones do."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arealtrio import (
    ConfigError,
    ConnectFailed,
    GenerationHyperparameters,
    ModelRequest,
    NoServerAvailable,
    RemoteEngine,
    ResponseTooLarge,
    RolloutConfig,
    SingleTurnWorkflow,
    TransportError,
    TransportTimeout,
    UsageError,
    WeightUpdate,
    WeightUpdateError,
    open_engine,
)
from arealtrio.embedded.sampling import SamplingParams
from arealtrio.testing import (
    EOS,
    FixedLengths,
    LogNormalLengths,
    RecordedLengths,
    ScriptedModel,
    ServerCondition,
    SimulatedFleet,
    SimulatedServer,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
    run_virtually,
    simulated_executor,
)
from arealtrio.testing.fleet import DEFAULT_LENGTHS
from arealtrio.testing.script import load, plan
from arealtrio.types import HttpRequest, TimeLimits

LIMITS = TimeLimits.of(30.0)
HEALTH = HttpRequest("GET", "/health")
GENERATE = HttpRequest(
    "POST",
    "/inference/v1/generate",
    b'{"token_ids": [1], "sampling_params": {"max_tokens": 1000}}',
)
SLOW = SimulatedServerSettings(max_num_seqs=2, token_time_s=1.0)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@asynccontextmanager
async def engine_on(
    fleet: SimulatedFleet, **config: Any
) -> AsyncIterator[tuple[RemoteEngine, SimulatedServer]]:
    settings = RolloutConfig(**{"setup_timeout_s": 5.0, **config, "servers": fleet.addresses})
    async with open_engine(settings, transport=fleet) as engine:
        yield engine, fleet.servers[0]


def request(prompt: list[int], **gconfig: Any) -> ModelRequest:
    return ModelRequest(prompt, GenerationHyperparameters(**gconfig))


def countdown(length: int) -> list[int]:
    return list(range(EOS + length - 1, EOS - 1, -1))


# --- lengths ---------------------------------------------------------------------------------


def test_log_normal_lengths_have_the_median_and_tail_asked_for() -> None:
    lengths, rng = LogNormalLengths.with_tail(median=40, p99=360, longest=1000), random.Random(0)
    drawn = sorted(lengths.draw(rng) for _ in range(20_000))
    assert statistics.median(drawn) == pytest.approx(40, rel=0.05)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(360, rel=0.1)
    assert 1 <= drawn[0] <= drawn[-1] == 1000


def test_recorded_lengths_come_in_order_over_and_over() -> None:
    lengths, rng = RecordedLengths([3, 1]), random.Random(0)
    assert [lengths.draw(rng) for _ in range(5)] == [3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedLengths(0),
        lambda: RecordedLengths([]),
        lambda: RecordedLengths([1, 0]),
        lambda: LogNormalLengths(0.5, 1, 10),
        lambda: LogNormalLengths(20, 1, 10),
        lambda: LogNormalLengths(5, float("inf"), 10),
        lambda: SimulatedServerSettings(max_num_seqs=0),
        lambda: SimulatedServerSettings(token_time_s=0),
        lambda: SimulatedServerSettings(speed=float("nan")),
        lambda: SimulatedServerSettings(latency_s=-1),
        lambda: SimulatedServerSettings(prefill_s=-1),
        lambda: checkpoint(-1),
        lambda: run_virtually(trio.sleep, 1, time_limit_s=-1),
        lambda: run_virtually(trio.sleep, 1, time_limit_s=float("nan")),
        lambda: run_virtually(_fleet_of, -1),
        lambda: run_virtually(_fleet_of, 2.5),
        lambda: run_virtually(_fleet_of, "3"),
        lambda: run_virtually(_fleet_of, {"servers": 3}),
        lambda: run_virtually(_fleet_of, [SimulatedServerSettings(), 8]),
        lambda: run_virtually(_fleet_of, 1, 100),
        lambda: run_virtually(_fleet_of, 1, FixedLengths),
        lambda: run_virtually(_fleet_of, 1, FixedLengths(1), "death"),
    ],
)
def test_what_can_not_be_simulated_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


async def _fleet_of(servers: Any, lengths: Any = DEFAULT_LENGTHS, faults: Any = None) -> None:
    async with open_fleet(servers, lengths=lengths, faults=faults):
        pass


# --- the script ------------------------------------------------------------------------------


def test_an_answer_goes_on_from_wherever_it_stopped() -> None:
    params = SamplingParams()
    whole = plan([1, 2], params, 100, 6)
    assert (whole.first, whole.length, whole.stopped) == (EOS + 5, 6, True)
    for made in range(1, 6):
        rest = plan([1, 2, *countdown(6)[:made]], params, 100 - made, drawn=0)
        assert rest.first == EOS + 5 - made
        assert rest.length == 6 - made


def test_a_budget_a_minimum_and_a_stop_id_are_kept() -> None:
    assert not plan([1], SamplingParams(), 4, 6).stopped
    assert plan([1], SamplingParams(), 6, 6).stopped
    assert plan([1], SamplingParams(min_tokens=5), 100, 1).length == 6
    assert plan([1], SamplingParams(ignore_eos=True), 9, 1).length == 9
    stopped = plan([1], SamplingParams(stop_token_ids=frozenset({EOS + 3, 7})), 100, 6)
    assert (stopped.length, stopped.stop_reason) == (3, EOS + 3)


def test_a_logprob_names_the_weights_that_made_it() -> None:
    for version in (0, 1, 63, 4000):
        assert made_by(float(np.float32(ScriptedModel(version).logprob))) == version
        assert load(Path(checkpoint(version))) == ScriptedModel(version)


@pytest.mark.parametrize(
    "path", ["/tmp/checkpoint-1", "/simulated/checkpoint-x", "/simulated/other-1", "/simulated"]
)
def test_there_are_no_weights_elsewhere(path: str) -> None:
    with pytest.raises(FileNotFoundError):
        load(Path(path))


def test_a_scripted_model_is_not_asked_token_by_token() -> None:
    with pytest.raises(UsageError):
        ScriptedModel(0).next_logits([[1]])


# --- answering -------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect_route", ["tokens", "completions"])
async def test_it_generates_as_fast_as_it_is_told(
    autojump_clock: MockClock, dialect_route: str
) -> None:
    async with (
        open_fleet([SLOW], lengths=FixedLengths(7)) as fleet,
        engine_on(fleet) as (engine, server),
    ):
        if dialect_route == "completions":
            (known,) = engine.pool.servers
            known.info = type(known.info)(model=known.info.model, token_in_token_out=False)
        response = await engine.agenerate(request([1, 2]))
        assert response.output_tokens.tolist() == countdown(7)
        assert response.stop_reason == "stop"
        assert response.output_versions.tolist() == [0] * 7
        assert response.latency_s == 7.0
        assert (server.most_generations, server.generations) == (1, 0)


async def test_a_fuller_batch_is_slower_and_a_faster_server_faster(
    autojump_clock: MockClock,
) -> None:
    settings = SimulatedServerSettings(max_num_seqs=3, token_time_s=1.0, batch_growth=0.5, speed=2)
    async with (
        open_fleet([settings], lengths=FixedLengths(10)) as fleet,
        engine_on(fleet) as (engine, server),
    ):
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(engine.agenerate, request([1]))
        first, further = 1.0 / 2, (1 + 2 * 0.5) / 2  # the first step began when one was there
        assert trio.current_time() - started == first + 9 * further
        server.pace.speed = 1.0
        assert (await engine.agenerate(request([1]))).latency_s == 10.0


async def test_latency_and_loading_take_their_time(autojump_clock: MockClock) -> None:
    settings = SimulatedServerSettings(latency_s=0.5, load_time_s=3.0)
    async with open_fleet([settings]) as fleet, engine_on(fleet):
        started = trio.current_time()
        await fleet.request(fleet.addresses[0], HEALTH, LIMITS)
        assert trio.current_time() - started == 0.5
    async with simulated_executor(servers=[settings]) as (executor, _):
        result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        # pause, label, load, drop the cache, confirm the label, resume
        assert result.seconds == 3.0 + 6 * 0.5


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_prefill_is_of_requests_for_tokens_alone(
    autojump_clock: MockClock, dialect: Any
) -> None:
    settings = SimulatedServerSettings(
        dialect=dialect, token_time_s=1.0, load_time_s=3.0, latency_s=0.25, prefill_s=0.5
    )
    async with simulated_executor(servers=[settings], lengths=FixedLengths(7)) as (executor, _):
        assert (await executor.engine.agenerate(request([1]))).latency_s == 0.25 + 0.5 + 7
        result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        assert result.seconds < 3.0 + 8 * 0.25


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
async def test_an_answer_across_an_update_says_which_weights_made_what(
    autojump_clock: MockClock, mode: Any
) -> None:
    async with (
        simulated_executor(servers=[SLOW], lengths=FixedLengths(10)) as (executor, _),
        trio.open_nursery() as nursery,
    ):

        async def update() -> None:
            await trio.sleep(4.5)
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1, pause=mode))

        nursery.start_soon(update)
        response = await executor.engine.agenerate(request([1, 2]))
        made = [made_by(float(logprob)) for logprob in response.output_logprobs]
        assert response.output_tokens.tolist() == countdown(10)
        assert response.output_versions.tolist() == made
        assert made == ([0] * 10 if mode == "wait" else [0] * 4 + [1] * 6)
        assert len(response.segments) == (2 if mode == "abort" else 1)
        assert response.versions_exact


async def test_a_cancelled_request_frees_its_slot(autojump_clock: MockClock) -> None:
    async with (
        open_fleet([SLOW], lengths=FixedLengths(100)) as fleet,
        engine_on(fleet) as (engine, server),
    ):
        with trio.move_on_after(5):
            await engine.agenerate(request([1]))
        assert server.generations == 0
        assert server.scheduler.running == ()
        assert trio.current_time() == 5.0


async def test_nothing_happens_between_two_events(autojump_clock: MockClock) -> None:
    """A long answer costs no more wake-ups than a short one."""

    class Ticks(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1

    counts = []
    quick = SimulatedServerSettings(token_time_s=1e-4)  # so that it ends before a health check
    for length in (10, 50_000):
        async with (
            open_fleet([quick], lengths=FixedLengths(length)) as fleet,
            engine_on(fleet) as (engine, _),
        ):
            ticks = Ticks()
            trio.lowlevel.add_instrument(ticks)
            response = await engine.agenerate(request([1], max_new_tokens=10**5, max_tokens=10**6))
            trio.lowlevel.remove_instrument(ticks)
            assert response.output_len == length
            counts.append(ticks.count)
    assert counts[1] <= counts[0] + 2


async def test_no_thread_is_started(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a virtual clock a thread is a race: time would jump while it works."""

    def refuse(self: threading.Thread) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    async with simulated_executor(servers=2, consumer_batch_size=2) as (executor, fleet):
        workflow = SingleTurnWorkflow(lambda *_, **__: 1.0, GenerationHyperparameters())
        loader = [{"input_ids": [1]}] * 2
        assert len(await executor.prepare_batch(loader, workflow)) == 2
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        missing = await fleet.request(fleet.addresses[0], HttpRequest("GET", "/no"), LIMITS)
        assert missing.status == 404


async def test_an_answer_is_streamed_in_one_piece(autojump_clock: MockClock) -> None:
    async with (
        open_fleet([SLOW]) as fleet,
        fleet.stream(fleet.addresses[0], HttpRequest("GET", "/version"), LIMITS) as response,
    ):
        assert response.status == 200
        assert response.headers["content-type"] == "application/json"
        assert [chunk async for chunk in response.chunks()] == [b'{"version":"0.32.0"}']


async def test_an_answer_above_the_limit_is_refused(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW]) as fleet:
        with pytest.raises(ResponseTooLarge):
            await fleet.request(
                fleet.addresses[0], HttpRequest("GET", "/version"), LIMITS, size_bytes_max=5
            )


async def test_a_refusal_has_the_words_of_the_embedded_server(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW]) as fleet:
        question = HttpRequest("POST", "/inference/v1/generate", b'{"token_ids": [1]}')
        answer = await fleet.request(fleet.addresses[0], question, LIMITS)
        assert answer.status == 400
        assert b"Field required" in answer.body


# --- faults ----------------------------------------------------------------------------------


async def in_flight(fleet: SimulatedFleet, nursery: trio.Nursery) -> list[BaseException]:
    """Start one generation, and return where its error will be."""
    errors: list[BaseException] = []

    async def ask() -> None:
        try:
            await fleet.request(fleet.addresses[0], GENERATE, LIMITS)
        except TransportError as exc:
            errors.append(exc)

    nursery.start_soon(ask)
    await wait_all_tasks_blocked()
    assert fleet.servers[0].generations == 1
    return errors


async def test_a_dead_server_resets_and_refuses_until_it_restarts(
    autojump_clock: MockClock,
) -> None:
    async with open_fleet([SLOW], lengths=FixedLengths(1000)) as fleet:
        (server,) = fleet
        async with trio.open_nursery() as nursery:
            errors = await in_flight(fleet, nursery)
            server.die()
            await wait_all_tasks_blocked()
            assert [type(error) for error in errors] == [TransportError]
            assert errors[0].request_sent  # type: ignore[attr-defined]
        assert server.generations == 0
        with pytest.raises(ConnectFailed, match="refused"):
            await fleet.request(server.address, HEALTH, LIMITS)
        server.restart()
        assert (await fleet.request(server.address, HEALTH, LIMITS)).status == 200
        assert server.scheduler.running == ()
        assert server.scheduler.weight_version == "default"


async def test_a_hung_server_is_silent_until_the_time_is_up(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW], lengths=FixedLengths(1000)) as fleet:
        (server,) = fleet
        async with trio.open_nursery() as nursery:
            errors = await in_flight(fleet, nursery)
            await trio.sleep(10)
            server.hang()
            with pytest.raises(TransportTimeout, match="5 s"):
                await fleet.request(server.address, HEALTH, TimeLimits.of(5.0))
            assert errors == []
            await trio.sleep(16)
            assert [type(error) for error in errors] == [TransportTimeout]
        assert trio.current_time() == 31.0


async def test_a_restart_ends_a_hang(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW], lengths=FixedLengths(1000)) as fleet, trio.open_nursery() as n:
        (server,) = fleet
        errors = await in_flight(fleet, n)
        server.hang()
        await wait_all_tasks_blocked()
        assert errors == []
        server.restart()
        await wait_all_tasks_blocked()
        assert [type(error) for error in errors] == [TransportError]
        assert (await fleet.request(server.address, HEALTH, LIMITS)).status == 200


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), 5e-324, "2"])
async def test_a_speed_that_is_none_is_refused_and_changes_nothing(
    autojump_clock: MockClock, factor: Any
) -> None:
    async with (
        open_fleet([SLOW], lengths=FixedLengths(7)) as fleet,
        engine_on(fleet) as (engine, server),
    ):
        with pytest.raises(ConfigError, match="factor"):
            server.slow_down(factor)
        assert (server.pace.speed, server.paces) == (1.0, 0)
        assert (await engine.agenerate(request([1, 2]))).latency_s == 7.0


async def test_a_generation_outlives_its_server(autojump_clock: MockClock) -> None:
    async with (
        open_fleet([SLOW], lengths=FixedLengths(5)) as fleet,
        engine_on(fleet) as (engine, server),
        trio.open_nursery() as nursery,
    ):

        async def mend() -> None:
            await trio.sleep(2.5)
            server.die()
            await trio.sleep(2.5)
            server.restart()

        nursery.start_soon(mend)
        response = await engine.agenerate(request([1]))
        assert response.output_tokens.tolist() == countdown(5)
        assert response.latency_s > 5 + 5


async def test_weights_that_do_not_load_kill_it_as_they_kill_vllm(
    autojump_clock: MockClock,
) -> None:
    load_nothing = HttpRequest(
        "POST",
        "/collective_rpc",
        b'{"method": "reload_weights", "kwargs": {"weights_path": "/elsewhere"}}',
    )
    async with open_fleet([SLOW], lengths=FixedLengths(20)) as fleet:
        (server,) = fleet
        async with trio.open_nursery() as nursery:

            async def generate() -> None:
                answer = await fleet.request(server.address, GENERATE, LIMITS)
                assert answer.status == 500
                assert b"EngineCore encountered an issue" in answer.body
                assert trio.current_time() == 6.0  # the next step

            nursery.start_soon(generate)
            await trio.sleep(5.5)
            refused = await fleet.request(server.address, load_nothing, LIMITS)
            assert refused.status == 500
            assert b"no simulated checkpoint" in refused.body
        await wait_all_tasks_blocked()
        assert server.condition is ServerCondition.DOWN


async def test_an_update_that_loads_nothing_is_an_error_of_its_own(
    autojump_clock: MockClock,
) -> None:
    async with simulated_executor(servers=[SLOW]) as (executor, _):
        with pytest.raises(WeightUpdateError, match="no simulated checkpoint"):
            await executor.update_weights(WeightUpdate.from_disk("/elsewhere", 1))
        assert executor.get_version() == 0


async def test_the_pool_waits_for_a_server_that_comes_up_late(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW]) as fleet, trio.open_nursery() as nursery:
        (server,) = fleet
        server.die()

        async def later() -> None:
            await trio.sleep(3)
            server.restart()

        nursery.start_soon(later)
        async with engine_on(fleet):
            assert trio.current_time() == pytest.approx(3, abs=0.3)


async def test_an_error_leaves_the_fleet_as_itself(autojump_clock: MockClock) -> None:
    async def main() -> None:
        async with open_fleet([SLOW]) as fleet:
            fleet.servers[0].die()
            async with engine_on(fleet):
                raise AssertionError("unreachable")

    with pytest.raises(NoServerAvailable, match="refused"):
        await main()


async def test_an_address_that_is_no_server_refuses(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW]) as fleet:
        with pytest.raises(ConnectFailed):
            await fleet.request("http://elsewhere", HEALTH, LIMITS)
        await fleet.aclose()
        with pytest.raises(UsageError):
            await fleet.request(fleet.addresses[0], HEALTH, LIMITS)


async def test_a_trace_tells_every_exchange(autojump_clock: MockClock) -> None:
    async with open_fleet([SLOW], lengths=FixedLengths(3), traced=True) as fleet:
        async with engine_on(fleet) as (engine, _):
            fleet.trace.clear()
            await engine.agenerate(request([1]))
        told = [(e.time_s, e.request, e.outcome) for e in fleet.trace]
        assert told == [
            (0.0, "POST /inference/v1/generate", ""),
            (3.0, "POST /inference/v1/generate", "200"),
        ]
        assert all(exchange.size_bytes > 0 for exchange in fleet.trace)
