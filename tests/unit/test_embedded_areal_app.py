"""A vLLM that AReaL started, as the library meets it: routes of its own, no label of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.settings import ServerSettings
from arealtrio.engine import RemoteEngine
from arealtrio.errors import ConfigError, UsageError, WeightUpdateError
from arealtrio.servers import ServerState
from arealtrio.supervision import _try_to_bring_back
from arealtrio.types import GenerationHyperparameters, HttpRequest, ModelRequest, ModelResponse
from arealtrio.weights import (
    AdapterSpec,
    Chunk,
    TensorSpec,
    WeightsGroup,
    WeightUpdate,
    init_weights_group,
    update_weights,
)
from arealtrio.wire.vllm_areal import ArealVllmDialect

from .embedded_server import PROMPT
from .fleet import connected_engine
from .test_engine import check_lengths, greedy_answer

GREEDY = GenerationHyperparameters(greedy=True, max_new_tokens=300, ignore_eos=True)
SHORT = GREEDY.new(max_new_tokens=20)
CONFIG: dict[str, Any] = {"backend": "vllm_areal", "vocab_size": 371, "probe_interval_s": 0.05}
GROUP = WeightsGroup(master_address="10.0.0.1", master_port=29500, name="g")


async def generate(engine: RemoteEngine, answers: list[ModelResponse]) -> None:
    answers.append(await engine.agenerate(ModelRequest(PROMPT, GREEDY)))


async def test_an_update_from_disk_in_the_middle_of_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is returned, sent again, and each token is of the weights that it names."""
    answers: list[ModelResponse] = []
    async with connected_engine(
        tmp_path, monkeypatch, 2, CONFIG, areal=True
    ) as (engine, fleet), trio.open_nursery() as nursery:  # fmt: skip
        nursery.start_soon(generate, engine, answers)
        await fleet.where(lambda s: any(r.output_length >= 20 for r in s.running))
        update = WeightUpdate.from_disk(str(fleet.weights[2]), 1, pause="abort")
        result = await update_weights(engine.pool, update)
        assert set(result.updated) == set(fleet.urls)
    (answer,) = answers
    check_lengths(answer)
    assert set(answer.output_versions.tolist()) == {0, 1}
    assert answer.versions_exact
    whole = np.concatenate([answer.input_tokens, answer.output_tokens])
    for version, weights in ((0, 1), (1, 2)):
        ours = answer.output_versions == version
        thought = TinyModel.load(fleet.weights[weights]).logprobs(whole, len(PROMPT))
        np.testing.assert_allclose(answer.output_logprobs[ours], thought[ours], atol=1e-4)
    assert engine.totals().interruptions == 1


async def test_a_failed_update_leaves_no_server_that_would_die_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 1, CONFIG, areal=True) as (engine, fleet):
        missing = WeightUpdate.from_disk(str(tmp_path / "missing"), 1, pause="abort")
        with pytest.raises(WeightUpdateError, match="the version stays 0"):
            await update_weights(engine.pool, missing)
        assert engine.statistics()[0].state == "stale"
        sound = WeightUpdate.from_disk(str(fleet.weights[2]), 1, pause="abort")
        await update_weights(engine.pool, sound)
        answer = await engine.agenerate(ModelRequest(PROMPT, SHORT), min_version=1)
        assert answer.output_tokens.tolist() == greedy_answer(fleet.weights[2], PROMPT, 20)
        assert set(answer.output_versions.tolist()) == {1}


async def test_weights_that_the_trainer_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [TensorSpec("a", "bfloat16", (4, 2)), TensorSpec("b", "float32", (3,))]
    sent: list[str] = []

    async def send(chunk: Chunk) -> None:
        sent.extend(tensor.name for tensor in chunk)
        await trio.lowlevel.checkpoint()

    async with connected_engine(tmp_path, monkeypatch, 2, CONFIG, areal=True) as (engine, fleet):
        group = await init_weights_group(engine.pool, GROUP)
        update = WeightUpdate.distributed(
            1, group=group, tensors=tensors, send=send, chunk_size_bytes=16, pause="abort"
        )
        result = await update_weights(engine.pool, update)
        assert set(result.updated) == set(fleet.urls)
        assert sent == ["a", "b"]
        for server in fleet.servers.values():
            assert [tensor.name for tensor in server.announced] == ["a", "b"]
        answer = await engine.agenerate(ModelRequest(PROMPT, SHORT))
        assert set(answer.output_versions.tolist()) == {1}


