"""Versioned adapters: switched for all requests at once, unloaded when nobody uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.adapters import Adapters
from arealtrio.config import RolloutConfig
from arealtrio.engine import RemoteEngine, open_engine
from arealtrio.errors import TransportError, UsageError, WeightUpdateError
from arealtrio.servers import ServerState
from arealtrio.types import GenerationHyperparameters, HttpRequest, ModelRequest, ModelResponse
from arealtrio.weights import WeightUpdate, update_weights

from .embedded_server import PROMPT, VOCAB_SIZE
from .observed import Observed, observed_engine, running_servers

both_dialects = pytest.mark.parametrize("dialect", ["vllm", "sglang"])
LOAD = {"vllm": "/v1/load_lora_adapter", "sglang": "/load_lora_adapter"}
UNLOAD = {"vllm": "/v1/unload_lora_adapter", "sglang": "/unload_lora_adapter"}
NAMED = {"vllm": "model", "sglang": "lora_path"}
ROUTE = {"vllm": "/inference/v1/generate", "sglang": "/generate"}
SHORT = GenerationHyperparameters(max_new_tokens=4, ignore_eos=True, lora_name="x")
LONG = GenerationHyperparameters(max_new_tokens=300, ignore_eos=True, lora_name="x")


def lora(path: Path, version: int) -> WeightUpdate:
    return WeightUpdate.lora("x", path, version)


def states(engine: RemoteEngine) -> list[str]:
    return [row.state for row in engine.statistics()]


def named(seen: Observed, dialect: str) -> list[str]:
    """The adapter that each generation asked for."""
    asked = [r for _, r in seen.transport.asked if r.path == ROUTE[dialect] and r.method == "POST"]
    return [json.loads(request.body)[NAMED[dialect]] for request in asked]


async def loaded(engine: RemoteEngine) -> list[dict[str, str]]:
    """The adapters of each server: their directories, by name."""
    limits = engine.config.control_limits(5)
    answers = [
        await engine.pool.send(server, HttpRequest("GET", "/v1/models"), limits)
        for server in engine.pool.servers
    ]
    cards = [json.loads(answer.body)["data"] for answer in answers]
    return [{card["id"]: card["root"] for card in one if card["parent"]} for one in cards]


@pytest.mark.parametrize(("name", "path"), [("", "/a"), ("x", "")])
def test_a_wrong_adapter_is_refused(name: str, path: str) -> None:
    with pytest.raises(UsageError):
        WeightUpdate.lora(name, path, 1)


async def test_an_adapter_in_use_is_not_taken() -> None:
    adapters = Adapters()
    with adapters.using("x") as name:
        assert name == "x"
    adapters.switch("x", "/a", 1)
    with adapters.using("x") as first, adapters.using("x"):
        assert first == "x-v1"
        changed = adapters.changed
        adapters.switch("x", "/b", 2)
        assert changed.is_set()
        assert adapters.take_unused() == []
        with adapters.using("x") as second:
            assert second == "x-v2"
    assert [one.served_name for one in adapters.take_unused()] == ["x-v1"]
    assert adapters.take_unused() == []
    assert [one.served_name for one in adapters.current] == ["x-v2"]


async def test_a_version_that_returns_is_not_unloaded() -> None:
    adapters = Adapters()
    for version in (1, 2, 1):
        adapters.switch("x", "/a", version)
    assert [one.served_name for one in adapters.take_unused()] == ["x-v2"]


@both_dialects
async def test_requests_name_the_new_adapter_from_the_switch_on(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, token_time_s=0.001) as (
        engine,
        seen,
    ):
        await update_weights(engine.pool, lora(tmp_path, 1))
        answers: list[ModelResponse] = []
        unloaded = trio.Event()

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest(PROMPT, LONG)))

        async def notice(_: str, request: HttpRequest) -> None:
            if request.path == UNLOAD[dialect]:
                assert len(answers) == 4, "it was in use"
                unloaded.set()

        seen.transport.hook = notice
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(generate)
            for watch in seen.watches.values():
                await watch.until(lambda scheduler: bool(scheduler.running))
            assert named(seen, dialect) == ["x-v1"] * 4
            result = await update_weights(engine.pool, lora(tmp_path, 2))
            assert set(result.updated) == set(seen.urls)
            assert not answers, "nothing was paused or ended"
            after = await engine.agenerate(ModelRequest(PROMPT, SHORT))
        assert named(seen, dialect)[4:] == ["x-v2"]
        assert set(after.output_versions.tolist()) == {2}
        for answer in answers:
            assert answer.output_len == 300
            assert set(answer.output_versions.tolist()) == {1}, "it kept the adapter it had named"
            assert answer.versions_exact
        with trio.fail_after(5):
            await unloaded.wait()
        assert not any("pause" in path for url in seen.urls for path in seen.paths(url))


@both_dialects
async def test_a_server_without_the_adapter_is_out_of_service_until_it_has_it(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"probe_interval_s": 0.02}
    async with observed_engine(tmp_path, monkeypatch, dialect, config=config) as (engine, seen):
        good, bad = seen.urls
        held = True

        async def lost(url: str, request: HttpRequest) -> None:
            if held and url == bad and request.path == LOAD[dialect]:
                raise TransportError("no answer")

        seen.transport.hook = lost
        result = await update_weights(engine.pool, lora(tmp_path, 1))
        assert result.updated == (good,)
        assert list(result.failed) == [bad]
        assert states(engine) == ["ready", "stale"]
        for _ in range(3):
            await engine.agenerate(ModelRequest(PROMPT, SHORT))
        assert engine.statistics()[1].requests == 0

        held = False
        await engine.pool.wait_ready(5)
        assert engine.pool.servers[1].version == 1
        seen.forget()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(engine.agenerate, ModelRequest(PROMPT, SHORT))
        assert named(seen, dialect) == ["x-v1"] * 4
        assert engine.statistics()[1].requests == 2


@both_dialects
async def test_a_new_server_gets_the_base_weights_and_the_adapter(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        late = seen.urls[1]
        engine.pool.fleet.remove(late)
        await update_weights(engine.pool, WeightUpdate.from_disk(seen.weights[2], 1))
        await update_weights(engine.pool, lora(tmp_path, 2))
        seen.forget()
        engine.pool.fleet.add(late)
        await engine.pool.wait_ready(5)
        base = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}[dialect]
        paths = seen.paths(late)
        assert paths.index(base) < paths.index(LOAD[dialect])
        assert seen.servers[late].scheduler.weight_version == "2"


@both_dialects
async def test_what_a_run_before_left_under_that_name_is_replaced(
    dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang says that it has it, and keeps it: the old policy was served under the new version."""
    (tmp_path / "before").mkdir()
    async with running_servers(tmp_path, monkeypatch, dialect) as seen:
        config = RolloutConfig(servers=seen.urls, backend=dialect, vocab_size=VOCAB_SIZE)
        for path in (tmp_path / "before", tmp_path):
            async with open_engine(config) as engine:
                result = await update_weights(engine.pool, lora(path, 1))
                assert set(result.updated) == set(seen.urls)
                assert await loaded(engine) == [{"x-v1": str(path)}] * 2


