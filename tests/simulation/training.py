"""A training loop on simulated servers, and everything that must hold while it runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import trio

from arealtrio import (
    Batch,
    GenerationHyperparameters,
    Group,
    GroupPolicy,
    SingleTurnWorkflow,
    Trajectory,
    WeightUpdate,
    WorkflowExecutor,
)
from arealtrio.testing import (
    EOS,
    LogNormalLengths,
    SimulatedFleet,
    SimulatedServer,
    SimulatedServerSettings,
    checkpoint,
    made_by,
    run_virtually,
    simulated_executor,
)

T = TypeVar("T")

TRAINING_S = 3.0
TOKEN_TIME_S = 0.04
# p99 is 9 times the median; the longest answer takes 375 × 0.04 s = 5 training steps.
LONG_TAIL = LogNormalLengths.with_tail(median=20, p99=180, longest=375)
SERVERS = (SimulatedServerSettings(max_num_seqs=4, token_time_s=TOKEN_TIME_S),) * 4
LONGER_THAN_ANY_RUN_S = 5000.0  # and shorter than a rollout's own deadline
MAX_RUNNING = 20  # more than the 16 slots, so that requests do wait in the pool's queue


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run.

    ``reject`` and ``fail`` are shares of the groups, ``flaky`` is one of the attempts at a member;
    ``think_s`` is the longest time that a rollout spends on something else before it asks a server.
    """

    seed: int
    max_staleness: int
    group_size: int = 1
    policy: str = "wait"
    steps: int = 40
    batch_size: int = 4
    reject: float = 0.0
    fail: float = 0.0
    think_s: float = 0.0
    flaky: float = 0.0
    group_policy: GroupPolicy | None = None
    dynamic_batch_size: bool = False
    max_requeues: int = 2
    max_running: int = MAX_RUNNING

    def __str__(self) -> str:
        return (
            f"seed={self.seed} staleness={self.max_staleness} group={self.group_size} {self.policy}"
        )

    def chance(self, what: str, prompt_id: object) -> float:
        """In [0, 1), the same for all members of a group, whatever the schedule."""
        return random.Random(f"{self.seed} {what} {prompt_id}").random()

    def config(self) -> dict[str, Any]:
        return {
            "consumer_batch_size": self.batch_size,
            "max_staleness": self.max_staleness,
            "straggler_policy": self.policy,
            "max_requeues": self.max_requeues,
            "max_concurrent_rollouts": self.max_running,
        }


class Broken(Exception):
    """What a failing workflow raises."""


