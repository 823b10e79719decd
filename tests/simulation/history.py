"""History: what happened in a run, over all its executors, and whether it may go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from arealtrio.testing import Fault

from .invariants import Violation
from .plan import Plan


@dataclass
class History:
    """What is known of a run so far.

    Inside a rollout nobody may raise, because that is data; nor inside trio's own callbacks. So
    the first violation is kept here, and ends the run.

    Attributes:
        violation: The first.
        faults: Those that were planned and happened, by kind.
        log: Those that happened by chance.
        events: What else happened.
        groups: That settled, by outcome.
        rollouts: Members that ran.
    """

    plan: Plan
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    violation: Violation | None = None
    faults: Counter[str] = field(default_factory=Counter)
    log: list[Fault] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    groups: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    tokens: int = 0
    lives: int = 0

    def note(self, words: str) -> None:
        """Keep a line for whoever reads a failure."""
        self.events.append((trio.current_time(), words))

    def lines(self) -> list[str]:
        """All that happened, the faults by chance among it, in order."""
        faults = [
            (fault.time_s, f"{fault.kind.value} {fault.server} {fault.detail}")
            for fault in self.log
        ]
        ordered = sorted([*self.events, *faults], key=lambda event: event[0])
        return [f"{at_s:9.3f} s  {words}" for at_s, words in ordered]

    def kinds(self) -> Counter[str]:
        """How often each fault happened."""
        return self.faults + Counter(fault.kind.value for fault in self.log)

    def fault(self, kind: str, words: str) -> None:
        """Count a fault that happened."""
        self.faults[kind] += 1
        self.note(words)

    def check(self, invariant: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Ask an invariant; the run ends with the first that does not hold."""
        with self.checking():
            invariant(*args, **kwargs)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Ask several."""
        try:
            yield
        except Violation as violation:
            self.broken(violation)

    def broken(self, violation: Violation) -> None:
        """An invariant does not hold."""
        if self.violation is None:
            self.violation = violation
            self.note(f"VIOLATION {violation}")
            self.scope.cancel()
