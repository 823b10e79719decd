"""Rollouts of the demo's task in one process: a loop over tokens, weights as old as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arealtrio.demo.task import reward_fn
from arealtrio.demo.trainer import TrainingBatch
from arealtrio.embedded.model import TinyModel, log_softmax


def answer(
    model: TinyModel, prompt: list[int], count: int, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample ``count`` answers at temperature 1: sequences int32[count, P + length], logprobs."""
    sequences, logprobs = [list(prompt) for _ in range(count)], []
    for _ in range(length):
        table = log_softmax(model.next_logits(sequences))
        drawn = (table + rng.gumbel(size=table.shape)).argmax(axis=1)
        logprobs.append(table[np.arange(count), drawn])
        for sequence, token in zip(sequences, drawn.tolist(), strict=True):
            sequence.append(token)
    return np.array(sequences, dtype=np.int32), np.stack(logprobs, axis=1)


def batch(
    prompts: Sequence[dict[str, Any]],
    models: Sequence[TinyModel],
    group_size: int,
    rng: np.random.Generator,
) -> TrainingBatch:
    """Answer each prompt ``group_size`` times with its model, and pad as ``Batch.padded`` does."""
    shape = (
        len(prompts) * group_size,
        max(len(p["input_ids"]) + p["max_new_tokens"] for p in prompts),
    )
    out: dict[str, np.ndarray] = {
        "input_ids": np.zeros(shape, np.int32),
        "attention_mask": np.zeros(shape, np.bool_),
        "loss_mask": np.zeros(shape, np.int32),
        "logprobs": np.zeros(shape, np.float32),
        "versions": np.full(shape, -1, np.int32),
        "rewards": np.zeros(shape[0], np.float32),
        "group_ids": np.repeat(np.arange(len(prompts), dtype=np.int32), group_size),
    }
    for index, (prompt, model) in enumerate(zip(prompts, models, strict=True)):
        ids, budget = prompt["input_ids"], prompt["max_new_tokens"]
        rows = slice(index * group_size, (index + 1) * group_size)
        made = slice(len(ids), len(ids) + budget)
        sequences, logprobs = answer(model, ids, group_size, budget, rng)
        out["input_ids"][rows, : made.stop] = sequences
        out["attention_mask"][rows, : made.stop] = True
        out["loss_mask"][rows, made], out["versions"][rows, made] = 1, 0
        out["logprobs"][rows, made] = logprobs
        out["rewards"][rows] = [
            reward_fn(None, None, sequence[: made.start], sequence[made], **prompt)
            for sequence in sequences
        ]
    return out
