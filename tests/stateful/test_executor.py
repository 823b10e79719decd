"""The executor against a model of lists, after any sequence of calls and ends of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio.errors import ArealTrioError, UsageError
from arealtrio.executor import WorkflowExecutor
from arealtrio.settlement import RolloutResult
from arealtrio.testing import simulated_executor

from ..models.executor import ModelExecutor
from ..unit.puppet import Puppet, check_closed, check_counts, settled

NAMES = st.sampled_from("abcdef")
ENDS: dict[str, Any] = {"accepted": "accept", "rejected": None, "failed": ValueError("told to")}

SUBMIT = st.tuples(st.just("submit"), NAMES, st.integers(1, 3), st.booleans())
FRESH = st.tuples(st.just("fresh"), st.integers(1, 3), st.booleans())
END = st.tuples(st.just("end"), st.integers(0, 7), st.sampled_from([*ENDS, "accepted"]))
WAIT = st.tuples(st.just("wait"), st.integers(1, 3), st.booleans())
OTHERS = st.sampled_from([("version",), ("version",), ("jump",), ("pause",), ("resume",)])
STEPS = st.lists(
    st.one_of(
        SUBMIT,
        FRESH,
        FRESH,
        END,
        END,
        END,
        WAIT,
        st.tuples(st.just("wait_for_task"), NAMES),
        OTHERS,
    ),
    max_size=40,
)


class Comparison:
    """One executor and its model, told the same."""

    def __init__(self, executor: WorkflowExecutor, model: ModelExecutor) -> None:
        self.executor, self.model = executor, model
        self.puppet = Puppet()
        self.names = 0

    def submit(self, name: str, size: int, is_eval: bool) -> None:
        expected = self.model.submit(name, size, is_eval)
        try:
            self.executor.submit(
                {"prompt_id": name},
                self.puppet,
                task_id=name,
                is_eval=is_eval,
                group_size=size,
            )
        except UsageError:
            assert expected == "refused"
        else:
            assert expected == "done"

    def fresh(self, size: int, is_eval: bool) -> None:
        self.names += 1
        self.submit(f"fresh-{self.names}", size, is_eval)

    def end(self, index: int, outcome: str) -> None:
        running = [group for group in self.model.live() if group.running]
        if running:
            group = running[index % len(running)]
            self.puppet.end(group.name, ENDS[outcome])
            self.model.end(group, outcome)

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
            found = [f"{r.task_id} {r.outcome.value} {r.number}" for r in await ask()]
        except (ArealTrioError, TimeoutError) as exc:
            found = type(exc).__name__
        assert found == expected

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

    def check(self) -> None:
        check_counts(self.executor)
        model, executor = self.model, self.executor
        assert executor.counts.as_dict() == model.counts(is_eval=False)
        assert executor.eval_counts.as_dict() == model.counts(is_eval=True)
        assert executor.get_capacity() == model.capacity()
        assert executor.staleness_manager.charged == model.charged
        running = Counter({g.name: g.running for g in model.live() if g.running})
        assert Counter(rollout.prompt_id for rollout in self.puppet.running) == running
        for is_eval in (False, True):
            queue = executor._results.of(is_eval=is_eval)
            assert len(queue) == len(model.settled(is_eval))
            assert queue.ready == len(model.ready(is_eval))


async def compare(
    steps: list[tuple[Any, ...]], batch: int, max_staleness: int, slots: int, queue_size: int
) -> None:
    async with simulated_executor(
        servers=1,
        consumer_batch_size=batch,
        max_staleness=max_staleness,
        max_concurrent_rollouts=slots,
        queue_size=queue_size,
    ) as (executor, fleet):
        both = Comparison(executor, ModelExecutor(batch, max_staleness, slots, queue_size))
        for name, *arguments in steps:
            pending = getattr(both, name)(*arguments)
            if pending is not None:
                await pending
            await settled()
            both.check()
    check_closed(executor, fleet)


@settings(max_examples=250)
@given(STEPS, st.integers(1, 3), st.integers(0, 2), st.integers(1, 5), st.integers(1, 6))
def test_the_executor_does_what_its_model_does(
    steps: list[tuple[Any, ...]], batch: int, max_staleness: int, slots: int, queue_size: int
) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(compare, steps, batch, max_staleness, slots, queue_size, clock=clock)
