"""What the choice of a server is worth, end to end."""

from __future__ import annotations

import trio

from arealtrio import GenerationHyperparameters, SingleTurnWorkflow
from arealtrio.testing import SimulatedServerSettings, simulated_executor

from .training import LONG_TAIL, prompts, virtually

CAPS = (8,) * 4 + (24,) * 4
COUNT = 1024


def reward(
    prompt: object, completions: object, prompt_ids: object, ids: object, **_: object
) -> int:
    return 1


async def _makespan(policy: str) -> float:
    async with simulated_executor(
        servers=[SimulatedServerSettings(max_num_seqs=cap) for cap in CAPS],
        lengths=LONG_TAIL,
        seed=3,
        consumer_batch_size=COUNT,
        max_concurrent_rollouts=160,
        schedule_policy=policy,
    ) as (executor, fleet):
        workflow = SingleTurnWorkflow(reward, GenerationHyperparameters())
        started = trio.current_time()
        batch = await executor.rollout_batch(list(prompts(COUNT)), workflow)
        assert len(batch) == COUNT
        if policy == "least_request":
            assert [server.most_waiting for server in fleet] == [0] * len(CAPS)
        return trio.current_time() - started


def test_least_request_beats_round_robin_on_unequal_servers() -> None:
    """Strict turns send every server the same, so the small ones set the pace of the large."""
    assert virtually(_makespan, "least_request") <= 0.75 * virtually(_makespan, "round_robin")
