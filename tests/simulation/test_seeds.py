"""Whole training runs under faults: some fixed seeds, and those that once found something.

``python -m tests.simulation --seeds N`` plays as many as one likes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from . import driver
from .planted import BUGS, Bug
from .play import play

FOUND = Path(__file__).with_name("seeds.txt")
FIXED = range(1000, 1012)


def found() -> list[int]:
    """The seeds of the file."""
    lines = FOUND.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("seed", [*found(), *FIXED])
def test_a_run_keeps_every_invariant(seed: int) -> None:
    verdict = play(seed)
    assert verdict.violation is None, str(verdict)
    assert verdict.history.rollouts > 0


def test_a_seed_gives_the_same_run_again() -> None:
    first, again = play(FIXED[0]).history, play(FIXED[0]).history
    assert first.lines() == again.lines()
    assert (first.rollouts, first.tokens) == (again.rollouts, again.tokens)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.quick], ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    """The suite's test of itself; the rare ones are found by ``--planted``."""
    finding = bug.find(most=100)
    assert finding is not None, f"{bug.words}: not found"
    violation = finding[1].violation
    assert violation is not None
    assert violation.invariant in bug.expected, str(finding[1])


def test_the_command_prints_a_summary_and_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "count-twice")
    sound = CliRunner().invoke(driver.main, ["--seeds", "1"], standalone_mode=False)
    assert sound.return_value == 0
    assert sound.output.splitlines()[-1].endswith("violations: 0")
    with bug.planted():
        broken = CliRunner().invoke(driver.main, ["--seeds", "1"], standalone_mode=False)
    assert broken.return_value == 1
    assert "replay with: python -m tests.simulation --seeds 1 --start 0" in broken.output
    assert broken.output.splitlines()[-1].endswith("violations: 1")
