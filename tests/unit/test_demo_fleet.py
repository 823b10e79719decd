"""The demo's servers: they listen, they are watched, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import arealtrio
from arealtrio.demo.fleet import server_processes
from arealtrio.demo.task import base_model
from arealtrio.embedded.model import WEIGHTS_FILE
from arealtrio.errors import NoServerAvailable

from .processes import embedded_servers


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    base_model().save(tmp_path / "v0")
    return tmp_path / "v0"


def test_servers_listen_in_sessions_of_their_own_and_end_with_the_block(
    weights: Path, tmp_path: Path
) -> None:
    with server_processes(2, weights, tmp_path) as servers:
        assert len({server.url for server in servers}) == 2
        assert {os.getsid(server.process.pid) for server in servers} == {
            server.process.pid for server in servers
        }
        for server in servers:
            server.check_alive()
    assert [server.process.returncode for server in servers] == [0, 0]
    assert embedded_servers() == []


def test_servers_are_of_the_arealtrio_that_runs_not_of_one_that_lies_around(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``pip install .`` in a checkout, whose sources lack the compiled islands."""
    (tmp_path / "arealtrio").mkdir()
    (tmp_path / "arealtrio" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(arealtrio.__file__).parents[1]))  # it may be relative
    with server_processes(1, weights, tmp_path) as (server,):
        server.check_alive()


def test_servers_end_when_the_block_fails(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), server_processes(1, weights, tmp_path):
        raise KeyboardInterrupt
    assert embedded_servers() == []


def test_a_signal_while_a_server_is_started_leaves_none(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the process is there, and nobody has it yet."""
    start = subprocess.Popen

    def start_and_interrupt(*arguments: Any, **more: Any) -> Any:
        process = start(*arguments, **more)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt), server_processes(2, weights, tmp_path):
        raise AssertionError("it went on")
    assert embedded_servers() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dead_server_is_named(weights: Path, tmp_path: Path) -> None:
    with server_processes(1, weights, tmp_path) as (server,):
        server.process.kill()
        server.process.wait()
        server.log.write_text("first words\nlast words\n")
        with pytest.raises(NoServerAvailable, match=r"127.* ended with status -9: last words"):
            server.check_alive()


def test_a_server_that_does_not_start_is_reported_with_its_own_words(
    weights: Path, tmp_path: Path
) -> None:
    (weights / WEIGHTS_FILE).write_text("these are no weights")
    with (
        pytest.raises(NoServerAvailable, match=r"did not start: .*does not hold a TinyModel"),
        server_processes(2, weights, tmp_path),
    ):
        raise AssertionError("it started without weights")
    assert embedded_servers() == []


def test_no_server_outlives_a_parent_that_is_killed(weights: Path, tmp_path: Path) -> None:
    """SIGKILL leaves the parent no time for anything: the end of the pipe does it."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(weights), str(tmp_path)], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert orphan.wait(timeout=30) is None  # not our child: psutil waits until it is gone
    assert not orphan.is_running()


PARENT = """
import signal, sys
from pathlib import Path
from arealtrio.demo.fleet import server_processes
with server_processes(1, Path(sys.argv[1]), Path(sys.argv[2])) as (server,):
    print(server.process.pid, flush=True)
    signal.pause()
"""
