"""What does one generation cost a client, from the prompt's array to the answer's arrays?

256 requests in flight, answers of 4,096 tokens with logprobs. Ours is the whole of
``RemoteEngine.agenerate``: lease, request, answer, checks, versions. The baseline is what one would
write with aiohttp, json and numpy, and checks nothing. CPU time, user and system, of the client's
process alone. Target: at most 1/6.

    pytest benchmarks/bench_end_to_end.py -s
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import aiohttp
import numpy as np
import trio

from arealtrio import GenerationHyperparameters, ModelRequest, RolloutConfig
from arealtrio.engine import open_engine
from arealtrio.transport import ensure_descriptors

from .inference_server import inference_server

TOKENS = 4096
IN_FLIGHT = 256
EACH = 3
DELAY_S = 1.0
PROMPT = np.arange(1024, dtype=np.int32)


def ours(url: str) -> float:
    """CPU seconds per generation."""

    async def main() -> float:
        config = RolloutConfig(servers=[url], max_requests_per_server=IN_FLIGHT)
        request = ModelRequest(PROMPT, GenerationHyperparameters(max_new_tokens=TOKENS))
        async with open_engine(config) as engine:

            async def worker(count: int) -> None:
                for _ in range(count):
                    response = await engine.agenerate(request)
                    assert len(response.output_tokens) == TOKENS

            async def workers(count: int) -> None:
                async with trio.open_nursery() as nursery:
                    for _ in range(IN_FLIGHT):
                        nursery.start_soon(worker, count)

            await workers(1)  # opens the connections
            start = time.process_time()
            await workers(EACH)
            return (time.process_time() - start) / (IN_FLIGHT * EACH)

    return trio.run(main)


def aiohttp_and_json(url: str) -> float:
    """CPU seconds per generation."""
    target = url + "/v1/completions"
    question = {"prompt": PROMPT.tolist(), "max_tokens": TOKENS, "logprobs": 0}

    async def main() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def worker(count: int) -> None:
                for _ in range(count):
                    async with session.post(target, data=json.dumps(question)) as response:
                        choice = json.loads(await response.read())["choices"][0]
                    ids = np.array(choice["token_ids"], dtype=np.int32)
                    logprobs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
                    assert len(ids) == len(logprobs) == TOKENS

            async def workers(count: int) -> None:
                await asyncio.gather(*(worker(count) for _ in range(IN_FLIGHT)))

            await workers(1)
            start = time.process_time()
            await workers(EACH)
            return (time.process_time() - start) / (IN_FLIGHT * EACH)

    return asyncio.run(main())


def end_to_end(rounds: int = 3) -> tuple[float, float]:
    """Median CPU seconds of both, taken in turn."""
    ensure_descriptors(2 * IN_FLIGHT)
    mine, theirs = [], []
    with inference_server(tokens=TOKENS, delay_s=DELAY_S) as url:
        for _ in range(rounds):
            mine.append(ours(url))
            theirs.append(aiohttp_and_json(url))
    return statistics.median(mine), statistics.median(theirs)


def test_a_generation_costs_a_sixth_of_aiohttp_and_json() -> None:
    mine, theirs = end_to_end()
    print(f"\nend to end: {mine * 1e6:.0f} us against {theirs * 1e6:.0f} us, {mine / theirs:.3f}")
    assert mine / theirs <= 1 / 6
