"""What users write against the public types. mypy --strict reads it, and pytest runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type, get_type_hints

import arealtrio
from arealtrio import (
    Batch,
    Engine,
    Failure,
    GenerationHyperparameters,
    Group,
    ModelRequest,
    RolloutResult,
    RolloutWorkflow,
    SingleTurnWorkflow,
    Tokenizer,
)


class AsInAReaL:
    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any] | None:
        response = await engine.agenerate(ModelRequest(data["input_ids"]))
        return {"input_ids": response.output_tokens}


class OfAnyMapping:
    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> None:
        await engine.agenerate(ModelRequest(data["input_ids"]))


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def reward(*_: object, **__: object) -> float:
    return 1.0


def single_turn(tokenizer: Tokenizer) -> SingleTurnWorkflow:
    return SingleTurnWorkflow(reward, GenerationHyperparameters(), tokenizer)


def errors_of(batch: Batch) -> list[Exception]:
    """Of a batch, as a trainer logs them: no cast is needed."""
    assert_type(batch.failures, tuple[RolloutResult, ...])
    of_groups = [result.failure.error for result in batch.failures if result.failure is not None]
    return of_groups + [f.error for group in batch.groups for f in group.member_failures]


def test_failures_are_told_by_their_type() -> None:
    assert get_type_hints(Batch)["failures"] == tuple[RolloutResult, ...]
    assert get_type_hints(Group)["member_failures"] == tuple[Failure, ...]
    assert get_type_hints(RolloutResult)["group"] == Group | None
    assert errors_of(Batch(groups=(), version=0)) == []


def test_the_protocols_that_users_write_to_are_public() -> None:
    assert {"Engine", "RolloutWorkflow", "Tokenizer"} <= set(arealtrio.__all__)
    single_turn(Letters())


def test_a_workflow_takes_a_dict_or_any_mapping() -> None:
    workflows: list[RolloutWorkflow] = [AsInAReaL(), OfAnyMapping(), single_turn(Letters())]
    assert all(isinstance(workflow, RolloutWorkflow) for workflow in workflows)
