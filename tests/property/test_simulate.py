"""What holds of every fleet, record and histogram that ``arealtrio simulate`` reads or draws."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arealtrio.errors import ConfigError
from arealtrio.simulate.answers import TOKENS_MAX, LogNormalAnswers, RecordedAnswers
from arealtrio.simulate.bars import bar, binned, columns
from arealtrio.simulate.servers import SERVERS_MAX, ServerKind, fleet

kinds = st.builds(
    ServerKind,
    count=st.integers(1, SERVERS_MAX),
    slots=st.integers(1, 2**20),
    tokens_per_s=st.integers(1, 99_999).map(lambda tenths: tenths / 10),
)
histograms = st.dictionaries(st.integers(0, 5000), st.integers(1, 10**12), min_size=1)
shares = st.floats(0, 1)


@given(st.lists(kinds, min_size=1, max_size=4))
def test_a_fleet_that_is_written_is_read_back(written: list[ServerKind]) -> None:
    assert fleet(",".join(map(str, written))) == tuple(written)


@given(st.text(st.sampled_from("0123456789x@.,- +eE_٣"), max_size=12) | st.text(max_size=8))
def test_any_text_is_a_fleet_or_an_error(text: str) -> None:
    try:
        read = fleet(text)
    except ConfigError:
        return
    assert fleet(",".join(map(str, read))) == read


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tokens", "prompt_id", "seqlen", "prompt_len", "task_id"]), inner
        )
    ),
    max_leaves=6,
)
good_lines = st.integers(1, TOKENS_MAX).map(str)
lines = good_lines | json_values.map(json.dumps) | st.text(max_size=8)


@given(st.lists(lines, max_size=6))
@example(["3", '{"tokens": 5, "prompt_id": "a"}'])
@example(["\x85", "7"])
def test_any_file_is_a_record_or_an_error_that_names_it(written: list[str]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "lengths.jsonl"
        path.write_bytes("\n".join(written).encode("utf-8", "surrogatepass"))
        answers = load(path)
    if isinstance(answers, ConfigError):
        assert str(path) in str(answers)
        return
    for tokens in islice(answers.of_prompt(0, 0, seed=1), 20):
        assert 1 <= tokens <= answers.longest


def load(path: Path) -> RecordedAnswers | ConfigError:
    try:
        return RecordedAnswers.load(path)
    except ConfigError as error:
        return error


@given(
    st.floats(1, 1e4), st.floats(1, 50), st.floats(1, 8) | st.none(), shares, st.integers(0, 2**40)
)
def test_log_normal_answers_are_whole_and_never_longer_than_the_longest(
    median: float, tail: float, cut: float | None, share: float, seed: int
) -> None:
    longest = None if cut is None else int(median * cut) + 1
    answers = LogNormalAnswers(median, median * tail, longest, share)
    drawn = list(islice(answers.of_prompt(3, 1, seed), 20))
    assert all(isinstance(tokens, int) and 1 <= tokens <= answers.longest for tokens in drawn)
    assert drawn == list(islice(answers.of_prompt(3, 1, seed), 20))
    assert 1 <= answers.mean <= answers.longest


@given(shares, st.integers(0, 80), st.booleans())
def test_a_bar_takes_its_width_and_grows_with_its_share(
    share: float, width: int, plain: bool
) -> None:
    drawn = bar(share, width, plain=plain)
    assert len(drawn) == width
    assert (drawn.strip() == "") == (share == 0 or width == 0)
    assert len(bar(share / 2, width, plain=plain).strip()) <= len(drawn.strip())


@given(histograms, st.integers(1, 80))
def test_bins_hold_everything_once_and_are_as_few_as_asked_for(
    histogram: dict[int, int], most: int
) -> None:
    bins = binned(histogram, most)
    assert sum(bins.values()) == pytest.approx(1)
    assert 1 <= len(bins) <= most
    assert next(iter(bins)).startswith("0")


@given(st.lists(shares, max_size=40), st.booleans())
def test_columns_are_one_for_each_share_and_rank_as_they_do(
    values: list[float], plain: bool
) -> None:
    drawn = columns(values, plain=plain)
    assert len(drawn) == len(values)
    order = ".12345678" if plain else "·▁▂▃▄▅▆▇█"
    heights = [order.index(character) for character in drawn]
    ranked = [height for _, height in sorted(zip(values, heights, strict=True))]
    assert ranked == sorted(ranked)
