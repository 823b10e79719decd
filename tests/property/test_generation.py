"""Whatever happens to its servers, a generation is what an undisturbed server would have given."""

from __future__ import annotations

from typing import Any

import numpy as np
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio.config import RolloutConfig
from arealtrio.engine import open_engine
from arealtrio.errors import TransportError
from arealtrio.types import GenerationHyperparameters, ModelRequest

from ..unit.scripted import Events, Scripted, token_event, whole

ENDINGS = ["break", "fail", "garbage", "abort", "unsaid"]
disturbances = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(ENDINGS)), max_size=8)
FAILED = b'data: {"error":{"message":"it died","code":500}}\n\n'


async def break_off() -> None:
    raise TransportError("it broke off")


def ended(how: str, tokens: int, question: dict[str, Any]) -> Events:
    """The first tokens of an answer, and an end that is not the model's."""
    events = whole(question)
    if tokens >= question["sampling_params"]["max_tokens"]:
        return events
    if how == "abort":  # with one more token, and without a word on versions
        return [*events[:tokens], token_event(100 + len(question["token_ids"]) + tokens, "abort")]
    endings: dict[str, Events] = {
        "break": [break_off], "fail": [FAILED], "garbage": [b"data: {\n\n"], "unsaid": [],
    }  # fmt: skip
    return [*events[:tokens], *endings[how]]


@settings(max_examples=60)
@given(
    disturbed=disturbances,
    budget=st.integers(1, 9),
    segment_tokens=st.none() | st.integers(1, 4),
)
def test_the_tokens_are_those_of_an_undisturbed_server(
    disturbed: list[tuple[int, str]], budget: int, segment_tokens: int | None
) -> None:
    asked: list[tuple[int, int]] = []  # of each stream: tokens so far, and how many it asks for
    lost = 0

    def script(turn: int, question: dict[str, Any]) -> Events:
        nonlocal lost
        asked.append((len(question["token_ids"]) - 2, question["sampling_params"]["max_tokens"]))
        if turn >= len(disturbed):
            return whole(question)
        tokens, how = disturbed[turn]
        if how in ("garbage", "unsaid") and tokens < asked[-1][1]:
            lost += tokens
        return ended(how, tokens, question)

    async def run() -> None:
        config = RolloutConfig(
            servers=["http://a:1", "http://b:1"],
            streaming=True,
            segment_tokens=segment_tokens,
            max_failovers=99,
            eject_after_failures=99,
            failover_interval_s=1e-3,
        )
        async with open_engine(config, transport=Scripted(script)) as engine:
            gconfig = GenerationHyperparameters(greedy=True, max_new_tokens=budget)
            response = await engine.agenerate(ModelRequest([1, 2], gconfig))
            totals = engine.totals()
            assert [row.outstanding for row in engine.statistics()] == [0, 0]
        expected = np.arange(102, 102 + budget)
        np.testing.assert_array_equal(response.output_tokens, expected)
        np.testing.assert_array_equal(response.output_logprobs, -expected.astype(np.float32) / 8)
        assert response.output_versions.tolist() == [0] * budget
        assert [s.start for s in response.segments] == [0, *(s.end for s in response.segments[:-1])]
        assert totals.tokens_generated == budget
        assert totals.tokens_lost == lost

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    limit = segment_tokens or budget
    assert all(wanted == min(limit, budget - had) for had, wanted in asked)
