"""Any trainer, however odd its loop: nothing too old is delivered, nothing lost, nothing stuck."""

from __future__ import annotations

from collections import Counter
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio import StalenessBudgetExhausted, TooManyFailures

from .training import TRAINING_S, Run, Scenario, open_run, prompts, virtually

Action = tuple[str, Any]

ACTIONS = st.one_of(
    st.tuples(st.just("batch"), st.none()),
    st.tuples(st.just("update"), st.none()),
    st.tuples(st.just("sleep"), st.sampled_from([0.1, TRAINING_S, 20.0])),
    st.tuples(st.just("epoch"), st.integers(0, 9)),
)

SCENARIOS = st.builds(
    Scenario,
    seed=st.integers(0, 1000),
    max_staleness=st.sampled_from([0, 1, 2, 4]),
    group_size=st.sampled_from([1, 3]),
    batch_size=st.sampled_from([1, 3, 4]),
    reject=st.sampled_from([0.0, 0.4]),
    fail=st.sampled_from([0.0, 0.2]),
    think_s=st.sampled_from([0.0, 15.0]),
)


class Trainer:
    """Does what it is told, and knows what it may expect."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loader: list[Any] | None = None  # of the epoch under way
        self.stream = prompts()
        self.discarded: Counter[int] = Counter()  # by number, too old to be delivered
        self.failures: Counter[str] = Counter()  # by outcome

    async def do(self, action: str, argument: Any) -> None:
        if action == "batch":
            await self.batch(self.loader if self.loader is not None else self.stream)
        elif action == "update":
            await self.run.update()
        elif action == "sleep":
            await trio.sleep(argument)
        elif self.loader is not None or not self.run.report.batches:
            await self.drain()
            self.loader = list(prompts(argument))

    async def batch(self, loader: Any) -> bool:
        """Take a batch; False at the end of the epoch, or if the budget is spent."""
        try:
            batch = await self.run.next_batch(loader)
        except (StopAsyncIteration, TooManyFailures):  # or its groups failed, all of them
            return False
        except StalenessBudgetExhausted:
            self.check_exhausted()
            await self.run.update()
            return True
        self.failures.update(result.outcome.value for result in batch.failures)
        self.discarded.update(
            result.number
            for result in batch.failures
            if result.outcome.value == "expired" and result.number is not None
        )
        return True

    def check_exhausted(self) -> None:
        """Refused only where the next batch could not be of this version."""
        scenario, executor = self.run.scenario, self.run.executor
        consumed = self.delivered + executor.staleness_manager.charged + len(self.discarded)
        window = scenario.max_staleness + executor.get_version()
        assert consumed > window * scenario.batch_size

    @property
    def delivered(self) -> int:
        return len(self.run.report.numbers)

    async def drain(self) -> None:
        """Read the epoch to its end, as prepare_batch asks before it takes another loader."""
        while self.loader is not None and await self.batch(self.loader):
            pass

    async def finish(self) -> None:
        """Read to the end, and on until a batch brings the last news: I7, both ways."""
        await self.drain()
        batches = len(self.run.report.batches)
        while len(self.run.report.batches) == batches:
            self.loader = [next(self.stream)]
            await self.run.update()
            await self.drain()
        counts = self.run.executor.counts.as_dict()
        assert counts["queued"] == counts["running"] == 0
        assert counts["submitted"] == self.delivered + self.failures.total()

    def check(self) -> None:
        report, bound = self.run.report, self.run.scenario.max_staleness
        assert report.groups_older_than(bound) == 0  # I6
        assert self.run.executor.staleness_violations == 0
        assert len(set(report.numbers)) == self.delivered  # I7
        assert not set(self.discarded) & set(report.numbers)
        assert set(self.discarded.values()) <= {1}


async def obey(scenario: Scenario, actions: list[Action]) -> None:
    async with open_run(scenario) as run:
        trainer = Trainer(run)
        for action, argument in actions:
            await trainer.do(action, argument)
            trainer.check()
        if trainer.loader is not None:
            await trainer.finish()


@settings(max_examples=50)
@given(scenario=SCENARIOS, actions=st.lists(ACTIONS, min_size=1, max_size=25))
def test_any_trainer_gets_what_it_may_have(scenario: Scenario, actions: list[Action]) -> None:
    virtually(obey, scenario, actions)
