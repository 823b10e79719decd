"""The same rollouts inside a trio program: no thread, and cancellation reaches the servers.

Run it: ``python examples/inside_trio.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import trio

from arealtrio import (
    GenerationHyperparameters,
    RolloutConfig,
    SingleTurnWorkflow,
    WeightUpdate,
    open_executor,
)
from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.serve import ServerSettings, running_server


async def reward_fn(
    prompt: str | None, completions: str | None, prompt_ids: Any, completion_ids: Any, **data: Any
) -> float:
    """Return 1 for an answer that holds the wanted token; it may wait for something meanwhile."""
    await trio.sleep(0.001)
    return float(data["wanted"] in completion_ids)


PROMPTS = [{"prompt_id": f"p{n}", "input_ids": [n, n + 1], "wanted": n} for n in range(1, 25)]


async def main() -> None:
    """Run one epoch, then withdraw from a second one."""
    workflow = SingleTurnWorkflow(reward_fn, GenerationHyperparameters(max_new_tokens=16))
    with tempfile.TemporaryDirectory() as scratch:
        model = TinyModel.random(0, vocab_size=32, eos_id=0)
        model.save(Path(scratch) / "0")
        async with running_server(ServerSettings(weights=Path(scratch) / "0")) as server:
            config = RolloutConfig(servers=[server.url], consumer_batch_size=8, max_staleness=1)
            async with open_executor(config) as rollout:
                async for batch in rollout.batches(PROMPTS, workflow, group_size=2):
                    mean = batch.padded()["rewards"].mean()
                    print(f"version {batch.version}: {len(batch)} groups, mean reward {mean:.2f}")
                    version = batch.version + 1
                    model.save(Path(scratch) / str(version))  # a trainer would have changed it
                    update = WeightUpdate.from_disk(Path(scratch) / str(version), version)
                    await rollout.update_weights(update)
                with trio.move_on_after(0.01):  # loses nothing, and leaves nothing on the server
                    await rollout.prepare_batch(PROMPTS, workflow)
            print(f"left on the server: {len(server.scheduler.running)} requests")


if __name__ == "__main__":
    trio.run(main)
