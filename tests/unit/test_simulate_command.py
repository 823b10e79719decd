"""``arealtrio simulate``: options, sweeps, errors that say what is wrong, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from arealtrio import cli
from arealtrio.errors import StalenessBudgetExhausted
from arealtrio.simulate import LogNormalAnswers, Plan, command, comparison, simulate
from arealtrio.simulate.outcome import Outcome
from arealtrio.simulate.progress import Progress

from .processes import closed_pipe

SMALL = (
    *("--servers", "2x4@50", "--batch-size", "4", "--group-size", "2"),
    *("--steps", "4", "--lengths", "50/400"),
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["simulate", *arguments])


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Return the plans that were asked for; a tiny one is run in place of each."""
    asked: list[Plan] = []
    tiny = command._plan(_defaults())

    def run(plan: Plan, *_: Any) -> Outcome:
        asked.append(plan)
        return simulate(tiny)

    monkeypatch.setattr(comparison, "simulate", run)
    return asked


def _defaults() -> dict[str, Any]:
    context = command.command.make_context("simulate", [*SMALL, "--steps", "2"])
    return {
        name: value
        for name, value in context.params.items()
        if name not in ("sweep", "plot", "json_path", "quiet")
    }


def test_options_reach_the_plan(plans: list[Plan]) -> None:
    words = (
        "--servers 4x8@50,2x24@80 --slow-down 0.01 --lengths 100/900/2000 --prompt-share 0.25 "
        "--prompts 77 --batch-size 16 --group-size 4 --training-s 30 --update-s 1 --latency-s 0.5 "
        "--steps 9 --warm-up 3 --max-staleness inf --straggler-policy keep "
        "--schedule-policy round_robin --queue-order deadline --max-concurrent-rollouts 50 "
        "--grain 7 --seed 5"
    )
    result = invoke(*words.split())
    assert result.exit_code == 0, result.output
    (plan,) = plans
    assert ",".join(map(str, plan.servers)) == "4x8@50,2x24@80"
    assert str(plan.answers) == "100/900/2000"
    assert plan.answers == LogNormalAnswers(100, 900, 2000, prompt_share=0.25)
    values = {name: getattr(plan, name) for name in _defaults() if hasattr(plan, name)}
    assert {**values, "servers": 0} == {
        "servers": 0, "slow_down": 0.01, "prompts": 77, "batch_size": 16, "group_size": 4,
        "training_s": 30, "update_s": 1, "latency_s": 0.5, "steps": 9, "warm_up": 3,
        "max_staleness": None, "straggler_policy": "keep", "schedule_policy": "round_robin",
        "queue_order": "deadline", "max_concurrent_rollouts": 50, "grain": 7, "seed": 5,
    }  # fmt: skip


def test_every_option_of_a_plan_can_be_swept(plans: list[Plan]) -> None:
    for name in {*_defaults()} - {"trace"}:
        value = {"servers": "1x2@3", "lengths": "7", "prompt_share": "0"}.get(name)
        if value is None:
            value = str(_defaults()[name] or 3)
        result = invoke(*SMALL, "--sweep", f"{name}={value}")
        assert result.exit_code == 0, result.output
    assert len(plans) == len(_defaults()) - 1


def test_a_sweep_compares_and_a_second_one_is_crossed_with_it(plans: list[Plan]) -> None:
    result = invoke(
        *SMALL, "--sweep", "max_staleness=0,2,inf", "--sweep", "straggler-policy=wait,drop"
    )
    assert result.exit_code == 0, result.output
    assert [(plan.max_staleness, plan.straggler_policy) for plan in plans] == [
        (0, "wait"), (0, "drop"), (2, "wait"), (2, "drop"), (None, "wait"), (None, "drop"),
    ]  # fmt: skip
    lines = [line.split() for line in result.output.splitlines()]
    assert [line[:2] for line in lines[2:8]] == [
        ["0", "wait"], ["0", "drop"], ["2", "wait"], ["2", "drop"], ["inf", "wait"],
        ["inf", "drop"],
    ]  # fmt: skip


def test_a_whole_run_prints_at_most_80_columns_and_writes_what_it_is_asked_to(
    tmp_path: Path,
) -> None:
    picture, numbers = tmp_path / "out.png", tmp_path / "out.json"
    more = ["--plot", str(picture), "--json", str(numbers), "--sweep", "max_staleness=0,1"]
    result = invoke(*SMALL, *more)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
    first, second = json.loads(numbers.read_text())["settings"]
    assert (first["values"], second["values"]) == ({"max_staleness": "0"}, {"max_staleness": "1"})
    assert first["outcome"]["tokens_per_s"] < second["outcome"]["tokens_per_s"]
    assert first["plan"]["lengths"] == "50/400"


