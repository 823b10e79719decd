"""Two real vLLM servers for a whole test run, put back to their first state before each test."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from .server import VllmServer
from .setup_environment import Environment, environment

HERE = Path(__file__).parent
START_LIMIT_S = 300.0
SERVERS = 2
TEST_LIMIT_S = 600  # the first test's share includes the start

ON_REQUEST = "real servers are started on request only: pytest -m real_servers"
NO_ENVIRONMENT = (
    "vLLM is not installed for these tests: run python tests/real_servers/setup_environment.py"
)
RUNNING = pytest.StashKey[list[VllmServer]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test run that does not name these tests must not start two servers for them."""
    wanted = "real_servers" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("real_servers"):
            item.add_marker(pytest.mark.timeout(TEST_LIMIT_S))
            if not wanted:
                item.add_marker(pytest.mark.skip(reason=ON_REQUEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers said beside a failure."""
    report = yield
    if report.failed and HERE in item.path.parents:
        for server in item.config.stash.get(RUNNING, []):
            report.sections.append((f"vLLM {server.url}", server.last_words()))
    return report


def built_environment() -> Environment:
    """Skip without vLLM, or fail where it was promised: a run that skips everything looks green."""
    built = environment()
    if not built.complete:
        if os.environ.get("AREALTRIO_REAL_SERVERS") == "required":
            pytest.fail(NO_ENVIRONMENT)
        pytest.skip(NO_ENVIRONMENT)
    return built


@pytest.fixture(scope="session")
def running_servers(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Sequence[VllmServer]]:
    """Start two servers side by side; stop them, and all they started, at the end."""
    built = built_environment()
    servers = pytestconfig.stash.setdefault(RUNNING, [])
    try:
        for index in range(SERVERS):
            folder = tmp_path_factory.mktemp(f"vllm-{index}")
            servers.append(VllmServer(built.python, built.models, folder))
        deadline = time.monotonic() + START_LIMIT_S
        for server in servers:
            server.wait_healthy(deadline)
        yield servers
    finally:
        for server in servers:
            server.ask_to_stop()
        for server in servers:
            server.stop()


@pytest.fixture
def vllm_servers(running_servers: Sequence[VllmServer]) -> Sequence[VllmServer]:
    """Two idle servers with ``tiny-1``, version 0, not paused; one that ended is started again."""
    dead = [server for server in running_servers if not server.alive]
    for server in dead:
        server.start_again()
    for server in dead:
        server.wait_healthy(time.monotonic() + START_LIMIT_S)
    for server in running_servers:
        server.reset()
    return running_servers


@pytest.fixture
def vllm_server(vllm_servers: Sequence[VllmServer]) -> VllmServer:
    """The first of the two."""
    return vllm_servers[0]


@pytest.fixture
def models(vllm_server: VllmServer) -> Path:
    """The folder of ``tiny-1`` … ``tiny-3``, as the servers see it."""
    return vllm_server.models
