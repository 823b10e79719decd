"""Defects of ours that the simulation found, each as small as it can be told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import pytest
import trio
from trio.testing import MockClock

from arealtrio import (
    GenerationHyperparameters,
    ModelRequest,
    RolloutConfig,
    WeightUpdate,
    WorkflowExecutor,
    open_executor,
)
from arealtrio.errors import NoServerAvailable, StalenessBudgetExhausted, WeightUpdateError
from arealtrio.testing import (
    FixedLengths,
    ScriptedModel,
    SimulatedFleet,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    open_fleet,
    simulated_executor,
)
from arealtrio.types import HttpRequest, Outcome

from ..unit.puppet import Generates, Instant, Puppet, prompts


async def test_a_result_that_nobody_takes_in_time_gives_its_budget_back(
    autojump_clock: MockClock,
) -> None:
    """It kept it until somebody took it, and a trainer that was told to update was told again."""
    async with simulated_executor(servers=1, consumer_batch_size=1) as (executor, _):
        loader = prompts()
        task = executor.submit({"prompt_id": "untaken"}, Instant())
        await executor.drain()
        with pytest.raises(StalenessBudgetExhausted):
            await executor.prepare_batch(loader, Instant())
        await executor.set_version(1)
        assert len(await executor.prepare_batch(loader, Instant())) == 1
        assert (await executor.wait_for_task(task)).outcome is Outcome.EXPIRED
        counts = executor.counts.as_dict()
        assert (counts["accepted"], counts["expired"]) == (1, 1)


MANY = GenerationHyperparameters(max_new_tokens=100)
LOADS_FOR_3_S = (SimulatedServerSettings(load_time_s=3.0),) * 2


def to(version: int, **how: Any) -> WeightUpdate:
    return WeightUpdate.from_disk(checkpoint(version), version, **how)


async def check_weights(executor: WorkflowExecutor, fleet: SimulatedFleet, version: int) -> None:
    """Every server that is in service in the end has the weights that its label names."""
    await executor.wait_ready(60.0)
    assert executor.get_version() == version
    for server in fleet:
        model = server.scheduler.model
        assert isinstance(model, ScriptedModel)
        assert (model.version, server.scheduler.weight_version) == (version, str(version))


async def test_a_server_that_comes_back_during_an_update_has_the_weights_of_its_label(
    autojump_clock: MockClock,
) -> None:
    """It was restoring the ones before, and was then taken to have the new ones, but the label."""
    async with simulated_executor(servers=LOADS_FOR_3_S) as (executor, fleet):
        await executor.update_weights(to(1))
        fleet.faults.plan("failed_load", server=fleet.servers[0])
        result = await executor.update_weights(to(2, rolling=True))
        assert result.updated == ("http://server-1",)
        await check_weights(executor, fleet, 2)


async def test_a_server_that_restarts_within_an_update_does_not_get_the_label_of_its_weights(
    autojump_clock: MockClock,
) -> None:
    """Loaded, started again, labelled: its first weights went by the name of the new ones."""
    async with simulated_executor(servers=LOADS_FOR_3_S) as (executor, fleet):
        fleet.faults.plan("restart", server=fleet.servers[0], path="/reset_prefix_cache")
        result = await executor.update_weights(to(1))
        assert list(result.failed) == ["http://server-0"]
        await check_weights(executor, fleet, 1)


async def test_a_server_that_restarts_while_it_is_restored_is_restored_again(
    autojump_clock: MockClock,
) -> None:
    async with simulated_executor(servers=LOADS_FOR_3_S) as (executor, fleet):
        first = fleet.servers[0]
        first.die()
        await executor.update_weights(to(1))
        fleet.faults.plan("restart", server=first, path="/reset_prefix_cache")
        first.restart()
        await trio.sleep(1.0)
        await check_weights(executor, fleet, 1)


async def test_a_server_that_keeps_the_old_label_has_not_taken_the_update(
    autojump_clock: MockClock,
) -> None:
    """What waited for it through the update was stamped with the version before."""
    async with simulated_executor(servers=LOADS_FOR_3_S) as (executor, fleet):
        fleet.faults.plan("wrong_version", server=fleet.servers[0])
        result = await executor.update_weights(to(1))
        assert list(result.failed) == ["http://server-0"]
        assert "reports version" in result.failed["http://server-0"]
        await check_weights(executor, fleet, 1)


async def test_a_new_process_that_labels_itself_wrongly_has_not_what_the_one_before_it_had(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had taken the update before it died, and called itself by that number when it returned."""
    settings = [SimulatedServerSettings(load_time_s=seconds) for seconds in (1.0, 30.0)]
    async with simulated_executor(
        servers=settings, health_interval_s=1.0, probe_interval_max_s=1.0
    ) as (executor, fleet):
        first = fleet.servers[0]
        always_1 = lambda server, asked: "1" if server is first else asked  # noqa: E731
        monkeypatch.setattr(fleet.faults, "on_label", always_1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.update_weights, to(1, rolling=True))
            await trio.sleep(10.0)
            assert first.scheduler.weight_version == "1"
            first.die()
            await trio.sleep(10.0)
            assert executor.engine.pool.named(first.address).state.value == "ejected"
            first.restart()
            await trio.sleep(5.0)
            assert (first.scheduler.weight_version, executor.get_version()) == ("1", 0)
        await check_weights(executor, fleet, 1)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_an_adapter_does_not_hide_that_its_server_was_started_again(
    autojump_clock: MockClock, dialect: Literal["vllm", "sglang"]
) -> None:
    """Between two health checks: the adapter lay on the first weights, under the newest label."""
    settings = [SimulatedServerSettings(dialect=dialect, load_time_s=3.0)] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        await executor.update_weights(to(1))
        fleet.servers[0].restart()
        result = await executor.update_weights(WeightUpdate.lora("policy", "/", 2))
        assert list(result.failed) == ["http://server-0"]
        assert "was restarted" in result.failed["http://server-0"]
        await executor.wait_ready(60.0)
        models = [server.scheduler.model for server in fleet]
        assert [model.version for model in models if isinstance(model, ScriptedModel)] == [1, 1]
        assert {server.scheduler.weight_version for server in fleet} == {"2"}


