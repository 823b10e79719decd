"""A synchronous trainer: batches in, weights out, on two servers that run as processes.

Run it: ``python examples/trainer_loop.py``.

The trainer stands in for yours: it takes ``batch.padded()`` and saves weights to a directory.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arealtrio import (
    GenerationHyperparameters,
    RolloutConfig,
    RolloutController,
    SingleTurnWorkflow,
    WeightUpdate,
)
from arealtrio.demo.fleet import server_processes
from arealtrio.demo.trainer import PolicyTrainer
from arealtrio.embedded.model import TinyModel


def reward_fn(
    prompt: str | None, completions: str | None, prompt_ids: Any, completion_ids: Any, **data: Any
) -> float:
    """Return the share of even tokens."""
    return float((completion_ids % 2 == 0).mean())


def prompts() -> Iterator[dict[str, Any]]:
    """An endless data loader."""
    for number in itertools.count():
        yield {"prompt_id": str(number), "input_ids": [1 + number % 30, 5]}


def main(steps: int = 8) -> None:
    """Train, and print the reward of each step."""
    trainer = PolicyTrainer(TinyModel.random(0, vocab_size=32, eos_id=0, output_scale=0.3))
    workflow = SingleTurnWorkflow(reward_fn, GenerationHyperparameters(max_new_tokens=24))
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch)
        trainer.model.save(weights / "0")
        with server_processes(2, weights / "0", weights) as servers:
            config = RolloutConfig(servers=[s.url for s in servers], consumer_batch_size=16,
                                   max_concurrent_rollouts=16, max_staleness=2)  # fmt: skip
            with RolloutController(config) as rollout:
                loader = prompts()
                for step in range(1, steps + 1):
                    batch = rollout.prepare_batch(loader, workflow, group_size=4)
                    report = trainer.step(batch.padded())  # rollouts go on meanwhile
                    trainer.model.save(weights / str(step))
                    rollout.update_weights(WeightUpdate.from_disk(weights / str(step), step))
                    oldest = batch.staleness().max()
                    print(f"step {step}: reward {report.reward_mean:.2f}, staleness ≤ {oldest}")


if __name__ == "__main__":
    main()
