"""The driver: plays seeds one after the other, prints what broke, and adds up."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click

from .planted import BUGS, row_of, seeds_needed
from .play import play

NEWS_EVERY = 500  # seeds: a line while a long run goes on


@dataclass(frozen=True)
class Line:
    """What one seed adds to the summary; it travels between processes.

    Args:
        seed: Which.
        seconds: It took.
        rollouts: That ran.
        tokens: Of whole answers.
        lives: Of the trainer.
        faults: By kind.
        groups: By outcome.
        report: What broke, in full; empty if nothing did.
    """

    seed: int
    seconds: float
    rollouts: int
    tokens: int
    lives: int
    faults: Counter[str]
    groups: Counter[str]
    report: str


@contextmanager
def _without_news() -> Iterator[None]:
    """What servers are blamed for is expected here, and no news."""
    logger = logging.getLogger("arealtrio")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def line_of(seed: int) -> Line:
    """Play one seed."""
    with _without_news():
        verdict = play(seed)
    history = verdict.history
    return Line(
        seed,
        verdict.seconds,
        history.rollouts,
        history.tokens,
        history.lives,
        history.kinds(),
        history.groups,
        str(verdict) if verdict.violation else "",
    )


@dataclass
class Summary:
    """Of a whole run of the driver."""

    seeds: int = 0
    violations: int = 0
    rollouts: int = 0
    tokens: int = 0
    lives: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, 0)

    def add(self, line: Line) -> None:
        """Count one seed."""
        self.seeds += 1
        self.violations += bool(line.report)
        self.rollouts += line.rollouts
        self.tokens += line.tokens
        self.lives += line.lives
        self.faults += line.faults
        self.groups += line.groups
        self.slowest = max(self.slowest, (line.seconds, line.seed))

    def news(self, seconds: float) -> str:
        """A line on the way."""
        return f"{self.seeds} seeds in {seconds:.0f} s, violations: {self.violations}"

    def text(self, seconds: float) -> str:
        """The last line."""
        return (
            f"{self.seeds} seeds in {seconds:.1f} s, {self.lives} executors, {self.rollouts} "
            f"rollouts, {self.tokens} tokens; groups: {_words(self.groups)}; faults: "
            f"{_words(self.faults)}; slowest: seed {self.slowest[1]} ({self.slowest[0]:.1f} s); "
            f"violations: {self.violations}"
        )


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def lines(seeds: Iterable[int], jobs: int) -> Iterator[Line]:
    """Play seeds, in one process or several; in whatever order they end."""
    if jobs == 1:
        yield from map(line_of, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(line_of, seeds, chunksize=4)


def _search(start: int, most: int) -> int:
    """Look for each planted bug; 1 if one is not found."""
    missed = []
    for bug in BUGS:
        with _without_news():
            needed = seeds_needed(bug, start, most)
        click.echo(row_of(bug, needed, most))
        if None in needed:
            missed.append(bug.name)
    click.echo(f"{len(BUGS)} planted bugs; not found: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


@click.command()
@click.option("--seeds", default=200, show_default=True, help="How many runs to play.")
@click.option("--start", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=1, show_default=True, help="Processes to use.")
@click.option("--keep-going/--stop", default=True, help="Whether to go on after a violation.")
@click.option("--planted", is_flag=True, help="Look for planted bugs instead, with all seeds each.")
def main(seeds: int, start: int, jobs: int, keep_going: bool, planted: bool) -> int:
    """Play whole training runs under faults and check every invariant of the design."""
    if planted:
        return _search(start, seeds)
    began, summary = time.perf_counter(), Summary()
    status = 0
    try:
        for line in lines(range(start, start + seeds), jobs):
            summary.add(line)
            if line.report:
                click.echo(line.report + "\n")
                if not keep_going:
                    break
            if not summary.seeds % NEWS_EVERY and summary.seeds < seeds:
                click.echo(summary.news(time.perf_counter() - began), err=True)
    except KeyboardInterrupt:  # say what there is
        status = 130
    click.echo(summary.text(time.perf_counter() - began))
    return 1 if summary.violations else status