async def test_a_server_that_is_added_again_within_an_update_has_not_its_first_weights(
    autojump_clock: MockClock,
) -> None:
    """It had loaded the new ones as a member before, and was labelled as if it had the first."""
    settings = [SimulatedServerSettings(load_time_s=seconds) for seconds in (1.0, 60.0)]
    async with simulated_executor(servers=settings, probe_interval_max_s=1.0) as (executor, fleet):
        first = fleet.servers[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.update_weights, to(1))
            await trio.sleep(10.0)
            assert first.scheduler.weight_version == "1"
            executor.remove_server(first.address)
            await trio.sleep(1.0)
            executor.add_server(first.address)
            await trio.sleep(20.0)
            assert first.scheduler.weight_version == "1"
            assert executor.get_version() == 0
        await check_weights(executor, fleet, 1)


@asynccontextmanager
async def after_a_run_that_came_to_1(servers: int) -> AsyncIterator[tuple[WorkflowExecutor, Any]]:
    """An executor of the first of two servers, or of both, which an earlier run left behind."""
    quick = {"health_interval_s": 0.5, "health_timeout_s": 0.5, "probe_interval_max_s": 1.0}
    async with open_fleet([SimulatedServerSettings(load_time_s=5.0)] * 2) as fleet:
        async with open_executor(RolloutConfig(servers=fleet.addresses), transport=fleet) as before:
            await before.update_weights(to(1))
        config: dict[str, Any] = {"servers": fleet.addresses[:servers], **quick}
        async with open_executor(RolloutConfig(**config), transport=fleet) as executor:
            yield executor, fleet


async def test_who_joins_within_an_update_to_the_version_that_it_is_taken_to_have_has_missed_it(
    autojump_clock: MockClock,
) -> None:
    """It was labelled 0, as all are at the start, and so was what the others were loading."""
    async with after_a_run_that_came_to_1(servers=1) as (executor, fleet):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.update_weights, to(0))
            await trio.sleep(1.0)
            executor.add_server(fleet.addresses[1])
            await trio.sleep(2.0)
            assert [row.state for row in executor.statistics()] == ["paused", "ready"]
        await check_weights(executor, fleet, 0)


