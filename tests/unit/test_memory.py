"""Servers that sleep while the trainer uses their GPUs, of both dialects, over sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import ConnectFailed, TransportError, UsageError, WeightUpdateError
from arealtrio.testing import (
    ServerCondition,
    SimulatedServerSettings,
    checkpoint,
    simulated_executor,
)
from arealtrio.types import GenerationHyperparameters, HttpRequest, ModelRequest, ModelResponse
from arealtrio.weights import (
    TensorSpec,
    WeightsGroup,
    WeightUpdate,
    init_weights_group,
    update_weights,
)

from .embedded_server import PROMPT, VOCAB_SIZE
from .faulty import faulty_engine
from .observed import Observed, observed_engine, running_servers

both_dialects = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
ENDLESS = GenerationHyperparameters(max_new_tokens=300, ignore_eos=True, greedy=True)
SLEEP = {"vllm": "/sleep?level=1", "sglang": "/release_memory_occupation"}
WAKE = {"vllm": "/wake_up", "sglang": "/resume_memory_occupation"}
FRAGILE: dict[str, dict[str, Any]] = {"vllm": {}, "sglang": {"fragile": True}}


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


def slept(seen: Observed, url: str, dialect: str) -> int:
    return seen.paths(url).count(SLEEP[dialect])


def woken(seen: Observed, url: str, dialect: str) -> int:
    return sum(path.startswith(WAKE[dialect]) for path in seen.paths(url))


def disk(seen: Observed, version: int) -> WeightUpdate:
    return WeightUpdate.from_disk(seen.weights[2], version)


@both_dialects
async def test_generations_wait_while_the_trainer_trains_and_go_on_with_its_weights(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast: dict[str, Any] = {"token_time_s": 0.001, **FRAGILE[dialect]}
    async with observed_engine(tmp_path, monkeypatch, dialect, **fast) as (engine, seen):
        answers: list[ModelResponse] = []

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest(PROMPT, ENDLESS)))

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(generate)
            for watch in seen.watches.values():
                await watch.until(lambda scheduler: bool(scheduler.running))
            async with engine.offloaded() as failed:
                assert not failed
                assert not answers
                for server in seen.servers.values():
                    assert not server.scheduler.running
                assert states(engine) == ["paused", "paused"]
                await update_weights(engine.pool, disk(seen, 1))
                assert states(engine) == ["paused", "paused"]
                assert not answers
            assert states(engine) == ["ready", "ready"]
        for answer in answers:
            assert answer.output_len == 300
            assert answer.output_versions[-1] == 1
            assert answer.versions_exact
        for url in seen.urls:
            assert slept(seen, url, dialect) == 1
            assert woken(seen, url, dialect) == len(engine.pool.dialect.memory_tags)


@both_dialects
async def test_the_weights_wake_before_the_update_and_the_cache_after_it(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1, **FRAGILE[dialect]) as (
        engine,
        seen,
    ):
        seen.forget()
        async with engine.offloaded():
            await update_weights(engine.pool, disk(seen, 1))
        load = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}[dialect]
        paths = seen.paths(seen.urls[0])
        wakes = [i for i, path in enumerate(paths) if path.startswith(WAKE[dialect])]
        assert paths.index(SLEEP[dialect]) < wakes[0] < paths.index(load) < wakes[1]
        resume = {"vllm": "/resume", "sglang": "/continue_generation"}[dialect]
        assert paths[-1] == resume
        assert (await engine.agenerate(ModelRequest(PROMPT))).output_versions[0] == 1


@both_dialects
async def test_nothing_is_released_or_woken_twice(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1, **FRAGILE[dialect]) as (
        engine,
        seen,
    ):
        assert not await engine.onload()  # nothing sleeps
        assert not await engine.offload()
        assert not await engine.offload()
        assert engine.memory.is_lent
        await engine.onload(["weights"])
        await engine.onload(["weights"])
        assert engine.memory.is_lent
        await update_weights(engine.pool, disk(seen, 1))
        await engine.onload()
        await engine.onload()
        assert not engine.memory.is_lent
        assert states(engine) == ["ready"]
        assert slept(seen, seen.urls[0], dialect) == 1
        assert woken(seen, seen.urls[0], dialect) == len(engine.pool.dialect.memory_tags)
        with pytest.raises(UsageError, match="curtains"):
            await engine.onload(["curtains"])


@both_dialects
async def test_what_an_update_woke_is_put_to_sleep_again(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said to sleep, while its weights were on the GPU."""
    async with observed_engine(tmp_path, monkeypatch, dialect, 1, **FRAGILE[dialect]) as (
        engine,
        seen,
    ):
        tags = set(engine.pool.dialect.memory_tags)
        (server,) = engine.pool.servers
        async with engine.offloaded():
            await update_weights(engine.pool, disk(seen, 1))
            assert server.asleep == tags - {"weights"}
            assert not await engine.offload()
            assert server.asleep == tags
            assert not await engine.offload()
            assert slept(seen, seen.urls[0], dialect) == 2
            await update_weights(engine.pool, disk(seen, 2))
        assert states(engine) == ["ready"]
        assert woken(seen, seen.urls[0], dialect) == len(tags) + 1
        assert (await engine.agenerate(ModelRequest(PROMPT))).output_versions[0] == 2


