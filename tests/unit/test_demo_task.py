"""The demo's task: rewards by the rule, prompts by the seed, lengths with a long tail."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from arealtrio.demo.task import (
    EOS_ID,
    FIRST_ANSWER_ID,
    KEYS,
    MAX_LENGTH,
    VOCAB_SIZE,
    BudgetWorkflow,
    Prompts,
    base_model,
    reward_fn,
)
from arealtrio.types import ModelRequest, ModelResponse, Trajectory
from arealtrio.workflow import RolloutWorkflow


def reward(key: int, answer: list[int]) -> float:
    return reward_fn(None, None, np.array([key, 9]), np.array(answer, dtype=np.int32), prompt_id=1)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_names_eight_tokens_of_its_own(key: int) -> None:
    right = [token for token in range(VOCAB_SIZE) if reward(key, [token]) == 1]
    others = [token for token in range(VOCAB_SIZE) for k in KEYS if reward(k, [token]) == 1]
    assert len(right) == 8
    assert len(others) == len(set(others)) == VOCAB_SIZE - FIRST_ANSWER_ID


def test_the_reward_is_the_fraction_of_the_answer_that_follows() -> None:
    right = FIRST_ANSWER_ID
    assert reward(KEYS[0], [right, right + 4, right + 1, EOS_ID]) == 0.5
    assert reward(KEYS[0], []) == 0


def take(prompts: Prompts, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(prompts, count))


def test_prompts_depend_on_the_seed_alone() -> None:
    prompts = Prompts(seed=3)
    first = take(prompts, 50)
    assert first == take(prompts, 50) == take(Prompts(seed=3), 50)
    assert [p["input_ids"] for p in first] != [p["input_ids"] for p in take(Prompts(seed=4), 50)]


def test_a_count_ends_them_and_changes_none() -> None:
    assert list(Prompts(seed=3, count=50)) == take(Prompts(seed=3), 50)
    assert list(Prompts(count=0)) == []


def test_keys_take_turns_and_no_prompt_id_comes_twice() -> None:
    prompts = take(Prompts(), 600)
    assert [p["input_ids"][0] for p in prompts[:8]] == [*KEYS, *KEYS]
    assert len({p["prompt_id"] for p in prompts}) == 600


def test_lengths_have_a_long_tail() -> None:
    lengths = [p["max_new_tokens"] for p in take(Prompts(), 5000)]
    p50, p99 = np.percentile(lengths, [50, 99])
    assert 15 <= p50 <= 30
    assert p99 / p50 >= 5
    assert 1 <= min(lengths) <= max(lengths) <= MAX_LENGTH


class EchoEngine:
    """Answers with the key's first right token, as often as asked."""

    def __init__(self) -> None:
        self.asked: list[ModelRequest] = []

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        self.asked.append(request)
        length = request.gconfig.max_new_tokens
        tokens = np.full(length, FIRST_ANSWER_ID, np.int32)
        return ModelResponse(
            rid="r",
            input_tokens=request.input_ids,
            output_tokens=tokens,
            output_logprobs=np.zeros(length, np.float32),
            output_versions=np.zeros(length, np.int32),
            stop_reason="length",
        )

    def get_version(self) -> int:
        return 0


async def test_the_workflow_asks_for_the_length_of_the_prompt() -> None:
    engine, workflow = EchoEngine(), BudgetWorkflow()
    data = {"prompt_id": "0-0", "input_ids": [KEYS[0], 9, 9], "max_new_tokens": 17}
    row = await workflow.arun_episode(engine, data)
    assert isinstance(workflow, RolloutWorkflow)
    assert isinstance(row, Trajectory)
    assert (len(row), row.reward) == (20, 1.0)
    assert engine.asked[0].gconfig.ignore_eos
    assert engine.asked[0].session == "0-0"


def test_the_base_model_knows_nothing_yet() -> None:
    model = base_model(0)
    assert model.vocab_size == VOCAB_SIZE
    logits = model.next_logits([p["input_ids"] for p in take(Prompts(), 200)])
    assert np.exp(logits).max() / np.exp(logits).mean() < 5