async def test_who_returns_after_an_update_to_the_version_that_it_has_missed_it(
    autojump_clock: MockClock,
) -> None:
    async with after_a_run_that_came_to_1(servers=2) as (executor, fleet):
        fleet.faults.partition(fleet.servers[1])
        while executor.statistics()[1].state != "ejected":
            await executor.engine.pool.service_changed.wait()
        assert (await executor.update_weights(to(0))).updated == (fleet.addresses[0],)
        fleet.faults.heal()
        await check_weights(executor, fleet, 0)


async def test_an_adapter_goes_to_a_server_that_never_told_a_label(
    autojump_clock: MockClock,
) -> None:
    """It was taken for one that was restarted, at every update: no server had the adapter."""
    async with open_fleet(LOADS_FOR_3_S) as fleet, AsyncExitStack() as stack:
        config = RolloutConfig(servers=fleet.addresses, backend="vllm")
        with pytest.MonkeyPatch.context() as patch:
            keeps = lambda server, _: server.scheduler.weight_version  # noqa: E731
            patch.setattr(fleet.faults, "on_label", keeps)
            executor = await stack.enter_async_context(open_executor(config, transport=fleet))
        result = await executor.update_weights(WeightUpdate.lora("policy", "/", 1))
        assert not result.failed
        assert {server.scheduler.weight_version for server in fleet} == {"1"}


async def test_a_wrong_label_is_set_right_where_there_is_nothing_to_load(
    autojump_clock: MockClock,
) -> None:
    """An adapter alone mends no base weights, so the server would stay out for ever."""
    async with simulated_executor(servers=LOADS_FOR_3_S) as (executor, fleet):
        fleet.faults.plan("wrong_version", server=fleet.servers[0])
        await executor.update_weights(WeightUpdate.lora("policy", "/", 1))
        await executor.wait_ready(60.0)
        await executor.update_weights(WeightUpdate.lora("policy", "/", 2))
        await executor.wait_ready(60.0)
        assert {server.scheduler.weight_version for server in fleet} == {"2"}


async def test_a_server_that_took_no_label_is_not_taken_for_one_that_was_restarted(
    autojump_clock: MockClock,
) -> None:
    """It had loaded weights that nobody asked for any more, and went on as if it had the first."""
    async with open_fleet(LOADS_FOR_3_S) as fleet, AsyncExitStack() as stack:
        config = RolloutConfig(servers=fleet.addresses, backend="vllm", probe_interval_max_s=1.0)
        with pytest.MonkeyPatch.context() as patch:
            keeps = lambda server, _: server.scheduler.weight_version  # noqa: E731
            patch.setattr(fleet.faults, "on_label", keeps)
            executor = await stack.enter_async_context(open_executor(config, transport=fleet))
            with pytest.raises(WeightUpdateError, match="reports version None"):
                await executor.update_weights(to(1))
        await trio.sleep(60.0)
        assert executor.get_version() == 0
        assert executor.engine.pool.in_service == ()
        await executor.update_weights(to(2))
        await check_weights(executor, fleet, 2)


