"""One training run for as long as it may last: batches, updates, evaluation, waits given up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from arealtrio import (
    Batch,
    Outcome,
    RolloutConfig,
    WeightUpdate,
    WeightUpdateError,
    WorkflowExecutor,
)
from arealtrio.demo.task import VOCAB_SIZE, BudgetWorkflow, Prompts
from arealtrio.types import PauseMode

BATCH_SIZE = 8
GROUP_SIZE = 2
MAX_STALENESS = 2
EVALUATIONS = 4  # at once
PROMPTS_MAX = 10**7
PAUSES: tuple[PauseMode, ...] = ("keep", "abort")


def config(backend: Any, servers: Sequence[str], slots: int, *, streaming: bool) -> RolloutConfig:
    """Times are short, so that ten minutes hold hundreds of deaths and returns."""
    return RolloutConfig(
        backend=backend,
        servers=servers,
        consumer_batch_size=BATCH_SIZE,
        max_staleness=MAX_STALENESS,
        max_concurrent_rollouts=2 * slots,
        vocab_size=VOCAB_SIZE,
        affinity_size=512,  # full before the warm-up ends: what fills up later looks like a leak
        streaming=streaming,
        segment_tokens=None if streaming else 32,
        max_failovers=64,
        failover_interval_s=0.1,
        connect_timeout_s=5,
        control_timeout_s=10,
        update_timeout_s=15,
        health_timeout_s=5,
        health_interval_s=1,
        probe_interval_s=0.2,
        probe_interval_max_s=1,
        eject_after_failures=2,
        rollout_timeout_s=120,
        segment_timeout_s=60,
        slow_step_warning_s=10,
    )


@dataclass
class Training:
    """A trainer, an evaluation beside it, and what they saw.

    Args:
        name: Of the dialect.
        executor: Theirs alone.
        weights: Checkpoints, taken in turn.
        rng: The source of their chance.
        violations: Where what must not be is written down.
    """

    name: str
    executor: WorkflowExecutor
    weights: Sequence[Path]
    rng: random.Random
    violations: list[str]
    batches: int = 0
    evaluations: int = 0
    given_up: int = 0
    updates_failed: int = 0
    delivered: bytearray = field(default_factory=lambda: bytearray(PROMPTS_MAX))  # by prompt
    prompts: Prompts = field(default_factory=Prompts)
    workflow: BudgetWorkflow = field(default_factory=BudgetWorkflow)

    async def train(self) -> None:
        """Take a batch, bring new weights, for ever."""
        while True:
            self._check(await self._next_batch())
            self.batches += 1
            await self._update(self.executor.get_version() + 1)

    async def _next_batch(self) -> Batch:
        """Wait for a batch, and give the wait up now and then: the next one gets what it had."""
        while True:
            with trio.move_on_after(self.rng.expovariate(1 / 3)):
                return await self.executor.prepare_batch(
                    self.prompts, self.workflow, group_size=GROUP_SIZE
                )
            self.given_up += 1

    def _check(self, batch: Batch) -> None:
        if len(batch.groups) != BATCH_SIZE:
            self._violated(f"a batch of {len(batch.groups)} groups")
        if batch.staleness().max() > MAX_STALENESS:
            self._violated(f"a token {batch.staleness().max()} versions old")
        for group in batch.groups:
            number = int(group.prompt_id)
            if self.delivered[number]:
                self._violated(f"prompt {number} was delivered twice")
            self.delivered[number] = 1

    async def _update(self, version: int) -> None:
        """Until it is done: with all servers dead it fails, and the version stays."""
        path = self.weights[version % len(self.weights)]
        while True:
            pause, rolling = self.rng.choice(PAUSES), self.rng.random() < 0.25
            update = WeightUpdate.from_disk(path, version, pause=pause, rolling=rolling)
            try:
                await self.executor.update_weights(update)
            except WeightUpdateError:
                self.updates_failed += 1
                await trio.sleep(0.5)  # until a server may be back
            else:
                return

    async def evaluate(self) -> None:
        """Submit a few, and take their results: each once, whoever gave up waiting between."""
        prompts = itertools.cycle(itertools.islice(Prompts(seed=1), 64))
        while True:
            some = itertools.islice(prompts, EVALUATIONS)
            wanted = [self.executor.submit(one, self.workflow, is_eval=True) for one in some]
            results = await self._evaluated(len(wanted))
            if sorted(wanted) != sorted(results):
                self._violated("evaluation got results that it did not ask for, or one twice")
            self.evaluations += len(results)

    async def _evaluated(self, count: int) -> list[str]:
        while True:
            with trio.move_on_after(self.rng.expovariate(1 / 3)):
                results = await self.executor.wait(count, is_eval=True)
                return [result.task_id for result in results]
            self.given_up += 1

    async def finish(self, within_s: float) -> None:
        """Start no more, and wait for what runs."""
        self.executor.pause()
        try:
            await self.executor.drain(within_s)
        except TimeoutError as exc:
            self._violated(f"rollouts that do not end: {exc}")

    def check_closed(self) -> None:
        """After the executor closed: every rollout settled, once."""
        for kind, counts in (
            ("training", self.executor.counts),
            ("evaluation", self.executor.eval_counts),
        ):
            told = counts.as_dict()
            settled = sum(counts.of(outcome) for outcome in Outcome)
            if told["submitted"] != settled or told["queued"] or told["running"]:
                self._violated(f"{kind} rollouts that did not settle once: {told}")
        accepted = self.executor.counts.of(Outcome.ACCEPTED)
        delivered = self.delivered.count(1)
        if delivered > accepted:
            self._violated(f"{delivered} groups delivered of {accepted} accepted")

    def _violated(self, words: str) -> None:
        self.violations.append(f"{self.name}: {words}")

    def __str__(self) -> str:
        told = self.executor.counts.as_dict()
        return (
            f"{self.name} version {self.executor.get_version()}, {told['accepted']} accepted, "
            f"{told['failed']} failed, {self.evaluations} evaluated, {self.given_up} waits given up"
        )
