"""What starts and stops the real servers, tried without one; part of every test run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from . import setup_environment as setup
from .server import LAUNCH, ServerDied, VllmServer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AREALTRIO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert setup.cache_folder() == tmp_path / "xdg" / "arealtrio"
    monkeypatch.setenv("AREALTRIO_CACHE", str(tmp_path / "own"))
    assert setup.cache_folder() == tmp_path / "own"


def test_a_folder_is_named_for_its_pins(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = setup.environment(cache)
    assert setup.environment(cache) == before
    other = tmp_path / "requirements.txt"
    other.write_text("torch==0\n")
    monkeypatch.setattr(setup, "REQUIREMENTS", other)
    after = setup.environment(cache)
    assert after.install != before.install
    assert after.models != before.models


def test_what_an_interrupted_run_left_is_built_anew(cache: Path) -> None:
    folder = cache / "pieces"

    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.build_once(folder, interrupted)
    assert not setup.is_complete(folder)
    setup.build_once(folder, lambda folder: (folder / "whole").touch())
    assert sorted(p.name for p in folder.iterdir()) == [setup.COMPLETE, "whole"]


def test_what_is_whole_is_not_built_again(cache: Path) -> None:
    folder = cache / "pieces"
    setup.build_once(folder, lambda folder: (folder / "whole").touch())

    def again(folder: Path) -> None:
        raise AssertionError(f"{folder} was whole")

    setup.build_once(folder, again)
    assert (folder / "whole").is_file()


def test_a_failed_command_ends_the_setup_with_its_name() -> None:
    with pytest.raises(SystemExit, match="failed with 3"):
        setup.run(sys.executable, "-c", "raise SystemExit(3)")


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    """The waiting one says so, and goes on when the holder ends, without a word from it."""
    lock = tmp_path / "lock"
    take = (
        f"import sys; sys.path.insert(0, {str(LAUNCH.parent)!r}); import pathlib, setup_environment"
        f"\nwith setup_environment.locked(pathlib.Path({str(lock)!r})): print('has it', flush=True)"
    )
    with setup.locked(lock):
        other = subprocess.Popen([sys.executable, "-c", take], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert "waiting" in other.stdout.readline()
    assert other.communicate(timeout=60)[0] == "has it\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_launched_program_ends_with_the_run_that_launched_it() -> None:
    """The launcher's parent is killed outright, as a run out of memory is."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(LAUNCH)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "running\n"
    parent.kill()
    parent.communicate(timeout=60)
    assert child.pid not in {p.pid for p in psutil.wait_procs([child], timeout=60)[1]}


PARENT = """
import os, subprocess, sys
launched = subprocess.Popen(
    [sys.executable, sys.argv[1], str(os.getpid()), sys.executable, "-c",
     "import os, time; os.write(1, b'running\\\\n'); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE)
print(launched.pid, flush=True)
print(launched.stdout.readline().decode(), end="", flush=True)
launched.wait()
"""


def stand_in(folder: Path, script: str) -> Path:
    """Write a program to be run in vLLM's interpreter's place."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def test_a_server_that_cannot_start_is_noticed_at_once_with_its_last_words(tmp_path: Path) -> None:
    program = stand_in(tmp_path, "echo no such flag; exit 7")
    server = VllmServer(program, tmp_path, tmp_path / "server")
    with pytest.raises(ServerDied, match=r"ended with 7(?s:.*)no such flag"):
        server.wait_healthy(time.monotonic() + 60)
    server.stop()
    assert not (tmp_path / "server" / "tmp").exists()


def test_a_server_that_is_never_healthy_is_given_up(tmp_path: Path) -> None:
    server = VllmServer(stand_in(tmp_path, "exec sleep 600"), tmp_path, tmp_path / "server")
    with pytest.raises(ServerDied, match="not healthy in time"):
        server.wait_healthy(time.monotonic())
    server.stop()


def test_stop_ends_the_whole_group_even_what_ignores_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.real_servers.server.STOP_LIMIT_S", 0.2)
    program = stand_in(tmp_path, "trap '' TERM; sleep 600 & echo $!; wait")
    server = VllmServer(program, tmp_path, tmp_path / "server")
    while not (words := server.log.read_text()):
        time.sleep(0.01)  # its word that it runs, in a file
    worker = psutil.Process(int(words))
    server.stop()
    assert worker.pid not in {p.pid for p in psutil.wait_procs([worker], timeout=60)[1]}