@both_dialects
async def test_a_server_that_can_not_let_go_of_what_was_woken_is_named(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM lets go of its cache along with its weights, or not at all."""
    async with observed_engine(tmp_path, monkeypatch, dialect, 1, **FRAGILE[dialect]) as (
        engine,
        seen,
    ):
        async with engine.offloaded():
            assert not await engine.onload(["kv_cache"])
            failed = await engine.offload()
            assert list(failed) == (seen.urls if dialect == "vllm" else [])
            assert all("its kv_cache alone" in error for error in failed.values())
        assert "kv_cache" not in engine.pool.servers[0].asleep
        assert not engine.memory.is_lent


@both_dialects
async def test_a_server_that_was_restarted_while_it_slept_is_put_to_sleep_again(
    dialect: Any, autojump_clock: MockClock
) -> None:
    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        async with executor.offloaded():
            fleet.servers[1].restart()
            assert not await executor.offload()
            assert fleet.servers[1].asleep
        await executor.engine.pool.wait_ready(100)
        for server in fleet:
            assert not server.asleep
            assert server.scheduler.weight_version == "1"


async def test_a_server_that_slept_without_a_label_returns_once_it_was_restarted(
    autojump_clock: MockClock,
) -> None:
    """It was asked for a restart for ever: nothing told one process from the next."""
    settings = [SimulatedServerSettings(dialect="sglang")] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        pool, twice = executor.engine.pool, fleet.servers[0]
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        server = pool.named(twice.address)
        pool.mark_stale(server, "the test says so")
        twice.restart()
        fleet.faults.plan("failed_load", server=twice, count=2)
        await trio.sleep(2)
        assert not server.labelled
        wake = "/resume_memory_occupation"
        async with executor.offloaded() as failed:
            assert not failed
            fleet.faults.plan("reset", server=twice, path=wake, after_bytes=1)
        await trio.sleep(60)
        assert "restart it" in server.reason
        twice.restart()
        await pool.wait_ready(200)
        assert twice.scheduler.weight_version == "1"


@both_dialects
async def test_a_server_removed_while_it_sleeps_is_woken_and_goes_on(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        removed = seen.urls[1]
        async with engine.offloaded():
            engine.pool.fleet.remove(removed)
            await engine.onload(["weights"])
            assert engine.memory.is_lent
        assert not engine.memory.is_lent
        assert seen.servers[removed].scheduler.pause_mode is None
        assert woken(seen, removed, dialect) == len(engine.pool.dialect.memory_tags)


@both_dialects
async def test_what_sleeps_is_woken_when_training_fails_and_at_the_end(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1) as (engine, seen):
        with trio.move_on_after(30) as scope:
            async with engine.offloaded():
                scope.cancel()
                await trio.sleep_forever()
        assert not engine.memory.is_lent
        assert woken(seen, seen.urls[0], dialect) == len(engine.pool.dialect.memory_tags)
        seen.forget()
        await engine.offload()
    assert woken(seen, seen.urls[0], dialect) == len(engine.pool.dialect.memory_tags)


async def test_closing_waits_for_a_server_as_long_as_it_wakes(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It gave up after a while, with the weights awake and the cache not, and said nothing."""
    async with faulty_engine(close_timeout_s=10.0) as (engine, faulty):
        faulty.delay_s = lambda path: 6.0 if path.startswith("/wake_up") else 0.0
        with trio.CancelScope() as scope:
            async with open_engine(engine.config, transport=faulty) as other:
                await other.offload()
                scope.cancel()  # as by Ctrl-C
        assert not any(server.asleep for server in faulty.fleet)
        assert [server.scheduler.pause_mode for server in faulty.fleet] == [None, None]
        assert not other.memory.is_lent
        assert not caplog.text


@both_dialects
async def test_closing_gives_a_server_up_that_hangs_and_names_it(
    dialect: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with simulated_executor(servers=settings, close_timeout_s=10.0) as (executor, fleet):
        await executor.offload()
        awake, hung = fleet.servers
        hung.hang()
        began = trio.current_time()
        await executor.engine.memory.close()
        assert trio.current_time() - began < 15
        assert f"{hung.address} may be left asleep, restart it" in caplog.text
        assert awake.address not in caplog.text
        assert not awake.asleep
        assert awake.scheduler.pause_mode is None


async def test_a_cancelled_offload_wakes_what_it_had_put_to_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm") as (engine, seen):
        reached = trio.Event()

        async def hold(url: str, request: HttpRequest) -> None:
            if request.path.startswith("/sleep") and url == seen.urls[1]:
                reached.set()
                await trio.sleep_forever()

        seen.transport.hook = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.offload)
            await reached.wait()
            nursery.cancel_scope.cancel()
        assert not engine.memory.is_lent
        assert states(engine) == ["ready", "ready"]
        assert woken(seen, seen.urls[0], "vllm") == 2
        assert len((await engine.agenerate(ModelRequest(PROMPT))).output_tokens)


@both_dialects
@pytest.mark.parametrize("error", [ConnectFailed, TransportError])
async def test_a_server_that_does_not_sleep_is_named(
    error: Callable[[str], Exception],
    dialect: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        bad = seen.urls[1]

        async def lost(url: str, request: HttpRequest) -> None:
            if url == bad and request.path == SLEEP[dialect]:
                raise error("lost")

        seen.transport.hook = lost
        async with engine.offloaded() as failed:
            assert list(failed) == [bad]
        not_sent = error is ConnectFailed
        assert bool(woken(seen, bad, dialect)) is not not_sent
        if not_sent:
            assert states(engine)[1] == "ready"


async def test_weights_that_do_not_survive_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"probe_interval_s": 0.02}
    async with observed_engine(tmp_path, monkeypatch, "sglang", 1, config) as (engine, seen):
        await update_weights(engine.pool, disk(seen, 1))
        seen.forget()
        async with engine.offloaded():
            assert states(engine) == ["paused"]
        assert states(engine) == ["stale"]
        with trio.fail_after(5):
            await engine.pool.wait_ready(5)
        assert "/update_weights_from_disk" in seen.paths(seen.urls[0]), (
            "the update was not repeated"
        )
        assert (await engine.agenerate(ModelRequest(PROMPT))).output_versions[0] == 1


async def test_a_server_that_is_out_of_service_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm") as (engine, seen):
        late = seen.urls[1]
        engine.pool.fleet.remove(late)

        async def refuse(url: str, _: HttpRequest) -> None:
            if url == late:
                raise ConnectFailed("not there")

        seen.transport.hook = refuse
        engine.pool.fleet.add(late)
        async with engine.offloaded() as failed:
            assert list(failed) == [late]
            assert "joining" in failed[late]


async def test_weights_that_were_not_kept_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"probe_interval_s": 0.02}
    async with observed_engine(tmp_path, monkeypatch, "vllm", 1, config) as (engine, seen):
        await update_weights(engine.pool, disk(seen, 1))
        seen.forget()
        async with engine.offloaded(keep_weights=False):
            assert "/sleep?level=2" in seen.paths(seen.urls[0])
        assert states(engine) == ["stale"]
        await engine.pool.wait_ready(5)
        assert "/collective_rpc" in seen.paths(seen.urls[0])


