"""What does each straggler policy do to the lengths that are trained on, and to the pace?

The production executor and simulated servers on trio's virtual clock: 8 groups a batch on 4 servers
of 8 slots, training for 3 s, log-normal lengths with p99 ÷ p50 = 9 whose longest answer takes 5
training steps. Bias is the mean length delivered ÷ the mean length drawn; 1 is none. Beside it, the
groups delivered beyond the bound, those given up, and the time of a step ÷ the time of training.
``wait`` is the baseline of the bias, ``keep`` (what AReaL does) of the pace.

    pytest benchmarks/bench_length_bias.py -s        # a minute
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio import GenerationHyperparameters, SingleTurnWorkflow, WeightUpdate
from arealtrio.testing import (
    LogNormalLengths,
    SimulatedServerSettings,
    checkpoint,
    simulated_executor,
)

TRAINING_S, TOKEN_TIME_S = 3.0, 0.04
LENGTHS = LogNormalLengths.with_tail(median=20, p99=180, longest=375)
SERVERS = [SimulatedServerSettings(max_num_seqs=8, token_time_s=TOKEN_TIME_S)] * 4
BATCH, STEPS, SEEDS = 8, 120, (1, 2)
POLICIES = ("wait", "keep", "requeue", "drop")


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    bias: float
    violations: int
    given_up: int
    step: float  # ÷ training

    def __str__(self) -> str:
        return (
            f"bias {self.bias:5.3f}   beyond the bound {self.violations:4}   "
            f"given up {self.given_up:4}   step {self.step:5.2f}"
        )


class Drawn:
    """The source, with a note of what it gave: a sample's own mean is off by some percent."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def draw(self, rng: random.Random) -> int:
        """See ``Lengths``."""
        self.lengths.append(LENGTHS.draw(rng))
        return self.lengths[-1]


def prompts() -> Iterator[dict[str, Any]]:
    """Prompts without end."""
    number = 0
    while True:
        yield {"prompt_id": number, "input_ids": [1, 2, 3 + number % 1000]}
        number += 1


async def train(policy: str, max_staleness: int, seed: int) -> Outcome:
    """Train for ``STEPS`` steps, and tell what came."""
    drawn = Drawn()
    async with simulated_executor(
        servers=SERVERS,
        lengths=drawn,
        seed=seed,
        consumer_batch_size=BATCH,
        max_staleness=max_staleness,
        max_concurrent_rollouts=32,
        straggler_policy=policy,
    ) as (executor, _):
        workflow = SingleTurnWorkflow(lambda *_, **__: 1.0, GenerationHyperparameters())
        lengths: list[int] = []
        given_up, loader, began = 0, prompts(), trio.current_time()
        for step in range(STEPS):
            batch = await executor.prepare_batch(loader, workflow)
            lengths += [int(row.loss_mask.sum()) for row in batch.rows]
            given_up += len(batch.failures)
            await trio.sleep(TRAINING_S)
            await executor.update_weights(WeightUpdate.from_disk(checkpoint(step + 1), step + 1))
        pace = (trio.current_time() - began) / STEPS / TRAINING_S
        bias = statistics.fmean(lengths) / statistics.fmean(drawn.lengths)
        return Outcome(bias, executor.staleness_violations, given_up, pace)


def run(policy: str, max_staleness: int, seed: int) -> Outcome:
    """One run on virtual time."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(train, policy, max_staleness, seed, clock=clock)


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_length_bias(max_staleness: int) -> None:
    """Print a row for each policy; the means of all seeds."""
    rows = {}
    for policy in POLICIES:
        outcomes = [run(policy, max_staleness, seed) for seed in SEEDS]
        rows[policy] = Outcome(
            statistics.fmean(o.bias for o in outcomes),
            round(statistics.fmean(o.violations for o in outcomes)),
            round(statistics.fmean(o.given_up for o in outcomes)),
            statistics.fmean(o.step for o in outcomes),
        )
        print(f"max_staleness {max_staleness}   {policy:8} {rows[policy]}", flush=True)
    assert all(rows[policy].violations == 0 for policy in POLICIES if policy != "keep")
    assert abs(rows["wait"].bias - 1) < 0.03
