"""What is expected of a prompt, against means and medians taken from the whole list."""

from __future__ import annotations

from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.lengths import LengthEstimator

ANSWERS = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(1, 10**6)), max_size=15
)


@given(ANSWERS)
def test_a_prompt_is_expected_to_do_as_it_did(answers: list[tuple[str | None, int]]) -> None:
    estimator = LengthEstimator()
    for prompt, tokens in answers:
        estimator.learn(prompt, tokens)
    for prompt in ("a", "b", "c"):
        own = [tokens for p, tokens in answers if p == prompt]
        assert estimator.expected(prompt) == (pytest.approx(fmean(own)) if own else None)
    assert estimator.expected(None) is None


@given(ANSWERS, st.integers(1, 5))
def test_the_median_is_of_the_last_answers(
    answers: list[tuple[str | None, int]], window: int
) -> None:
    estimator = LengthEstimator(window=window)
    for prompt, tokens in answers:
        estimator.learn(prompt, tokens)
    assert estimator.median == median([tokens for _, tokens in answers[-window:]] or [0])


def test_the_prompt_answered_longest_ago_is_forgotten_first() -> None:
    estimator = LengthEstimator(prompts_max=2)
    for prompt in ("a", "b", "a", "c"):
        estimator.learn(prompt, 10)
    assert [estimator.expected(prompt) for prompt in ("a", "b", "c")] == [10, None, 10]


def test_a_model_that_changes_is_followed() -> None:
    estimator = LengthEstimator()
    for tokens in [10] * 1000 + [1000] * 64:
        estimator.learn("a", tokens)
    expected = estimator.expected("a")
    assert expected is not None
    assert expected > 950
