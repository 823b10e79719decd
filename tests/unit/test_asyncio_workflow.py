"""Workflows written for asyncio, as AReaL's are, inside a trio run."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sniffio
import trio
import trio.testing

from arealtrio.asyncio_workflow import AsyncioEngine, AsyncioWorkflow, explain_asyncio
from arealtrio.errors import ConfigError, ServerError, UsageError, WorkflowError
from arealtrio.reward import AsyncRewardWrapper
from arealtrio.rows import rows_from_result
from arealtrio.testing import simulated_executor
from arealtrio.types import (
    FailureKind,
    GenerationHyperparameters,
    ModelRequest,
    ModelResponse,
    Outcome,
)
from arealtrio.workflow import RolloutWorkflow

from . import rewards

ROOT = Path(__file__).parents[2]
PROMPT: Mapping[str, Any] = {"input_ids": [1, 2, 3]}


class TrioEngine:
    """Generates on trio, as the executor's does: it waits, counts, and can be told to fail."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0
        self.libraries: set[str] = set()
        self.gate: trio.Event | None = None
        self.error: Exception | None = None

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        self.running += 1
        self.libraries.add(sniffio.current_async_library())
        try:
            with trio.CancelScope():  # what only trio's own tasks can do
                await trio.lowlevel.checkpoint()
                if self.gate is not None:
                    await self.gate.wait()
            if self.error is not None:
                raise self.error
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return ModelResponse(
            rid=request.rid,
            input_tokens=request.input_ids,
            output_tokens=np.array([7, 8], dtype=np.int32),
            output_logprobs=np.full(2, -0.5, dtype=np.float32),
            output_versions=np.full(2, 3, dtype=np.int32),
            stop_reason="stop",
        )

    def get_version(self) -> int:
        return 3


class Episode:
    """An asyncio workflow of one function."""

    def __init__(self, run: Callable[[AsyncioEngine, Mapping[str, Any]], Awaitable[Any]]) -> None:
        self.run = run

    async def arun_episode(self, engine: AsyncioEngine, data: Mapping[str, Any]) -> Any:
        return await self.run(engine, data)


async def run(
    function: Callable[[AsyncioEngine, Mapping[str, Any]], Awaitable[Any]],
    engine: TrioEngine | None = None,
) -> Any:
    return await AsyncioWorkflow(Episode(function)).arun_episode(engine or TrioEngine(), PROMPT)


async def until(there: Callable[[], bool]) -> None:
    """Let the loop go on until a state is reached, on the asyncio side."""
    while not there():  # noqa: ASYNC110
        await asyncio.sleep(0)


class ArealsWorkflow:
    """As AReaL writes one: asyncio throughout, a group by gather, dicts of [batch, seq] arrays."""

    def __init__(self, group_size: int) -> None:
        self.gconfig = GenerationHyperparameters(max_new_tokens=2)
        self.group_size = group_size

    async def arun_episode(self, engine: Any, data: Mapping[str, Any]) -> dict[str, Any]:
        req = ModelRequest(input_ids=data["input_ids"], gconfig=self.gconfig.new(n_samples=1))
        resps = await asyncio.gather(*[engine.agenerate(req) for _ in range(self.group_size)])
        await asyncio.sleep(0)
        rows = [
            {
                "input_ids": [*resp.input_tokens, *resp.output_tokens],
                "loss_mask": [0] * resp.input_len + [1] * resp.output_len,
                "logprobs": [0.0] * resp.input_len + list(resp.output_logprobs),
                "versions": [-1] * resp.input_len + list(resp.output_versions),
                "attention_mask": [True] * (resp.input_len + resp.output_len),
                "rewards": 1.0,
            }
            for resp in resps
        ]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}


async def test_an_areal_workflow_runs_unchanged() -> None:
    workflow = AsyncioWorkflow(ArealsWorkflow(4))
    assert isinstance(workflow, RolloutWorkflow)
    engine = TrioEngine()
    rows = rows_from_result(await workflow.arun_episode(engine, PROMPT))
    assert len(rows) == 4
    assert rows[0].input_ids.tolist() == [1, 2, 3, 7, 8]
    assert rows[0].versions.tolist() == [-1, -1, -1, 3, 3]
    assert engine.libraries == {"trio"}


async def test_many_rollouts_share_one_loop_and_what_is_bound_to_it() -> None:
    loops = set()
    queue: asyncio.Queue[int] = asyncio.Queue(1)
    lock = asyncio.Lock()

    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        assert sniffio.current_async_library() == "asyncio"
        loops.add(asyncio.get_running_loop())
        async with lock:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(queue.put(1), 60)
        async with asyncio.timeout(60):
            await asyncio.shield(asyncio.create_task(queue.get()))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(int))
        assert engine.get_version() == 3

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(run, episode)
    assert len(loops) == 1


