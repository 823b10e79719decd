"""One step of policy-gradient training on a batch of trajectories, in numpy.

Advantages are relative to the prompt's group (GRPO, Shao et al. 2024, arXiv:2402.03300). The
objective is the decoupled PPO of Hilton et al. 2021 (arXiv:2110.00641), which AReaL uses for stale
samples: the clipped ratio is taken against the weights at the start of the step, and the samples'
own age enters as a capped importance weight against the log-probabilities they were sampled with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..embedded.model import TinyModel, Weights
from ..types import Float32Array, Int32Array
from .adam import Adam, arrays_of

# What ``Batch.padded()`` returns: B rows, T columns. The trainer reads input_ids int32[B, T],
# loss_mask int32[B, T] (1 on generated tokens), logprobs float32[B, T] (as they were sampled),
# rewards float32[B], and group_ids int32[B] (equal for the answers to one prompt).
TrainingBatch: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step saw and did.

    Args:
        loss: The negative objective per token, over all minibatches.
        reward_mean: Over the rows.
        clip_fraction: Of the tokens, the share whose ratio was clipped, over all minibatches.
        importance_mean: Mean importance weight of the samples, before the cap; 1 when fresh.
        tokens: Generated tokens trained on.
    """

    loss: float
    reward_mean: float
    clip_fraction: float
    importance_mean: float
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """The generated tokens of a batch, flat: contexts int32[N, F], the rest [N]."""

    contexts: Int32Array
    tokens: Int32Array
    sampled: Float32Array
    advantages: Float32Array

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: npt.NDArray[Any]) -> _Tokens:
        return _Tokens(
            self.contexts[rows], self.tokens[rows], self.sampled[rows], self.advantages[rows]
        )


def group_advantages(rewards: Float32Array, group_ids: Int32Array) -> Float32Array:
    """Return each row's reward above its group's mean, in the batch's deviations, float32[B].

    Dividing by the group's own deviation, as GRPO did first, gives most weight to the groups whose
    answers differ least (Liu et al. 2025, arXiv:2503.20783). An answer alone in its group is
    compared with the whole batch.
    """
    _, member_of = np.unique(group_ids, return_inverse=True)
    sizes = np.bincount(member_of)
    means = np.where(sizes > 1, np.bincount(member_of, rewards) / sizes, rewards.mean())
    centred = rewards - means[member_of]
    return np.asarray(centred / (centred.std() + 1e-6), dtype=np.float32)


class PolicyTrainer:
    """Trains a ``TinyModel``; ``model`` is always the newest one.

    Args:
        model: Where to start.
        learning_rate: Of Adam.
        clip: ε: ratios outside [1 − ε, 1 + ε] give no further push in their direction.
        importance_cap: Largest importance weight a stale token may get.
        passes: Times each batch is gone through.
        minibatches: Updates per pass.
        seed: Of the minibatches' shuffle.
    """

    def __init__(
        self,
        model: TinyModel,
        *,
        learning_rate: float = 0.02,
        clip: float = 0.3,
        importance_cap: float = 3.0,
        passes: int = 2,
        minibatches: int = 2,
        seed: int = 0,
    ) -> None:
        self.model = model
        self._adam = Adam(learning_rate)
        self._clip = clip
        self._importance_cap = importance_cap
        self._passes = passes
        self._minibatches = minibatches
        self._rng = np.random.default_rng(seed)

    def step(self, batch: TrainingBatch) -> StepReport:
        """Train on one batch and report; afterwards ``model`` is the new version.

        Args:
            batch: What ``Batch.padded()`` returns.

        Raises:
            ValueError: No row holds a generated token.
        """
        tokens = self._flatten(batch)
        if not len(tokens):
            raise ValueError("a training batch needs at least one generated token")
        proximal = self.model.score(tokens.contexts, tokens.tokens)
        importance = np.exp(proximal - tokens.sampled)
        weight = np.minimum(importance, self._importance_cap)
        weighted = replace(tokens, advantages=tokens.advantages * weight)
        updates = [
            self._update(weighted.take(rows), proximal[rows])
            for rows in self._shuffled(len(tokens))
        ]
        losses, clipped = zip(*updates, strict=True)
        return StepReport(
            loss=float(np.mean(losses)),
            reward_mean=float(batch["rewards"].mean()),
            clip_fraction=float(np.mean(clipped)),
            importance_mean=float(importance.mean()),
            tokens=len(tokens),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` goes on from, bit for bit: plain values, as for JSON."""
        arrays = self.model.weights.arrays()
        return {
            "weights": {name: array.tolist() for name, array in arrays.items()},
            "adam": self._adam.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, with the next step that it would have made."""
        self.model = replace(self.model, weights=Weights(**arrays_of(state["weights"])))
        self._adam.load_state_dict(state["adam"])
        self._rng.bit_generator.state = state["rng"]

    def _shuffled(self, count: int) -> list[npt.NDArray[np.int64]]:
        """Return the rows of each minibatch of each pass; none is empty."""
        minibatches = min(self._minibatches, count)
        return [
            rows
            for _ in range(self._passes)
            for rows in np.array_split(self._rng.permutation(count), minibatches)
        ]

    def _update(self, tokens: _Tokens, proximal: Float32Array) -> tuple[float, float]:
        """Ascend min(r · A, clip(r) · A), whose gradient is r · A · ∇ log p where not clipped."""
        ratio = np.exp(self.model.score(tokens.contexts, tokens.tokens) - proximal)
        bounded = np.clip(ratio, 1 - self._clip, 1 + self._clip)
        objective = np.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
        open_ = ratio * tokens.advantages <= bounded * tokens.advantages
        slope = np.where(open_, ratio * tokens.advantages / len(tokens), np.float32(0))
        gradient = self.model.gradient(tokens.contexts, tokens.tokens, slope)
        weights = self._adam.ascend(self.model.weights, gradient)
        self.model = replace(self.model, weights=weights)
        return -float(objective.mean()), 1 - float(open_.mean())

    def _flatten(self, batch: TrainingBatch) -> _Tokens:
        chosen = batch["loss_mask"] != 0
        advantages = group_advantages(batch["rewards"], batch["group_ids"])
        contexts = [
            self.model.contexts(row, 0)[mask]
            for row, mask in zip(batch["input_ids"], chosen, strict=True)
        ]
        return _Tokens(
            contexts=np.concatenate(contexts),
            tokens=batch["input_ids"][chosen],
            sampled=batch["logprobs"][chosen],
            advantages=np.repeat(advantages, chosen.sum(axis=1)),
        )
