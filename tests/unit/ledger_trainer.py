"""The demo's trainer as a program that can be killed: it goes on from its own checkpoint.

    python -m tests.unit.ledger_trainer DIRECTORY PROMPTS URL…

Servers are somebody else's. It trains one epoch, and leaves ``checkpoint.json``: the prompts that
the weights in it were trained on, in order, and whether the epoch has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arealtrio import ModelRequest, ModelResponse, RolloutConfig, RolloutController, WeightUpdate
from arealtrio.demo.task import BudgetWorkflow, Prompts, base_model
from arealtrio.demo.trainer import PolicyTrainer
from arealtrio.embedded.model import TinyModel
from arealtrio.types import Trajectory
from arealtrio.workflow import Engine

BATCH = 8
GROUP = 2
STEPS_PER_CHECKPOINT = 2
FLUSH_S = 0.02


class _Naming:
    """An engine whose requests can be told by their prompts, at the servers."""

    def __init__(self, engine: Engine, prompt_id: str) -> None:
        self._engine = engine
        self._rid = f"{prompt_id}.{os.urandom(6).hex()}"

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        return await self._engine.agenerate(
            ModelRequest(request.input_ids, request.gconfig, rid=self._rid)
        )

    def get_version(self) -> int:
        return self._engine.get_version()


class NamedWorkflow(BudgetWorkflow):
    """The demo's, with named requests."""

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any], /) -> Trajectory | None:
        return await super().arun_episode(_Naming(engine, data["prompt_id"]), data)


def write(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint, whole or not at all."""
    beside = path.with_suffix(".new")
    with beside.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def main(directory: Path, count: int, urls: list[str]) -> None:
    """Train what is left of the epoch."""
    path = directory / "checkpoint.json"
    found = json.loads(path.read_text()) if path.exists() else None
    trained: list[str] = found["trained"] if found else []
    prompts = list(itertools.islice(Prompts(0), count))
    config = RolloutConfig(
        servers=urls,
        consumer_batch_size=BATCH,
        max_staleness=2,
        max_concurrent_rollouts=32,
        slow_step_warning_s=60,
        no_server_grace_s=10,  # whoever started this one is gone
        ledger_path=str(directory / "ledger"),
        ledger_flush_s=FLUSH_S,
    )
    with RolloutController(config) as rollout:
        version = 0
        if found:
            version = found["rollout"]["version"]
            rollout.load_state_dict(found["rollout"])
            weights = directory / f"v{version}"
            rollout.recover(version, WeightUpdate.from_disk(weights, version))
        elif rollout.get_version() or (directory / "v1").exists():
            rollout.recover(0, WeightUpdate.from_disk(directory / "v0", 0))
        model = TinyModel.load(directory / f"v{version}") if version else base_model()
        trainer = PolicyTrainer(model)
        for batch in rollout.batches(prompts, NamedWorkflow(), group_size=GROUP):
            assert batch.staleness().max() <= 2
            trainer.step(batch.padded())
            trained += [group.prompt_id for group in batch.groups]
            version += 1
            trainer.model.save(directory / f"v{version}")
            rollout.update_weights(WeightUpdate.from_disk(directory / f"v{version}", version))
            if version % STEPS_PER_CHECKPOINT == 0:
                state = rollout.state_dict()
                write(path, {"trained": trained, "rollout": state, "ended": False})
        write(path, {"trained": trained, "rollout": rollout.state_dict(), "ended": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