@both_dialects
async def test_what_a_failed_update_left_under_that_name_is_replaced(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two servers have different adapters of one name, and of one version."""
    (tmp_path / "failed").mkdir()
    config = {"min_updated": 2}
    async with observed_engine(tmp_path, monkeypatch, dialect, config=config) as (engine, seen):

        async def lost(url: str, request: HttpRequest) -> None:
            if url == seen.urls[1] and request.path == LOAD[dialect]:
                raise TransportError("no answer")

        seen.transport.hook = lost
        with pytest.raises(WeightUpdateError):
            await update_weights(engine.pool, lora(tmp_path / "failed", 1))
        seen.transport.hook = None
        result = await update_weights(engine.pool, lora(tmp_path, 1))
        assert set(result.updated) == set(seen.urls)
        assert await loaded(engine) == [{"x-v1": str(tmp_path)}] * 2


@both_dialects
async def test_a_server_that_returns_loses_what_it_had_under_that_name(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "before").mkdir()
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, _):
        late = engine.pool.servers[1]
        before = engine.pool.dialect.load_adapter("x-v1", str(tmp_path / "before"))
        await engine.pool.control(late, before, 5)
        engine.pool.fleet.remove(late.address)
        await update_weights(engine.pool, lora(tmp_path, 1))
        engine.pool.fleet.add(late.address)
        await engine.pool.wait_ready(5)
        assert await loaded(engine) == [{"x-v1": str(tmp_path)}] * 2


@both_dialects
async def test_a_server_that_was_away_as_a_version_came_again_gets_it_again(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version was current, so it came back with what had gone by that before."""
    (tmp_path / "before").mkdir()
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, _):
        await update_weights(engine.pool, lora(tmp_path / "before", 1))
        away = engine.pool.servers[1]
        engine.pool.set_state(away, ServerState.EJECTED, "the test says so")
        result = await update_weights(engine.pool, lora(tmp_path, 1))
        assert result.updated == (engine.pool.servers[0].address,)
        await engine.pool.wait_ready(5)
        assert await loaded(engine) == [{"x-v1": str(tmp_path)}] * 2


