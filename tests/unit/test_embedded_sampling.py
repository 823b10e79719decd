"""How the embedded server draws a token: against formulas written out, on small vocabularies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealtrio.embedded.sampling import Drawn, SamplingParams, draw, log_softmax

LOGITS = np.array([2.0, 1.0, 0.5, -1.0, 0.0], dtype=np.float32)
rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)


def drawn(params: SamplingParams, seed: int = 0, logits: Any = LOGITS, **more: Any) -> Drawn:
    row = np.asarray(logits, dtype=np.float32)
    return draw(row, log_softmax(row), params, np.random.default_rng(seed), **more)


def support(params: SamplingParams, **more: Any) -> set[int]:
    """Every token that some seed draws."""
    return {drawn(params, seed, **more).token_id for seed in range(400)}


@given(rows)
def test_log_softmax_sums_to_one(row: list[float]) -> None:
    assert np.exp(log_softmax(np.array(row))).sum() == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_takes_the_best_and_reports_its_raw_logprob(temperature: float) -> None:
    answer = drawn(SamplingParams(temperature=temperature, logprobs=0))
    expected = 2.0 - math.log(sum(math.exp(x) for x in LOGITS.tolist()))
    assert (answer.token_id, answer.rank) == (0, 1)
    assert answer.logprob == pytest.approx(expected)


def test_frequencies_are_the_probabilities() -> None:
    rng = np.random.default_rng(1)
    logprobs = log_softmax(LOGITS)
    params = SamplingParams()
    counts = np.zeros(5)
    for _ in range(4000):
        counts[draw(LOGITS, logprobs, params, rng).token_id] += 1
    assert counts / 4000 == pytest.approx(np.exp(logprobs), abs=0.03)


@given(rows, st.integers(1, 12), st.integers(0, 5))
def test_top_k_draws_one_of_the_k_best(row: list[float], k: int, seed: int) -> None:
    answer = drawn(SamplingParams(top_k=k, logprobs=0), seed, row)
    assert answer.rank <= k


@given(rows, st.floats(0.01, 1), st.integers(0, 5))
def test_top_p_draws_from_the_nucleus(row: list[float], p: float, seed: int) -> None:
    answer = drawn(SamplingParams(top_p=p), seed, row)
    logprobs = log_softmax(np.asarray(row, dtype=np.float32))
    better = np.exp(logprobs[logprobs > logprobs[answer.token_id]]).sum()
    assert better < p + 1e-9


@given(rows, st.floats(0.01, 1), st.integers(0, 5))
def test_min_p_draws_nothing_too_improbable(row: list[float], p: float, seed: int) -> None:
    answer = drawn(SamplingParams(min_p=p), seed, row)
    logprobs = log_softmax(np.asarray(row, dtype=np.float32))
    assert logprobs[answer.token_id] >= logprobs.max() + math.log(p) - 1e-9


def test_filters_keep_what_they_should() -> None:
    assert support(SamplingParams()) == {0, 1, 2, 3, 4}
    assert support(SamplingParams(top_k=2)) == {0, 1}
    assert support(SamplingParams(top_p=0.1)) == {0}
    assert support(SamplingParams(min_p=0.3)) == {0, 1}
    assert support(SamplingParams(), forbidden=[0, 1]) == {2, 3, 4}


def test_where_everything_is_forbidden_nothing_is() -> None:
    assert support(SamplingParams(), forbidden=[0, 1, 2, 3, 4]) == {0, 1, 2, 3, 4}


def test_bias_moves_the_draw_and_not_the_raw_logprob() -> None:
    params = SamplingParams(logit_bias={3: 100.0})
    raw = drawn(params)
    assert raw.token_id == 3
    assert raw.logprob == pytest.approx(float(log_softmax(LOGITS)[3]))
    assert drawn(params, mode="processed_logprobs").logprob == pytest.approx(0)


def test_penalties_follow_their_formulas() -> None:
    params = SamplingParams(
        temperature=0.5, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    answer = drawn(params, prompt=[0], output=[3, 3], mode="processed_logprobs")
    changed = LOGITS.astype(np.float64)
    changed[0] /= 2
    changed[3] = changed[3] * 2 - 0.5 - 2 * 0.25
    assert answer.logprob == pytest.approx(float(log_softmax(changed / 0.5)[answer.token_id]))


@given(rows, st.floats(0.1, 4), st.integers(0, 9))
def test_processed_logprobs_are_of_the_distribution_drawn_from(
    row: list[float], temperature: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature)
    answer = drawn(params, seed, row, mode="processed_logprobs")
    expected = log_softmax(np.asarray(row, dtype=np.float32) / np.float64(temperature))
    assert answer.logprob == pytest.approx(float(expected[answer.token_id]), abs=1e-9)


@given(rows, st.floats(0.1, 4), st.integers(1, 5), st.floats(0.05, 1), st.integers(0, 9))
def test_scaled_logprobs_know_the_temperature_and_no_filter(
    row: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    answer = drawn(params, seed, row, mode="scaled_logprobs")
    expected = log_softmax(np.asarray(row, dtype=np.float32) / np.float64(temperature))
    assert answer.logprob == pytest.approx(float(expected[answer.token_id]), abs=1e-9)


def test_the_best_are_reported_in_order() -> None:
    answer = drawn(SamplingParams(logprobs=3))
    assert [(one.token_id, one.rank) for one in answer.top] == [(0, 1), (1, 2), (2, 3)]
    assert [one.logprob for one in answer.top] == pytest.approx(log_softmax(LOGITS)[:3].tolist())


def test_a_seed_repeats_the_draw() -> None:
    params = SamplingParams()
    assert [drawn(params, seed) for seed in range(20)] == [
        drawn(params, seed) for seed in range(20)
    ]


def test_answers_to_one_prompt_have_seeds_of_their_own() -> None:
    params = SamplingParams(seed=7)
    assert [params.numbered(number).seed for number in range(3)] == [7, 8, 9]
    assert SamplingParams().numbered(3).seed is None
