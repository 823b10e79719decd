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

import argparse
import os
import shlex
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
        type=_at_least_one,
        default=None,
        metavar="N",
        help="how many seeds each is run with; default: what its mark says, or 1",
    )


def _at_least_one(text: str) -> int:
    """A number of seeds: a run that skips every simulated test would end as if all were well."""
    count = int(text)  # argparse tells of a ValueError itself
    if count < 1:
        raise argparse.ArgumentTypeError("with no seed every simulated test would be skipped")
    return count


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", "seeds(count): run a simulated test with so many seeds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that is simulated with each of its seeds."""
    if _SEED not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("seeds")
    of_mark = 1 if mark is None else _count_of(mark, metafunc.definition.nodeid)
    count = metafunc.config.getoption("simulation_seeds") or of_mark
    first = metafunc.config.getoption("simulation_seed")
    seeds = range(first, first + count)
    metafunc.parametrize(_SEED, seeds, ids=[f"seed{seed}" for seed in seeds], indirect=True)


def _count_of(mark: pytest.Mark, test: str) -> int:
    """What ``seeds(20)`` or ``seeds(count=20)`` says; of anything else, how it is written."""
    given = [*mark.args, *mark.kwargs.values()]
    count = given[0] if len(given) == 1 and not mark.kwargs.keys() - {"count"} else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        words = "write @pytest.mark.seeds(N), with a whole number N of at least 1"
        pytest.fail(f"{test}: {words}", pytrace=False)  # as pytest's own marks, without a traceback
    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failure how it is repeated."""
    report = yield
    call: Any = getattr(item, "callspec", None)
    seed = None if call is None else call.params.get(_SEED)
    if report.failed and seed is not None:
        line = f"pytest {_argument(item)} --simulation-seed {seed} --simulation-seeds 1"
        report.sections.append(("simulation", f"seed {seed}; repeat with: {line}"))
    return report


def _argument(item: pytest.Item) -> str:
    """What names a test in the shell that pytest was called in; its id begins at the root."""
    _, colons, rest = item.nodeid.partition("::")
    path = os.path.relpath(item.path, item.config.invocation_params.dir)
    return shlex.quote(f"{path}{colons}{rest}")


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