@both_dialects
async def test_an_adapter_is_replaced_under_the_requests_that_use_it(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1, token_time_s=0.001) as (
        engine,
        seen,
    ):
        await update_weights(engine.pool, lora(tmp_path, 1))
        (server,) = seen.servers.values()

        async def idle(_: str, request: HttpRequest) -> None:
            if request.path == UNLOAD[dialect]:
                assert not server.scheduler.running, "SGLang would wait for it"

        seen.transport.hook = idle
        answers: list[ModelResponse] = []

        async def generate() -> None:
            answers.append(await engine.agenerate(ModelRequest(PROMPT, LONG)))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(generate)
            (watch,) = seen.watches.values()
            await watch.until(lambda scheduler: bool(scheduler.running))
            result = await update_weights(engine.pool, lora(tmp_path, 1))
            assert result.updated == (seen.urls[0],)
        assert [answer.output_len for answer in answers] == [300, 300]
        assert states(engine) == ["ready"]


@both_dialects
@pytest.mark.parametrize("version", [0, 1])
async def test_one_that_could_not_be_replaced_is_there_again(
    dialect: str, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"probe_interval_s": 0.02}
    async with observed_engine(tmp_path, monkeypatch, dialect, config=config) as (engine, _):
        await update_weights(engine.pool, lora(tmp_path, version))
        with pytest.raises(WeightUpdateError):
            await update_weights(engine.pool, lora(tmp_path / "missing", version))
        assert states(engine) == ["stale", "stale"]
        await engine.pool.wait_ready(5)
        assert await loaded(engine) == [{f"x-v{version}": str(tmp_path)}] * 2


@both_dialects
async def test_if_no_server_takes_it_requests_name_the_one_before(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect) as (engine, seen):
        await update_weights(engine.pool, lora(tmp_path, 1))
        with pytest.raises(WeightUpdateError):
            await update_weights(engine.pool, lora(tmp_path / "missing", 2))
        assert engine.get_version() == 1
        seen.forget()
        await engine.pool.wait_ready(5)  # they have what the pool is at
        answer = await engine.agenerate(ModelRequest(PROMPT, SHORT))
        assert set(answer.output_versions.tolist()) == {1}
        assert named(seen, dialect) == ["x-v1"]


@both_dialects
async def test_an_adapter_of_the_servers_own_keeps_its_name(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, dialect, 1) as (engine, seen):
        load = engine.pool.dialect.load_adapter("x", str(tmp_path))
        await engine.pool.control(engine.pool.servers[0], load, 5)
        answer = await engine.agenerate(ModelRequest(PROMPT, SHORT))
        assert named(seen, dialect) == ["x"]
        assert set(answer.output_versions.tolist()) == {0}


async def test_what_can_not_be_unloaded_is_said_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm", 1) as (engine, seen):
        asked = trio.Event()

        async def lost(_: str, request: HttpRequest) -> None:
            if request.path == UNLOAD["vllm"]:
                asked.set()
                raise TransportError("no answer")

        seen.transport.hook = lost
        await update_weights(engine.pool, lora(tmp_path, 1))
        await update_weights(engine.pool, lora(tmp_path, 2))
        await asked.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert "keeps x-v1 loaded: no answer" in caplog.text
        assert states(engine) == ["ready"]


async def test_an_adapter_resumes_no_server_that_a_pause_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with observed_engine(tmp_path, monkeypatch, "vllm") as (engine, seen):
        server = engine.pool.servers[1]
        seen.forget()
        async with engine.paused():
            server.frozen = True  # as one that was not resumed before
            engine.pool.mark_stale(server, "the test says so")
            result = await update_weights(engine.pool, lora(tmp_path, 1))
            assert server.address in result.updated
            assert "/resume" not in seen.paths(server.address)
            assert states(engine) == ["paused", "paused"]
        assert "/resume" in seen.paths(server.address)
        assert states(engine) == ["ready", "ready"]
