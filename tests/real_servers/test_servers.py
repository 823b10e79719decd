"""The facts of a real vLLM server that the tests beside this one, and the library, rely on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from .server import CAP, MODEL, VllmServer
from .until import until

pytestmark = pytest.mark.real_servers

PROMPT = [300, 301, 302, 303, 304]
MODELS = ("tiny-1", "tiny-2", "tiny-3")


def test_both_servers_continue_a_prompt_alike(vllm_servers: Sequence[VllmServer]) -> None:
    (ids, logprobs), (other_ids, other_logprobs) = (s.greedy(PROMPT, 64) for s in vllm_servers)
    assert len(ids) == 64
    assert ids == other_ids
    assert logprobs == pytest.approx(other_logprobs, abs=1e-4)


def test_new_weights_give_other_tokens_and_old_weights_give_the_old(
    vllm_server: VllmServer,
) -> None:
    answers = []
    for version, model in enumerate((*MODELS, "tiny-1")):
        vllm_server.load(model, version=version)
        answers.append(vllm_server.greedy(PROMPT, 16)[0])
    assert answers[3] == answers[0]
    assert len({tuple(a) for a in answers}) == len(MODELS)


async def test_it_runs_no_more_than_its_cap_at_once(vllm_server: VllmServer) -> None:
    async with questions(vllm_server, CAP + 3):
        await until(lambda: gauges(vllm_server) == (CAP, 3), "eight run and three wait")


async def test_a_disconnect_frees_the_slot(vllm_server: VllmServer) -> None:
    async with questions(vllm_server, 1):
        await until(lambda: gauges(vllm_server) == (1, 0), "the request runs")
    await until(lambda: vllm_server.in_flight() == 0, "the server forgets the request", limit_s=5)


@asynccontextmanager
async def questions(server: VllmServer, count: int) -> AsyncIterator[None]:
    """Keep ``count`` requests open within, and break their connections off on leaving."""
    async with (
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(count):
            nursery.start_soon(ask_endlessly, client)
        yield
        nursery.cancel_scope.cancel()


async def ask_endlessly(client: httpx.AsyncClient) -> None:
    """Ask for more tokens than any test waits for."""
    question = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 15000, "ignore_eos": True,
    }  # fmt: skip
    await client.post("/v1/completions", json=question, timeout=None)


def gauges(server: VllmServer) -> tuple[int, int]:
    now = server.metrics()
    return int(now["vllm:num_requests_running"]), int(now["vllm:num_requests_waiting"])
