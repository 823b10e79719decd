"""The ``arealtrio`` command: exit statuses, one-line errors, and nothing left behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from arealtrio import cli
from arealtrio.demo.options import DemoOptions
from arealtrio.demo.report import DemoReport
from arealtrio.errors import NoServerAvailable, TooManyFailures

REPORT = DemoReport(
    steps=1,
    steps_before=0,
    prompts=16,
    prompts_repeated=0,
    reward_first=0.25,
    reward_last=0.5,
    rollouts={"accepted": 16},
    tokens=7,
    seconds=1.5,
    staleness_max=2,
    staleness_histogram={0: 3, 2: 1},
    mixed_version_trajectories=1,
    weight_updates=1,
    servers={"http://127.0.0.1:1": {"requests": 4, "requests_reported": 4}},
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the options of each demo that was asked for; none is run."""
    options: list[Any] = []

    def run_demo(wanted: Any, out: Any) -> DemoReport:
        options.append(wanted)
        out.write("a line\n")
        return REPORT

    monkeypatch.setattr(cli, "run_demo", run_demo)
    return options


def test_options_reach_the_demo(asked: list[Any], tmp_path: Path) -> None:
    words = "--steps 3 --servers 2 --max-staleness 1 --schedule-policy round_robin --seed 5"
    more = f"--group-size 8 --batch-size 6 --freeze-weights --keep-weights {tmp_path}"
    result = invoke("demo", *words.split(), *more.split())
    assert (result.exit_code, result.output) == (0, "a line\n")
    (options,) = asked
    assert (options.steps, options.servers, options.max_staleness, options.seed) == (3, 2, 1, 5)
    assert (options.schedule_policy, options.group_size) == ("round_robin", 8)
    assert options.batch_size == 6
    assert (options.freeze_weights, options.keep_weights) == (True, tmp_path)


def test_a_state_and_servers_that_run_already_reach_it(asked: list[Any], tmp_path: Path) -> None:
    servers = ["--server", "http://a:1", "--server", "http://b:2"]
    result = invoke("demo", "--state", str(tmp_path / "run"), *servers)
    assert result.exit_code == 0
    (options,) = asked
    assert (options.state, options.server_urls) == (tmp_path / "run", ("http://a:1", "http://b:2"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "every server has ended"),
        (["--server", "http://a:1"], "the servers run on"),
        (["--state", "."], "every server has ended; the same command goes on from there"),
    ],
)
def test_who_interrupts_it_is_told_what_is_left(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    def interrupt(*_: object) -> DemoReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupt)
    result = invoke("demo", *arguments)
    assert (result.exit_code, result.output) == (130, f"interrupted; {words}\n")


def test_the_numbers_go_into_a_file_and_quiet_is_quiet(asked: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = invoke("demo", "--quiet", "--json", str(file))
    assert (result.exit_code, result.output, len(asked)) == (0, "", 1)
    numbers = json.loads(file.read_text())
    assert numbers == json.loads(json.dumps(REPORT.as_dict()))
    assert numbers["staleness_histogram"] == {"0": 3, "2": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--bogus"], "No such option"),
        (["demo", "--steps", "0"], "Invalid value for '--steps'"),
        (["demo", "--servers", "many"], "Invalid value for '--servers'"),
        (["demo", "--schedule-policy", "random"], "Invalid value for '--schedule-policy'"),
        (["demo", "--json", "/no/such/place/x.json"], "there is no directory /no/such/place"),
        (["bogus"], "No such command"),
        (["serve", "--bogus"], "No such option"),
        (["serve", "--weights", "x", "--port", "99999"], "Invalid value for '--port'"),
        (["serve", "--weights", "x", "--max-num-seqs", "0"], "Invalid value for '--max-num-seqs'"),
        (["demo", "--keep-weights", "/proc/no/such"], "/proc/no/such can not be made"),
        (["demo", "--state", "/proc/no/such"], "/proc/no/such can not be made"),
        (["demo", "--json", ""], "Invalid value for '--json': a path is not empty"),
        (["demo", "--state", ""], "Invalid value for '--state': a path is not empty"),
        (["demo", "--keep-weights", ""], "Invalid value for '--keep-weights': a path is not"),
        (["demo", "--state", __file__], "Invalid value for '--state'"),
        (["demo", "--server", "http://a:1", "--servers", "4"], "contradict each other"),
    ],
)
def test_a_wrong_argument_is_one_error_and_runs_nothing(
    asked: list[Any], arguments: list[str], words: str
) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, asked) == (2, [])
    assert words in result.output
    assert result.output.count("Error") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NoServerAvailable("server a\nis gone"), "Error: server a is gone\n"),
        (PermissionError(13, "no", "/x"), "Error: [Errno 13] no: '/x'\n"),
        (
            TooManyFailures("2 groups failed", [ValueError("why"), ValueError("b")]),
            "Error: 2 groups failed; the first: why\n",
        ),
    ],
)
def test_a_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object) -> DemoReport:
        raise error

    monkeypatch.setattr(cli, "run_demo", fail)
    result = invoke("demo")
    assert (result.exit_code, result.output) == (1, line)


def test_who_has_read_enough_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> DemoReport:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "run_demo", write)
    result = invoke("demo")
    assert (result.exit_code, result.output) == (1, "")


def test_where_the_shell_has_closed_standard_output_it_runs_all_the_same(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DemoOptions()
    monkeypatch.setattr(sys, "stdout", None)
    assert cli._run(False, options) is REPORT
    assert asked == [options]


def test_the_version_is_the_distribution_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9.9 of {name}")
    assert invoke("--version").output.endswith("version 9.9 of arealtrio\n")


@pytest.mark.parametrize("moment", ["starting", "step"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_the_demo_and_every_server(
    tmp_path: Path, moment: str, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-c", "from arealtrio.cli import main; main()", "demo"]
    with subprocess.Popen(
        [*command, "--steps", "1000", "--servers", "1", "--keep-weights", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        next(line for line in demo.stdout if line.startswith(moment))
        servers = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(number)
        demo.stdout.read()
        errors = demo.stderr.read()
    assert demo.returncode == status
    assert moment == "starting" or len(servers) == 1
    assert not any(server.is_running() for server in servers)
    assert "Traceback" not in errors
    assert errors.startswith("interrupted") == (number == signal.SIGINT)
