"""A filter of groups, and evaluation while training rollouts go on.

Run it: ``python examples/filter_and_evaluate.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from arealtrio import (
    GenerationHyperparameters,
    Group,
    RolloutConfig,
    RolloutResult,
    SingleTurnWorkflow,
    open_executor,
)
from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.serve import ServerSettings, running_server


def reward_fn(
    prompt: str | None, completions: str | None, prompt_ids: Any, completion_ids: Any, **data: Any
) -> float:
    """Return 1 for an even last token."""
    return float(completion_ids[-1] % 2 == 0)


def has_a_signal(group: Group) -> bool:
    """Keep groups whose answers differ: where all earn the same, advantages are 0 (DAPO)."""
    return float(group.rewards.std()) > 0


def accuracy(results: Sequence[RolloutResult]) -> float:
    """Mean reward of the evaluations that ended well."""
    rewards = [row.reward for r in results if r.group is not None for row in r.group.rows]
    return sum(rewards) / len(rewards)


async def main() -> None:
    """Take one filtered batch and one evaluation from the same servers."""
    sampled = GenerationHyperparameters(max_new_tokens=8, ignore_eos=True)
    train, test = (SingleTurnWorkflow(reward_fn, g) for g in (sampled, sampled.new(greedy=True)))
    with tempfile.TemporaryDirectory() as scratch:
        TinyModel.random(0, vocab_size=32, eos_id=0).save(scratch)
        async with running_server(ServerSettings(weights=Path(scratch))) as server:
            config = RolloutConfig(servers=[server.url], consumer_batch_size=8, max_staleness=2)
            async with open_executor(config) as rollout:
                for n in range(16):  # holds no permit: it costs training no staleness
                    rollout.submit({"input_ids": [n, 7]}, test, is_eval=True)
                loader = [{"prompt_id": str(n), "input_ids": [n % 31, 3]} for n in range(64)]
                batch = await rollout.prepare_batch(
                    loader, train, should_accept_fn=has_a_signal, group_size=4
                )
                results = await rollout.wait(16, is_eval=True)
                counts = rollout.counts.as_dict()
    print(f"trained on {len(batch)} groups; the filter rejected {counts['rejected']}")
    print(f"evaluation: {accuracy(results):.2f} of {len(results)} prompts")


if __name__ == "__main__":
    trio.run(main)
