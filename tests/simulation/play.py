"""Play a plan: one seed, one run, one verdict."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from textwrap import shorten

import trio
from trio.testing import MockClock

from arealtrio.testing import Faults, SimulatedFleet, open_fleet, repeatable_schedule

from . import invariants as hold
from .chaos import Chaos
from .history import History
from .invariants import Violation
from .plan import draw
from .trainer import Trainer
from .watch import Sight

LONGEST_S = 100_000.0  # virtual; the slowest plans that were seen need a tenth of it
TRACE_LINES = 200  # of what ended a run: a group of exceptions may have thousands
PATIENCE_S = 1_000.0  # virtual; something settles in a third of it, if only by its deadline


@dataclass(frozen=True)
class Verdict:
    """What came of one seed.

    Args:
        history: Of the run.
        seconds: It took, of real time.
    """

    history: History
    seconds: float

    @property
    def violation(self) -> Violation | None:
        """The first, if any."""
        return self.history.violation

    def __str__(self) -> str:
        plan, events = self.history.plan, "\n".join(self.history.lines()[-80:])
        return (
            f"seed {plan.seed}\n{plan}\n\n{events}\n\n{self._trace()}{self.violation}\n\n"
            f"replay with: python -m tests.simulation --seeds 1 --start {plan.seed}"
        )

    def _trace(self) -> str:
        """Of what ended the run, where that was no invariant."""
        cause = self.violation.__cause__ if self.violation is not None else None
        if cause is None:
            return ""
        told = "".join(traceback.format_exception(cause)).splitlines()
        return "\n".join(told[-TRACE_LINES:]) + "\n"


def play(seed: int) -> Verdict:
    """Play the run of a seed, on a clock that jumps to the next thing to happen."""
    began = time.perf_counter()
    history, sight = History(draw(seed)), Sight()
    with repeatable_schedule(seed):
        clock = MockClock(autojump_threshold=0)
        trio.run(_run, history, sight, clock=clock, instruments=[sight])
    return Verdict(history, time.perf_counter() - began)


async def _run(history: History, sight: Sight) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    try:
        with history.scope:
            plan = history.plan
            faults = Faults(plan.seed, plan.rates, outage_s=plan.outage_s)
            history.log = faults.log
            async with open_fleet(
                plan.servers, lengths=plan.lengths, seed=plan.seed, faults=faults
            ) as fleet:
                await _train(history, fleet, sight)
    except Violation as violation:
        history.broken(violation)
    except Exception as exc:  # noqa: BLE001 - whatever breaks a run is what it is for
        history.broken(_unexpected(exc))
    history.check(hold.i9_no_task, tasks, trio.lowlevel.current_statistics().tasks_living)


def _unexpected(exc: Exception) -> Violation:
    violation = Violation("crash", f"the run ended with {shorten(repr(exc), 2000)}")
    violation.__cause__ = exc
    return violation


async def _train(history: History, fleet: SimulatedFleet, sight: Sight) -> None:
    trainer = Trainer(history, fleet, sight)
    chaos = Chaos(history, fleet, trainer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chaos.run)
        nursery.start_soon(_lose_patience, history, trainer)
        await trainer.run()
        nursery.cancel_scope.cancel()
    for server in fleet:
        history.check(hold.i9_no_request, server, server.orphans)


async def _lose_patience(history: History, trainer: Trainer) -> None:
    """Give the run all the time that it needs, as long as something settles now and then."""
    await trio.sleep_until(history.plan.horizon_s)
    while trio.current_time() < LONGEST_S:
        settled = history.groups.total()
        await trio.sleep(PATIENCE_S)
        if history.groups.total() == settled:
            history.check(hold.liveness, PATIENCE_S, trainer.state)
    history.check(hold.comes_to_an_end, LONGEST_S, trainer.state)
