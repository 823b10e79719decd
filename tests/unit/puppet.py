"""Workflows that end when and how a test says, and what every test of the executor asserts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio
import trio.testing

from arealtrio.executor import WorkflowExecutor
from arealtrio.testing import SimulatedFleet
from arealtrio.types import (
    GenerationHyperparameters,
    ModelRequest,
    Outcome,
    Trajectory,
)
from arealtrio.workflow import Engine

Prompt = Mapping[str, Any]
GENERATED = GenerationHyperparameters(max_new_tokens=100_000)


def row(version: int = 0, reward: float = 1.0) -> Trajectory:
    """A prompt of one token and an answer of one token, made by ``version``."""
    return Trajectory(
        input_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([0, 1], np.int32),
        logprobs=np.array([0, -1], np.float32),
        versions=np.array([-1, version], np.int32),
        reward=reward,
    )


@dataclass(eq=False)
class Rollout:
    """One that runs now, until ``end``."""

    prompt_id: Any
    version: int
    event: trio.Event = field(default_factory=trio.Event)
    how: Any = None

    def end(self, how: Any = "accept") -> None:
        """End as accepted, with None, with the exception given, or with any other return value."""
        self.how = row(self.version) if how == "accept" else how
        self.event.set()


class Puppet:
    """A workflow whose rollouts run until the test ends them, each in its own way."""

    def __init__(self) -> None:
        self.running: list[Rollout] = []
        self.started: list[Any] = []

    async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
        rollout = Rollout(data.get("prompt_id"), engine.get_version())
        self.running.append(rollout)
        self.started.append(rollout.prompt_id)
        try:
            await rollout.event.wait()
        finally:
            self.running.remove(rollout)
        if isinstance(rollout.how, BaseException):
            raise rollout.how
        return rollout.how

    def end(self, prompt_id: Any, how: Any = "accept") -> None:
        """End the first rollout of a prompt that has no end yet."""
        self._of(prompt_id).end(how)

    def _of(self, prompt_id: Any) -> Rollout:
        return next(r for r in self.running if r.prompt_id == prompt_id and not r.event.is_set())

    def end_all(self, how: Any = "accept") -> None:
        for rollout in self.running:
            rollout.end(how)


class Instant:
    """A workflow that ends at once: what ``decide`` returns or raises for the prompt."""

    def __init__(self, decide: Callable[[Prompt], Any] = lambda _: "accept") -> None:
        self.decide = decide
        self.runs = 0

    async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
        self.runs += 1
        how = self.decide(data)
        return row(engine.get_version()) if how == "accept" else how


class Generates:
    """A workflow that really generates; ``hold`` runs after it."""

    def __init__(self, gconfig: GenerationHyperparameters = GENERATED) -> None:
        self.gconfig = gconfig

    async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
        response = await engine.agenerate(ModelRequest(data["input_ids"], self.gconfig))
        length = response.input_len + response.output_len
        mask = np.zeros(length, np.int32)
        mask[response.input_len :] = 1
        versions = np.full(length, -1, np.int32)
        versions[response.input_len :] = response.output_versions
        logprobs = np.zeros(length, np.float32)
        logprobs[response.input_len :] = response.output_logprobs
        return Trajectory(
            input_ids=np.concatenate([response.input_tokens, response.output_tokens]),
            loss_mask=mask,
            logprobs=logprobs,
            versions=versions,
            reward=1.0,
        )


def raises(error: BaseException) -> Callable[[Prompt], Any]:
    def decide(_: Prompt) -> Any:
        raise error

    return decide


def prompts(count: int | None = None) -> Iterator[Prompt]:
    """That many prompts, or without end."""
    numbers = itertools.count() if count is None else range(count)
    return ({"prompt_id": number, "input_ids": [number % 300 + 3]} for number in numbers)


def prompt_list(count: int) -> list[Prompt]:
    return list(prompts(count))


class Deferred:
    """A call that runs in its own task, and its end."""

    def __init__(self, nursery: trio.Nursery, function: Callable[..., Any], *args: Any) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, function, args)

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with self.scope:
            try:
                self.value = await function(*args)
            except Exception as exc:  # noqa: BLE001 - the test looks at it
                self.error = exc
        self.ended.set()

    @property
    def pending(self) -> bool:
        return not self.ended.is_set()


settled = trio.testing.wait_all_tasks_blocked


def check_counts(executor: WorkflowExecutor) -> None:
    """Invariants I1 and I2, between the executor's counts, its groups and its manager's."""
    live = list(executor._live.values())
    for counts, is_eval in ((executor.counts, False), (executor.eval_counts, True)):
        shown = counts.as_dict()
        assert all(count >= 0 for count in shown.values()), shown
        assert 2 * shown["submitted"] == sum(shown.values()), shown
        groups = [group for group in live if group.is_eval == is_eval]
        assert counts.queued == sum(not group.admitted for group in groups)
        assert counts.running == sum(group.admitted for group in groups)
    members = sum(len(group.running) for group in live)
    assert executor._admission.running_members == members <= executor._admission.concurrency
    stat = executor.staleness_manager.get_stats()
    assert stat.running == executor.counts.running
    assert stat.enqueued == executor.counts.queued
    assert stat.accepted == executor.counts.of(Outcome.ACCEPTED)


def check_closed(executor: WorkflowExecutor, fleet: SimulatedFleet) -> None:
    """Invariants I1, I4 and I9 after the end: nothing is left anywhere."""
    check_counts(executor)
    assert executor.counts.queued == executor.counts.running == 0
    assert executor.eval_counts.queued == executor.eval_counts.running == 0
    assert all(row.outstanding == 0 for row in executor.engine.statistics())
    assert executor.engine.pool.waiting == 0
    for server in fleet:
        assert server.generations == 0
        assert not server.scheduler.running
        assert not server.scheduler.waiting