async def test_what_runs_may_finish_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    penalised = GenerationHyperparameters(
        max_new_tokens=100, ignore_eos=True, frequency_penalty=1.0
    )
    async with observed_engine(tmp_path, monkeypatch, "vllm", 1, token_time_s=0.001) as (
        engine,
        seen,
    ):
        answers: list[ModelResponse] = []

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest(PROMPT, penalised)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            (watch,) = seen.watches.values()
            await watch.until(lambda scheduler: bool(scheduler.running))
            async with engine.offloaded(drain=True):
                assert len(answers) == 1
        assert answers[0].output_len == 100
        assert len(answers[0].segments) == 1


@both_dialects
async def test_an_update_wakes_no_server_that_was_restarted_while_it_slept(
    dialect: Any, autojump_clock: MockClock
) -> None:
    """It is awake, and a real SGLang dies of being woken then."""
    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        async with executor.offloaded():
            fleet.servers[1].restart()
            result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(2), 2))
            assert not result.failed
        assert states(executor.engine) == ["ready", "ready"]
        for server in fleet:
            assert server.condition is ServerCondition.UP
            assert server.scheduler.weight_version == "2"
            assert not server.asleep


@both_dialects
async def test_a_server_that_was_restarted_while_it_slept_is_in_no_weights_group(
    dialect: Any, autojump_clock: MockClock
) -> None:
    async def nothing(_: object) -> None:
        await trio.lowlevel.checkpoint()

    settings = [SimulatedServerSettings(dialect=dialect)] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        pool = executor.engine.pool
        meeting = WeightsGroup(master_address="10.0.0.1", master_port=29500)
        group = await init_weights_group(pool, meeting)
        tensors = [TensorSpec("embed", "bfloat16", (8, 4))]
        update = WeightUpdate.distributed(1, group=group, tensors=tensors, send=nothing)
        async with executor.offloaded():
            fleet.servers[1].restart()
            with pytest.raises(WeightUpdateError, match="is in no weights group"):
                await executor.update_weights(update)
        assert [server.condition for server in fleet] == [ServerCondition.UP] * 2