def test_json_to_standard_output_is_all_there_is() -> None:
    result = invoke(*SMALL, "--json", "-")
    assert result.exit_code == 0
    (setting,) = json.loads(result.output)["settings"]
    assert setting["outcome"]["steps"] == 3


def test_quiet_is_quiet() -> None:
    result = invoke(*SMALL, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_trace_takes_the_place_of_a_distribution(plans: list[Plan], tmp_path: Path) -> None:
    trace = tmp_path / "lengths.jsonl"
    trace.write_text('{"tokens": 5, "prompt_id": 1}\n{"tokens": 9, "prompt_id": 2}\n')
    result = invoke("--trace", str(trace))
    assert result.exit_code == 0, result.output
    assert (plans[0].answers.longest, plans[0].prompts_of_an_epoch) == (9, 2)


def bad_trace(directory: Path) -> str:
    path = directory / "bad.jsonl"
    path.write_text('12\n{"tokens": "many"}\n')
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--bogus", "No such option"),
        ("--servers 4x8", "Invalid value for '--servers'"),
        ("--servers -4x8@50", "Invalid value for '--servers'"),
        ("--batch-size -3", "Invalid value for '--batch-size'"),
        ("--steps 1", "Invalid value for '--steps'"),
        ("--training-s 0", "Invalid value for '--training-s'"),
        ("--training-s nan", "Invalid value for '--training-s'"),
        ("--training-s 1e12", "a run lasts 1e+12 simulated seconds at most"),
        ("--update-s 1e12", "its training steps would take 4e+13"),
        ("--latency-s 1e12", "its longest answer would take 1e+12"),
        ("--slow-down 1e12", "its longest answer would take"),
        ("--update-s inf", "Invalid value for '--update-s'"),
        ("--slow-down -0.1", "Invalid value for '--slow-down'"),
        ("--lengths 0", "Invalid value for '--lengths'"),
        ("--lengths nan", "Invalid value for '--lengths'"),
        ("--lengths 9/5", "Invalid value for '--lengths'"),
        ("--lengths 1/2/3/4", "neither TOKENS nor MEDIAN/P99"),
        ("--lengths what/ever", "neither TOKENS nor MEDIAN/P99"),
        ("--lengths 900000000/900000000", "Invalid value for '--lengths'"),
        ("--lengths 2000000 --grain 1", "choose a coarser one"),
        ("--lengths 100 --grain 100000", "choose a finer one"),
        ("--max-staleness -1", "Invalid value for '--max-staleness'"),
        ("--max-staleness forever", "nor inf"),
        ("--max-staleness 99999999999999", "max_staleness"),
        ("--straggler-policy hope", "Invalid value for '--straggler-policy'"),
        ("--warm-up 40", "warm_up must be at least 0 and below steps"),
        ("--trace /no/such/trace", "No such file"),
        ("--trace {bad}", "line 2: a length is a whole number"),
        ("--trace {bad} --lengths 7", "Invalid value for '--trace'"),
        ("--sweep max_staleness", "not written OPTION=VALUE"),
        ("--sweep bogus=1,2", "'bogus' is nothing that can be swept; choose from batch_size"),
        ("--sweep quiet=1,2", "'quiet' is nothing that can be swept"),
        ("--sweep max_staleness=", "nor inf"),
        ("--sweep max_staleness=1,x", "Invalid value for --sweep: max_staleness: 'x'"),
        ("--sweep max_staleness=1,1", "names a value twice"),
        ("--sweep steps=2,3 --sweep steps=4,5", "steps is swept twice"),
        ("--sweep steps=2 --sweep seed=1 --sweep grain=1", "at most 2"),
        ("--sweep steps=20,30 --warm-up 25", "below steps, which is 20"),
        ("--sweep trace={bad}", "line 2"),
        ("--plot /no/such/place/x.png", "there is no directory /no/such/place"),
        ("--plot x.bmp", "must end in .png, .svg or .pdf"),
        ("--json /no/such/place/x.json", "there is no directory /no/such/place"),
        ("--json=", "Invalid value for '--json': a path is not empty"),
        ("--plot=", "Invalid value for '--plot': a path is not empty"),
        ("--trace=", "Invalid value for '--trace': a path is not empty"),
    ],
)
def test_a_wrong_argument_is_one_error_and_runs_nothing(
    plans: list[Plan], tmp_path: Path, arguments: str, words: str
) -> None:
    result = invoke(*arguments.format(bad=bad_trace(tmp_path)).split())
    assert (result.exit_code, plans) == (2, [])
    assert words in " ".join(result.output.split())
    assert result.output.count("Error") == 1
    assert len(result.output.splitlines()) < 12


