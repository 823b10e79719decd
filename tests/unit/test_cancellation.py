"""Cancelled at each step in turn, of a rollout, a group, a batch or a run: nothing is lost or left.

A walk runs the same scene once for each step that any of its tasks makes, and cancels just before
it. Counts (I1, I2) are compared at every step of every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import RolloutClosed
from arealtrio.executor import WorkflowExecutor
from arealtrio.group_policy import GroupPolicy
from arealtrio.testing import (
    FixedLengths,
    Lengths,
    LogNormalLengths,
    SimulatedFleet,
    checkpoint,
    simulated_executor,
)
from arealtrio.types import GenerationHyperparameters, Outcome
from arealtrio.weights import WeightUpdate
from arealtrio.workflow import Engine

from .puppet import Deferred, Generates, Prompt, check_closed, check_counts, prompt_list, settled

Clock = trio.testing.MockClock
LENGTHS = LogNormalLengths.with_tail(median=5, p99=20, longest=40)
OTHER_PROMPTS = 4


class AtStep(trio.abc.Instrument):
    """Does something just before the n-th step of a task since it was armed; None only counts.

    Args:
        step: Which.
        act: What.
        task: The name of the tasks that count; None counts all.
    """

    def __init__(self, step: int | None, act: Callable[[], None], task: str | None = None) -> None:
        self.steps = 0
        self._step, self._act, self._task = step, act, task

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._task in (None, task.name):
            if self.steps == self._step:
                self._act()
            self.steps += 1


class CheckCounts(trio.abc.Instrument):
    """Compares the counts after each step of any task; trio only logs what an instrument raises."""

    def __init__(self, executor: WorkflowExecutor) -> None:
        self._executor = executor
        self.broken: list[AssertionError] = []

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        try:
            check_counts(self._executor)
        except AssertionError as exc:
            self.broken.append(exc)


@contextmanager
def instrument(added: trio.abc.Instrument) -> Iterator[None]:
    trio.lowlevel.add_instrument(added)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(added)


@asynccontextmanager
async def open_scene(
    servers: int = 2, lengths: Lengths = LENGTHS, **config: Any
) -> AsyncIterator[tuple[WorkflowExecutor, SimulatedFleet]]:
    async with simulated_executor(
        servers=servers, lengths=lengths, rollout_timeout_s=60, **config
    ) as (executor, fleet):
        counts = CheckCounts(executor)
        with instrument(counts):
            yield executor, fleet
        check_counts(executor)
        assert not counts.broken, counts.broken[0]
    check_closed(executor, fleet)


@contextmanager
def cancelled_at(step: int | None) -> Iterator[AtStep]:
    """Cancel the block just before the step."""
    with trio.CancelScope() as scope:
        at = AtStep(step, scope.cancel)
        with instrument(at):
            yield at


class Flaky(Generates):
    """Its first attempt at each prompt may fail, after it generated as many tokens as that says."""

    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.attempts: Counter[Any] = Counter()
        self._breaks = breaks

    async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
        self.attempts[data["prompt_id"]] += 1
        first = self.attempts[data["prompt_id"]] == 1
        tokens = GenerationHyperparameters(max_new_tokens=data.get("tokens", 1000))
        result = await Generates(tokens).arun_episode(engine, data)
        if first and self._breaks:
            raise ValueError("the first one breaks")
        return result


POLICIES: dict[str, dict[str, Any]] = {
    "one": {},
    "all of two, tried again": {"group_size": 2, "group_policy": GroupPolicy.all(max_retries=3)},
    "three, replaced": {"group_size": 3, "group_policy": GroupPolicy.replace()},
    "two of three": {"group_size": 3, "group_policy": GroupPolicy.at_least(2)},
}
FAILING = {"all of two, tried again", "three, replaced", "two of three"}


def workflow_of(policy: str) -> Flaky:
    return Flaky(breaks=policy in FAILING)


def walked(walk: Callable[[int | None], Any], seed_trio: Callable[[int], None]) -> int:
    """Run a walk once for each of its steps; return how many there are."""

    def run(step: int | None) -> int:
        seed_trio(3)
        steps: int = trio.run(walk, step, clock=Clock(autojump_threshold=0))
        return steps

    steps = run(None)
    for step in range(steps):
        run(step)
    return steps


# --- its caller is cancelled ---------------------------------------------------------------------


async def walk_rollout_batch(policy: str, step: int | None) -> int:
    async with open_scene(consumer_batch_size=4, max_staleness=4) as (executor, _):
        arguments = POLICIES[policy]
        with cancelled_at(step) as at:
            await executor.rollout_batch(prompt_list(2), workflow_of(policy), **arguments)
        await settled()
        assert executor.counts.queued == executor.counts.running == 0
        again = await executor.rollout_batch(prompt_list(2), workflow_of(policy), **arguments)
        assert len(again) == 2
    return at.steps


async def walk_prepare_batch(policy: str, step: int | None) -> int:
    async with open_scene(consumer_batch_size=2, max_staleness=1) as (executor, _):
        loader, seen = prompt_list(4), []
        draw = partial(executor.prepare_batch, loader, workflow_of(policy), **POLICIES[policy])
        with cancelled_at(step) as at:
            batch = await draw()
            seen += [group.prompt_id for group in batch.groups]
        if seen:
            await executor.set_version(1)
        while True:
            try:
                batch = await draw()
            except StopAsyncIteration:
                break
            seen += [group.prompt_id for group in batch.groups]
            await executor.set_version(batch.version + 1)
        assert sorted(seen) == list("0123")  # each once (I7)
    return at.steps


@pytest.mark.parametrize("policy", ["one", "all of two, tried again", "three, replaced"])
@pytest.mark.parametrize("walk", [walk_rollout_batch, walk_prepare_batch])
def test_a_cancelled_call_loses_and_leaves_nothing(
    walk: Callable[..., Any], policy: str, seed_trio: Callable[[int], None]
) -> None:
    assert walked(partial(walk, policy), seed_trio) > 12


# --- stragglers are cancelled, and so is whoever cancels them ------------------------------------


LONG, SHORT = 40, 2  # tokens; training takes as long as ten


class Training:
    """A trainer that is faster than the answer to its first prompt, and what it saw."""

    def __init__(self, executor: WorkflowExecutor, policy: str) -> None:
        self.executor = executor
        lengths = enumerate([LONG, SHORT, SHORT])
        self.loader = [{"prompt_id": str(i), "input_ids": [3], "tokens": n} for i, n in lengths]
        self.workflow, self.arguments = workflow_of(policy), POLICIES[policy]
        self.seen: list[str] = []

    async def step(self) -> None:
        batch = await self.executor.prepare_batch(self.loader, self.workflow, **self.arguments)
        self.seen += [group.prompt_id for group in batch.groups]
        assert max(batch.staleness()) <= 1  # I6
        await trio.sleep(0.2)
        await self.update()

    async def update(self) -> None:
        version = self.executor.get_version() + 1
        await self.executor.update_weights(WeightUpdate.from_disk(checkpoint(version), version))

    async def to_the_end(self) -> None:
        await self.update()  # what was in the middle of one is out of service until the next
        while True:
            try:
                await self.step()
            except StopAsyncIteration:
                return


async def walk_training(straggler_policy: str, policy: str, step: int | None) -> int:
    async with open_scene(
        servers=1,
        lengths=FixedLengths(1000),
        consumer_batch_size=1,
        max_staleness=1,
        max_requeues=1000,
        straggler_policy=straggler_policy,
        max_concurrent_rollouts=64,
    ) as (executor, _):
        training = Training(executor, policy)
        with cancelled_at(step) as at:
            for _ in range(2):
                await training.step()
        await training.to_the_end()
        attempts, expired = training.workflow.attempts, executor.counts.of(Outcome.EXPIRED)
        if step is None:
            assert expired == (straggler_policy == "drop")
            assert (attempts["0"] > attempts["1"]) == (straggler_policy == "requeue")
        assert sorted(training.seen) == list("012")[expired:]  # I7
    return at.steps


@pytest.mark.parametrize(
    ("straggler_policy", "policy"),
    [("requeue", "three, replaced"), ("drop", "one")],
)
def test_a_training_loop_that_stops_stragglers_loses_and_leaves_nothing(
    straggler_policy: str, policy: str, seed_trio: Callable[[int], None]
) -> None:
    assert walked(partial(walk_training, straggler_policy, policy), seed_trio) > 60


# --- a rollout's own time is up ------------------------------------------------------------------


async def walk_deadline(policy: str, step: int | None) -> int:
    """A member's deadline passes just before each step that any of its group makes."""

    def expire() -> None:
        for rollout in list(executor._live["mine"].running.values())[:1]:
            rollout.scope.deadline = trio.current_time()

    config: dict[str, Any] = {
        "consumer_batch_size": 4,
        "max_requests_per_server": 1,
        "segment_tokens": 1,
    }
    async with open_scene(**config) as (executor, fleet):
        with instrument(at := AtStep(step, expire, task="mine")):
            for task_id, prompt in zip(["mine", "other"], prompt_list(2), strict=True):
                executor.submit(prompt, Flaky(breaks=False), task_id=task_id, **POLICIES[policy])
            mine = await executor.wait_for_task("mine")
            other = await executor.wait_for_task("other")
        assert other.outcome is Outcome.ACCEPTED
        if policy == "one":  # it may have made its last step
            assert mine.outcome in (Outcome.EXPIRED, Outcome.ACCEPTED)
        else:
            assert mine.group is not None
            assert len(mine.group.rows) in ((3,) if policy == "three, replaced" else (2, 3))
        await settled()
        assert sum(server.generations for server in fleet) == 0
        assert executor.get_capacity() == 4 - executor.counts.of(Outcome.ACCEPTED)
    return at.steps


