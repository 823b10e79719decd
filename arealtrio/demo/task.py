"""A task with a verifiable reward and long-tailed lengths, learnable from random weights.

A prompt is ``[key, salt, salt]``. The key names one of four classes of tokens, and the reward is
the fraction of the answer that belongs to it: 8/37 by chance, 1 at best. How long the answer shall
be stands beside the prompt, drawn from a log-normal distribution: most answers are short and a few
are ten times as long, as in real reasoning runs.

Why a budget and not the end-of-sequence token: a policy that may choose its length soon does.
Training then changes the lengths together with the reward, and runs of different settings no longer
carry the same load. So EOS ends nothing here; it is one more wrong token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..embedded.model import TinyModel
from ..types import GenerationHyperparameters, Int32Array, Trajectory
from ..workflow import Engine, SingleTurnWorkflow

EOS_ID = 0
KEYS = (1, 2, 3, 4)
FIRST_ANSWER_ID = 5
VOCAB_SIZE = FIRST_ANSWER_ID + 8 * len(KEYS)

MEDIAN_LENGTH = 20
LENGTH_SIGMA = 0.9  # p99 is exp(2.33 · 0.9) = 8 medians
MAX_LENGTH = 240


def follows(key: int, tokens: Int32Array) -> Any:
    """Return bool[N]: which of ``tokens`` belong to the class that ``key`` names."""
    residue = (tokens - FIRST_ANSWER_ID) % len(KEYS)
    return (tokens >= FIRST_ANSWER_ID) & (residue == key - KEYS[0])


def reward_fn(
    prompt: str | None,
    completions: str | None,
    prompt_ids: Int32Array,
    completion_ids: Int32Array,
    **data: Any,
) -> float:
    """Return the fraction of the answer that follows the prompt's key, in [0, 1].

    Args:
        prompt: Not used; there is no text.
        completions: Not used.
        prompt_ids: int32[P]; its first token is the key.
        completion_ids: int32[N]. An empty answer earns 0.
        data: Not used; the prompt says it all.
    """
    del prompt, completions, data
    right = follows(int(prompt_ids[0]), completion_ids)
    return float(right.mean()) if len(completion_ids) else 0.0


class Prompts:
    """A data loader; every iteration starts over with the same prompts.

    Keys take turns, so that no batch is easier than another by chance. A prompt is a dict of
    ``prompt_id``, ``input_ids`` and ``max_new_tokens``.

    Args:
        seed: Of salt and lengths, on which alone the prompts depend.
        count: How many there are; None is endless.
    """

    def __init__(self, seed: int = 0, count: int | None = None) -> None:
        self._seed = seed
        self._count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self._seed)
        numbers = itertools.count() if self._count is None else range(self._count)
        for number in numbers:
            salt = rng.integers(FIRST_ANSWER_ID, VOCAB_SIZE, size=2).tolist()
            length = round(rng.lognormal(math.log(MEDIAN_LENGTH), LENGTH_SIGMA))
            yield {
                "prompt_id": str(number),
                "input_ids": [KEYS[number % len(KEYS)], *salt],
                "max_new_tokens": min(max(length, 1), MAX_LENGTH),
            }


class BudgetWorkflow:
    """One answer of exactly the length that the prompt's data asks for, and its reward."""

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any], /) -> Trajectory | None:
        """Generate ``data["max_new_tokens"]`` tokens and reward them.

        Args:
            engine: Generates.
            data: One of ``Prompts``.
        """
        gconfig = GenerationHyperparameters(max_new_tokens=data["max_new_tokens"], ignore_eos=True)
        return await SingleTurnWorkflow(reward_fn, gconfig).arun_episode(engine, data)


def base_model(seed: int = 0) -> TinyModel:
    """Return the untrained model a run starts from; it keeps the key in view, and three tokens.

    Args:
        seed: Of its weights.
    """
    return TinyModel.random(
        seed, vocab_size=VOCAB_SIZE, window=3, prefix=1, eos_id=EOS_ID, output_scale=0.25
    )
