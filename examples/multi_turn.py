"""A workflow of several turns with a tool: guess a number, and be told higher or lower.

Run it: ``python examples/multi_turn.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from arealtrio import (
    Engine,
    GenerationHyperparameters,
    ModelRequest,
    RolloutConfig,
    RowBuilder,
    Trajectory,
    open_executor,
)
from arealtrio.embedded.model import TinyModel
from arealtrio.embedded.serve import ServerSettings, running_server

HIGHER, LOWER = 30, 31  # the tool's two tokens; the guess is a number below 30
ONE_TOKEN = GenerationHyperparameters(max_new_tokens=1, ignore_eos=True)


def tool(guess: int, secret: int) -> list[int]:
    """What stands in for a sandbox, a search, a calculator: text in, tokens out."""
    return [HIGHER if guess < secret else LOWER]


class GuessingWorkflow:
    """At most ``turns`` guesses; the reward halves with each. Only guesses are learnt from."""

    def __init__(self, turns: int = 8) -> None:
        self.turns = turns

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> Trajectory | None:
        """Play one game."""
        row = RowBuilder().append_prompt(data["input_ids"])
        for turn in range(self.turns):
            request = ModelRequest(row.input_ids, ONE_TOKEN, session=f"{data['prompt_id']}")
            response = await engine.agenerate(request)
            row.append_response(response)
            guess = int(response.output_tokens[0])
            if guess == data["secret"]:
                return row.build(0.5**turn)
            row.append_prompt(tool(guess, data["secret"]))  # mask 0, version -1
        return row.build(0.0)


async def main() -> None:
    """Play a batch of games, and show one row as the trainer gets it."""
    games = [{"prompt_id": f"g{n}", "input_ids": [1, 2], "secret": n} for n in range(10, 18)]
    with tempfile.TemporaryDirectory() as scratch:
        TinyModel.random(0, vocab_size=32, eos_id=0).save(scratch)
        async with running_server(ServerSettings(weights=Path(scratch))) as server:
            config = RolloutConfig(servers=[server.url], consumer_batch_size=len(games))
            async with open_executor(config) as rollout:
                batch = await rollout.prepare_batch(games, GuessingWorkflow())
    print("rewards  ", batch.padded()["rewards"].tolist())
    longest = max(batch.rows, key=len)
    print("input_ids", longest.input_ids.tolist())
    print("loss_mask", longest.loss_mask.tolist())


if __name__ == "__main__":
    trio.run(main)