@pytest.mark.parametrize(
    ("policy", "least"), [("one", 5), ("three, replaced", 15), ("two of three", 15)]
)
def test_a_rollout_that_expires_at_any_step_leaves_nothing_and_its_group_to_its_policy(
    policy: str, least: int, seed_trio: Callable[[int], None]
) -> None:
    assert walked(partial(walk_deadline, policy), seed_trio) >= least


# --- the run ends --------------------------------------------------------------------------------


async def walk_close(policy: str, step: int | None) -> int:
    """Close comes just before each step, while one waits for a batch, one for a task."""
    config: dict[str, Any] = {
        "consumer_batch_size": 2,
        "max_staleness": 1,
        "max_concurrent_rollouts": 6,
    }
    async with open_scene(**config) as (executor, _):
        with instrument(at := AtStep(step, executor.close)):
            async with trio.open_nursery() as nursery:
                more, workflow = POLICIES[policy], workflow_of(policy)
                calls = [
                    Deferred(
                        nursery,
                        partial(executor.prepare_batch, prompt_list(3), workflow, **more),
                    )
                ]
                with suppress(RolloutClosed):
                    name = executor.submit({"input_ids": [9]}, workflow, is_eval=True, **more)
                    calls.append(Deferred(nursery, executor.wait_for_task, name))
        errors = [type(call.error) for call in calls if call.error is not None]
        assert set(errors) <= {RolloutClosed}
        assert step is not None or not errors
    return at.steps


@pytest.mark.parametrize("policy", ["one", "three, replaced"])
def test_a_run_that_closes_at_any_step_wakes_everybody_and_leaves_nothing(
    policy: str, seed_trio: Callable[[int], None]
) -> None:
    assert walked(partial(walk_close, policy), seed_trio) > 15
