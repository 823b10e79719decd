"""What does a simulated rollout cost, and how far does one core get?

Everything is the production code: executor, engine, codecs of both sides; only the servers' tokens
are made up and time is virtual. So the numbers are of CPU, and a fleet's size and speed change them
by what has to be looked at, not by how long it takes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from arealtrio import GenerationHyperparameters, SingleTurnWorkflow, WeightUpdate
from arealtrio.testing import (
    Lengths,
    LogNormalLengths,
    SimulatedServerSettings,
    checkpoint,
    run_virtually,
    simulated_executor,
)

TARGET_US = 250.0
TAIL = LogNormalLengths.with_tail(median=40, p99=360, longest=2000)
WARM_UP = 2  # steps


def prompts() -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {"prompt_id": number, "input_ids": [1, 2, 3 + number % 1000]}


async def training(
    steps: int,
    *,
    servers: int = 8,
    slots: int = 64,
    batch_size: int = 256,
    lengths: Lengths = TAIL,
    dialect: Literal["vllm", "sglang"] = "vllm",
) -> tuple[int, float]:
    """Train on a fleet that is always full; return groups accepted and seconds of CPU."""
    workflow = SingleTurnWorkflow(
        lambda *_, **__: 1.0, GenerationHyperparameters(max_new_tokens=4000)
    )
    settings = SimulatedServerSettings(max_num_seqs=slots, dialect=dialect)
    async with simulated_executor(
        servers=[settings] * servers,
        lengths=lengths,
        consumer_batch_size=batch_size,
        max_concurrent_rollouts=servers * slots,
        max_staleness=max(4, 2 * servers * slots // batch_size),
    ) as (executor, _):
        loader = prompts()
        began, before = 0.0, 0
        for step in range(steps + WARM_UP):
            if step == WARM_UP:
                began, before = time.process_time(), executor.counts.as_dict()["accepted"]
            await executor.prepare_batch(loader, workflow)
            version = step + 1
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
        seconds = time.process_time() - began
        return executor.counts.as_dict()["accepted"] - before, seconds


def cpu_us(rounds: int = 5, steps: int = 12, **fleet: Any) -> float:
    """Median µs of CPU for one rollout of a group of one, weight updates included."""
    taken = []
    for seed in range(rounds):
        count, seconds = run_virtually(lambda: training(steps, **fleet), seed=seed)
        taken.append(1e6 * seconds / count)
    return statistics.median(taken)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_cpu_of_a_simulated_rollout(dialect: Literal["vllm", "sglang"]) -> None:
    taken = cpu_us(dialect=dialect)
    print(f"\n{dialect}: {taken:.0f} µs of CPU a rollout; target {TARGET_US:.0f}")
    assert taken <= TARGET_US


@pytest.mark.parametrize(
    ("servers", "slots", "batch_size", "steps"), [(64, 64, 1024, 96), (2048, 8, 1024, 48)]
)
def test_a_large_fleet(servers: int, slots: int, batch_size: int, steps: int) -> None:
    """64 × 64 and 100,000 rollouts; and thousands of servers."""
    began = time.perf_counter()
    count, seconds = run_virtually(
        lambda: training(steps, servers=servers, slots=slots, batch_size=batch_size)
    )
    took = time.perf_counter() - began
    print(
        f"\n{servers} servers × {slots} slots: {count} rollouts in {took:.0f} s, "
        f"{1e6 * seconds / count:.0f} µs of CPU each"
    )
    assert count >= steps * batch_size - servers * slots
