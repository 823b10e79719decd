"""Faults that a test switches on: the same in both dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio

from .embedded_server import PROMPT, Line, open_line

DIALECTS = ["vllm", "sglang"]


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> AsyncIterator[Line]:
    async with open_line(tmp_path, monkeypatch, dialect=dialect) as line:
        yield line


async def load(line: Line, dialect: str, version: str) -> int:
    if dialect == "sglang":
        body = {"model_path": str(line.weights[2]), "weight_version": version}
        return (await line.post("/update_weights_from_disk", body)).status_code
    kwargs = {"weights_path": str(line.weights[2])}
    response = await line.post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
    await line.ok("/update_weight_version", {"new_version": version})
    return response.status_code


async def generate(line: Line, dialect: str) -> list[str]:
    """Return the versions that made the tokens."""
    if dialect == "sglang":
        told = (await line.ok("/generate", {"input_ids": PROMPT}))["meta_info"]
    else:
        body = {"token_ids": PROMPT, "sampling_params": {}}
        told = (await line.ok("/inference/v1/generate", body))["choices"][0]
    return [span["version"] for span in told["weight_versions"]]


async def test_loads_fail_as_often_as_asked(line: Line, dialect: str) -> None:
    line.server.faults.failing_loads = 2
    bad = 400 if dialect == "sglang" else 500
    assert [await load(line, dialect, "1") for _ in range(3)] == [bad, bad, 200]
    assert await generate(line, dialect) == ["1"]


async def test_labels_lie_from_the_next_one_on(line: Line, dialect: str) -> None:
    line.server.faults.mislabel = "99"
    assert await generate(line, dialect) == ["default"]
    assert await load(line, dialect, "1") == 200
    assert await generate(line, dialect) == ["99"]
    route = "/model_info" if dialect == "sglang" else "/weight_info"
    assert (await line.client.get(route)).json()["weight_version"] == "99"


async def test_a_silent_server_takes_requests_and_answers_other_questions(
    line: Line, dialect: str
) -> None:
    line.server.faults.silent = True
    with pytest.raises(httpx.ReadTimeout):
        await line.client.post(
            "/generate" if dialect == "sglang" else "/v1/completions",
            json={"input_ids": PROMPT, "prompt": PROMPT, "stream": True},
            timeout=httpx.Timeout(5, read=0.05),
        )
    assert (await line.client.get("/health")).status_code == 200
    assert "requests_total" in (await line.client.get("/metrics")).text
    assert not line.scheduler.counters.submitted
    line.server.faults.silent = False
    assert await generate(line, dialect) == ["default"]


async def test_health_is_answered_late(line: Line) -> None:
    line.server.faults.health_delay_s = 3600
    with pytest.raises(httpx.ReadTimeout):
        await line.client.get("/health", timeout=httpx.Timeout(5, read=0.05))
    line.server.faults.health_delay_s = 0.0
    with trio.fail_after(5):
        assert (await line.client.get("/health")).status_code == 200
