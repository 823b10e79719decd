"""What users write against the public types. mypy --strict reads it, and pytest runs it."""

from __future__ import annotations

import arealtrio
from arealtrio import GenerationHyperparameters, SingleTurnWorkflow, Tokenizer


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def reward(*_: object, **__: object) -> float:
    return 1.0


def single_turn(tokenizer: Tokenizer) -> SingleTurnWorkflow:
    return SingleTurnWorkflow(reward, GenerationHyperparameters(), tokenizer)


def test_the_protocols_that_users_write_to_are_public() -> None:
    assert {"Engine", "RolloutWorkflow", "Tokenizer"} <= set(arealtrio.__all__)
    single_turn(Letters())
