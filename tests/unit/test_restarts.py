"""Servers that are started again behind the pool's back: found out, and nothing lost by them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import RequestRejected, TransportError
from arealtrio.settlement import classify
from arealtrio.testing import (
    FixedLengths,
    SimulatedFleet,
    SimulatedServerSettings,
    checkpoint,
    open_fleet,
    simulated_executor,
)
from arealtrio.types import (
    FailureKind,
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
)
from arealtrio.weights import WeightUpdate, update_weights

from .faulty import Fault, Faulty, faulty_engine, refuses
from .puppet import Deferred, Generates, prompts, settled
from .test_supervision import check_exact, disk, requests_of, states, traffic, until_states

Clock = trio.testing.MockClock
GENERATE = "/inference/v1/generate"
both_dialects = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
ABSENT = HttpResponse(404, {"content-type": "application/json"}, b'{"detail":"Not Found"}')
ADAPTED = GenerationHyperparameters(max_new_tokens=20, lora_name="x")
TYPO = GenerationHyperparameters(max_new_tokens=20, lora_name="nobody")


# --- what a restarted server refuses ------------------------------------------------------------


@both_dialects
async def test_a_restarted_server_that_lost_its_adapters_takes_no_work_with_it(
    dialect: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    """It refuses at once, so that it always has the fewest requests: it would get them all."""
    servers = [SimulatedServerSettings(dialect=dialect)] * 4  # type: ignore[arg-type]
    async with simulated_executor(
        servers=servers, lengths=FixedLengths(20), consumer_batch_size=8, max_staleness=4
    ) as (executor, fleet):
        await executor.update_weights(WeightUpdate.lora("x", tmp_path, 1))
        fleet.servers[3].restart()  # idle, so that no connection tells
        loader = prompts()
        for version in (2, 3, 4):
            batch = await executor.prepare_batch(loader, Generates(ADAPTED))
            assert len(batch) == 8
            await executor.update_weights(WeightUpdate.lora("x", tmp_path, version))
        assert executor.counts.as_dict()["failed"] == 0
        await until_states(executor.engine, *["ready"] * 4)
        for _ in range(4):
            await executor.engine.agenerate(ModelRequest([3], ADAPTED))
        assert requests_of(executor.engine)[3] > 1


@both_dialects
async def test_a_server_that_restarts_in_a_pause_is_found_out_by_what_it_refuses(
    dialect: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    """Nobody checks a paused server, and it is sent requests the moment it goes on."""
    servers = [SimulatedServerSettings(dialect=dialect)] * 2  # type: ignore[arg-type]
    async with simulated_executor(servers=servers, lengths=FixedLengths(20)) as (executor, fleet):
        engine = executor.engine
        await update_weights(engine.pool, WeightUpdate.lora("x", tmp_path, 1))
        async with engine.paused():
            fleet.servers[1].die()
            await trio.sleep(60)
            fleet.servers[1].restart()
        async with trio.open_nursery() as nursery:
            request = ModelRequest([3], ADAPTED)
            calls = [Deferred(nursery, engine.agenerate, request) for _ in range(2)]
            await until_states(engine, "ready", "stale")
            assert "it was restarted" in engine.statistics()[1].reason
        for call in calls:
            assert set(call.value.output_versions.tolist()) == {1}
        await until_states(engine, "ready", "ready")


async def test_a_server_that_comes_back_without_the_token_route_is_asked_on_another(
    autojump_clock: Clock,
) -> None:
    """As when it is started again without --enable-scale-out."""
    async with faulty_engine(length=20) as (engine, faulty):
        changed = faulty.fleet.addresses[1]
        await update_weights(engine.pool, disk(1))

        def without_route(address: str, request: HttpRequest) -> HttpResponse | None:
            return ABSENT if (address, request.path) == (changed, GENERATE) else None

        faulty.fleet.servers[1].restart()
        faulty.fault = without_route
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])), 20)
        await until_states(engine, "ready", "ready")
        assert not engine.pool.servers[1].info.token_in_token_out
        asked = requests_of(engine)[1]
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])), 20)
        assert requests_of(engine)[1] > asked


async def test_a_refusal_of_one_that_lost_even_its_development_routes_is_not_the_prompts(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(length=20) as (engine, faulty):
        changed = faulty.fleet.addresses[1]
        await update_weights(engine.pool, disk(1))
        faulty.fleet.servers[1].restart()
        gone = (GENERATE, "/weight_info", "/update_weight_version", "/collective_rpc", "/pause")
        faulty.fault = lambda address, request: (
            ABSENT if address == changed and request.path.startswith(gone) else None
        )
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])), 20)
        assert states(engine) == ["ready", "stale"]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 408, 425, 429])
async def test_a_refusal_that_is_not_the_requests_costs_time_only(
    status: int, autojump_clock: Clock
) -> None:
    async with faulty_engine() as (engine, faulty), traffic(engine, 4):
        faulty.fault = refuses(GENERATE, faulty.fleet.addresses[0], status=status)
        await until_states(engine, "ejected", "ready")
        faulty.fault = lambda *_: None
        await until_states(engine, "ready", "ready")


async def test_where_every_server_refuses_it_so_the_prompt_is_not_blamed(
    autojump_clock: Clock,
) -> None:
    async with faulty_engine(max_failovers=3) as (engine, faulty):
        faulty.asked.clear()
        faulty.fault = refuses(GENERATE, status=429)
        with pytest.raises(RequestRejected) as caught:
            await engine.agenerate(ModelRequest([3]))
        assert classify(caught.value) is FailureKind.INFRASTRUCTURE
        assert "max_failovers" in caught.value.__notes__[-1]
        assert sum(path == GENERATE for _, path in faulty.asked) == 4


@pytest.mark.parametrize("gconfig", [ADAPTED, GenerationHyperparameters()])
async def test_a_prompt_that_is_wrong_is_refused_once_and_ends_as_its_own_failure(
    gconfig: GenerationHyperparameters, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with faulty_engine() as (engine, faulty):
        await update_weights(engine.pool, WeightUpdate.lora("x", tmp_path, 1))
        faulty.asked.clear()
        faulty.fault = refuses(GENERATE)
        with pytest.raises(RequestRejected) as caught:
            await engine.agenerate(ModelRequest([3], gconfig))
        assert classify(caught.value) is FailureKind.DATA
        assert sum(path == GENERATE for _, path in faulty.asked) == 1
        assert states(engine) == ["ready", "ready"]


async def test_an_adapter_that_nobody_loaded_is_no_servers_failure(autojump_clock: Clock) -> None:
    async with faulty_engine() as (engine, _):
        for _ in range(20):
            with pytest.raises(RequestRejected, match="nobody"):
                await engine.agenerate(ModelRequest([3], TYPO))
        assert states(engine) == ["ready", "ready"]
        assert engine.totals().failovers == 0


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


def loses(path: str, *addresses: str) -> Fault:
    """No answer comes to a request that may have arrived."""

    def fault(address: str, request: HttpRequest) -> HttpResponse | None:
        if request.path == path and address in addresses:
            raise TransportError("lost")
        return None

    return fault


# --- where no label tells -----------------------------------------------------------------------


class Unlabelled(Faulty):
    """AReaL's routes, and what its vLLM lacks, in front of simulated servers."""

    def __init__(self, fleet: SimulatedFleet, *, tells_start: bool = True) -> None:
        super().__init__(fleet)
        absent = [GENERATE, "/update_weight_version", "/weight_info", "/is_sleeping"]
        self.absent = absent if tells_start else [*absent, "/metrics"]

    async def request(self, base_url: str, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if request.path in self.absent:
            return ABSENT
        return await super().request(base_url, self._translated(request), *args, **kwargs)

    def _translated(self, request: HttpRequest) -> HttpRequest:
        if request.path == "/areal_pause_generation":
            return HttpRequest("POST", "/pause?mode=abort")
        if request.path == "/areal_continue_generation":
            return HttpRequest("POST", "/resume")
        if request.path == "/areal_update_weights":
            path = msgspec.json.decode(request.body)["model_path"]
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            return HttpRequest("POST", "/collective_rpc", msgspec.json.encode(rpc))
        return request


@asynccontextmanager
async def unlabelled_engine(**kind: Any) -> AsyncIterator[tuple[RemoteEngine, SimulatedFleet]]:
    async with open_fleet(2, lengths=FixedLengths(20)) as fleet:
        config = RolloutConfig(servers=fleet.addresses, backend="vllm_areal")
        transport = Unlabelled(fleet, **kind)
        async with open_engine(config, transport=transport) as engine:
            yield engine, fleet


async def test_a_server_without_labels_is_told_by_its_start_from_the_one_before(
    autojump_clock: Clock,
) -> None:
    async with unlabelled_engine() as (engine, fleet):
        update = WeightUpdate.from_disk(checkpoint(1), 1, pause="abort")
        assert not (await update_weights(engine.pool, update)).failed
        await trio.sleep(100)
        assert states(engine) == ["ready", "ready"]
        check_exact(await engine.agenerate(ModelRequest([3])), 20)
        fleet.servers[1].restart()
        await until_states(engine, "ready", "stale")
        assert "it was restarted" in engine.statistics()[1].reason
        await until_states(engine, "ready", "ready")
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])), 20)
        assert requests_of(engine)[1] > 1


