"""Trainers that crash at any moment: whatever the seed, no prompt is lost or trained twice."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from arealtrio import (
    Batch,
    GroupPolicy,
    Ledger,
    NoServerAvailable,
    RolloutConfig,
    WeightUpdate,
    WeightUpdateError,
    WorkflowExecutor,
    open_executor,
)
from arealtrio.recording import open_ledger_of
from arealtrio.testing import (
    Faults,
    LogNormalLengths,
    ServerCondition,
    SimulatedFleet,
    checkpoint,
    open_fleet,
)
from arealtrio.testing.faults import ALL

from .plan import LIMITS
from .training import SERVERS, Scenario, WatchedWorkflow, check_row, virtually

PROMPTS = 60
LENGTHS = LogNormalLengths.with_tail(median=10, p99=80, longest=120)
TRAINING_S = 1.0
RETRY_S = 1.0
LIFE_S = 12.0  # at most; all prompts take about three times as long
LIVES_MAX = 100
SEEDS = range(int(os.environ.get("AREALTRIO_LEDGER_SEEDS", "12")))


class Story:
    """The lives of one trainer: what its checkpoints hold, and what was durable when it died.

    Where it is ``faulty`` its servers fail too, in every way.
    """

    def __init__(self, seed: int, path: Path, *, faulty: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.path = path
        self.faulty = faulty
        self.scenario = Scenario(
            seed=seed,
            max_staleness=rng.randint(0, 3),
            group_size=rng.choice([1, 1, 3]),
            policy=rng.choice(["wait", "wait", "keep", "requeue"]),
            batch_size=rng.randint(1, 6),
            reject=rng.choice([0, 0.2]),
            flaky=rng.choice([0, 0.05]),
            group_policy=GroupPolicy.replace(max_replacements=50),
            max_requeues=100,
        )
        self.steps_per_checkpoint = rng.randint(1, 3)
        self.takes_ahead = self.scenario.max_staleness > 0 and rng.random() < 0.3
        self.workflow = WatchedWorkflow(self.scenario)
        self.trained: list[str] = []  # by the weights in the checkpoint
        self.state: dict[str, Any] | None = None  # in the checkpoint
        self.kept: set[str] = set()  # finished and durable at a crash, by weights not lost with it
        self.ended = False

    async def live(self, fleet: SimulatedFleet, life_s: float) -> None:
        """One life. It ends by a crash after ``life_s``, or with the epoch."""
        before = self.workflow.attempts.copy()
        config = RolloutConfig(
            servers=up(fleet),
            ledger_path=str(self.path),
            ledger_flush_s=self.rng.choice([0.01, 0.5, 5.0]),
            seed=self.scenario.seed,
            **self.scenario.config(),
            **LIMITS,
        )
        durable: set[str] = set()
        try:
            async with (
                open_ledger_of(config, inline=True) as ledger,
                open_executor(config, transport=fleet, ledger=ledger) as executor,
            ):
                with trio.move_on_after(life_s):
                    await self.train(executor)
                ledger.abandon()
                durable = finished(ledger, 0 if self.state is None else self.state["version"])
        except NoServerAvailable:  # a short life
            assert self.faulty
            await trio.sleep(RETRY_S)
        again = {prompt for prompt in self.kept if self.workflow.attempts[prompt] > before[prompt]}
        # What a stricter order finds too old may be made again, and nothing else.
        assert not again or self.scenario.policy == "requeue", sorted(again)
        self.kept |= durable

    async def train(self, executor: WorkflowExecutor) -> None:
        loader = [{"prompt_id": str(n), "input_ids": [1, 2, 3 + n]} for n in range(PROMPTS)]
        trained, version = list(self.trained), 0
        if self.state is not None:
            version = self.state["version"]
            executor.load_state_dict(self.state)
        await self.bring(version, executor.recover, version)
        batch = await self.next_batch(executor, loader)
        while batch is not None:
            ahead = [await self.next_batch(executor, loader)] if self.takes_ahead else []
            await trio.sleep(TRAINING_S)
            version += 1
            await self.bring(version, executor.update_weights)
            trained += [group.prompt_id for group in batch.groups]
            if version % self.steps_per_checkpoint == 0:
                await self.save(executor, batch, trained)
            batch = ahead[0] if ahead else await self.next_batch(executor, loader)
        self.trained, self.state = trained, await executor.state_dict()
        self.ended = True

    async def bring(self, version: int, update: Callable[..., Awaitable[Any]], *args: int) -> None:
        """Update the servers' weights; again, where too many of them fail."""
        while True:
            try:
                await update(*args, WeightUpdate.from_disk(checkpoint(version), version))
            except WeightUpdateError:
                assert self.faulty
                await trio.sleep(RETRY_S)
            else:
                return

    async def save(self, executor: WorkflowExecutor, batch: Batch, trained: list[str]) -> None:
        state = await executor.state_dict(batch)
        await trio.sleep(self.rng.uniform(0, 0.3))  # a crash here leaves the checkpoint before it
        self.trained, self.state = list(trained), state
        if self.rng.random() < 0.3:
            await executor.ack(batch)

    async def next_batch(self, executor: WorkflowExecutor, loader: Any) -> Batch | None:
        try:
            batch = await executor.prepare_batch(
                loader,
                self.workflow,
                should_accept_fn=self.workflow.should_accept,
                group_size=self.scenario.group_size,
                group_policy=self.scenario.group_policy,
            )
        except StopAsyncIteration:
            return None
        for row in batch.rows:
            assert row.versions_exact or self.faulty
            if row.versions_exact:
                check_row(row)
        if self.scenario.policy != "keep":
            assert batch.staleness().max() <= self.scenario.max_staleness
        return batch

    def accepted(self) -> Counter[str]:
        """What the epoch has to train on: all prompts but those that the filter rejects."""
        names = [str(n) for n in range(PROMPTS)]
        share = self.scenario.reject
        return Counter(n for n in names if self.scenario.chance("reject", n) >= share)


def finished(ledger: Ledger, version: int) -> set[str]:
    """Prompts whose groups are durable, and were made by no weights newer than ``version``."""
    rows = ledger._file._db.execute(
        "SELECT mark FROM prompts JOIN groups USING (key) WHERE tail <= ?", (version,)
    )
    return {mark for (mark,) in rows}


def up(fleet: SimulatedFleet) -> list[str]:
    """The servers that a trainer finds when it starts; one is started where none is up."""
    if not any(server.condition is ServerCondition.UP for server in fleet):
        fleet.servers[0].restart()
    return [server.address for server in fleet if server.condition is ServerCondition.UP]


async def _told(seed: int, path: Path, faulty: bool) -> Story:
    story = Story(seed, path, faulty=faulty)
    rates = {kind: rate * story.rng.choice((0.5, 2.0)) for kind, rate in ALL.items()}
    faults = Faults(seed, rates if faulty else None, outage_s=(0.5, 5.0))
    async with open_fleet(SERVERS, lengths=LENGTHS, seed=seed, faults=faults) as fleet:
        for _ in range(LIVES_MAX):
            await story.live(fleet, story.rng.uniform(0.5, LIFE_S))
            if story.ended:
                break
    assert bool(faults.log) is faulty
    return story


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_prompt_is_trained_once_over_all_crashes(
    seed: int, faulty: bool, tmp_path: Path
) -> None:
    story = virtually(_told, seed, tmp_path / "ledger", faulty, seed=seed)
    assert story.ended
    assert Counter(story.trained) == story.accepted()
