"""What every test has: how hypothesis searches, and a trio whose schedule can be repeated.

A test that hangs is shown by pytest's own fault handler (``faulthandler_timeout``), ended by
pytest-timeout (``timeout``), and, under ``.ci/run``, by SIGABRT, on which every thread prints where
it is.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import trio

from arealtrio.testing import repeatable_schedule

# Time is the machine's, and these machines are slow and shared: an example may take as long as it
# likes, and the test's own time limit is what ends a search that does not.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# The same examples on every run: a failure in CI is the commit's, and can be repeated at home.
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("default"), max_examples=3000
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


@pytest.fixture(autouse=True)
def same_schedule_in_ci(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let trio take its tasks in one order on every run of CI, another for each test.

    It shuffles the tasks that are ready. Elsewhere it goes on to do so, which finds more.
    """
    if hypothesis.settings().derandomize:
        with repeatable_schedule(zlib.crc32(request.node.nodeid.encode())):
            yield
    else:
        yield


@pytest.fixture
def seed_trio(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes the next ``trio.run`` repeatable: one seed, one schedule.

    trio shuffles the tasks that are ready, from a private generator. This fixture is the only place
    that reaches for it; both of its private names are trio's own testing hooks.
    """
    run = trio._core._run
    schedule = random.Random(0)
    monkeypatch.setattr(run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(run, "_r", schedule)
    return schedule.seed