async def test_a_cancelled_generation_leaves_by_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no route to abort it by its id, and asking does no harm."""
    async with connected_engine(tmp_path, monkeypatch, 1, CONFIG, areal=True) as (engine, fleet):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, engine, [])
            await fleet.watch.until(lambda s: any(r.output_length >= 5 for r in s.running))
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await fleet.watch.until(lambda s: not s.running)
        assert engine.statistics()[0].state == "ready"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/areal_update_weights", b"{}"),
        ("/areal_init_weights_update_group", b"nothing"),
        ("/areal_set_update_weight_meta", b'{"names":[],"dtypes":[],"shapes":[],"group_name":"?"}'),
        ("/areal_update_weights_xccl", b"{}"),
    ],
)
async def test_nonsense_is_refused_in_areals_words(
    path: str, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 1, CONFIG, areal=True) as (engine, _):
        limits = engine.config.segment_limits()
        server = engine.pool.servers[0]
        answer = await engine.pool.send(server, HttpRequest("POST", path, body), limits)
        assert (answer.status, b'"success":false' in answer.body) == (400, True)
        for absent in ("/pause", "/inference/v1/generate", "/update_weight_version"):
            answer = await engine.pool.send(server, HttpRequest("POST", absent, b"{}"), limits)
            assert answer.status == 404


def test_only_vllm_has_areals_routes() -> None:
    with pytest.raises(ConfigError, match="areal is of vLLM"):
        ServerSettings(weights=Path("w"), dialect="sglang", areal=True)


# --- adapters -------------------------------------------------------------------------------------

ADAPTER = AdapterSpec(name="math", rank=8, alpha=16, target_modules=("q_proj",), base_model="m")
LORA = [
    TensorSpec("layer.0.lora_A", "bfloat16", (8, 2)),
    TensorSpec("layer.0.lora_B", "bfloat16", (2, 8)),
]


async def nothing(_: Chunk) -> None:
    await trio.lowlevel.checkpoint()


def adapter_update(group: WeightsGroup, version: int, **more: Any) -> WeightUpdate:
    return WeightUpdate.distributed(
        version, group=group, tensors=LORA, send=nothing, pause="abort", adapter=ADAPTER, **more
    )


def test_the_requests_of_an_adapter_are_areals() -> None:
    first, second = ArealVllmDialect().receive(LORA, "g", last=True, adapter=ADAPTER)
    assert first.path == "/areal_set_update_weight_meta_lora"
    assert second.path == "/areal_update_weights_lora_xccl"
    assert first.body == second.body
    assert json.loads(first.body) == {
        "names": ["layer.0.lora_A", "layer.0.lora_B"],
        "dtypes": ["bfloat16", "bfloat16"],
        "shapes": [[8, 2], [2, 8]],
        "group_name": "g",
        "lora_name": "math",
        "lora_int_id": 1,
        "lora_target_modules": ["q_proj"],
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_bias": "none",
        "base_model_name": "m",
    }


async def test_an_adapter_that_the_trainer_sends_is_named_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 2, CONFIG, areal=True) as (engine, fleet):
        group = await init_weights_group(engine.pool, GROUP)
        with_it = SHORT.new(lora_name="math")
        for version in (1, 2):
            result = await update_weights(engine.pool, adapter_update(group, version))
            assert set(result.updated) == set(fleet.urls)
            assert (engine.get_version(), engine.pool.base_version) == (version, 0)
            answer = await engine.agenerate(ModelRequest(PROMPT, with_it))
            assert set(answer.output_versions.tolist()) == {version}
        for server in fleet.servers.values():
            assert [tensor.name for tensor in server.announced[:2]] == [t.name for t in LORA]


async def test_a_server_that_missed_a_sent_adapter_returns_with_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CONFIG, "probe_interval_s": 60.0, "probe_interval_max_s": 60.0}
    async with connected_engine(tmp_path, monkeypatch, 2, config, areal=True) as (engine, _):
        group = await init_weights_group(engine.pool, GROUP)
        away = engine.pool.servers[0]
        await update_weights(engine.pool, adapter_update(group, 1))
        engine.pool.mark_stale(away, "the test says so")
        away.version = 0
        await _try_to_bring_back(engine.pool, away)
        assert away.state is ServerState.STALE
        assert "alone can do that again" in away.reason
        result = await update_weights(engine.pool, adapter_update(group, 2))
        assert away.address in result.updated
        assert engine.statistics()[0].state == "ready"


async def test_adapters_are_not_sent_to_servers_that_take_them_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_engine(tmp_path, monkeypatch, 1) as (engine, _):
        group = await init_weights_group(engine.pool, GROUP)
        with pytest.raises(UsageError, match=r"vllm takes adapters from disk.*WeightUpdate\.lora"):
            await update_weights(engine.pool, adapter_update(group, 1))
        assert engine.statistics()[0].state == "ready"


def test_an_adapter_is_sent_whole() -> None:
    group = WeightsGroup(master_address="h", master_port=1, members=("http://a:1",))
    with pytest.raises(UsageError, match="sent whole"):
        adapter_update(group, 1, chunk_size_bytes=32)
