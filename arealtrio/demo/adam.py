"""Adam, for the arrays of a TinyModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..embedded.model import Weights
from ..types import Float32Array


class Adam:
    """Adam with bias correction (Kingma and Ba, ICLR 2015, algorithm 1); it ascends.

    Args:
        learning_rate: Step per update, in units of the weights.
        beta1: Decay of the mean gradient.
        beta2: Decay of the mean square. Runs of tens of steps want less than the usual 0.999.
        epsilon: Added to the root mean square.
    """

    def __init__(
        self,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
    ) -> None:
        self._learning_rate = learning_rate
        self._betas = (beta1, beta2)
        self._epsilon = epsilon
        self._updates = 0
        self._mean: dict[str, Float32Array] = {}
        self._square: dict[str, Float32Array] = {}

    def ascend(self, weights: Weights, gradient: Weights) -> Weights:
        """Return ``weights`` moved one step along ``gradient``; the argument is left as it is."""
        self._updates += 1
        slopes = gradient.arrays()
        return Weights(
            **{
                name: array + self._step(name, slopes[name])
                for name, array in weights.arrays().items()
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` goes on from: plain values that JSON keeps exactly."""
        return {
            "updates": self._updates,
            "mean": {name: array.tolist() for name, array in self._mean.items()},
            "square": {name: array.tolist() for name, array in self._square.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._updates = state["updates"]
        self._mean = arrays_of(state["mean"])
        self._square = arrays_of(state["square"])

    def _step(self, name: str, slope: Float32Array) -> Float32Array:
        beta1, beta2 = self._betas
        zero = np.zeros_like(slope)
        mean = beta1 * self._mean.get(name, zero) + (1 - beta1) * slope
        square = beta2 * self._square.get(name, zero) + (1 - beta2) * slope**2
        self._mean[name], self._square[name] = mean, square
        unbiased_mean = mean / (1 - beta1**self._updates)
        unbiased_square = square / (1 - beta2**self._updates)
        step = self._learning_rate * unbiased_mean / (np.sqrt(unbiased_square) + self._epsilon)
        return np.asarray(step, dtype=np.float32)


def arrays_of(lists: Mapping[str, Any]) -> dict[str, Float32Array]:
    """Return nested lists as float32 arrays; of what such an array's ``tolist`` gave, itself."""
    return {name: np.asarray(values, dtype=np.float32) for name, values in lists.items()}
