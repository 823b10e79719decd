"""What does it cost a controller to keep a ledger, for each rollout?

A training loop whose rollouts end at once with a row of 4,096 tokens, with a ledger and without, in
the order A B B A. CPU time, user and system, of the whole process: the writer's thread is part of
the price. From the difference the writing of the bytes themselves is taken: the same records, put
into a plain file by plain writes and synced as often as the ledger commits. Target: at most 100 µs.

    pytest benchmarks/bench_ledger.py -s
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import trio

from arealtrio import Outcome, RolloutConfig, Trajectory
from arealtrio.executor import open_executor
from arealtrio.ledger import encode_group
from arealtrio.testing import open_fleet
from arealtrio.trajectory import Group

TOKENS = 4096
BATCH = 64
STEPS = 48
STEPS_PER_CHECKPOINT = 4
RECORDS = BATCH * STEPS
PROMPT_TOKENS = 512


def row() -> Trajectory:
    made = np.arange(TOKENS) >= PROMPT_TOKENS
    return Trajectory(
        input_ids=np.arange(TOKENS, dtype=np.int32) * 31 % 150_000,
        loss_mask=made.astype(np.int32),
        logprobs=np.where(made, np.float32(-0.7), np.float32(0)),
        versions=np.where(made, np.int32(0), np.int32(-1)),
        reward=1.0,
    )


class Trivial:
    def __init__(self) -> None:
        self._row = row()

    async def arun_episode(self, engine: Any, data: Mapping[str, Any], /) -> Trajectory:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        return self._row


def prompts() -> Iterator[dict[str, Any]]:
    tokens = list(range(PROMPT_TOKENS))
    number = 0
    while True:
        yield {"prompt_id": str(number), "input_ids": tokens, "answer": "42"}
        number += 1


async def train(path: Path | None) -> float:
    """CPU seconds per rollout of a training loop; with a ledger where there is a path."""
    async with open_fleet(1) as fleet:
        config = RolloutConfig(
            servers=fleet.addresses,
            consumer_batch_size=BATCH,
            max_staleness=2,
            straggler_policy="keep",  # the rows are all of version 0
            slow_step_warning_s=60,
            ledger_path=None if path is None else str(path),
        )
        async with open_executor(config, transport=fleet) as executor:
            loader, workflow = prompts(), Trivial()
            await executor.prepare_batch(loader, workflow)  # what is made once
            gc.collect()
            gc.disable()
            before = executor.counts.of(Outcome.ACCEPTED)
            start = time.process_time()
            for step in range(1, STEPS + 1):
                await executor.set_version(step)
                batch = await executor.prepare_batch(loader, workflow)
                if path is not None and step % STEPS_PER_CHECKPOINT == 0:
                    await executor.state_dict()
                    await executor.ack(batch)
            if executor.ledger is not None:
                await executor.ledger.flush()
            seconds = time.process_time() - start
            gc.enable()
            return seconds / (executor.counts.of(Outcome.ACCEPTED) - before)


def bare_writes(path: Path) -> float:
    """CPU seconds per record to put the same bytes into a file."""
    group = Group.of([[row()]], number=1, permit_version=0, prompt_id="1", task_id="rollout-1")
    record = encode_group(group)
    start = time.process_time()
    with path.open("wb", buffering=0) as file:
        for number in range(RECORDS):
            file.write(record)
            if number % (BATCH * STEPS_PER_CHECKPOINT) == 0:
                os.fsync(file.fileno())
    return (time.process_time() - start) / RECORDS


def ledger_cost(rounds: int = 5) -> tuple[float, float, float]:
    """Median CPU seconds a rollout: with a ledger, without, and of writing the bytes alone."""
    with_it: list[float] = []
    without: list[float] = []
    writes: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            for arm in "ABBA":
                path = Path(directory, f"{number}{arm}{len(with_it)}") if arm == "B" else None
                (without if path is None else with_it).append(trio.run(train, path))
            writes.append(bare_writes(Path(directory, "bare")))
    return statistics.median(with_it), statistics.median(without), statistics.median(writes)


def test_a_ledger_costs_a_rollout_a_tenth_of_a_millisecond() -> None:
    with_it, without, writes = ledger_cost()
    more = with_it - without - writes
    print(
        f"\nledger: {with_it * 1e6:.0f} us a rollout against {without * 1e6:.0f} us without; "
        f"{writes * 1e6:.0f} us write the bytes, {more * 1e6:.0f} us are the ledger's own"
    )
    assert more <= 100e-6