async def test_an_adapter_is_loaded_beside_weights_that_are_awake(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with simulated_executor(servers=2, traced=True) as (executor, fleet):
        async with executor.offloaded():
            result = await executor.update_weights(WeightUpdate.lora("x", tmp_path, 1))
            assert not result.failed
            assert [server.asleep for server in executor.engine.pool.servers] == [{"kv_cache"}] * 2
        first = fleet.addresses[0]
        asked = [one.request for one in fleet.trace if one.server == first and not one.outcome]
        wake, load = "POST /wake_up?tags=weights", "POST /v1/load_lora_adapter"
        assert asked.index(wake) < asked.index(load) < asked.index("POST /wake_up?tags=kv_cache")
        assert asked.count(wake) == 1
        assert states(executor.engine) == ["ready", "ready"]


async def test_no_adapter_is_loaded_beside_weights_that_did_not_survive(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    settings = [SimulatedServerSettings(dialect="sglang")] * 2
    async with simulated_executor(servers=settings) as (executor, fleet):
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        async with executor.offloaded():
            with pytest.raises(WeightUpdateError, match="base weights are not current"):
                await executor.update_weights(WeightUpdate.lora("x", tmp_path, 2))
        await executor.engine.pool.wait_ready(60)
        assert [server.scheduler.weight_version for server in fleet] == ["1", "1"]


@pytest.mark.parametrize("kind", ["lora", "label"])
async def test_a_server_that_was_restarted_while_it_slept_takes_nothing_but_weights(
    kind: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It has its first ones: neither an adapter nor a label mends that."""
    lora = WeightUpdate.lora("x", tmp_path, 2)
    update = lora if kind == "lora" else WeightUpdate.label(2)
    async with simulated_executor(servers=2) as (executor, fleet):
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        async with executor.offloaded():
            fleet.servers[1].restart()
            result = await executor.update_weights(update)
            assert "was restarted while it slept" in result.failed[fleet.addresses[1]]
        assert states(executor.engine) == ["ready", "stale"]
        assert fleet.servers[1].scheduler.weight_version == "default"


@both_dialects
async def test_a_trainers_thread_borrows_the_memory(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_servers(tmp_path, monkeypatch, dialect) as seen:
        await trio.to_thread.run_sync(train_in_a_thread, dialect, seen)


def train_in_a_thread(dialect: Any, seen: Observed) -> None:
    config = RolloutConfig(
        servers=seen.urls, backend=dialect, vocab_size=VOCAB_SIZE,
        max_concurrent_rollouts=4, consumer_batch_size=1,
    )  # fmt: skip
    with RolloutController(config) as rollout:
        with rollout.offloaded() as failed:
            assert not failed
            assert {row.state for row in rollout.statistics()} == {"paused"}
            rollout.update_weights(disk(seen, 1))
        assert {row.state for row in rollout.statistics()} == {"ready"}
        assert not rollout.offload()
        rollout.update_weights(disk(seen, 2))
        assert not rollout.onload()
        assert {row.state for row in rollout.statistics()} == {"ready"}
