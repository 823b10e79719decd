"""Weights that a trainer broadcasts: both dialects over sockets, and no server left in doubt."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.errors import TransportError, UsageError, WeightUpdateError
from arealtrio.types import (
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    ModelRequest,
    ModelResponse,
)
from arealtrio.weights import (
    Chunk,
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

TENSORS = [
    TensorSpec("embed", "torch.bfloat16", (371, 8)),
    TensorSpec("layer.0", "bfloat16", (8, 8)),
    TensorSpec("layer.1", "bfloat16", (8, 8)),
    TensorSpec("head", "float32", (371, 8)),
]
GROUP = WeightsGroup(master_address="10.0.0.1", master_port=29500, name="g")
ENDLESS = GenerationHyperparameters(max_new_tokens=900, ignore_eos=True, greedy=True)
FIRST_CHUNK = {"vllm": "/update_weights", "sglang": "/update_weights_from_distributed"}


async def nothing(_: Chunk) -> None:
    pass


def update_of(group: WeightsGroup, version: int = 1, **more: Any) -> WeightUpdate:
    more = {"send": nothing, "chunk_size_bytes": 6_000, **more}
    return WeightUpdate.distributed(version, group=group, tensors=TENSORS, **more)


def states(engine: Any) -> list[str]:
    return [row.state for row in engine.statistics()]


def test_ranks_and_world_are_those_of_areal() -> None:
    group = WeightsGroup(
        master_address="h", master_port=1, tp_size=2, pp_size=3, members=("a", "b")
    )
    assert [group.place(i).rank_offset for i in range(2)] == [1, 7]
    assert group.world_size == 13
    stage = WeightsGroup(
        master_address="h", master_port=1, tp_size=2, pp_size=3, pp_rank=1, members=("a", "b")
    )
    assert [stage.place(i).rank_offset for i in range(2)] == [1, 3]
    assert stage.world_size == 5
    assert stage.place(0).pp_rank == 1


@pytest.mark.parametrize("wrong", [{"tp_size": 0}, {"master_port": 0}, {"pp_rank": 1}])
def test_a_group_that_can_not_be_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"master_address": "h", "master_port": 1}
    with pytest.raises(UsageError):
        WeightsGroup(**(right | wrong))


def test_tensors_go_in_chunks_in_their_order() -> None:
    group = WeightsGroup(master_address="h", master_port=1, members=("a",))
    update = update_of(group)
    assert [[t.name for t in chunk] for chunk in update.chunks] == [
        ["embed"], ["layer.0", "layer.1"], ["head"]
    ]  # fmt: skip
    whole = update_of(group, chunk_size_bytes=1 << 20)
    assert len(whole.chunks) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": GROUP},  # nobody joined
        {"tensors": []},
        {"tensors": [TensorSpec("x", "float1", (2,))]},
        {"tensors": [TensorSpec("x", "float32", (-2,))]},
    ],
)
def test_a_wrong_update_is_refused(wrong: dict[str, Any]) -> None:
    joined = WeightsGroup(master_address="h", master_port=1, members=("a",))
    right: dict[str, Any] = {"group": joined, "tensors": TENSORS, "send": nothing}
    with pytest.raises(UsageError):
        WeightUpdate.distributed(1, **(right | wrong))


@both_dialects
async def test_servers_receive_every_chunk_while_the_trainer_sends(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, token_time_s=0.001) as (
        engine,
        seen,
    ):
        joined = trio.Event()

        async def join() -> None:
            joined.set()

        group = await init_weights_group(engine.pool, GROUP, join)
        assert joined.is_set()
        assert group.members == tuple(seen.urls)
        sent: list[list[str]] = []

        async def send(chunk: Chunk) -> None:
            sent.append([tensor.name for tensor in chunk])

        answers: list[ModelResponse] = []

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest(PROMPT, ENDLESS)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(generate)
            for watch in seen.watches.values():
                await watch.until(lambda scheduler: bool(scheduler.running))
            result = await update_weights(engine.pool, update_of(group, send=send))
        assert set(result.updated) == set(seen.urls)
        assert not result.failed
        assert sent == [["embed"], ["layer.0", "layer.1"], ["head"]]
        for server in seen.servers.values():
            assert [t.name for t in server.announced] == [t.name for t in TENSORS]
            assert server.announced[0].dtype == "bfloat16"
            assert server.scheduler.weight_version == "1"
            assert server.scheduler.pause_mode is None
        assert engine.get_version() == 1
        for answer in answers:
            assert answer.output_len == 900
            assert answer.versions_exact
            assert set(answer.output_versions.tolist()) <= {0, 1}
        assert states(engine) == ["ready", "ready"]


async def test_the_requests_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm") as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)
        init = seen.bodies("/init_weight_transfer_engine")
        assert sorted(one["init_info"]["rank_offset"] for one in init) == [1, 2]
        assert {one["init_info"]["world_size"] for one in init} == {3}
        seen.forget()
        await update_weights(engine.pool, update_of(group))
        assert seen.paths(seen.urls[0]) == [
            "/pause?mode=keep",
            "/start_weight_update",
            *["/update_weights"] * 3,
            "/reset_prefix_cache?reset_running_requests=true",
            "/finish_weight_update",
            "/resume",
        ]
        assert seen.bodies("/finish_weight_update") == [{"weight_version": "1"}] * 2


async def test_the_requests_of_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with observed_engine(tmp_path, monkeypatch, "sglang") as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)
        init = seen.bodies("/init_weights_update_group")
        assert sorted(one["rank_offset"] for one in init) == [1, 2]
        assert {one["group_name"] for one in init} == {"g"}
        seen.forget()
        await update_weights(engine.pool, update_of(group))
        assert seen.paths(seen.urls[0]) == [
            "/pause_generation",
            "/begin_weight_update",
            *["/update_weights_from_distributed"] * 3,
            "/end_weight_update",
            "/update_weight_version",
            "/continue_generation",
        ]
        received = seen.bodies("/update_weights_from_distributed")
        assert [one["flush_cache"] for one in received].count(True) == 2
        assert not any(one["abort_all_requests"] for one in received)
        assert not seen.bodies("/update_weight_version")[0]["abort_all_requests"]


@both_dialects
async def test_a_server_that_fails_a_chunk_is_named_and_the_others_go_on(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)
        good, bad = seen.urls
        seen.servers[bad].faults.failing_loads = 1
        result = await update_weights(engine.pool, update_of(group))
        assert result.updated == (good,)
        assert list(result.failed) == [bad]
        assert states(engine) == ["ready", "stale"]
        assert seen.paths(bad).count(FIRST_CHUNK[dialect]) == 3, "a rank was missing"
        seen.forget()
        for _ in range(4):
            await engine.agenerate(ModelRequest(PROMPT))
        assert engine.statistics()[1].requests == 0

        result = await update_weights(engine.pool, update_of(group, 2))
        assert set(result.updated) == {good, bad}
        assert states(engine) == ["ready", "ready"]
        assert (await engine.agenerate(ModelRequest(PROMPT))).output_versions[0] == 2


@both_dialects
async def test_a_silent_server_ends_the_update_in_time(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"update_timeout_s": 0.2, "abort_timeout_s": 0.2, "control_timeout_s": 2.0}
    async with observed_engine(tmp_path, monkeypatch, dialect, config=limits) as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)

        async def lost(url: str, request: HttpRequest) -> None:
            if url == seen.urls[1] and request.path == FIRST_CHUNK[dialect]:
                raise TransportError("no answer")

        seen.transport.hook = lost
        with trio.fail_after(5), pytest.raises(WeightUpdateError) as caught:
            await update_weights(engine.pool, update_of(group))
        assert set(caught.value.failed) == set(seen.urls)
        assert "no answer" in caught.value.failed[seen.urls[1]]
        assert f"{seen.urls[1]} was lost before chunk 2/3" in caught.value.failed[seen.urls[0]]
        assert engine.get_version() == 0
        assert states(engine) == ["stale", "stale"]


@both_dialects
async def test_one_lost_at_the_last_chunk_does_not_take_the_others_along(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)

        async def lost(url: str, request: HttpRequest) -> None:
            if url == seen.urls[1] and request.path == FIRST_CHUNK[dialect]:
                raise TransportError("no answer")

        seen.transport.hook = lost
        update = update_of(group, chunk_size_bytes=1 << 20)
        result = await update_weights(engine.pool, update)
        assert result.updated == (seen.urls[0],)
        assert list(result.failed) == [seen.urls[1]]


@both_dialects
async def test_a_trainer_that_can_not_send_leaves_no_server_in_doubt(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, _):
        group = await init_weights_group(engine.pool, GROUP)

        async def send(_: Chunk) -> None:
            raise ValueError("NCCL error")

        with pytest.raises(ValueError, match="NCCL error"):
            await update_weights(engine.pool, update_of(group, send=send))
        assert states(engine) == ["stale", "stale"]
        assert engine.get_version() == 0
        await update_weights(engine.pool, update_of(group))
        assert states(engine) == ["ready", "ready"]


@both_dialects
async def test_a_trainer_that_hangs_is_given_up(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"update_timeout_s": 0.2}
    async with observed_engine(tmp_path, monkeypatch, dialect, config=limits) as (engine, _):
        group = await init_weights_group(engine.pool, GROUP)

        async def send(_: Chunk) -> None:
            await trio.sleep_forever()

        with trio.fail_after(5), pytest.raises(WeightUpdateError, match="did not send"):
            await update_weights(engine.pool, update_of(group, send=send))
        assert states(engine) == ["stale", "stale"]


@both_dialects
async def test_a_group_without_one_of_its_members_is_refused_unharmed(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)
        engine.pool.fleet.remove(seen.urls[1])
        with pytest.raises(WeightUpdateError, match="make another group"):
            await update_weights(engine.pool, update_of(group))
        assert states(engine) == ["ready"]


@pytest.mark.parametrize("how", ["added", "restarted", "ejected"])
async def test_who_comes_or_returns_without_the_weights_gets_them_in_another_group(
    how: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with faulty_engine(named=1 if how == "added" else 2) as (engine, faulty):
        addresses = faulty.fleet.addresses
        group = await init_weights_group(engine.pool, GROUP)
        await update_weights(engine.pool, update_of(group))
        if how == "added":
            engine.pool.fleet.add(addresses[1])
        elif how == "restarted":
            faulty.fleet.servers[1].restart()
        else:
            faulty.fleet.servers[1].die()
            await trio.sleep(100)
            assert states(engine) == ["ready", "ejected"]
            faulty.fleet.servers[1].mend()
        await trio.sleep(200)
        assert states(engine) == ["ready", "stale"]
        assert "returns with the next" in engine.statistics()[1].reason
        if how != "added":
            with pytest.raises(WeightUpdateError, match="make another group"):
                await update_weights(engine.pool, update_of(group, version=2))
            assert states(engine) == ["ready", "stale"]
        result = await update_weights(engine.pool, WeightUpdate.label(2))
        assert list(result.failed) == [addresses[1]]  # it has other weights
        group = await init_weights_group(engine.pool, replace(GROUP, name="another"))
        assert group.members == addresses
        result = await update_weights(engine.pool, update_of(group, version=3))
        assert result.updated == addresses
        assert states(engine) == ["ready", "ready"]
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(engine.agenerate, ModelRequest([3]))
        assert all(row.requests for row in engine.statistics())


async def test_a_refused_group_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with observed_engine(tmp_path, monkeypatch, "sglang") as (engine, seen):

        async def lost(url: str, request: HttpRequest) -> None:
            if url == seen.urls[1] and request.path == "/init_weights_update_group":
                raise TransportError("no answer")

        seen.transport.hook = lost
        with trio.fail_after(5), pytest.raises(WeightUpdateError, match="did not meet") as caught:
            await init_weights_group(engine.pool, GROUP, trio.sleep_forever)
        assert list(caught.value.failed) == [seen.urls[1]]
        assert states(engine) == ["ready", "ready"]


async def test_a_trainer_that_can_not_join_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "sglang") as (engine, seen):

        async def hang(_: str, request: HttpRequest) -> None:
            if request.path == "/init_weights_update_group":
                await trio.sleep_forever()

        async def join() -> None:
            raise ValueError("port taken")

        seen.transport.hook = hang
        with trio.fail_after(5), pytest.raises(ValueError, match="port taken"):
            await init_weights_group(engine.pool, GROUP, join)
        assert states(engine) == ["ready", "ready"]


async def test_an_older_sglang_has_no_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "sglang") as (engine, seen):
        group = await init_weights_group(engine.pool, GROUP)

        async def older(_: str, request: HttpRequest) -> HttpResponse | None:
            if request.path in engine.pool.dialect.optional_routes:
                return HttpResponse(404, {}, b"Not Found")
            if request.path == FIRST_CHUNK["sglang"]:
                return HttpResponse(200, {}, b'{"success": true, "message": "done"}')
            return None

        seen.transport.hook = older
        result = await update_weights(engine.pool, update_of(group))
        assert set(result.updated) == set(seen.urls)
        assert states(engine) == ["ready", "ready"]


async def test_an_ordinary_send_would_block_trio_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm") as (engine, _):
        group = await init_weights_group(engine.pool, GROUP)
        with pytest.raises(UsageError, match="async"):
            await update_weights(engine.pool, update_of(group, send=lambda _: None))
        assert states(engine) == ["ready", "ready"]


@both_dialects
async def test_a_trainers_thread_sends_itself(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_servers(tmp_path, monkeypatch, dialect) as seen:
        await trio.to_thread.run_sync(train_in_a_thread, dialect, seen)


def train_in_a_thread(dialect: Any, seen: Observed) -> None:
    here, sent = threading.current_thread(), []

    def send(chunk: Chunk) -> None:
        assert threading.current_thread() is here
        sent.append(len(chunk))

    def fail(_: Chunk) -> None:
        raise ValueError("NCCL error")

    config = RolloutConfig(
        servers=seen.urls, backend=dialect, vocab_size=VOCAB_SIZE,
        max_concurrent_rollouts=4, consumer_batch_size=1,
    )  # fmt: skip
    with RolloutController(config) as rollout:
        joined = []
        group = rollout.init_weights_group(GROUP, lambda: joined.append(threading.current_thread()))
        assert joined == [here]
        result = rollout.recover(1, update_of(group, send=send))  # as an update, in this thread
        assert set(result.updated) == set(seen.urls)
        assert sent == [1, 2, 1]
        with pytest.raises(ValueError, match="NCCL error"):
            rollout.update_weights(update_of(group, 2, send=fail))
        assert rollout.get_version() == 1
        assert rollout.update_weights(update_of(group, 2, send=send)).version == 2
        assert rollout.get_version() == 2