class WatchedWorkflow(SingleTurnWorkflow):
    """Generates, fails as often as the scenario says, and counts who runs (invariant I2)."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(
            lambda prompt, completions, prompt_ids, completion_ids, **_: len(completion_ids),
            GenerationHyperparameters(max_new_tokens=1000),
        )
        self._scenario = scenario
        self._flaky = random.Random(f"{scenario.seed} flaky")
        self.running = 0
        self.most_running = 0
        self.attempts: Counter[str] = Counter()  # at members, by prompt

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> Trajectory | None:
        self.attempts[str(data["prompt_id"])] += 1
        breaks = self._flaky.random() < self._scenario.flaky
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await trio.sleep(
                self._scenario.think_s * self._scenario.chance("think", data["prompt_id"])
            )
            row = await super().arun_episode(engine, data)
            if breaks or self._scenario.chance("fail", data["prompt_id"]) < self._scenario.fail:
                raise Broken
            return row
        finally:
            self.running -= 1

    def should_accept(self, group: Group) -> bool:
        return self._scenario.chance("reject", group.prompt_id) >= self._scenario.reject


def prompts(count: int | None = None) -> Iterator[dict[str, Any]]:
    """Prompts 0, 1, …; for ever unless ``count`` says how many."""
    number = 0
    while count is None or number < count:
        yield {"prompt_id": number, "input_ids": [1, 2, 3 + number % 1000]}
        number += 1


@dataclass
class Report:
    """What was seen of a run."""

    batches: list[Batch] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return [group for batch in self.batches for group in batch.groups]

    @property
    def numbers(self) -> list[int]:
        return [group.number for group in self.groups]

    @property
    def lengths(self) -> list[int]:
        """Of every answer delivered, in tokens."""
        return [int(row.loss_mask.sum()) for batch in self.batches for row in batch.rows]

    def oldest_token(self) -> int:
        """The staleness of the oldest token consumed, counted here from the tokens themselves."""
        return max(
            batch.version - int(version)
            for batch in self.batches
            for row in batch.rows
            for version in row.versions[row.versions >= 0]
        )

    def groups_older_than(self, bound: int) -> int:
        return sum(
            any(batch.version - min(row.versions[row.versions >= 0]) > bound for row in group.rows)
            for batch in self.batches
            for group in batch.groups
        )


class Run:
    """An executor, its servers, and the invariants that are checked at every change."""

    def __init__(
        self, scenario: Scenario, executor: WorkflowExecutor, fleet: SimulatedFleet
    ) -> None:
        self.scenario = scenario
        self.executor = executor
        self.fleet = fleet
        self.workflow = WatchedWorkflow(scenario)
        self.report = Report()
        self.broken: list[str] = []  # invariants that did not hold
        self.most_waiting = 0  # requests in the pool's queue
        for server in fleet:
            server.on_change = self._watch

    def _watch(self, server: SimulatedServer) -> None:
        if server.generations > server.settings.max_num_seqs:
            self.broken.append(f"I4: {server.address} has {server.generations} generations")
        if server.scheduler.waiting and server.scheduler.pause_mode is None:
            self.broken.append(f"I4: a request queues inside {server.address}")
        self._watch_pool()

    def _watch_pool(self) -> None:
        servers = self.executor.engine.statistics()
        waiting = self.executor.engine.pool.waiting
        self.most_waiting = max(self.most_waiting, waiting)
        self.broken += [f"I4: {s}" for s in servers if s.outstanding > s.cap]
        if waiting:
            idle = [s for s in servers if s.state == "ready" and s.outstanding < s.cap]
            self.broken += [f"I5: {waiting} requests wait for {s}" for s in idle]

    def check(self) -> None:
        """I1, I2, and what was seen of I4 and I5 since: inside a rollout nobody may raise."""
        assert not self.broken
        self._check_counts()

    def _check_counts(self) -> None:
        counts = dict(self.executor.counts.as_dict())
        assert counts.pop("submitted") == sum(counts.values())
        assert min(counts.values()) >= 0
        assert self.workflow.most_running <= self.scenario.max_running

    async def next_batch(self, loader: Any) -> Batch:
        batch = await self.executor.prepare_batch(
            loader,
            self.workflow,
            should_accept_fn=self.workflow.should_accept,
            group_size=self.scenario.group_size,
            group_policy=self.scenario.group_policy,
            dynamic_batch_size=self.scenario.dynamic_batch_size,
        )
        self.report.batches.append(batch)
        self.check()
        for row in batch.rows:
            check_row(row)
        return batch

    async def update(self) -> None:
        version = self.executor.get_version() + 1
        await self.executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))
        assert self.executor.get_version() == version

    async def train(self, loader: Any, steps: int) -> None:
        for _ in range(steps):
            await self.next_batch(loader)
            await trio.sleep(TRAINING_S)
            await self.update()


def check_row(row: Trajectory) -> None:
    """No token was lost or made twice, and each carries the version that made it (I8)."""
    made = row.loss_mask == 1
    tokens, versions = row.input_ids[made], row.versions[made]
    assert tokens[-1] == EOS
    assert (np.diff(tokens) == -1).all()
    assert [made_by(float(logprob)) for logprob in row.logprobs[made]] == versions.tolist()
    assert (np.diff(versions) >= 0).all()
    assert row.versions_exact


@asynccontextmanager
async def open_run(scenario: Scenario, **more: Any) -> AsyncIterator[Run]:
    async with simulated_executor(
        servers=SERVERS, lengths=LONG_TAIL, seed=scenario.seed, **scenario.config(), **more
    ) as (executor, fleet):
        run = Run(scenario, executor, fleet)
        yield run
    run.check()
    executor.check_settled()
    assert all(server.generations == 0 for server in fleet), "I9: a request outlived its rollout"


async def _train(scenario: Scenario) -> Run:
    async with open_run(scenario) as run:
        await run.train(prompts(), scenario.steps)
    return run


def trained(scenario: Scenario) -> Run:
    """Train for as many steps as the scenario says, in no time."""
    return virtually(_train, scenario, seed=scenario.seed)


def virtually(function: Callable[..., Awaitable[T]], *args: object, seed: int = 0) -> T:
    """Run an async function in no time, the same on every run.

    A deadlock would wait for ever, so it is given a time that no run needs.
    """
    return run_virtually(function, *args, seed=seed, time_limit_s=LONGER_THAN_ANY_RUN_S)
