"""What the demo reports: sums over batches, and lines that fit a terminal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from arealtrio.demo.report import DemoReport, Tally, progress_line
from arealtrio.demo.trainer import StepReport
from arealtrio.trajectory import Batch, Group
from arealtrio.types import Trajectory


def row(*versions: int) -> Trajectory:
    length = len(versions) + 1
    return Trajectory(
        input_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.array([0] + [1] * len(versions), np.int32),
        logprobs=np.zeros(length, np.float32),
        versions=np.array([-1, *versions], np.int32),
        reward=0.0,
    )


def batch(version: int, *rows: Trajectory) -> Batch:
    group = Group.of([[r] for r in rows], number=0, permit_version=0, prompt_id="", task_id="")
    return Batch(groups=(group,), version=version)


def step(reward: float, tokens: int = 3) -> StepReport:
    return StepReport(
        loss=0.1, reward_mean=reward, clip_fraction=0.0, importance_mean=1.0, tokens=tokens
    )


def report_of(tally: Tally) -> DemoReport:
    return tally.report(
        steps_before=3,
        rollouts={"submitted": 12345, "queued": 0, "accepted": 12345},
        servers={"http://127.0.0.1:65535": {"requests": 12345, "requests_reported": 12345}},
    )


def test_a_tally_adds_up_its_batches() -> None:
    tally = Tally()
    tally.add(batch(4, row(4, 4), row(2, 3)), step(0.1, tokens=4))
    tally.add(batch(5, row(5, 5), row(3, 3, 5)), step(0.2, tokens=5))
    for _ in range(3):
        tally.add(batch(6, row(6)), step(0.9, tokens=1))
    report = report_of(tally)
    assert (report.steps, report.tokens) == (5, 12)
    assert report.staleness_histogram == {0: 5, 2: 2}
    assert report.staleness_max == 2
    assert report.mixed_version_trajectories == 2
    np.testing.assert_allclose([report.reward_first, report.reward_last], [0.4, 0.9])


def test_a_short_run_is_its_own_beginning_and_end() -> None:
    tally = Tally()
    tally.add(batch(0, row(0)), step(0.25))
    report = report_of(tally)
    assert report.reward_first == report.reward_last == 0.25


def test_the_report_survives_json() -> None:
    tally = Tally()
    tally.add(batch(3, row(1), row(3)), step(0.25))
    read = json.loads(json.dumps(report_of(tally).as_dict()))
    assert read["staleness_histogram"] == {"0": 1, "2": 1}
    assert read["servers"]["http://127.0.0.1:65535"]["requests_reported"] == 12345


def test_a_report_and_a_tally_come_back_from_json() -> None:
    tally = Tally()
    tally.add(batch(3, row(1), row(3)), step(0.25))
    tally.seconds = 1.5
    read = Tally.from_dict(json.loads(json.dumps(tally.as_dict())))
    assert read == tally
    read.add(batch(4, row(2)), step(0.5))
    assert (read.ages, read.prompts) == ({0: 1, 2: 2}, ["", ""])
    report = report_of(read)
    assert (report.prompts, report.prompts_repeated, report.seconds) == (1, 1, 1.5)
    assert DemoReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_what_was_counted_since_a_restart_says_so() -> None:
    tally = Tally()
    tally.add(batch(3, row(1)), step(0.25))
    whole = replace(report_of(tally), steps_before=0)
    assert "accepted since step 3" in " ".join(report_of(tally).lines())
    nothing = replace(report_of(tally), rollouts={"submitted": 0})
    assert "groups none since step 3" in " ".join(" ".join(nothing.lines()).split())
    assert "since" not in " ".join(whole.lines())


def test_no_line_is_wider_than_a_terminal() -> None:
    tally = Tally()
    tally.add(batch(40, *(row(version) for version in range(41))), step(0.5, tokens=99999))
    lines = [*report_of(tally).lines()]
    lines.append(progress_line(100, 100, batch(40, *[row(3, 9)] * 64), step(0.5, 99999), 999.9))
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "40 versions at most; 0: 2%" in text
    assert "40: 2%" in text
    assert "staleness 37-37 mixed 64/64" in text
