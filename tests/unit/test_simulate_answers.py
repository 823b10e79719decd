"""Lengths of answers: the distributions, and records of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from arealtrio.errors import ConfigError
from arealtrio.simulate.answers import (
    TOKENS_MAX,
    Answers,
    FixedAnswers,
    LogNormalAnswers,
    RecordedAnswers,
)


def some(answers: Answers, count: int = 8, *, prompt: int = 0, epoch: int = 0) -> list[int]:
    return list(islice(answers.of_prompt(prompt, epoch, seed=0), count))


def one_of_each(answers: Answers, prompts: int) -> Iterator[int]:
    return (next(answers.of_prompt(prompt, 0, 0)) for prompt in range(prompts))


def test_fixed_answers_are_all_alike() -> None:
    answers = FixedAnswers(7)
    assert some(answers, 3) == [7, 7, 7]
    assert (answers.mean, answers.longest, answers.prompts, str(answers)) == (7, 7, None, "7")


def test_log_normal_answers_have_the_percentiles_asked_for() -> None:
    drawn = sorted(one_of_each(LogNormalAnswers(1000, 9000, 10**6), 20_000))
    assert statistics.median(drawn) == pytest.approx(1000, rel=0.03)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(9000, rel=0.06)


@pytest.mark.parametrize("cut", [1200, 3000, None])
def test_the_mean_is_of_what_is_left_after_the_cut(cut: int | None) -> None:
    answers = LogNormalAnswers(1000, 9000, cut)
    drawn = list(one_of_each(answers, 20_000))
    assert statistics.fmean(drawn) == pytest.approx(answers.mean, rel=0.02)
    assert max(drawn) <= answers.longest
    assert (max(drawn) == answers.longest) or cut is None


def test_without_a_tail_log_normal_answers_are_all_alike() -> None:
    answers = LogNormalAnswers(50, 50)
    assert some(answers, 3) == [50, 50, 50]
    assert answers.mean == 50


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_answers_to_one_prompt_have_in_common_what_was_asked_for(share: float) -> None:
    answers = LogNormalAnswers(1000, 9000, 10**7, prompt_share=share)
    pairs = [map(math.log, some(answers, 2, prompt=prompt)) for prompt in range(4000)]
    first, second = zip(*pairs, strict=True)
    assert statistics.correlation(first, second) == pytest.approx(share, abs=0.05)


def test_lengths_belong_to_prompt_epoch_and_seed_and_to_nothing_else() -> None:
    answers = LogNormalAnswers(1000, 9000)
    assert some(answers) == some(answers)
    others = (
        some(answers, prompt=1),
        some(answers, epoch=1),
        list(islice(answers.of_prompt(0, 0, seed=1), 8)),
    )
    assert all(other != some(answers) for other in others)


def write(directory: Path, *lines: str) -> Path:
    path = directory / "lengths.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "lines",
    [
        ("3", "5", "9"),
        ('{"tokens": 3}', "", '{"tokens": 5, "prompt_id": null}', "  ", '{"tokens": 9}'),
    ],
)
def test_a_record_without_prompts_is_drawn_from(tmp_path: Path, lines: tuple[str, ...]) -> None:
    answers = RecordedAnswers.load(write(tmp_path, *lines))
    assert set(some(answers, 100)) == {3, 5, 9}
    assert (answers.prompts, answers.longest) == (None, 9)
    assert answers.mean == pytest.approx(17 / 3)


@pytest.mark.parametrize(
    "lines",
    [
        ('{"tokens": 3, "prompt_id": "a"}', '{"tokens": 8, "prompt_id": 7}',
         '{"tokens": 5, "prompt_id": "a"}'),
        ('{"task_id": 1, "seqlen": 13, "prompt_len": 10, "reward": 1.0}',
         '{"task_id": 2, "seqlen": 8, "prompt_len": 0}',
         '{"task_id": 1, "seqlen": 15, "prompt_len": 10, "sample_idx": 1}'),
    ],
    ids=["own", "areal"],
)  # fmt: skip
def test_a_record_by_prompt_gives_each_its_own_answers(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    answers = RecordedAnswers.load(write(tmp_path, *lines))
    assert answers.prompts == 2
    assert sorted(some(answers, 4, prompt=0)) == [3, 3, 5, 5]
    assert some(answers, 3, prompt=1) == [8, 8, 8]
    assert some(answers, prompt=2) == some(answers, prompt=2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1.5", "whole number"),
        ("true", "whole number"),
        ('"7"', "whole number"),
        ("[7]", "whole number"),
        ("0", "1 to"),
        ("-4", "1 to"),
        (str(TOKENS_MAX + 1), "1 to"),
        ('{"length": 4}', "neither 'tokens'"),
        ('{"tokens": null}', "whole number"),
        ('{"task_id": 1, "seqlen": 10, "prompt_len": 10}', "1 to"),
        ('{"task_id": 1, "seqlen": 10, "prompt_len": -1}', "0 to"),
        ('{"tokens": 4, "prompt_id": "a"}', "some lines name a prompt"),
    ],
)
def test_a_line_that_is_no_length_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, "3", "", line, "5")
    with pytest.raises(ConfigError, match=words) as caught:
        RecordedAnswers.load(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert len(str(caught.value)) < 300


def test_a_record_that_is_missing_empty_or_no_text_is_named(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none", "can not be read: No such file"),
        (tmp_path, "can not be read: Is a directory"),
        (write(tmp_path, "", " "), "holds no lengths"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            RecordedAnswers.load(path)
        assert str(path) in str(caught.value)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        RecordedAnswers.load(binary)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedAnswers(0),
        lambda: FixedAnswers(TOKENS_MAX + 1),
        lambda: LogNormalAnswers(0.5, 10),
        lambda: LogNormalAnswers(10, 9),
        lambda: LogNormalAnswers(float("nan"), 10),
        lambda: LogNormalAnswers(10, float("inf")),
        lambda: LogNormalAnswers(10, 90, 9),
        lambda: LogNormalAnswers(10, 90, prompt_share=1.5),
        lambda: RecordedAnswers([]),
        lambda: RecordedAnswers({"a": []}),
        lambda: RecordedAnswers({"a": [3, 0]}),
    ],
)
def test_values_out_of_their_range_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ConfigError):
        make()
