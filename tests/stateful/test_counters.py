"""StalenessCounters against plain integers, in their range and beyond it."""

from collections.abc import Callable
from copy import copy

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from arealtrio._core.counters import StalenessCounters

from ..models.counters import PlainCounters

FIELDS = ("capacity", "free", "slack", "version", "max_concurrent", "batch", "max_staleness",
          "accepted", "enqueued", "rejected", "running", "charged", "granted")  # fmt: skip

counts = st.integers(0, 5) | st.sampled_from([2**22, 2**23 - 1, 2**23, 2**24, 2**38, 2**39])
versions = st.integers(-3, 12) | st.sampled_from([2**30, -(2**30), 2**38, 2**39, 2**40, -(2**62)])
limits = st.integers(-1, 6) | st.sampled_from([2**22, 2**23, 2**39, 2**40])


class CountersMachine(RuleBasedStateMachine):
    @initialize(
        concurrent=st.integers(-1, 8), batch=st.integers(-1, 5), staleness=st.integers(-1, 5)
    )
    def start(self, concurrent: int, batch: int, staleness: int) -> None:
        self.real = StalenessCounters(concurrent, batch, staleness)
        self.model = PlainCounters(concurrent, batch, staleness)

    def both(self, name: str, *args: int) -> None:
        """Do it to both; where the model has left the range, the real one must have refused."""
        wanted = copy(self.model)
        expected = getattr(wanted, name)(*args)
        if wanted.in_range:
            try:
                result = getattr(self.real, name)(*args)
            except OverflowError:
                # An argument or a count alone is beyond the range, though their difference is not.
                assert any(
                    abs(value) >= 2**39 for value in (*args, wanted.accepted, wanted.charged)
                )
                return
            assert result == expected
            self.model = wanted
        else:
            with pytest.raises(OverflowError, match="range"):
                getattr(self.real, name)(*args)

    @rule(n=counts)
    def enqueue(self, n: int) -> None:
        self.both("enqueue", n)

    @rule(n=counts)
    def try_submit(self, n: int) -> None:
        self.both("try_submit", n)

    @rule(version=versions)
    def grant(self, version: int) -> None:
        moved = copy(self.model)
        moved.set_version(version)
        if moved.in_range:
            self.both("grant", version)
        else:  # the budget alone is beyond the word, even where less the one granted it would fit
            with pytest.raises(OverflowError, match="range"):
                self.real.grant(version)

    @rule(n=counts)
    def submit(self, n: int) -> None:
        self.both("submit", n)

    @rule(n=counts)
    def accept(self, n: int) -> None:
        self.both("accept", n)

    @rule(n=counts)
    def reject(self, n: int) -> None:
        self.both("reject", n)

    @rule(n=counts)
    def discard(self, n: int) -> None:
        self.both("discard", n)

    @rule(n=counts)
    def charge(self, n: int) -> None:
        self.both("charge", n)

    @rule(version=versions)
    def set_version(self, version: int) -> None:
        self.both("set_version", version)

    @rule(concurrent=limits, batch=limits, staleness=limits)
    def set_limits(self, concurrent: int, batch: int, staleness: int) -> None:
        self.both("set_limits", concurrent, batch, staleness)

    @rule(version=versions, unconsumed=counts)
    def recover(self, version: int, unconsumed: int) -> None:
        self.both("recover", version, unconsumed)

    @rule(n=st.sampled_from([-1, -5, -(2**40)]))
    def negative_counts(self, n: int) -> None:
        calls: tuple[Callable[[int], object], ...] = (
            self.real.enqueue, self.real.try_submit, self.real.submit, self.real.accept,
            self.real.reject, self.real.charge, self.real.discard)  # fmt: skip
        for call in calls:
            with pytest.raises(ValueError, match="must not be negative"):
                call(n)

    @invariant()
    def agrees(self) -> None:
        self.real._check()
        for field in FIELDS:
            assert getattr(self.real, field) == getattr(self.model, field), field


TestCounters = CountersMachine.TestCase
