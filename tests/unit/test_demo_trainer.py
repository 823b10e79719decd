"""The trainer learns the demo's task from stale rollouts, and only from what it is given."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from arealtrio.demo.adam import Adam
from arealtrio.demo.task import Prompts, base_model
from arealtrio.demo.trainer import PolicyTrainer, group_advantages
from arealtrio.embedded.model import TinyModel, Weights

from ..models.rollouts import batch

BATCH = 16
GROUP = 4


def rewards_of_a_run(seed: int, *, steps: int, freeze: bool = False) -> list[float]:
    """Train on rollouts that are one to four versions old, some rewards per step."""
    rng = np.random.default_rng(seed)
    trainer, prompts = PolicyTrainer(base_model(seed), seed=seed), iter(Prompts(seed))
    versions, rewards = [trainer.model], []
    for _ in range(steps):
        ages = rng.integers(1, 5, size=BATCH).tolist()
        models = [versions[0] if freeze else versions[max(len(versions) - 1 - a, 0)] for a in ages]
        rewards.append(
            trainer.step(batch(list(islice(prompts, BATCH)), models, GROUP, rng)).reward_mean
        )
        versions.append(trainer.model)
    return rewards


def gain(rewards: list[float]) -> float:
    return float(np.mean(rewards[-3:]) - np.mean(rewards[:3]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_steps_on_stale_rollouts_teach_the_task(seed: int) -> None:
    rewards = rewards_of_a_run(seed, steps=20)
    assert np.mean(rewards[:3]) <= 0.35
    assert np.mean(rewards[-3:]) >= 0.75
    assert gain(rewards) >= 0.4


@pytest.mark.parametrize("seed", range(10))
def test_rollouts_of_frozen_weights_stay_as_they_are(seed: int) -> None:
    """The gain above comes from the weights that reach the sampler, not from luck."""
    assert abs(gain(rewards_of_a_run(seed, steps=6, freeze=True))) < 0.07


def one_batch(model: TinyModel, seed: int = 0, size: int = 4) -> dict[str, np.ndarray]:
    prompts = list(islice(Prompts(seed), size))
    return dict(batch(prompts, [model] * size, GROUP, np.random.default_rng(seed)))


def weights_after(trainer: PolicyTrainer, rows: dict[str, np.ndarray]) -> np.ndarray:
    trainer.step(rows)
    return np.concatenate([a.ravel() for a in trainer.model.weights.arrays().values()])


def test_a_fresh_batch_has_importance_one_and_a_stale_one_has_not() -> None:
    trainer = PolicyTrainer(base_model())
    rows = one_batch(trainer.model)
    assert trainer.step(rows).importance_mean == pytest.approx(1, abs=1e-4)
    assert trainer.step(rows).importance_mean != pytest.approx(1, abs=1e-4)


def test_the_report_counts_generated_tokens_only() -> None:
    rows = one_batch(base_model())
    report = PolicyTrainer(base_model()).step(rows)
    assert report.tokens == rows["loss_mask"].sum()
    assert report.reward_mean == pytest.approx(rows["rewards"].mean())
    assert 0 <= report.clip_fraction < 1


def test_the_model_given_is_left_as_it_was() -> None:
    model = base_model()
    before = {name: array.copy() for name, array in model.weights.arrays().items()}
    trainer = PolicyTrainer(model)
    trainer.step(one_batch(model))
    assert trainer.model is not model
    for name, array in model.weights.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_padding_and_prompts_do_not_matter_beyond_the_context() -> None:
    rows = one_batch(base_model())
    wider = {
        name: np.pad(a, ((0, 0), (0, 9)), constant_values=3 if name == "input_ids" else 0)
        if a.ndim == 2
        else a
        for name, a in rows.items()
    }
    wider["logprobs"] = np.where(wider["loss_mask"] == 1, wider["logprobs"], -7).astype(np.float32)
    np.testing.assert_array_equal(
        weights_after(PolicyTrainer(base_model()), rows),
        weights_after(PolicyTrainer(base_model()), wider),
    )


def test_equal_rewards_teach_nothing() -> None:
    rows = one_batch(base_model())
    rows["rewards"][:] = 0.5
    trainer = PolicyTrainer(base_model())
    trainer.step(rows)
    for name, array in trainer.model.weights.arrays().items():
        np.testing.assert_array_equal(array, base_model().weights.arrays()[name])


def test_a_batch_without_generated_tokens_is_refused_and_changes_nothing() -> None:
    rows = one_batch(base_model())
    rows["loss_mask"][:] = 0
    trainer = PolicyTrainer(base_model())
    before = trainer.model
    with pytest.raises(ValueError, match="at least one generated token"):
        trainer.step(rows)
    assert trainer.model is before


def test_a_step_makes_better_answers_likelier() -> None:
    model = base_model()
    rows = one_batch(model, size=8)
    trainer = PolicyTrainer(model, passes=1, minibatches=1, learning_rate=1e-3)
    trainer.step(rows)
    advantages = group_advantages(rows["rewards"], rows["group_ids"])
    gains = [
        float(((trainer.model.logprobs(ids, 0) - model.logprobs(ids, 0)) * mask).sum())
        for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True)
    ]
    assert float(np.dot(advantages, gains)) > 0


def test_clipping_stops_the_push() -> None:
    """Many passes over one batch end near the edge of the trust region, not far beyond it."""
    rows = one_batch(base_model())
    near = PolicyTrainer(base_model(), passes=40, clip=0.1)
    far = PolicyTrainer(base_model(), passes=40, clip=1e6)
    assert near.step(rows).clip_fraction > 0.3
    far.step(rows)

    def moved(trainer: PolicyTrainer) -> float:
        ids = rows["input_ids"][0]
        return float(np.abs(trainer.model.logprobs(ids, 0) - base_model().logprobs(ids, 0)).mean())

    assert moved(near) < moved(far) / 2


def test_advantages_are_relative_to_the_group() -> None:
    rewards = np.array([1, 0, 0.9, 0.9], np.float32)
    advantages = group_advantages(rewards, np.array([7, 7, 2, 2], np.int32))
    assert advantages.dtype == np.float32
    assert advantages[0] == -advantages[1] > 0
    np.testing.assert_allclose(advantages[2:], 0, atol=1e-6)


def test_answers_alone_in_their_groups_are_compared_with_the_batch() -> None:
    rewards = np.array([0.2, 0.4, 0.9], np.float32)
    advantages = group_advantages(rewards, np.arange(3, dtype=np.int32))
    np.testing.assert_allclose(advantages, (rewards - 0.5) / rewards.std(), rtol=1e-4)


def test_adam_takes_the_first_step_of_its_paper() -> None:
    """Bias correction makes the first step the learning rate times the sign of the gradient."""
    weights = TinyModel.random(1).weights
    ones = Weights(**{name: np.ones_like(a) for name, a in weights.arrays().items()})
    gradient = replace(ones, output=-3 * ones.output)
    moved = Adam(0.1).ascend(weights, gradient)
    np.testing.assert_allclose(moved.embedding - weights.embedding, 0.1, rtol=1e-4)
    np.testing.assert_allclose(moved.output - weights.output, -0.1, rtol=1e-4)


def test_a_trainer_goes_on_from_its_state_to_the_last_bit() -> None:
    """By way of JSON: its weights, Adam's moments, and the order of its minibatches."""
    trainer = PolicyTrainer(base_model(), seed=1)
    trainer.step(one_batch(trainer.model))
    other = PolicyTrainer(base_model(5), seed=2)
    other.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    rows = one_batch(trainer.model, seed=3)
    assert trainer.step(rows) == other.step(rows)
    ours, theirs = (one.model.weights.arrays() for one in (trainer, other))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert {array.dtype for array in theirs.values()} == {np.dtype(np.float32)}
