"""Fixtures for pytest: simulated fleets and rollouts, and failures that name their seed.

Switch them on in the root ``conftest.py``, or by ``-p`` on the command line::

    pytest_plugins = ["arealtrio.testing.pytest_plugin"]

simulation_seed     the seed of this run of the test
simulated_fleet     ``open_fleet`` with that seed
simulated_rollout   ``simulated_executor`` with that seed
virtually           ``run_virtually`` with that seed

A test runs once, with seed 0. ``@pytest.mark.seeds(20)`` runs it with the seeds 0 … 19, and so does
``--simulation-seeds 20`` with all; ``--simulation-seed K`` begins at K. The fixtures need no other
plugin; in a test that pytest-trio runs, ask for its ``autojump_clock`` besides.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest

from ..executor import WorkflowExecutor
from .fleet import SimulatedFleet, open_fleet
from .repeatable import repeatable_schedule, run_virtually
from .run import simulated_executor

_SEED = "simulation_seed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say with which seeds simulated tests run."""
    group = parser.getgroup("arealtrio", "simulated fleets of arealtrio")
    group.addoption(
        "--simulation-seed",
        type=int,
        default=0,
        metavar="K",
        help="the first seed of every simulated test",
    )
    group.addoption(
        "--simulation-seeds",
        type=int,
        default=None,
        metavar="N",
        help="how many seeds each is run with; default: what its mark says, or 1",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", "seeds(count): run a simulated test with so many seeds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that is simulated with each of its seeds."""
    if _SEED not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("seeds")
    count = metafunc.config.getoption("simulation_seeds")
    if count is None:
        count = mark.args[0] if mark is not None else 1
    first = metafunc.config.getoption("simulation_seed")
    seeds = range(first, first + count)
    metafunc.parametrize(_SEED, seeds, ids=[f"seed{seed}" for seed in seeds], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failure how it is repeated."""
    report = yield
    call: Any = getattr(item, "callspec", None)
    seed = None if call is None else call.params.get(_SEED)
    if report.failed and seed is not None:
        line = f"pytest '{item.nodeid}' --simulation-seed {seed} --simulation-seeds 1"
        report.sections.append(("simulation", f"seed {seed}; repeat with: {line}"))
    return report


@pytest.fixture
def simulation_seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """The seed of this run of the test; within it trio's schedule follows from the seed."""
    seed: int = request.param
    with repeatable_schedule(seed):
        yield seed


@pytest.fixture
def simulated_fleet(
    simulation_seed: int,
) -> Callable[..., AbstractAsyncContextManager[SimulatedFleet]]:
    """``open_fleet`` with the test's seed: ``async with simulated_fleet(4) as fleet``."""
    return partial(open_fleet, seed=simulation_seed)


@pytest.fixture
def simulated_rollout(
    simulation_seed: int,
) -> Callable[..., AbstractAsyncContextManager[tuple[WorkflowExecutor, SimulatedFleet]]]:
    """``simulated_executor`` with the test's seed.

    ``async with simulated_rollout(servers=4, consumer_batch_size=8) as (rollout, fleet)``
    """
    return partial(simulated_executor, seed=simulation_seed)


@pytest.fixture
def virtually(simulation_seed: int) -> Callable[..., Any]:
    """``run_virtually`` with the test's seed: runs an async function from a plain test."""
    return partial(run_virtually, seed=simulation_seed)