def test_a_trace_and_a_distribution_exclude_each_other(plans: list[Plan], tmp_path: Path) -> None:
    trace = tmp_path / "lengths.jsonl"
    trace.write_text("12\n")
    for more in (["--lengths", "7"], ["--prompt-share", "1"], ["--sweep", "lengths=7,8"]):
        result = invoke("--trace", str(trace), *more)
        assert (result.exit_code, plans) == (2, [])
        assert "exclude each other" in result.output


def test_a_picture_without_matplotlib_is_refused_at_once(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "arealtrio.simulate.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    result = invoke("--plot", "x.png")
    assert (result.exit_code, plans) == (2, [])
    assert "pip install 'arealtrio[plot]'" in result.output


def test_a_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Outcome:
        raise StalenessBudgetExhausted("two\nlines")

    monkeypatch.setattr(comparison, "simulate", fail)
    result = invoke()
    assert (result.exit_code, result.output) == (1, "Error: two lines\n")


def test_a_terminal_without_blocks_gets_ascii() -> None:
    arguments = [sys.executable, "-m", "arealtrio", "simulate", *SMALL]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, env=environment, capture_output=True, check=True)
    assert b"#####" in done.stdout
    assert done.stderr == b""


def test_who_has_read_enough_is_told_nothing_and_the_files_are_written(tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    arguments = [sys.executable, "-m", "arealtrio", "simulate", *SMALL, "--json", str(numbers)]
    with closed_pipe() as unread:
        done = subprocess.run(arguments, stdout=unread, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert json.loads(numbers.read_text())["settings"][0]["outcome"]["steps"] == 3


def test_what_the_shell_has_closed_is_not_written_to() -> None:
    arguments = [sys.executable, "-m", "arealtrio", "simulate", *SMALL]
    for closed, report in ((">&-", b""), ("2>&-", b"throughput")):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *arguments]
        done = subprocess.run(shell, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout[:10] == report


def test_json_to_a_closed_standard_output_is_refused_at_once(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(click.BadParameter, match="there is no standard output"):
        command.command.main([*SMALL, "--json", "-"], standalone_mode=False)
    assert plans == []


@pytest.mark.parametrize(("columns", "width"), [(0, 79), (30, 29), (200, 199)])
def test_progress_is_as_wide_as_its_terminal(columns: int, width: int) -> None:
    ours, its = pty.openpty()
    try:
        termios.tcsetwinsize(its, (24, columns))
        Progress(its).begin("a" * 100, 10, [])
        line = os.read(ours, 4096).decode().removeprefix("\r\x1b[K")
    finally:
        os.close(ours)
        os.close(its)
    assert line == f"{'a' * 100}: step 0 of 10, 0 rollouts"[:width]


def test_ctrl_c_ends_it_with_what_there_is() -> None:
    """Hundreds of rollouts are under way in the second setting, and nobody waits for them."""
    wide = ("--servers", "16x32@50", "--batch-size", "64", "--lengths", "50/200", "--warm-up", "0")
    sweep = ("--sweep", "max_staleness=0,inf", "--sweep", "steps=2,99999")
    with _on_terminal(*wide, *sweep) as (process, terminal):
        # Any step: a quick machine takes several between two lines.
        _read_until(terminal, rb"2 of 4 max_staleness=0 steps=99999: step [1-9]\d* of")
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stdout is not None
        report = process.stdout.read().decode()
        took_s = time.monotonic() - began
    assert process.returncode == 130
    rows = [line.split() for line in report.splitlines()]
    assert [row[:2] for row in rows[2:4]] == [["0", "2"], ["0", "99999"]]
    assert rows[4] == []  # the settings that were not begun are not there
    assert took_s < 5  # a second where the machine has nothing else to do


@contextlib.contextmanager
def _on_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run it with standard error on a terminal, whose other end is returned."""
    ours, its = pty.openpty()
    code = "from arealtrio.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "simulate", *arguments], stdout=subprocess.PIPE, stderr=its
    ) as process:
        os.close(its)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def _read_until(terminal: int, pattern: bytes) -> None:
    seen = b""
    while not re.search(pattern, seen):
        seen += os.read(terminal, 4096)
