"""Reports of outcomes: what a terminal of 80 columns shows, and what a program reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arealtrio.simulate import FixedAnswers, Outcome, Plan, fleet
from arealtrio.simulate.bars import bar, binned, columns
from arealtrio.simulate.report import WIDTH, Setting, as_json, lines

PLAN = Plan(servers=fleet("4x8@50,4x24@80"), answers=FixedAnswers(1000))


def outcome(**changes: Any) -> Outcome:
    given: dict[str, Any] = {
        "steps": 30,
        "seconds": 1860.0,
        "tokens_per_s": 5310.4,
        "rollouts_per_s": 4.414,
        "answer_tokens": 1203.2,
        "step_s": 62.0,
        "trainer_wait_s": 15.5,
        "update_s": 2.0,
        "utilisation": 0.93,
        "utilisation_by_kind": {"4x8@50": 0.91, "4x24@80": 0.95},
        "token_staleness": {0: 25, 1: 70, 2: 5},
        "head_staleness": {1: 8, 2: 2},
        "violations": 3,
        "given_up": 1234,
        "step_tokens_per_s": (5000.0, 5620.8),
    }
    return Outcome(**{**given, **changes})


def setting(done: Outcome | None, **values: str) -> Setting:
    return Setting(plan=PLAN, values=values, outcome=done)


def test_bars_are_as_long_as_their_share() -> None:
    assert [bar(share, 4) for share in (0, 0.001, 0.5, 0.53, 1)] == [
        "    ", "▏   ", "██  ", "██▏ ", "████",
    ]  # fmt: skip
    assert [bar(share, 4, plain=True) for share in (0, 0.001, 0.5, 1)] == [
        "    ", "#   ", "##  ", "####",
    ]  # fmt: skip


def test_columns_are_as_high_as_their_share_of_the_highest() -> None:
    assert columns([0, 0.01, 0.2, 0.4]) == "·▁▅█"
    assert columns([0, 0.01, 0.2, 0.4], plain=True) == ".158"
    assert columns([]) == ""


def test_histograms_are_cut_into_bins_of_one_width() -> None:
    assert binned({0: 1, 2: 3}, 12) == {"0": 0.25, "1": 0, "2": 0.75}
    assert binned({0: 1, 3: 1, 5: 2}, 3) == {"0-1": 0.25, "2-3": 0.25, "4-5": 0.5}
    assert sum(binned(dict.fromkeys(range(1000), 1), 12).values()) == pytest.approx(1)
    assert len(binned(dict.fromkeys(range(1000), 1), 12)) <= 12


def test_the_report_of_one_setting() -> None:
    text = "\n".join(lines([setting(outcome())]))
    for words in (
        "5,310 tokens/s, 4.41 rollouts/s",
        "62.0 s: 15.5 waiting (25%), 60.0 training, 2.0 for new weights",
        "93% of all slots (4x8@50 91%, 4x24@80 95%)",
        "1,203 tokens on average where trained on, 1,000 as given",
        "3 groups trained on all the same, 1,234 given up",
        "30 steps, 1,860 s",
    ):
        assert words in " ".join(text.split())


def test_the_histograms_of_one_setting_stand_side_by_side() -> None:
    *_, first, second, third = lines([setting(outcome())], plain=True)
    assert first.split() == ["0", "######", "25.0%", "0.0%"]
    assert second.split() == ["1", 17 * "#", "70.0%", 19 * "#", "80.0%"]
    assert third.split() == ["2", "#", "5.0%", "#####", "20.0%"]


def test_a_comparison_has_a_line_for_each_setting() -> None:
    settings = [
        setting(outcome(tokens_per_s=1000, given_up=0), max_staleness="0"),
        setting(outcome(tokens_per_s=2500, given_up=0), max_staleness="inf"),
        setting(None, max_staleness="7"),  # was not finished
    ]
    text = [line.split() for line in lines(settings, plain=True)]
    assert text == [
        ["slots", "trainer", "staleness"],
        ["max_staleness", "tokens/s", "/", "first", "busy", "waits", "mean", "max"],
        ["0", "1,000", "1.00", 7 * "#", "93%", "25%", "0.8", "2"],
        ["inf", "2,500", "2.50", 17 * "#", "93%", "25%", "0.8", "2"],
        [],
        ["tokens", "by", "staleness,", "from", "0", "at", "the", "left", "to", "2"],
        ["0", "381"],
        ["inf", "381"],
    ]


def test_a_comparison_says_what_was_given_up_where_anything_was() -> None:
    settings = [
        setting(outcome(given_up=count), max_staleness="1", straggler_policy=policy)
        for policy, count in (("wait", 0), ("drop", 1234))
    ]
    over, under, first, second, *_ = (line.split() for line in lines(settings, plain=True))
    assert (over[0], under[0]) == ("max_staleness", "straggler_policy")
    assert (over[-1], under[-1]) == ("groups", "lost")
    assert (first[:2], first[-1]) == (["1", "wait"], "0")
    assert (second[:2], second[-1]) == (["1", "drop"], "1,234")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [{"max_staleness": "0"}, {"max_staleness": "inf"}],
        [{"servers": "1000x10000@12345.678", "straggler_policy": "requeue"}] * 3,
        [{}],
    ],
)
def test_no_line_is_wider_than_a_terminal(values: list[dict[str, str]], plain: bool) -> None:
    wild = outcome(
        tokens_per_s=98_765_432.1,
        rollouts_per_s=1e6,
        step_s=1e6,
        trainer_wait_s=999_999.0,
        utilisation=1.0,
        utilisation_by_kind={f"100000x1000@{speed}": 1.0 for speed in range(9)},
        token_staleness=dict.fromkeys(range(2345), 10**9),
        head_staleness=dict.fromkeys(range(2345), 10**9),
        given_up=99_999,
    )
    text = list(lines([setting(wild, **v) for v in values], plain=plain))
    assert text
    assert max(map(len, text)) <= WIDTH
    assert not plain or "\n".join(text).isascii()


def test_nothing_is_reported_of_nothing() -> None:
    assert list(lines([setting(None)])) == []
    assert list(lines([setting(None, a="1"), setting(None, a="2")])) == []


def test_a_program_reads_plans_and_outcomes() -> None:
    read = json.loads(json.dumps(as_json([setting(outcome(), a="1"), setting(None, a="2")])))
    first, second = read["settings"]
    assert first["values"] == {"a": "1"}
    assert first["plan"]["servers"] == "4x8@50,4x24@80"
    assert (first["plan"]["lengths"], first["plan"]["grain"]) == ("1000", 10)
    assert first["plan"]["max_concurrent_rollouts"] == 4 * 8 + 4 * 24
    assert first["outcome"]["tokens_per_s"] == 5310.4
    assert first["outcome"]["trainer_wait"] == 0.25
    assert first["outcome"]["token_staleness"] == {"0": 25, "1": 70, "2": 5}
    assert second["outcome"] is None
