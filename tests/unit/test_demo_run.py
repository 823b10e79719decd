"""The demo from end to end: real servers, real HTTP, and a model that learns through them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from arealtrio.demo import training
from arealtrio.demo.run import DemoOptions, run_demo
from arealtrio.demo.task import base_model
from arealtrio.embedded.model import TinyModel
from arealtrio.errors import ConfigError, NoServerAvailable

from .processes import embedded_servers


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_steps_of_asynchronous_training_teach_the_task(seed: int) -> None:
    out = io.StringIO()
    report = run_demo(DemoOptions(seed=seed), out)
    assert report.reward_last - report.reward_first >= 0.3
    assert 1 <= report.staleness_max <= 4
    assert report.mixed_version_trajectories > 0
    assert sum(report.staleness_histogram.values()) == 20 * 16 * 4
    assert report.rollouts["accepted"] == report.prompts == 20 * 16
    assert report.prompts_repeated == 0
    assert report.rollouts["failed"] == report.rollouts["running"] == 0
    assert (report.steps, report.weight_updates, len(report.servers)) == (20, 20, 4)
    for counts in report.servers.values():
        assert counts["requests"] == counts["requests_reported"] > 0
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert out.getvalue().count("step ") == 20


def test_twenty_steps_with_frozen_weights_teach_nothing() -> None:
    report = run_demo(DemoOptions(freeze_weights=True), io.StringIO())
    assert abs(report.reward_last - report.reward_first) < 0.1
    assert report.mixed_version_trajectories > 0
    assert report.weight_updates == 20


def test_frozen_weights_teach_nothing_and_every_version_is_kept(tmp_path: Path) -> None:
    """All else is equal: versions advance, tokens age, and the files are there."""
    options = DemoOptions(
        steps=6, servers=2, max_staleness=1, freeze_weights=True, keep_weights=tmp_path, seed=1
    )
    report = run_demo(options, io.StringIO())
    assert abs(report.reward_last - report.reward_first) < 0.1
    assert report.staleness_max == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"v{n}" for n in range(7)]
    assert (TinyModel.load(tmp_path / "v6").weights.output == base_model(1).weights.output).all()


def test_a_server_that_dies_ends_the_demo_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_a_server(number: int, *args: object) -> str:
        if number == 2:
            embedded_servers()[0].kill()
        return ""

    monkeypatch.setattr(training, "progress_line", kill_a_server)
    with pytest.raises(NoServerAvailable, match=r"http://127.* ended with status -9"):
        run_demo(DemoOptions(servers=2, steps=1000), io.StringIO())
    assert embedded_servers() == []


@pytest.mark.parametrize("name", ["steps", "servers", "batch_size", "group_size"])
def test_options_without_sense_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be an integer of at least 1"):
        DemoOptions(**wrong)


@pytest.mark.parametrize("name", ["state", "keep_weights"])
def test_a_directory_that_no_request_can_name_is_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: Path(os.fsdecode(b"run\xff"))}
    with pytest.raises(ConfigError, match=f"{name} holds a character that UTF-8 can not write"):
        DemoOptions(**wrong)
