"""Who blocks the loop is named, and who does not is not."""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.lowlevel
import trio.testing

from arealtrio import watch
from arealtrio.types import GenerationHyperparameters, ModelRequest, ModelResponse
from arealtrio.watch import watch_slow_steps
from arealtrio.workflow import SingleTurnWorkflow

LIMIT_S = 0.02


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "arealtrio.watch"):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == "arealtrio.watch"]


async def watched(*rollouts: Callable[[], Awaitable[Any]], limit_s: float = LIMIT_S) -> None:
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            stack.enter_context(watch_slow_steps(nursery, limit_s))
            for number, rollout in enumerate(rollouts):
                nursery.start_soon(rollout, name=f"rollout-{number}")


def block() -> None:
    time.sleep(2 * LIMIT_S)  # what it is about: a call that does not return to the loop


async def blocks(times: int = 3) -> None:
    for _ in range(times):
        await trio.lowlevel.checkpoint()
        block()
    await trio.lowlevel.checkpoint()


async def test_what_blocks_again_and_again_is_named_once(
    warnings: Callable[[], list[str]],
) -> None:
    await watched(blocks)
    (said,) = warnings()
    assert said.startswith("rollout rollout-0 kept the event loop busy for ")
    assert "after the await in blocks (test_watch.py:" in said
    assert "slow_step_warning_s is 0.02" in said


async def test_what_blocks_once_is_not_named(warnings: Callable[[], list[str]]) -> None:
    await watched(lambda: blocks(1))
    assert warnings() == []


async def test_without_a_limit_nothing_is_timed(warnings: Callable[[], list[str]]) -> None:
    async with trio.open_nursery() as nursery:
        with watch_slow_steps(nursery, None) as watch:
            assert watch is None
            nursery.start_soon(blocks)
            await trio.testing.wait_all_tasks_blocked()
    assert warnings() == []


async def test_what_never_blocks_is_not_named(warnings: Callable[[], list[str]]) -> None:
    async def quick() -> None:
        for _ in range(100):
            await trio.lowlevel.checkpoint()

    await watched(*[quick] * 20, limit_s=60.0)
    assert warnings() == []


async def test_what_computes_is_named(warnings: Callable[[], list[str]]) -> None:
    async def computes() -> None:
        for _ in range(3):
            end = time.thread_time() + 2 * LIMIT_S
            while time.thread_time() < end:
                pass
            await trio.lowlevel.checkpoint()

    await watched(computes)
    (said,) = warnings()
    assert "after the await in " in said
    assert "computes (test_watch.py:" in said


@pytest.mark.skipif(watch.USAGE_OF_THREAD is None, reason="the system does not tell a thread's own")
async def test_what_only_lacked_the_cpu_is_not_named(
    warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock finds a second gone, of which the thread had next to nothing."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__, thread_time=time.thread_time)
    monkeypatch.setattr(watch, "time", clock)

    async def awaits() -> None:
        for _ in range(5):
            await trio.lowlevel.checkpoint()

    await watched(*[awaits] * 20)
    assert clock.perf_counter() > 200, "no step was timed"
    assert warnings() == []


async def test_the_collectors_time_is_nobodys_fault(warnings: Callable[[], list[str]]) -> None:
    collections = 0

    def slowly(phase: str, info: dict[str, int]) -> None:
        nonlocal collections
        del info
        if phase == "stop":
            collections += 1
            block()

    async def collects() -> None:
        for _ in range(4):
            await trio.lowlevel.checkpoint()
            gc.collect(0)

    gc.callbacks.insert(0, slowly)
    try:
        await watched(collects)
    finally:
        gc.callbacks.remove(slowly)
    assert collections >= 4
    assert warnings() == []


async def test_a_task_that_the_workflow_started_is_its_rollouts(
    warnings: Callable[[], list[str]],
) -> None:
    async def parent() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocks)

    await watched(parent)
    (said,) = warnings()
    assert "rollout rollout-0 " in said


async def test_what_is_no_rollout_is_left_alone(warnings: Callable[[], list[str]]) -> None:
    async with trio.open_nursery() as nursery:
        with watch_slow_steps(nursery, LIMIT_S):
            await blocks()
    assert warnings() == []


class SlowAnswer:
    """An engine that answers after so many more steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        for _ in range(self.steps + 1):
            await trio.lowlevel.checkpoint()
        return ModelResponse(
            rid=request.rid,
            input_tokens=request.input_ids,
            output_tokens=np.array([7], dtype=np.int32),
            output_logprobs=np.zeros(1, dtype=np.float32),
            output_versions=np.zeros(1, dtype=np.int32),
            stop_reason="stop",
        )

    def get_version(self) -> int:
        return 0


async def test_a_reward_function_that_runs_in_the_loop_is_named(
    warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_reward(*_: Any, **__: Any) -> None:
        block()

    workflow = SingleTurnWorkflow(slow_reward, GenerationHyperparameters())
    monkeypatch.setattr(watch, "LIBRARIES", (*watch.LIBRARIES, __file__))  # as if all were ours
    episodes = [
        partial(workflow.arun_episode, SlowAnswer(steps), {"input_ids": [1]}) for steps in range(3)
    ]
    await watched(*episodes)
    (said,) = warnings()
    assert "in SingleTurnWorkflow.arun_episode, whose reward_fn is " in said
    assert "slow_reward:" in said


async def test_nothing_of_it_is_left_behind() -> None:
    seen: list[Any] = []
    await watched(blocks)

    async with trio.open_nursery() as nursery:
        with watch_slow_steps(nursery, LIMIT_S):
            block()
            await trio.lowlevel.checkpoint()
            block()
            await trio.lowlevel.checkpoint()
        runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        seen = [i for i in runner.instruments["_all"] if "arealtrio" in type(i).__module__]
    assert seen == []
    assert [c for c in gc.callbacks if "arealtrio.watch" in repr(c)] == []
