"""What a run of the demo leaves on the disk: whole or not at all, and of one run alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from arealtrio.demo.checkpoint import FILE, Checkpoint, StateDirectory
from arealtrio.demo.options import DemoOptions
from arealtrio.errors import ConfigError

OPTIONS = DemoOptions().of_the_run()
LATER = Checkpoint(
    options=OPTIONS,
    trainer={"weights": [0.1, 1e-30]},
    tally={"rewards": [0.5]},
    rollout={"batch": 0, "ahead": [{"prompt_id": "7"}]},
)


@pytest.mark.parametrize("name", [".", "new", "new/er"])
def test_a_new_or_an_empty_directory_gets_a_first_checkpoint(tmp_path: Path, name: str) -> None:
    with StateDirectory(tmp_path / name).opened(OPTIONS) as found:
        assert (found.trainer, found.tally, found.rollout, found.report) == (None,) * 4
    assert Checkpoint.read(tmp_path / name / FILE).options == OPTIONS


def test_what_is_written_is_found_again_to_the_last_bit(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    with directory.opened(OPTIONS):
        directory.write(LATER)
    with directory.opened(OPTIONS) as found:
        assert found.trainer == LATER.trainer
        assert (found.tally, found.rollout) == (LATER.tally, LATER.rollout)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_one_that_is_cut_off_while_it_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    directory = StateDirectory(tmp_path)

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with directory.opened(OPTIONS):
        directory.write(LATER)
        with monkeypatch.context() as patch:
            where: object = os if call == "fsync" else Path
            patch.setattr(where, call, cut_off)
            with pytest.raises(KeyboardInterrupt):
                directory.write(replace(LATER, report={"steps": 1}))
    with directory.opened(OPTIONS) as found:
        assert (found.tally, found.report) == (LATER.tally, None)


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.new").write_text('{"for')
    with StateDirectory(tmp_path).opened(OPTIONS) as found:
        assert found.trainer is None


@pytest.mark.parametrize("name", OPTIONS)
def test_another_run_s_directory_is_refused_by_the_name_of_what_differs(
    tmp_path: Path, name: str
) -> None:
    with StateDirectory(tmp_path).opened(OPTIONS):
        pass
    other = {**OPTIONS, name: 7}
    with (
        pytest.raises(ConfigError, match=rf"holds a run with {name} {OPTIONS[name]}, not 7: "),
        StateDirectory(tmp_path).opened(other),
    ):
        pass
    assert Checkpoint.read(tmp_path / FILE).options == OPTIONS


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 2, "options": {}}', '{"format": 1}',
     '{"format": 1, "options": []}', '{"format": 1, "options": {}, "more": 1}', "\x00\xff"],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with (
        pytest.raises(ConfigError, match=r"checkpoint\.json is no checkpoint of this demo"),
        StateDirectory(tmp_path).opened(OPTIONS),
    ):
        pass
    assert (tmp_path / FILE).read_text() == text


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with (
        pytest.raises(ConfigError, match="is not empty and holds no run of this demo"),
        StateDirectory(tmp_path).opened(OPTIONS),
    ):
        pass
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_a_directory_is_of_one_at_a_time(tmp_path: Path) -> None:
    with StateDirectory(tmp_path).opened(OPTIONS):
        with (
            pytest.raises(ConfigError, match="is in use by another process"),
            StateDirectory(tmp_path).opened(OPTIONS),
        ):
            pass
        with (  # and the refusal let nobody in
            pytest.raises(ConfigError, match="is in use by another process"),
            StateDirectory(tmp_path).opened(OPTIONS),
        ):
            pass
    with StateDirectory(tmp_path).opened(OPTIONS) as found:
        assert found.options == OPTIONS
