"""Weight transfer, adapters and partial waking of the vLLM face, against recordings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from arealtrio.embedded.tensors import Tensor

from ..golden.exchange import answer, body_of, question
from .embedded_server import PROMPT, Line, open_line

SERVER = "vllm-0.32.0"
MISSING = "nope.safetensors"


@pytest.fixture
async def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    async with open_line(tmp_path, monkeypatch) as line:
        yield line


async def replay(line: Line, name: str) -> httpx.Response:
    """Send a recorded request; where it names the recorded weights, name ours."""
    asked = question(SERVER, f"{name}.json")
    body = asked["json"]
    info = (body or {}).get("update_info", {})
    if info and info["path"] != MISSING:
        body = {"update_info": {"path": f"{line.weights[2].name}/model.safetensors"}}
    if "init_info" in (body or {}):
        body = {"init_info": {"root": str(line.weights[2].parent)}}
    return await line.client.request(
        asked["method"], asked["path"], params=asked["params"],
        **({} if body is None else {"json": body}),
    )  # fmt: skip


async def as_recorded(line: Line, *names: str) -> None:
    for name in names:
        response = await replay(line, name)
        assert response.status_code == answer(SERVER, f"{name}.json").status, name
        expected = body_of(SERVER, f"{name}.json")
        if "error" in expected and "<path>" in expected["error"]["message"]:
            told = response.json()["error"]
            assert told["message"].startswith(expected["error"]["message"].split("<path>")[0])
            assert {**told, "message": ""} == {**expected["error"], "message": ""}
        else:
            assert response.json() == expected, name


async def greedy(line: Line) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    told = (await line.ok("/v1/completions", body | {"ignore_eos": True}))["choices"][0]
    ids = told["token_ids"]
    assert isinstance(ids, list)
    return ids


async def test_a_transfer_is_answered_as_recorded_and_changes_the_weights(line: Line) -> None:
    before = await greedy(line)
    await as_recorded(line, "wt_init", "wt_pause", "wt_start", "wt_update", "wt_finish",
                      "wt_reset_prefix", "wt_weight_info", "wt_resume")  # fmt: skip
    assert await greedy(line) != before


async def test_steps_out_of_order_are_refused_and_harm_nothing(line: Line) -> None:
    before = await greedy(line)
    await as_recorded(line, "err_update_weights_no_start", "err_finish_no_start")
    assert await greedy(line) == before


async def test_a_good_update_heals_a_bad_one(line: Line) -> None:
    await as_recorded(line, "wt_init", "rc_pause", "rc_start", "rc_bad")
    assert line.scheduler.state == "poisoned"
    await as_recorded(line, "rc_start2", "rc_good", "rc_finish", "rc_resume")
    await greedy(line)
    assert line.scheduler.weight_version == "v3"


async def test_a_bad_update_kills_at_the_next_token(line: Line) -> None:
    await as_recorded(line, "wt_init", "err_wt_start", "err_wt_update_missing")
    response = await replay(line, "completion_after_failed_wt")
    assert response.status_code == 500
    assert response.json() == body_of(SERVER, "completion_after_failed_wt.json")
    with trio.fail_after(5):
        await line.server.stopped.wait()


async def test_announced_tensors_are_checked_and_remembered(line: Line) -> None:
    async def update(info: Any) -> httpx.Response:
        return await line.post("/update_weights", {"update_info": info})

    info = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    await line.ok("/start_weight_update")
    assert "not initialized" in (await update(info)).json()["error"]["message"]
    group = {"master_address": "127.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 2}
    await line.ok("/init_weight_transfer_engine", {"init_info": group})
    assert (await update({"names": ["w"]})).status_code == 500
    assert (await update(info)).json() == {"message": "Weights updated"}
    await line.ok("/finish_weight_update", {"weight_version": "8"})
    assert line.server.announced == [Tensor("w", "bfloat16", (2, 3))]
    assert line.scheduler.weight_version == "8"


async def test_adapters_are_models_by_name(line: Line, tmp_path: Path) -> None:
    ask = {"prompt": PROMPT, "model": "x-v1"}
    assert (await line.post("/v1/completions", ask)).status_code == 404
    adapter = {"lora_name": "x-v1", "lora_path": str(tmp_path)}
    response = await line.post("/v1/load_lora_adapter", adapter)
    assert response.text == "Success: LoRA adapter 'x-v1' added successfully."
    assert (await line.ok("/v1/completions", ask))["model"] == "x-v1"
    cards = (await line.client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("x-v1", "tiny")]
    assert (await line.post("/v1/load_lora_adapter", adapter)).status_code == 400
    adapter["load_inplace"] = "true"
    assert (await line.post("/v1/load_lora_adapter", adapter)).status_code == 200
    response = await line.post("/v1/unload_lora_adapter", {"lora_name": "x-v1"})
    assert response.text == "Success: LoRA adapter 'x-v1' removed successfully."
    assert (await line.post("/v1/unload_lora_adapter", {"lora_name": "x-v1"})).status_code == 404
    assert (await line.post("/v1/completions", ask)).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [({"lora_name": "x"}, 400), ({"lora_name": "x", "lora_path": "/nowhere"}, 404)],
)
async def test_an_adapter_that_cannot_be_loaded(line: Line, body: Any, status: int) -> None:
    response = await line.post("/v1/load_lora_adapter", body)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status


async def test_waking_in_parts(line: Line) -> None:
    await line.ok("/sleep?level=1")
    assert await line.ok("/wake_up?tags=weights") == {"status": "awake", "tags": ["weights"]}
    assert (await line.client.get("/is_sleeping")).json() == {"is_sleeping": True}
    await line.ok("/wake_up?tags=kv_cache")
    assert (await line.client.get("/is_sleeping")).json() == {"is_sleeping": False}
    assert (await line.client.get("/is_paused")).json() == {"is_paused": False}