async def test_exceptions_arrive_as_themselves_in_both_directions() -> None:
    engine = TrioEngine()
    engine.error = ServerError("no", status=500)

    async def passes(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await engine.agenerate(ModelRequest([1]))

    async def catches(engine: AsyncioEngine, data: Mapping[str, Any]) -> int:
        try:
            await engine.agenerate(ModelRequest([1]))
        except ServerError as exc:
            return exc.status
        raise AssertionError

    async def raises(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ServerError) as caught:
        await run(passes, engine)
    assert caught.value is engine.error
    assert await run(catches, engine) == 500
    with pytest.raises(ZeroDivisionError):
        await run(raises)


async def test_a_cancelled_rollout_cancels_its_asyncio_tasks_and_generations() -> None:
    engine = TrioEngine()
    engine.gate = trio.Event()
    seen: list[str] = []

    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        try:
            await asyncio.gather(*[engine.agenerate(ModelRequest([1])) for _ in range(3)])
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, episode, engine)
        await trio.testing.wait_all_tasks_blocked()
        assert engine.running == 3
        nursery.cancel_scope.cancel()
    assert seen == ["cancelled"]
    assert (engine.running, engine.cancelled) == (0, 3)


async def test_a_deadline_reaches_code_that_waits_in_asyncio_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await asyncio.sleep(3600)

    with trio.move_on_after(5) as scope:
        await run(episode)
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(5, abs=0.1)


async def test_a_generation_ends_with_the_asyncio_task_that_awaits_it() -> None:
    engine = TrioEngine()
    engine.gate = trio.Event()

    async def episode(bridged: AsyncioEngine, data: Mapping[str, Any]) -> str:
        task = asyncio.create_task(bridged.agenerate(ModelRequest([1])))
        await until(lambda: engine.running == 1)
        task.cancel()
        await until(lambda: engine.running == 0)
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(bridged.agenerate(ModelRequest([1])), 0.01)
        return "went on"

    assert await run(episode, engine) == "went on"
    assert (engine.running, engine.cancelled) == (0, 2)


async def test_what_a_workflow_forgets_holds_no_server() -> None:
    """``asyncio.gather`` leaves the siblings of one that failed (AReaL's defect B19)."""
    engine = TrioEngine()
    engine.gate = trio.Event()
    forgotten: list[asyncio.Task[Any]] = []
    late: list[BaseException] = []

    async def episode(bridged: AsyncioEngine, data: Mapping[str, Any]) -> None:
        async def later() -> None:
            try:
                await bridged.agenerate(ModelRequest([1]))
            except asyncio.CancelledError:
                try:
                    await bridged.agenerate(ModelRequest([1]))
                except UsageError as exc:
                    late.append(exc)
                raise

        async def fail() -> None:
            await until(lambda: engine.running == 1)
            raise ZeroDivisionError

        forgotten.append(asyncio.create_task(later()))
        await asyncio.gather(*forgotten, fail())

    with pytest.raises(ZeroDivisionError):
        await run(episode, engine)
    assert (engine.running, engine.cancelled) == (0, 1)
    while not forgotten[0].done():
        await trio.lowlevel.checkpoint()
    assert "has ended" in str(late[0])


