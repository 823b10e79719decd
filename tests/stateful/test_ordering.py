"""A line against a list that is sorted whenever somebody asks, under every order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arealtrio.ordering import Line, Origin, make_line
from tests.models.ordering import ModelLine

PROMPTS = st.sampled_from([None, "a", "b", "c", "d"])


class LineMachine(RuleBasedStateMachine):
    """Requests are numbers; the most served first is the one that both name."""

    order: str

    @initialize(overtakes_max=st.sampled_from([0, 1, 3, 1000]))
    def begin(self, overtakes_max: int) -> None:
        self.line: Line[int] = make_line(self.order, overtakes_max)
        self.model = ModelLine(self.order, overtakes_max)
        self.names = itertools.count()

    @rule(prompt=PROMPTS, version=st.integers(0, 4))
    def enter(self, prompt: str | None, version: int) -> None:
        name = next(self.names)
        self.line.enter(name, Origin(prompt, version))
        self.model.enter(name, prompt, version)

    @rule()
    def enter_at_head(self) -> None:
        name = next(self.names)
        self.line.enter_at_head(name)
        self.model.enter_at_head(name)

    @precondition(lambda self: self.model.waiting)
    @rule()
    def serve(self) -> None:
        self.leave(next(iter(self.line)))

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from([w.name for w in self.model.waiting])))

    def leave(self, name: int) -> None:
        self.line.leave(name)
        self.model.leave(name)

    @rule(prompt=PROMPTS, tokens=st.integers(1, 9).map(lambda n: 2**n))
    def learn(self, prompt: str | None, tokens: int) -> None:
        # Means of few powers of two are exact enough to be equal where they ought to be.
        if len(self.model.of(prompt)) < 2:
            self.line.learn(prompt, tokens)
            self.model.learn(prompt, tokens)

    @invariant()
    def both_name_the_same_order(self) -> None:
        if hasattr(self, "line"):
            assert list(self.line) == self.model.in_order()
            assert len(self.line) == len(self.model.waiting)


class FifoMachine(LineMachine):
    order = "fifo"


class DeadlineMachine(LineMachine):
    order = "deadline"


class LongestExpectedMachine(LineMachine):
    order = "longest_expected"


for machine in (FifoMachine, DeadlineMachine, LongestExpectedMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

TestFifo = pytest.mark.timeout(60)(FifoMachine.TestCase)
TestDeadline = pytest.mark.timeout(60)(DeadlineMachine.TestCase)
TestLongestExpected = pytest.mark.timeout(60)(LongestExpectedMachine.TestCase)
