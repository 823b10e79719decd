"""A soak: training on servers that die and return, until the time is up, and what came of it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from arealtrio import open_executor
from arealtrio.demo.task import base_model
from arealtrio.wire.dialect import Dialect
from arealtrio.wire.sglang import SglangDialect
from arealtrio.wire.vllm import VllmDialect

from .fleet import ServerProcess, in_flight, server_processes
from .gauges import Gauges, take
from .training import Training, config

SERVERS = 2  # of each dialect
SLOTS = 8  # of each server
TOKEN_TIME_S = "0.01"
CHECKPOINTS = 3
SAMPLE_S = 2.0
REPORT_S = 60.0
DRAIN_S = 60.0
KILL_MEAN_S, AWAY_MEAN_S = 8.0, 1.5
DIALECTS: tuple[Dialect, ...] = (VllmDialect(), SglangDialect())


@dataclass(slots=True)
class Fleet:
    """One dialect's servers and the training that runs on them."""

    dialect: Dialect
    servers: tuple[ServerProcess, ...]
    training: Training
    kills: int = 0

    async def kill_and_restart(self, rng: random.Random) -> None:
        """One server dies by SIGKILL, and comes back with its first weights; then another."""
        while True:
            await trio.sleep(rng.expovariate(1 / KILL_MEAN_S))
            server = rng.choice(self.servers)
            await server.kill()
            self.kills += 1
            await trio.sleep(rng.expovariate(1 / AWAY_MEAN_S))
            await server.start()


async def soak(duration_s: float, seed: int, say: Callable[[str], object]) -> list[str]:
    """Run one.

    Args:
        duration_s: Until nothing more is started.
        seed: Of who dies when, and of which wait is given up; the rest is the machine's.
        say: Takes a line a minute, and a summary.

    Returns:
        What must not be and was; empty if all is well.
    """
    violations: list[str] = []
    before = take(0.0)
    gauges = Gauges(duration_s)
    with tempfile.TemporaryDirectory(prefix="arealtrio-soak-") as scratch:
        weights = [_checkpoint(Path(scratch), number) for number in range(CHECKPOINTS)]
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(_servers(dialect, weights[0]))
                for dialect in DIALECTS
            ]
            async with _fleets(servers, weights, seed, violations) as fleets:
                try:
                    await _run(fleets, gauges, seed, say)
                except Exception as exc:  # noqa: BLE001  it is what a soak is to find
                    violations.append(f"it ended early: {_words(exc)}")
                await _bring_back(fleets)
                for fleet in fleets:
                    await fleet.training.finish(DRAIN_S)
            for fleet in fleets:
                fleet.training.check_closed()
                if left := await in_flight(fleet.servers, fleet.dialect):
                    violations.append(f"{fleet.dialect.name}: {left} requests left on the servers")
    violations += gauges.violations()
    violations += _left_over(before)
    _sum_up(fleets, gauges, violations, say)
    return violations


def _checkpoint(scratch: Path, number: int) -> Path:
    path = scratch / f"v{number}"
    base_model(number).save(path)
    return path


@asynccontextmanager
async def _servers(dialect: Dialect, weights: Path) -> AsyncIterator[tuple[ServerProcess, ...]]:
    options = ["--dialect", dialect.name, "--token-time-s", TOKEN_TIME_S]
    options += ["--max-num-seqs", str(SLOTS)]
    async with server_processes(SERVERS, weights, options) as servers:
        yield servers


@asynccontextmanager
async def _fleets(
    servers: Sequence[tuple[ServerProcess, ...]],
    weights: Sequence[Path],
    seed: int,
    violations: list[str],
) -> AsyncIterator[list[Fleet]]:
    async with AsyncExitStack() as stack:
        fleets = []
        for dialect, processes in zip(DIALECTS, servers, strict=True):
            settings = config(
                dialect.name,
                [process.url for process in processes],
                SERVERS * SLOTS,
                streaming=dialect.name == "vllm",
            )
            executor = await stack.enter_async_context(open_executor(settings))
            rng = random.Random(f"{seed} {dialect.name}")
            training = Training(dialect.name, executor, weights, rng, violations)
            fleets.append(Fleet(dialect, processes, training))
        yield fleets


async def _run(
    fleets: Sequence[Fleet], gauges: Gauges, seed: int, say: Callable[[str], object]
) -> None:
    """Everything at once, until the time is up."""
    with trio.move_on_after(gauges.duration_s):
        async with trio.open_nursery() as nursery:
            for fleet in fleets:
                rng = random.Random(f"{seed} {fleet.dialect.name} kills")
                nursery.start_soon(fleet.training.train)
                nursery.start_soon(fleet.training.evaluate)
                nursery.start_soon(fleet.kill_and_restart, rng)
                nursery.start_soon(_keep_going, fleet.training)
            nursery.start_soon(_sample, gauges)
            nursery.start_soon(_report, fleets, gauges, say)


async def _bring_back(fleets: Sequence[Fleet]) -> None:
    """Start who was away when the time was up, to be looked at."""
    for fleet in fleets:
        for server in fleet.servers:
            if not server.up:
                await server.kill()  # it may have been cut short while it started
                await server.start()


async def _keep_going(training: Training) -> None:
    """A minute without a batch is a run that hangs."""
    while True:
        before = training.batches
        await trio.sleep(REPORT_S)
        if training.batches == before:
            training.violations.append(f"{training.name}: no batch for {REPORT_S:.0f} s")


async def _sample(gauges: Gauges) -> None:
    start = trio.current_time()
    while True:
        gauges.samples.append(take(trio.current_time() - start))
        await trio.sleep(SAMPLE_S)


async def _report(fleets: Sequence[Fleet], gauges: Gauges, say: Callable[[str], object]) -> None:
    minute = 0
    while True:
        await trio.sleep(REPORT_S)
        minute += 1
        say(f"minute {minute}: {_line(fleets, gauges)}")


def _line(fleets: Sequence[Fleet], gauges: Gauges) -> str:
    trainings = "; ".join(str(fleet.training) for fleet in fleets)
    return f"{gauges.summary()}; {trainings}; {sum(fleet.kills for fleet in fleets)} kills"


def _left_over(before: object) -> list[str]:
    """What was not there before: processes, descriptors, tasks."""
    after = take(0.0)
    found = [
        f"{getattr(after, name) - getattr(before, name):.0f} more {name} after the end than before"
        for name in ("descriptors", "tasks")
        if getattr(after, name) > getattr(before, name)
    ]
    children = [child.pid for child in psutil.Process().children() if child.is_running()]
    return found + ([f"processes left: {children}"] if children else [])


def _sum_up(
    fleets: Sequence[Fleet],
    gauges: Gauges,
    violations: Sequence[str],
    say: Callable[[str], object],
) -> None:
    for violation in violations:
        say(f"VIOLATION: {violation}")
    failed = sum(fleet.training.updates_failed for fleet in fleets)
    say(
        f"{len(violations)} violations in {gauges.duration_s / 60:.1f} minutes: "
        f"{_line(fleets, gauges)}, {failed} updates failed"
    )


def _words(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