async def test_a_server_that_restarts_between_label_and_load_is_not_taken_for_a_fresh_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load met the new process, which then went by the name of the weights it began with."""
    async with simulated_executor(servers=1) as (executor, fleet):
        (server,), carry, pool = fleet.servers, fleet.request, executor.engine.pool
        await pool.confirm(pool.servers[0], 0)  # it has told its label

        async def request(address: str, request: HttpRequest, *args: Any, **how: Any) -> Any:
            if request.path == "/collective_rpc" and server.scheduler.weight_version == "1":
                server.restart()
            return await carry(address, request, *args, **how)

        monkeypatch.setattr(fleet, "request", request)
        with pytest.raises(WeightUpdateError, match="reports version None"):
            await executor.update_weights(to(1))
        monkeypatch.undo()
        assert server.scheduler.model.version == 1  # type: ignore[attr-defined]
        assert server.scheduler.weight_version == "default"
        await trio.sleep(60.0)
        assert executor.engine.pool.in_service == ()
        await executor.update_weights(to(2))
        await check_weights(executor, fleet, 2)


async def test_tokens_of_a_stream_that_broke_off_before_its_report_are_not_vouched_for(
    autojump_clock: MockClock,
) -> None:
    """The server had been restarted since its label was read, and was again before its report."""
    settings = (SimulatedServerSettings(load_time_s=1.0, token_time_s=1.0),)
    async with simulated_executor(
        servers=settings, lengths=FixedLengths(8), streaming=True, probe_interval_max_s=1.0
    ) as (executor, fleet):
        (server,) = fleet
        await executor.update_weights(to(2))
        server.restart()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate_unvouched, executor)
            await trio.sleep(4.5)
            server.restart()


async def generate_unvouched(executor: WorkflowExecutor) -> None:
    answer = await executor.engine.agenerate(ModelRequest([1, 2], MANY))
    assert answer.output_versions.tolist() == [2] * 8
    assert [made_by(float(logprob)) for logprob in answer.output_logprobs] != [2] * 8
    assert not answer.versions_exact


async def test_what_a_call_throws_away_was_not_delivered_too_late(
    autojump_clock: MockClock,
) -> None:
    """Nobody got it, so it is no violation; it was counted as one when the call was cancelled."""
    async with simulated_executor(servers=1, consumer_batch_size=2, straggler_policy="keep") as (
        executor,
        _,
    ):
        workflow = Puppet()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.rollout_batch, [{"prompt_id": n} for n in "ab"], workflow)
            await trio.testing.wait_all_tasks_blocked()
            workflow.end("a")
            await trio.testing.wait_all_tasks_blocked()
            await executor.set_version(1)
            nursery.cancel_scope.cancel()
        assert executor.counts.as_dict()["accepted"] == 1
        assert executor.staleness_violations == 0


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("lost", ["the question", "the answer"])
async def test_a_server_that_did_not_confirm_that_it_woke_is_not_used_asleep(
    autojump_clock: MockClock, dialect: Literal["vllm", "sglang"], lost: str
) -> None:
    """It was given weights and requests; only a tag that was never asked for may be woken twice."""
    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with simulated_executor(
        servers=settings, probe_interval_s=0.5, consumer_batch_size=8
    ) as (executor, fleet):
        doubtful = fleet.servers[0]
        update = WeightUpdate.from_disk(checkpoint(1), 1)
        await executor.update_weights(update)
        async with executor.offloaded():
            kind = "server_error" if lost == "the question" else "reset"
            wake = "/wake_up" if dialect == "vllm" else "/resume_memory_occupation"
            fleet.faults.plan(kind, server=doubtful, path=wake, after_bytes=1)
        server = executor.engine.pool.named(doubtful.address)
        await trio.sleep(60)
        if dialect == "sglang":
            assert server.state.value == "stale"
            assert "restart it" in server.reason
            assert doubtful.asleep
            result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(2), 2))
            assert result.updated == (fleet.servers[1].address,)
            doubtful.restart()
            await trio.sleep(60)
        assert server.state.value == "ready"
        assert not doubtful.asleep
        assert doubtful.scheduler.weight_version == str(executor.get_version())
        for prompt in prompts(8):
            executor.submit(prompt, Generates())
        results = await executor.wait(8)
        assert [result.outcome for result in results] == [Outcome.ACCEPTED] * 8


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_a_server_that_takes_on_another_label_as_it_joins_is_refused(
    autojump_clock: MockClock, dialect: Literal["vllm", "sglang"]
) -> None:
    """An answer that came after the next update was taken for one that the new weights had made."""
    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with open_fleet(settings) as fleet:
        config = RolloutConfig(servers=fleet.addresses, backend=dialect, vocab_size=1_002_000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fleet.faults, "on_label", lambda *_: "1")
            with pytest.raises(
                NoServerAvailable, match=r"version 1 .* does another trainer use it"
            ):
                async with open_executor(config, transport=fleet):
                    pass
        async with open_executor(config, transport=fleet) as executor:
            await executor.wait_ready(60.0)
