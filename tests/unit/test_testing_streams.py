"""Streams of simulated servers: tokens arrive as they are made, and so break off in the middle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from arealtrio import (
    ConfigError,
    GenerationHyperparameters,
    ModelRequest,
    ModelResponse,
    RemoteEngine,
    ResponseTooLarge,
    RolloutConfig,
    TransportError,
    TransportTimeout,
    WeightUpdate,
    open_engine,
)
from arealtrio.testing import (
    EOS,
    Faults,
    FixedLengths,
    SimulatedFleet,
    SimulatedServer,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
    simulated_executor,
)
from arealtrio.types import HttpRequest, TimeLimits

DIALECTS = ["vllm", "sglang"]
PARAMETERS: dict[str, Any] = {"max_tokens": 1000, "logprobs": 0}
SGLANG_PARAMETERS: dict[str, Any] = {"max_new_tokens": 1000}
LIMITS = TimeLimits(connect_s=5.0, first_byte_s=50.0, idle_s=50.0, total_s=500.0)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def one_a_second(dialect: Any, **settings: Any) -> SimulatedServerSettings:
    return SimulatedServerSettings(token_time_s=1.0, dialect=dialect, **settings)


def question(dialect: str) -> HttpRequest:
    if dialect == "vllm":
        body = {"token_ids": [1], "sampling_params": PARAMETERS, "stream": True}
        return HttpRequest("POST", "/inference/v1/generate", msgspec.json.encode(body))
    body = {"input_ids": [1], "sampling_params": SGLANG_PARAMETERS, "stream": True}
    return HttpRequest("POST", "/generate", msgspec.json.encode({**body, "return_logprob": True}))


@asynccontextmanager
async def engine_on(
    dialect: str, servers: int = 1, length: int = 6, faults: Faults | None = None, **config: Any
) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    defaults = {"health_interval_s": 1000.0, "probe_interval_s": 1.0, "streaming": True}
    async with open_fleet(
        [one_a_second(dialect)] * servers, lengths=FixedLengths(length), faults=faults
    ) as fleet:
        settings = RolloutConfig(
            **{**defaults, **config, "backend": dialect, "vocab_size": 2 * EOS},
            servers=fleet.addresses,
        )
        async with AsyncExitStack() as stack:
            with fleet.faults.quiet():
                engine = await stack.enter_async_context(open_engine(settings, transport=fleet))
            yield engine, fleet


async def generate(engine: RemoteEngine) -> ModelResponse:
    return await engine.agenerate(ModelRequest([1, 2], GenerationHyperparameters()))


def countdown(length: int) -> list[int]:
    return list(range(EOS + length - 1, EOS - 1, -1))


async def arrivals(
    server: SimulatedServer, fleet: SimulatedFleet, limits: TimeLimits = LIMITS, **more: Any
) -> list[tuple[float, bytes]]:
    """When each piece came, of an answer on a fresh stream."""
    request = question(server.settings.dialect)
    pieces = []
    async with fleet.stream(server.address, request, limits, **more) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        async for piece in response.chunks():
            pieces.append((trio.current_time(), piece))
    return pieces


# --- as they are made ------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_each_token_arrives_when_it_is_made(autojump_clock: MockClock, dialect: str) -> None:
    async with open_fleet([one_a_second(dialect)], lengths=FixedLengths(4)) as fleet:
        (server,) = fleet
        pieces = await arrivals(server, fleet)
        times = [time for time, _ in pieces]
        assert times == [1.0, 2.0, 3.0, 4.0, 4.0]  # the last is the end mark
        assert pieces[-1][1] == b"data: [DONE]\n\n"
        assert server.generations == len(server.scheduler.running) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_event_can_hold_more_tokens(autojump_clock: MockClock, dialect: str) -> None:
    settings = one_a_second(dialect, event_tokens=3)
    async with open_fleet([settings], lengths=FixedLengths(7)) as fleet:
        pieces = await arrivals(fleet.servers[0], fleet)
        assert [time for time, _ in pieces] == [3.0, 6.0, 7.0, 7.0]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_neighbours_that_come_and_go_change_the_pace_only(
    autojump_clock: MockClock, dialect: str
) -> None:
    settings = one_a_second(dialect, max_num_seqs=2, batch_growth=1.0)
    async with (
        open_fleet([settings], lengths=FixedLengths(4)) as fleet,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(arrivals, fleet.servers[0], fleet)
        await trio.sleep(0.5)
        pieces = await arrivals(fleet.servers[0], fleet)
        # it joins a step under way; then both share, and so end together
        assert [time for time, _ in pieces][:4] == [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", ["keep", "abort"])
async def test_the_engine_sees_the_same_streamed_or_not(
    autojump_clock: MockClock, dialect: str, mode: Any, streaming: bool
) -> None:
    async with (
        simulated_executor(
            servers=[one_a_second(dialect)], lengths=FixedLengths(10), streaming=streaming
        ) as (executor, _),
        trio.open_nursery() as nursery,
    ):

        async def update() -> None:
            await trio.sleep(4.5)
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1, pause=mode))

        nursery.start_soon(update)
        response = await generate(executor.engine)
        made = [made_by(float(logprob)) for logprob in response.output_logprobs]
        assert response.output_tokens.tolist() == countdown(10)
        assert response.output_versions.tolist() == made == [0] * 4 + [1] * 6
        assert response.versions_exact


async def test_one_executor_speaks_one_dialect(autojump_clock: MockClock) -> None:
    with pytest.raises(ConfigError, match="sglang and vllm"):
        async with simulated_executor(servers=[one_a_second(d) for d in DIALECTS]):
            pass


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_is_read_as_one_answer(autojump_clock: MockClock, dialect: str) -> None:
    async with open_fleet([one_a_second(dialect)], lengths=FixedLengths(3)) as fleet:
        answer = await fleet.request(fleet.addresses[0], question(dialect), LIMITS)
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.body.count(b"data: ") == 4
        assert fleet.servers[0].generations == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_refusal_is_told_as_the_dialect_does(
    autojump_clock: MockClock, dialect: str
) -> None:
    path = "/generate" if dialect == "sglang" else "/inference/v1/generate"
    request = HttpRequest("POST", path, b'{"stream": true}')
    async with (
        open_fleet([one_a_second(dialect)]) as fleet,
        fleet.stream(fleet.addresses[0], request, LIMITS) as response,
    ):
        said = b"".join([piece async for piece in response.chunks()])
        assert response.status == (200 if dialect == "sglang" else 400)
        assert b"error" in said
        assert fleet.servers[0].generations == (1 if dialect == "sglang" else 0)
    assert fleet.servers[0].generations == 0


# --- in the middle ---------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("blow", ["die", "restart", "hang"])
async def test_a_server_lost_in_mid_stream_costs_no_token(
    autojump_clock: MockClock, dialect: str, blow: str
) -> None:
    async with (
        engine_on(dialect, servers=2, idle_timeout_s=3.0) as (engine, fleet),
        trio.open_nursery() as nursery,
    ):

        async def strike() -> None:
            await trio.sleep(3.5)
            (busy,) = [server for server in fleet if server.generations]
            getattr(busy, blow)()

        nursery.start_soon(strike)
        response = await generate(engine)
        assert response.output_tokens.tolist() == countdown(6)
        assert [(s.start, s.end) for s in response.segments] == [(0, 3), (3, 6)]
        assert engine.totals().tokens_regenerated == 0
        assert sum(server.generations for server in fleet) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["reset", "truncated", "garbage"])
async def test_an_answer_that_breaks_off_after_some_bytes(
    autojump_clock: MockClock, dialect: str, kind: str
) -> None:
    async with engine_on(dialect, servers=2) as (engine, fleet):
        path = "/generate" if dialect == "sglang" else "/inference"
        fleet.faults.plan(kind, path=path, after_bytes=1500)
        response = await generate(engine)
        assert response.output_tokens.tolist() == countdown(6)
        assert engine.totals().failovers == 1
        assert [fault.detail for fault in fleet.faults.log] == ["after 1500 bytes of a stream"]
        assert [len(server.scheduler.running) for server in fleet] == [0, 0]
        whole = len(response.segments) == 1
        assert whole == (kind != "reset")  # what breaks the protocol is not believed at all


async def test_a_late_stream_begins_late(autojump_clock: MockClock) -> None:
    async with engine_on("vllm") as (engine, fleet):
        fleet.faults.plan("late", path="/inference", seconds=20)
        assert (await generate(engine)).latency_s == 20.0  # all tokens were there by then


async def test_a_partition_holds_the_tokens_back(autojump_clock: MockClock) -> None:
    async with open_fleet([one_a_second("vllm")], lengths=FixedLengths(5)) as fleet:
        (server,) = fleet
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                await trio.sleep(2.5)
                fleet.faults.partition(server, for_s=10)

            nursery.start_soon(cut)
            pieces = await arrivals(server, fleet)
        assert [time for time, _ in pieces] == [1.0, 2.0, 12.5, 12.5, 12.5]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (TimeLimits(connect_s=1, first_byte_s=9, idle_s=0.5, total_s=9), "idle_s = 0.5 s"),
        (TimeLimits(connect_s=1, first_byte_s=9, idle_s=2, total_s=2.5), "total_s = 2.5 s"),
    ],
)
async def test_a_limit_that_passes_ends_the_stream_and_the_work(
    autojump_clock: MockClock, limits: TimeLimits, name: str
) -> None:
    async with open_fleet([one_a_second("vllm")], lengths=FixedLengths(50)) as fleet:
        with pytest.raises(TransportTimeout, match=name):
            await arrivals(fleet.servers[0], fleet, limits)
        assert len(fleet.servers[0].scheduler.running) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_leaving_a_stream_frees_its_slot(autojump_clock: MockClock, dialect: str) -> None:
    async with open_fleet([one_a_second(dialect)], lengths=FixedLengths(50), traced=True) as fleet:
        (server,) = fleet
        async with fleet.stream(server.address, question(dialect), LIMITS) as response:
            async for _ in response.chunks():
                break
        assert server.generations == len(server.scheduler.running) == 0
        assert [exchange.outcome for exchange in fleet.trace] == ["", "left"]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_client_whose_leaving_is_missed(autojump_clock: MockClock, dialect: str) -> None:
    async with engine_on(dialect, length=20) as (engine, fleet):
        (server,) = fleet
        fleet.faults.plan("lost_abort")
        with trio.move_on_after(3):
            await generate(engine)
        assert (server.generations, server.orphans) == (0, 1)
        await trio.sleep(30)
        assert server.orphans == len(server.scheduler.running) == 0
        updating = {"model_path": checkpoint(1), "weight_version": "1"}  # waits for an empty gate
        if dialect == "sglang":
            body = msgspec.json.encode(updating)
            request = HttpRequest("POST", "/update_weights_from_disk", body)
            answer = await fleet.request(server.address, request, TimeLimits.of(5.0))
            assert answer.status == 200


async def test_a_stream_above_the_limit_is_refused(autojump_clock: MockClock) -> None:
    async with open_fleet([one_a_second("vllm")], lengths=FixedLengths(50)) as fleet:
        with pytest.raises(ResponseTooLarge):
            await arrivals(fleet.servers[0], fleet, size_bytes_max=2000)
        assert fleet.servers[0].generations == 0


async def test_a_dead_server_resets_a_stream_that_is_not_being_read(
    autojump_clock: MockClock,
) -> None:
    async with open_fleet([one_a_second("vllm")], lengths=FixedLengths(50)) as fleet:
        (server,) = fleet
        async with fleet.stream(server.address, question("vllm"), LIMITS) as response:
            server.restart()
            with pytest.raises(TransportError, match="reset"):
                async for _ in response.chunks():
                    pass


async def test_every_kind_at_once_never_changes_a_token(autojump_clock: MockClock) -> None:
    rates = {"death": 0.02, "hang": 0.02, "reset": 0.1, "truncated": 0.05, "garbage": 0.05,
             "server_error": 0.05, "late": 0.05, "partition": 0.02, "lost_abort": 0.5}  # fmt: skip
    for dialect in DIALECTS:
        faults = Faults(5, rates=rates, outage_s=(1.0, 10.0))
        async with engine_on(
            dialect, servers=4, faults=faults, idle_timeout_s=5.0, max_failovers=50
        ) as (engine, fleet):
            for _ in range(100):
                answer: ModelResponse | None = None
                with suppress(TransportError):
                    answer = await generate(engine)
                assert answer is not None
                assert answer.output_tokens.tolist() == countdown(6)
            assert len(fleet.faults.log) > 20
            fleet.faults.stop()
            await trio.sleep(100)
            assert [s.state for s in engine.statistics()] == ["ready"] * 4
            assert [server.orphans for server in fleet] == [0] * 4
