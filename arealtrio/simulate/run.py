"""Run a plan: the production executor, a fleet in memory, and a trainer that only takes time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import trio

from ..errors import ConfigError
from ..rows import trajectory_from_response
from ..testing import checkpoint, run_virtually, simulated_executor
from ..trajectory import Batch
from ..types import GenerationHyperparameters, ModelRequest, Trajectory
from ..weights import WeightUpdate
from ..workflow import Engine
from .occupancy import Occupancy
from .outcome import Outcome, Step
from .plan import NEVER_S, SIMULATED_MAX, Plan

# Of what length does not matter: ``latency_s`` is what its prefill takes.
_PROMPT = np.array([1, 2, 3], dtype=np.int32)


def simulate(
    plan: Plan,
    moments: list[Step] | None = None,
    on_change: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run a plan in simulated time. The same plan gives the same outcome.

    Args:
        plan: What to run.
        moments: Its beginning and each of its steps are appended here as they end, for whoever
            wants to show progress, or what there is when it is interrupted; see ``Outcome.of``.
        on_change: Called whenever a request began or ended on a server; must be quick.

    Raises:
        ConfigError: The run takes too long for a clock that is a floating-point number.
    """
    moments = [] if moments is None else moments
    run = _Run(plan, moments, on_change)
    try:
        run_virtually(run.main, seed=plan.seed, time_limit_s=NEVER_S)
    except trio.TooSlowError as exc:
        raise ConfigError(f"the run did not end within {NEVER_S:g} simulated seconds") from exc
    outcome = Outcome.of(plan, moments)
    assert outcome is not None  # warm_up is below steps
    return outcome


class _Run:
    """One run of a plan."""

    def __init__(self, plan: Plan, moments: list[Step], on_change: Callable[[], None]) -> None:
        self._plan = plan
        self._on_change = on_change
        self._moments = moments
        self._prompts = _prompts(plan)
        self._workflow = _Workflow(plan.tokens_simulated_as_one)

    async def main(self) -> None:
        async with simulated_executor(
            servers=self._plan.server_settings(), **self._plan.config()
        ) as (executor, fleet):
            self._executor = executor
            self._occupancy = Occupancy(fleet, self._plan.kinds(), self._on_change)
            self._note(trio.current_time(), trio.current_time(), None)
            for _ in range(self._plan.steps):
                await self._step()

    async def _step(self) -> None:
        asked = trio.current_time()
        batch = await self._executor.prepare_batch(
            self._prompts, self._workflow, group_size=self._plan.group_size
        )
        got = trio.current_time()
        await trio.sleep(self._plan.training_s)
        version = batch.version + 1
        with self._occupancy.standing_still():
            await self._executor.update_weights(
                WeightUpdate.from_disk(checkpoint(version), version)
            )
        self._note(asked, got, batch)

    def _note(self, asked: float, got: float, batch: Batch | None) -> None:
        """A step has ended; or, without a batch, none has begun."""
        now, grain = trio.current_time(), self._plan.tokens_simulated_as_one
        tokens = {} if batch is None else batch.staleness_histogram("tokens")
        self._moments.append(
            Step(
                ended_s=now,
                wait_s=got - asked,
                update_s=0.0 if batch is None else now - got - self._plan.training_s,
                rollouts=0 if batch is None else len(batch.rows),
                token_staleness={age: count * grain for age, count in tokens.items()},
                head_staleness=_heads(batch),
                slot_seconds=self._occupancy.slot_seconds(),
                violations=self._executor.staleness_violations,
                given_up=self._executor.counts.as_dict()["expired"],
            )
        )


def _heads(batch: Batch | None) -> dict[int, int]:
    return {} if batch is None else batch.staleness_histogram("trajectories")


def _prompts(plan: Plan) -> Iterator[dict[str, Any]]:
    """Prompts without end, each with the lengths of its answers, one for each that is begun."""
    prompts = plan.prompts_of_an_epoch
    for number in itertools.count():
        epoch, prompt = (0, number) if prompts is None else divmod(number, prompts)
        yield {
            "prompt_id": prompt,
            "lengths": plan.answers.of_prompt(prompt, epoch, plan.seed),
        }


class _Workflow:
    """One answer, of the length that its prompt has for it."""

    def __init__(self, grain: int) -> None:
        self._grain = grain

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> Trajectory:
        tokens = max(1, round(next(data["lengths"]) / self._grain))
        response = await engine.agenerate(ModelRequest(_PROMPT, _exactly(tokens)))
        return trajectory_from_response(response, 0.0)


@lru_cache(maxsize=4096)  # they are checked whenever one is made, and the same lengths come again
def _exactly(tokens: int) -> GenerationHyperparameters:
    """Ask for so many tokens, no fewer."""
    return GenerationHyperparameters(
        max_new_tokens=tokens, max_tokens=SIMULATED_MAX + 1000, ignore_eos=True
    )
