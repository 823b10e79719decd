"""The executor against a model of lists, after any sequence of calls and ends of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arealtrio import GroupPolicy
from arealtrio.errors import ArealTrioError, UsageError
from arealtrio.executor import WorkflowExecutor
from arealtrio.settlement import RolloutResult
from arealtrio.testing import simulated_executor
from arealtrio.trajectory import Batch, Group

from ..models.executor import ModelExecutor, ModelMember, Rules
from ..unit.puppet import Puppet, check_closed, check_counts, row, settled

NAMES = st.sampled_from("abcdef")
LIKED, DISLIKED = 1.0, 0.0  # rewards
ENDS: dict[str, Any] = {"accepted": LIKED, "disliked": DISLIKED, "rejected": None}

SUBMIT = st.tuples(st.just("submit"), NAMES, st.integers(1, 3), st.booleans())
FRESH = st.tuples(st.just("fresh"), st.integers(1, 3), st.booleans())
TRAIN = st.tuples(st.just("fresh"), st.integers(1, 3), st.just(False))
# which member, how, and whether its tokens are of now, or of when it began
HOW = st.sampled_from(["accepted", "accepted", "accepted", "disliked", "rejected", "failed"])
END = st.tuples(st.just("end"), st.integers(0, 7), HOW, st.booleans())
WAIT = st.tuples(st.just("wait"), st.integers(1, 3), st.booleans())
WAIT_FOR_TASK = st.tuples(st.just("wait_for_task"), NAMES)
OTHERS = st.sampled_from([("version",), ("version",), ("jump",), ("pause",), ("resume",)])
BATCH = st.tuples(st.just("batch"), st.integers(1, 3))
VERSION = st.just(("version",))

OF_SUBMIT = st.lists(
    st.one_of(SUBMIT, FRESH, FRESH, END, END, END, WAIT, WAIT_FOR_TASK, OTHERS), max_size=40
)
OF_BATCHES = st.lists(st.one_of(BATCH, BATCH, END, END, END, END, VERSION, VERSION), max_size=60)
OF_BOTH = st.lists(
    st.one_of(BATCH, BATCH, TRAIN, END, END, END, VERSION, WAIT, OTHERS), max_size=40
)

POLICIES = st.one_of(
    st.tuples(st.just("all"), st.integers(0, 2)),
    st.tuples(st.just("at_least"), st.integers(1, 3)),
    st.tuples(st.just("replace"), st.integers(1, 3)),
)
RULES = st.builds(
    Rules,
    batch=st.integers(1, 3),
    max_staleness=st.integers(0, 2),
    slots=st.integers(1, 6),
    queue_size=st.integers(1, 6),
    straggler_policy=st.sampled_from(["wait", "keep", "requeue", "drop"]),
    max_requeues=st.integers(0, 2),
    group_policy=POLICIES,
    dynamic=st.booleans(),
    max_failures=st.integers(2, 5),
    max_rejections=st.integers(2, 5),
    epoch=st.sampled_from([1, 3, 20]),
)


class InTurn:
    """A schedule: what can run does so in the order it was made, as in the model."""

    def shuffle(self, batch: list[Any]) -> None:
        """Trio takes the last one first."""
        batch.reverse()


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(trio._core._run, "_r", InTurn())


@dataclass
class Epochs:
    """A data loader whose prompts are named anew in every epoch."""

    size: int
    begun: int = 0

    def upcoming(self) -> list[str]:
        """The names of the next epoch."""
        return [f"{self.begun}.{number}" for number in range(self.size)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        names = self.upcoming()
        self.begun += 1
        return ({"prompt_id": name} for name in names)


def liked(group: Group) -> bool:
    return all(row.reward == LIKED for row in group.rows)


def policy_of(rules: Rules) -> GroupPolicy:
    kind, number = rules.group_policy
    return getattr(GroupPolicy, kind)(number)  # type: ignore[no-any-return]


class Comparison:
    """One executor and its model, told the same."""

    def __init__(self, executor: WorkflowExecutor, model: ModelExecutor) -> None:
        self.executor, self.model, self.rules = executor, model, model.rules
        self.puppet = Puppet()
        self.names = 0
        self.loader = Epochs(self.rules.epoch)
        self.delivered: list[str] = []

    # --- submit, wait ----------------------------------------------------------------------------

    def submit(self, name: str, size: int, is_eval: bool) -> None:
        expected = self.model.submit(name, size, is_eval)
        try:
            self.executor.submit(
                {"prompt_id": name},
                self.puppet,
                should_accept_fn=liked,
                task_id=name,
                is_eval=is_eval,
                group_size=size,
                group_policy=policy_of(self.rules),
            )
        except UsageError:
            assert expected == "refused"
        else:
            assert expected == "done"

    def fresh(self, size: int, is_eval: bool) -> None:
        self.names += 1
        self.submit(f"fresh-{self.names}", size, is_eval)

    def end(self, index: int, how: str, now: bool) -> None:
        running = self.model.members
        if running:
            member = running[index % len(running)]
            version = self.model.version if now else member.version
            self._end(member, how, version)
            self.model.end(member, how, version)

    def _end(self, member: ModelMember, how: str, version: int) -> None:
        group = [other for other in self.model.members if other.group is member.group]
        started = [r for r in self.puppet.running if r.prompt_id == member.group.name]
        rollout = started[group.index(member)]
        if how == "failed":
            rollout.end(ValueError("told to"))
        else:
            rollout.end(None if ENDS[how] is None else row(version, ENDS[how]))

    async def wait(self, count: int, is_eval: bool) -> None:
        async def ask() -> list[RolloutResult]:
            return await self.executor.wait(count, timeout_s=1, is_eval=is_eval)

        await self._compare(ask, self.model.wait(count, is_eval))

    async def wait_for_task(self, name: str) -> None:
        async def ask() -> list[RolloutResult]:
            return [await self.executor.wait_for_task(name, timeout_s=1)]

        await self._compare(ask, self.model.wait_for_task(name))

    async def _compare(
        self, ask: Callable[[], Awaitable[list[RolloutResult]]], expected: str | list[str]
    ) -> None:
        found: str | list[str]
        try:
            results = await ask()
        except (ArealTrioError, TimeoutError) as exc:
            found = type(exc).__name__
        else:
            found = [f"{r.task_id} {r.outcome.value} {r.number}" for r in results]
            groups = [result.group for result in results if result.group is not None]
            self.check_age([group for group in groups if group.permit_version >= 0])
        assert found == expected

    # --- prepare_batch ---------------------------------------------------------------------------

    async def batch(self, size: int) -> None:
        expected = self.model.prepare_batch(self.loader.upcoming(), size)
        found: str | tuple[list[str], list[str]] = "Cancelled"
        with trio.move_on_after(1):
            try:
                found = self._seen(await self._prepare(size))
            except (ArealTrioError, StopAsyncIteration) as exc:
                found = type(exc).__name__
        assert found == expected

    async def _prepare(self, size: int) -> Batch:
        return await self.executor.prepare_batch(
            self.loader,
            self.puppet,
            should_accept_fn=liked,
            group_size=size,
            group_policy=policy_of(self.rules),
            dynamic_batch_size=self.rules.dynamic,
        )

    def _seen(self, batch: Batch) -> tuple[list[str], list[str]]:
        assert batch.version == self.model.version
        self.check_age(list(batch.groups))
        self.delivered += [group.task_id for group in batch.groups]
        groups = sorted(batch.groups, key=lambda group: group.number)
        return (
            [f"{group.prompt_id} {group.number}" for group in groups],
            [f"{result.prompt_id} {result.outcome.value}" for result in batch.failures],
        )

    # --- the rest --------------------------------------------------------------------------------

    async def version(self, by: int = 1) -> None:
        version = self.model.version + by
        await self.executor.set_version(version)
        self.model.set_version(version)

    async def jump(self) -> None:
        await self.version(100)

    def pause(self) -> None:
        self.executor.pause()
        self.model.paused = True

    def resume(self) -> None:
        self.executor.resume()
        self.model.paused = False
        self.model.start()

    def check_age(self, groups: list[Group]) -> None:
        """I6, from the tokens themselves, whatever the model says."""
        oldest = self.executor.get_version() - self.rules.max_staleness
        made = [v for group in groups for row in group.rows for v in row.versions if v >= 0]
        assert not self.rules.bounded or all(version >= oldest for version in made)

    def check(self) -> None:
        check_counts(self.executor)
        model, executor = self.model, self.executor
        assert executor.counts.as_dict() == model.counts(is_eval=False)
        assert executor.eval_counts.as_dict() == model.counts(is_eval=True)
        assert executor.get_capacity() == model.capacity()
        assert executor.staleness_manager.charged == model.charged
        assert executor.staleness_violations == model.violations
        running = Counter((member.group.name, member.version) for member in model.members)
        assert Counter((r.prompt_id, r.version) for r in self.puppet.running) == running
        assert Counter(self.puppet.started) == model.started
        for is_eval in (False, True):
            queue = executor._results.of(is_eval=is_eval)
            assert len(queue) == len(model.settled(is_eval))
            assert queue.ready == len(model.ready(is_eval))
        assert len(set(self.delivered)) == len(self.delivered)  # I7


async def compare(steps: list[tuple[Any, ...]], rules: Rules) -> None:
    async with simulated_executor(
        servers=1,
        consumer_batch_size=rules.batch,
        max_staleness=rules.max_staleness,
        max_concurrent_rollouts=rules.slots,
        queue_size=rules.queue_size,
        straggler_policy=rules.straggler_policy,
        max_requeues=rules.max_requeues,
        max_consecutive_failures=rules.max_failures,
        max_consecutive_rejections=rules.max_rejections,
    ) as (executor, fleet):
        both = Comparison(executor, ModelExecutor(rules))
        for name, *arguments in steps:
            pending = getattr(both, name)(*arguments)
            if pending is not None:
                await pending
            await settled()
            both.check()
    check_closed(executor, fleet)


def run(steps: list[tuple[Any, ...]], rules: Rules) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(compare, steps, rules, clock=clock)


HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=250, suppress_health_check=HEALTH)
@given(OF_SUBMIT, RULES)
@pytest.mark.usefixtures("in_turn")
def test_results_are_what_the_model_says(steps: list[tuple[Any, ...]], rules: Rules) -> None:
    run(steps, rules)


@settings(max_examples=250, suppress_health_check=HEALTH)
@given(OF_BATCHES, RULES)
@pytest.mark.usefixtures("in_turn")
def test_batches_are_what_the_model_says(steps: list[tuple[Any, ...]], rules: Rules) -> None:
    run(steps, rules)


@settings(max_examples=300, suppress_health_check=HEALTH)
@given(OF_BOTH, RULES)
@pytest.mark.usefixtures("in_turn")
def test_both_at_once_are_what_the_model_says(steps: list[tuple[Any, ...]], rules: Rules) -> None:
    run(steps, rules)
