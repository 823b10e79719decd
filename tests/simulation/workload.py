"""Workload: what the rollouts of a run do, well or badly, and what the filter makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import trio

from arealtrio import Group, ModelRequest, ModelResponse, RowBuilder, Trajectory
from arealtrio.workflow import Engine

from .plan import Plan
from .watch import Watch

FEEDBACK = (7, 8, 9)  # token ids between two turns
REFUSED_ADAPTER = "nobody-has-this"  # every server answers a request for it with 404


class Broken(Exception):
    """What a failing workflow raises."""


class Workload:
    """A workflow of one or more turns that fails as often as its plan says.

    Args:
        plan: Of the run.
        watch: Of its executor.
        rng: Decides about attempts; what is decided about a prompt is always the same.
    """

    def __init__(self, plan: Plan, watch: Watch, rng: random.Random) -> None:
        self._plan = plan
        self._watch = watch
        self._rng = rng

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> Trajectory | None:
        """One member, of whatever fate."""
        fate = _fate(self._plan, self._rng)
        self._watch.member_began()
        try:
            return await self._episode(engine, data, fate)
        except trio.Cancelled:
            if fate == "stay":
                with trio.CancelScope(shield=True):
                    await trio.sleep(1.0)
            raise
        finally:
            self._watch.member_ended()

    async def _episode(
        self, engine: Engine, data: Mapping[str, Any], fate: str
    ) -> Trajectory | None:
        row = RowBuilder().append_prompt(data["input_ids"])
        for turn in range(self._plan.turns):
            await self._spend(self._plan.think_s)
            if turn:
                row.append_prompt(FEEDBACK)
            if fate == "hang":
                await trio.sleep_forever()
            if fate == "fail" and turn == self._plan.turns - 1:
                raise Broken("as planned")
            row.append_response(await self._turn(engine, data, row, fate))
        await self._spend(self._plan.reward_s)
        return None if fate == "none" else row.build(float(len(row)))

    async def _turn(
        self, engine: Engine, data: Mapping[str, Any], row: RowBuilder, fate: str
    ) -> ModelResponse:
        if fate != "twins":
            return await self._generate(engine, data, row)
        answers: list[ModelResponse] = []

        async def one() -> None:
            answers.append(await self._generate(engine, data, row))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        return answers[0]

    async def _generate(
        self, engine: Engine, data: Mapping[str, Any], row: RowBuilder
    ) -> ModelResponse:
        gconfig = self._plan.gconfig
        if self._plan.chance("refused", data["prompt_id"]) < self._plan.shares.refused:
            gconfig = gconfig.new(lora_name=REFUSED_ADAPTER)
        request = ModelRequest(row.input_ids, gconfig)
        response = await engine.agenerate(request)
        self._watch.answered(f"an answer to {data['prompt_id']}", request, response)
        return response

    async def _spend(self, most_s: float) -> None:
        if most_s:
            await trio.sleep(most_s * self._rng.random())

    def should_accept(self, group: Group) -> bool:
        """The filter."""
        return self._plan.chance("reject", group.prompt_id) >= self._plan.shares.reject


def _fate(plan: Plan, rng: random.Random) -> str:
    """What becomes of one attempt."""
    shares = plan.shares
    at = rng.random()
    for fate in ("none", "fail", "hang", "stay", "twins"):
        at -= getattr(shares, fate)
        if at < 0:
            return fate
    return "well"


def prompt(name: str) -> dict[str, Any]:
    """A prompt, whose tokens say which one it is."""
    token = 1 + sum(map(ord, name)) % 1000
    return {"prompt_id": name, "input_ids": np.array([1, token, 2], dtype=np.int32)}


class Loader:
    """A data loader of one epoch, which may give several prompts at once.

    Args:
        names: Of its prompts.
        at_once: Prompts in one list; 0: none are in lists.

    Attributes:
        read: The prompts that were read.
    """

    def __init__(self, names: Sequence[str], at_once: int) -> None:
        self._names = names
        self._at_once = at_once
        self.read: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        step = self._at_once or 1
        for start in range(0, len(self._names), step):
            names = self._names[start : start + step]
            self.read += names
            prompts = [prompt(name) for name in names]
            yield prompts if self._at_once else prompts[0]
