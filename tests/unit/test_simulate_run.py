"""Simulated runs against what a pencil says, and against the promises of the policies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from arealtrio.errors import ConfigError
from arealtrio.simulate import FixedAnswers, LogNormalAnswers, Outcome, Plan, fleet, simulate
from arealtrio.simulate.outcome import Step

TAIL = LogNormalAnswers(100, 900, 1500)


def plan(**changes: Any) -> Plan:
    """Four slots, four answers of 2 s in a batch, 3 s of training and 1 s of new weights."""
    given: dict[str, Any] = {
        "servers": fleet("1x4@100"),
        "answers": FixedAnswers(200),
        "batch_size": 4,
        "group_size": 1,
        "training_s": 3.0,
        "update_s": 1.0,
        "steps": 8,
        "max_staleness": 0,
    }
    return Plan(**{**given, **changes})


def test_synchronous_training_takes_turns() -> None:
    outcome = simulate(plan())
    assert outcome.step_s == pytest.approx(2 + 3 + 1)
    assert outcome.trainer_wait_s == pytest.approx(2)
    assert outcome.update_s == pytest.approx(1)
    assert outcome.tokens_per_s == pytest.approx(4 * 200 / 6)
    assert outcome.rollouts_per_s == pytest.approx(4 / 6)
    assert outcome.utilisation == pytest.approx(2 / 6)
    assert outcome.token_staleness == {0: 4 * 200 * outcome.steps}
    assert outcome.head_staleness == {0: 4 * outcome.steps}
    assert outcome.steps == 6
    assert outcome.seconds == pytest.approx(36)
    assert outcome.step_tokens_per_s == pytest.approx([4 * 200 / 6] * 6)
    assert (outcome.answer_tokens, outcome.mean_staleness, outcome.oldest) == (200, 0, 0)


def test_the_trainer_hides_what_is_generated_meanwhile() -> None:
    outcome = simulate(plan(max_staleness=1))
    assert outcome.trainer_wait_s == pytest.approx(0)
    assert outcome.step_s == pytest.approx(3 + 1)
    assert outcome.oldest == 1


def test_servers_that_are_the_bottleneck_are_busy_and_bound_the_throughput() -> None:
    outcome = simulate(plan(max_staleness=8, training_s=0.5, update_s=0.0))
    assert outcome.utilisation == pytest.approx(1)
    assert outcome.tokens_per_s == pytest.approx(4 * 100)


def test_answers_slow_each_other_down() -> None:
    outcome = simulate(plan(slow_down=0.5))
    assert outcome.trainer_wait_s == pytest.approx(2 * (1 + 3 * 0.5), rel=0.01)


def test_latency_is_on_the_way_to_the_first_token() -> None:
    outcome = simulate(plan(latency_s=0.25))
    assert outcome.trainer_wait_s == pytest.approx(2.25)
    assert outcome.update_s == pytest.approx(1)  # no request of an update asks for tokens
    assert outcome.utilisation == pytest.approx(2 / outcome.step_s)


def test_a_run_that_lasts_for_ever_is_an_error_that_says_so() -> None:
    """Each of its answers is in time, and all of them together are not."""
    with pytest.raises(ConfigError, match=r"did not end within 1e\+12 simulated seconds"):
        simulate(plan(latency_s=4e11))


def test_kinds_are_counted_apart() -> None:
    outcome = simulate(plan(servers=fleet("1x2@100,1x2@50")))  # the slow one takes twice as long
    assert outcome.trainer_wait_s == pytest.approx(4)
    assert outcome.utilisation_by_kind == {
        "1x2@100": pytest.approx(2 / 8),
        "1x2@50": pytest.approx(4 / 8),
    }
    assert outcome.utilisation == pytest.approx(3 / 8)


def test_a_coarser_grain_says_nearly_the_same() -> None:
    given = plan(answers=TAIL, max_staleness=1, batch_size=8, steps=12)
    fine, coarse = (simulate(replace(given, grain=grain)) for grain in (1, 5))
    assert coarse.tokens_per_s == pytest.approx(fine.tokens_per_s, rel=0.03)
    assert coarse.utilisation == pytest.approx(fine.utilisation, rel=0.05)


def test_settings_are_compared_on_the_same_answers() -> None:
    given = plan(answers=TAIL, steps=6, group_size=2)
    fifo = simulate(replace(given, warm_up=0))
    other = replace(given, warm_up=0, queue_order="longest_expected", servers=fleet("2x3@70"))
    longest = simulate(other)
    assert fifo.answer_tokens == longest.answer_tokens  # synchronous: the same prompts


@pytest.mark.parametrize("policy", ["wait", "keep", "requeue", "drop"])
def test_policies_keep_what_they_promise(policy: Any) -> None:
    outcome = simulate(
        plan(answers=TAIL, straggler_policy=policy, max_staleness=1, training_s=1.0, steps=20)
    )
    assert (outcome.violations > 0) == (policy == "keep") == (outcome.oldest > 1)
    assert outcome.given_up > 0 or policy != "drop"
    assert sum(outcome.head_staleness.values()) == 4 * outcome.steps


def test_no_bound_means_that_servers_never_stop() -> None:
    outcome = simulate(plan(max_staleness=None, steps=10))
    assert outcome.utilisation == pytest.approx(3 / 4)  # they stand still for new weights
    assert outcome.oldest > 2


def test_a_plan_has_one_outcome_and_another_seed_another() -> None:
    given = plan(answers=TAIL, max_staleness=2, servers=fleet("2x3@100,1x2@50"))
    assert simulate(given) == simulate(given)
    assert simulate(given) != simulate(replace(given, seed=1))


def test_prompts_come_again_after_an_epoch() -> None:
    given = plan(answers=LogNormalAnswers(100, 900, prompt_share=1), steps=6, warm_up=0)
    outcome = simulate(replace(given, prompts=4))  # each batch is the epoch
    assert len({round(speed, 6) for speed in outcome.step_tokens_per_s}) == 1
    assert len({round(speed, 6) for speed in simulate(given).step_tokens_per_s}) > 1


def test_what_there_is_can_be_had_at_any_time() -> None:
    moments: list[Step] = []
    changes: list[None] = []
    given = plan()
    whole = simulate(given, moments, lambda: changes.append(None))
    assert len(moments) == 1 + given.steps
    assert len(changes) >= 2 * 4 * given.steps  # a beginning and an end each
    assert Outcome.of(given, moments) == whole
    assert [Outcome.of(given, moments[:k]) for k in range(4)] == [None] * 4  # it warms up
    part = Outcome.of(given, moments[:5])
    assert part is not None
    assert part.steps == 2
    assert part.step_s == pytest.approx(6)