async def test_one_without_labels_that_was_restarted_around_an_update_is_not_taken_to_have_it(
    autojump_clock: Clock,
) -> None:
    async with unlabelled_engine() as (engine, fleet):
        await trio.sleep(1)
        fleet.servers[1].restart()
        update = WeightUpdate.from_disk(checkpoint(1), 1, pause="abort")
        result = await update_weights(engine.pool, update)
        assert "it was restarted" in result.failed[fleet.addresses[1]]
        await until_states(engine, "ready", "ready")
        for _ in range(4):
            check_exact(await engine.agenerate(ModelRequest([3])), 20)


async def test_where_nothing_tells_a_restart_no_version_but_the_first_is_exact(
    autojump_clock: Clock,
) -> None:
    async with unlabelled_engine(tells_start=False) as (engine, _):
        check_exact(await engine.agenerate(ModelRequest([3])), 20)
        await update_weights(engine.pool, WeightUpdate.from_disk(checkpoint(1), 1, pause="abort"))
        answer = await engine.agenerate(ModelRequest([3]))
        assert set(answer.output_versions.tolist()) == {1}
        assert not answer.versions_exact


async def test_a_restart_is_told_from_one_of_a_server_that_slept_before_it_had_its_weights_again(
    autojump_clock: Clock,
) -> None:
    """An SGLang that may be awake must not be woken: only a label tells that it was restarted."""
    servers = [SimulatedServerSettings(dialect="sglang")] * 2
    async with open_fleet(servers, lengths=FixedLengths(20)) as fleet:
        config = RolloutConfig(servers=fleet.addresses, backend="sglang", vocab_size=50_000)
        transport = Faulty(fleet)
        async with open_engine(config, transport=transport) as engine:
            await update_weights(engine.pool, disk(1))
            bad, server = fleet.addresses[0], engine.pool.servers[0]
            transport.fault = refuses("/update_weights_from_disk", bad, status=500)
            fleet.servers[0].restart()
            await until_states(engine, "stale", "ready")
            await trio.sleep(5)
            assert "ServerError" in server.reason  # it was tried, and has no weights
            transport.fault = loses("/resume_memory_occupation", bad)
            assert not await engine.offload()
            assert list(await engine.onload()) == [bad]
            transport.fault = lambda *_: None
            await trio.sleep(100)
            assert "restart it" in server.reason
            fleet.servers[0].restart()
            await until_states(engine, "ready", "ready")
            for _ in range(4):
                check_exact(await engine.agenerate(ModelRequest([3])), 20)