async def test_a_workflow_that_cancels_itself_fails_and_nothing_else_does() -> None:
    async def cancels(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def raises(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        raise asyncio.CancelledError

    for episode in (cancels, raises):
        with pytest.raises(WorkflowError, match="not by its rollout"):
            await run(episode)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("in_a_child", [False, True])
async def test_what_would_end_the_loop_ends_its_rollout_alone(
    in_a_child: bool, error: BaseException
) -> None:
    """All workflows of a run share the loop: without it they would wait for ever."""

    async def fail() -> None:
        raise error

    async def fails(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await (asyncio.gather(fail(), asyncio.sleep(0)) if in_a_child else fail())

    async def answers(engine: AsyncioEngine, data: Mapping[str, Any]) -> int:
        await asyncio.sleep(0)
        return 1

    with pytest.raises((type(error), BaseExceptionGroup)) as caught:
        await run(fails)
    assert caught.value is error or error in getattr(caught.value, "exceptions", ())
    with trio.fail_after(5):
        assert await run(answers) == 1


async def test_a_task_that_is_cancelled_before_it_began_leaves_no_complaint(
    recwarn: pytest.WarningsRecorder,
) -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> int:
        task = asyncio.create_task(asyncio.sleep(3600), name="cancelled")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.get_name() == "cancelled"
        with pytest.raises(TypeError, match="coroutine was expected"):
            asyncio.get_running_loop().create_task(3)  # type: ignore[arg-type]
        return 1

    assert await run(episode) == 1
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_what_would_end_the_loop_arrives_as_itself_out_of_a_task_group(
    error: BaseException,
) -> None:
    """Else ``KeyboardInterrupt``, which ends the run, would be one rollout's failure."""

    async def fail() -> None:
        raise error

    async def fails(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            outer.create_task(asyncio.sleep(3600))
            inner.create_task(fail())

    async def fails_otherwise(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0)).add_done_callback(lambda _: None)
            raise ValueError

    with pytest.raises(type(error)) as caught:
        await run(fails)
    assert caught.value is error
    with pytest.raises(ExceptionGroup) as others:
        await run(fails_otherwise)
    assert others.group_contains(ValueError)


async def test_an_exception_that_nobody_awaits_is_logged_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> int:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.01)
        return 1

    with caplog.at_level(logging.ERROR):
        assert await run(episode) == 1
        assert await run(episode) == 1
    assert "ZeroDivisionError" in caplog.text


def test_the_loop_belongs_to_the_run() -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> Any:
        tasks.append(asyncio.create_task(asyncio.sleep(3600)))
        return asyncio.get_running_loop()

    tasks: list[asyncio.Task[Any]] = []
    first, second = trio.run(run, episode), trio.run(run, episode)
    assert first is not second
    assert first.is_closed()
    assert all(task.cancelled() for task in tasks)


async def test_areals_reward_wrapper_works_in_an_asyncio_workflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # for the process
    reward = AsyncRewardWrapper(rewards.length, max_workers=1)

    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> Any:
        response = await engine.agenerate(ModelRequest(data["input_ids"]))
        return await reward("", "", response.input_tokens, response.output_tokens, answer=1)

    assert await run(episode) == 2.0


@contextmanager
def never_run() -> Iterator[Coroutine[Any, Any, None]]:
    """A coroutine for a loop that is not there: left to the collector, it warns in a later test."""
    coroutine = asyncio.sleep(0)
    try:
        yield coroutine
    finally:
        coroutine.close()


async def sleep() -> None:
    await asyncio.sleep(1)


async def gather() -> None:
    with never_run() as coroutine:
        await asyncio.gather(coroutine)


async def queue() -> None:
    await asyncio.Queue[int]().get()


async def create_task() -> None:
    with never_run() as coroutine:
        await asyncio.create_task(coroutine)


async def zero_sleep() -> None:
    await asyncio.sleep(0)


async def timeout() -> None:
    async with asyncio.timeout(1):
        await asyncio.sleep(0)


@pytest.mark.filterwarnings("ignore:.*exception was never retrieved")
@pytest.mark.parametrize("use", [sleep, gather, queue, create_task, zero_sleep, timeout])
async def test_a_bare_asyncio_workflow_is_told_to_be_wrapped(
    use: Callable[[], Awaitable[None]],
) -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await use()

    workflow = Episode(episode)
    with pytest.raises((RuntimeError, TypeError, AttributeError)) as caught:
        await workflow.arun_episode(TrioEngine(), PROMPT)  # type: ignore[arg-type]
    explained = explain_asyncio(caught.value, workflow)
    assert isinstance(explained, WorkflowError)
    assert "Episode uses asyncio" in str(explained)
    assert "AsyncioWorkflow(workflow)" in str(explained)
    assert explained.__cause__ is caught.value


def test_other_errors_are_left_alone() -> None:
    workflow = Episode(lambda *_: sleep())
    for error in (RuntimeError("mine"), TypeError("mine"), ValueError("no running event loop")):
        assert explain_asyncio(error, workflow) is error
    error = RuntimeError("no running event loop")
    assert explain_asyncio(error, AsyncioWorkflow(workflow)) is error, "it has a loop"


async def test_the_executor_says_so_of_a_bare_one(autojump_clock: trio.testing.MockClock) -> None:
    async def episode(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await asyncio.sleep(1)

    async with simulated_executor(servers=1) as (executor, _):
        executor.submit(dict(PROMPT), Episode(episode))  # type: ignore[arg-type]
        (result,) = await executor.wait(1)
        assert result.failure is not None
        assert result.failure.kind is FailureKind.WORKFLOW
        assert "wrap it, AsyncioWorkflow(workflow)" in str(result.failure)


async def test_in_the_executor_it_is_a_rollout_like_any_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def too_late(engine: AsyncioEngine, data: Mapping[str, Any]) -> None:
        await asyncio.gather(*[engine.agenerate(ModelRequest([1, 2, 3])) for _ in range(4)])
        await asyncio.sleep(3600)

    async with simulated_executor(
        servers=2, consumer_batch_size=4, max_concurrent_rollouts=4, rollout_timeout_s=60.0
    ) as (executor, fleet):
        executor.submit(dict(PROMPT), AsyncioWorkflow(ArealsWorkflow(4)), task_id="in time")
        result = await executor.wait_for_task("in time")
        assert result.group is not None
        assert sum(map(len, result.group.members)) == 4
        executor.submit(dict(PROMPT), AsyncioWorkflow(Episode(too_late)), task_id="too late")
        result = await executor.wait_for_task("too late")
        assert result.outcome is Outcome.EXPIRED
        executor.submit(dict(PROMPT), AsyncioWorkflow(Episode(too_late)))
        await trio.testing.wait_all_tasks_blocked()
    assert all(server.generations == 0 for server in fleet)


def test_wrong_constructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="object has none"):
        AsyncioWorkflow(object())
    with pytest.raises(ConfigError, match=r"not its class: Episode\("):
        AsyncioWorkflow(Episode)
    monkeypatch.setitem(sys.modules, "trio_asyncio", None)
    with pytest.raises(ConfigError, match=r"arealtrio\[asyncio\]"):
        AsyncioWorkflow(Episode(lambda *_: sleep()))
