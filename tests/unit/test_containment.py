"""Whatever user code raises costs its own rollout; Ctrl-C alone ends the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.containment import contained, what_ends_the_run
from arealtrio.errors import RolloutClosed, WorkflowError
from arealtrio.settlement import RolloutResult
from arealtrio.testing import simulated_executor
from arealtrio.types import FailureKind, GenerationHyperparameters, Outcome
from arealtrio.workflow import SingleTurnWorkflow

from .puppet import (
    Instant,
    Prompt,
    Puppet,
    check_closed,
    check_counts,
    prompt_list,
    raises,
)

Clock = trio.testing.MockClock


class Abort(BaseException):
    """As some libraries have one, so that ``except Exception`` lets it pass."""


NO_EXCEPTIONS = [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), Abort()]


def name(error: BaseException) -> str:
    return type(error).__name__


# --- what may raise ------------------------------------------------------------------------------


class InANursery:
    """A workflow whose child task raises, so that it comes in a group."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fail)

    async def _fail(self) -> None:
        raise self._error


class Rows(list[Any]):
    """What a workflow returned, and what raises when it is made into rows."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([1])
        self._error = error

    def __len__(self) -> int:
        raise self._error

    def __iter__(self) -> Iterator[Any]:
        raise self._error


def raiser(error: BaseException) -> Callable[..., Any]:
    def reward_or_filter(*_: object, **__: object) -> Any:
        raise error

    return reward_or_filter


def in_a_workflow(error: BaseException) -> Mapping[str, Any]:
    return {"workflow": Instant(raises(error))}


def in_a_nursery(error: BaseException) -> Mapping[str, Any]:
    return {"workflow": InANursery(error)}


def in_a_filter(error: BaseException) -> Mapping[str, Any]:
    return {"workflow": Instant(), "should_accept_fn": raiser(error)}


def in_a_reward(error: BaseException) -> Mapping[str, Any]:
    gconfig = GenerationHyperparameters(max_new_tokens=4)
    return {"workflow": SingleTurnWorkflow(raiser(error), gconfig)}


def in_its_rows(error: BaseException) -> Mapping[str, Any]:
    return {"workflow": Instant(lambda _: Rows(error))}


PLACES = [in_a_workflow, in_a_nursery, in_a_filter, in_a_reward, in_its_rows]


# --- it costs its rollout ------------------------------------------------------------------------


@pytest.mark.parametrize("error", NO_EXCEPTIONS, ids=name)
@pytest.mark.parametrize("place", PLACES)
async def test_it_fails_its_rollout_and_no_other(
    place: Callable[[BaseException], Mapping[str, Any]], error: BaseException, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet):
        executor.submit({"input_ids": [3]}, task_id="bad", group_size=2, **place(error))
        executor.submit({}, Instant(), task_id="other")
        bad, other = [await executor.wait_for_task(task_id) for task_id in ("bad", "other")]
        assert other.outcome is Outcome.ACCEPTED
        assert bad.outcome is Outcome.FAILED
        assert bad.failure is not None
        assert bad.failure.kind is FailureKind.WORKFLOW
        assert isinstance(bad.failure.error, WorkflowError)
        assert bad.failure.error.__cause__ is error
        assert name(error) in str(bad.failure)
        check_counts(executor)
    check_closed(executor, fleet)


class Untold(RuntimeError):
    """Its own text can not be made, as of an error that formats an attribute it has not set."""

    def __str__(self) -> str:
        raise LookupError("no text")


class Proxy:
    """User code over a dict, whose lookup of a name it has not raises no AttributeError."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)

    async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
        raise self._error


class ProxyFilter(Proxy):
    def __call__(self, group: Any) -> bool:
        raise self._error

    @property
    def arun_episode(self) -> Any:
        raise LookupError


@pytest.mark.parametrize(
    "arguments",
    [
        in_a_workflow(Untold()),
        in_a_filter(Untold()),
        {"workflow": Proxy(SystemExit())},
        {"workflow": Instant(), "should_accept_fn": ProxyFilter(ValueError())},
        {"workflow": Instant(), "should_accept_fn": ProxyFilter(SystemExit())},
    ],
)
async def test_what_breaks_as_the_error_is_looked_at_ends_nothing_else(
    arguments: Mapping[str, Any], autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet):
        executor.submit({}, task_id="bad", **arguments)
        executor.submit({}, Instant(), task_id="other")
        bad, other = [await executor.wait_for_task(task_id) for task_id in ("bad", "other")]
        assert (bad.outcome, other.outcome) == (Outcome.FAILED, Outcome.ACCEPTED)
        check_counts(executor)
    check_closed(executor, fleet)


def test_the_message_names_who_raised_what() -> None:
    assert "Instant raised asyncio.CancelledError" in str(
        contained(asyncio.CancelledError(), Instant())
    )
    assert "raiser.<locals>.reward_or_filter raised SystemExit" in str(
        contained(BaseExceptionGroup("g", [SystemExit()]), raiser(SystemExit()))
    )
    error = ValueError()
    assert contained(error, Instant()) is error


# --- it ends the run -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
async def test_ctrl_c_ends_the_run_wherever_it_comes(
    place: Callable[[BaseException], Mapping[str, Any]], autojump_clock: Clock
) -> None:
    results: list[RolloutResult] = []

    async def wait() -> None:
        with pytest.raises(RolloutClosed):
            results.extend(await executor.wait(2))

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the block's own end raises
        async with (
            simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet),
            trio.open_nursery() as nursery,
        ):
            executor.submit({"input_ids": [3]}, Puppet())
            executor.submit({"input_ids": [3]}, **place(KeyboardInterrupt()))
            nursery.start_soon(wait)
    assert not results
    check_closed(executor, fleet)


async def test_what_ends_it_is_told_from_what_does_not() -> None:
    ctrl_c, other = KeyboardInterrupt(), ValueError()
    assert what_ends_the_run(ctrl_c) is ctrl_c
    for error in (*NO_EXCEPTIONS, other, ExceptionGroup("g", [other])):
        assert what_ends_the_run(error) is None
    found = what_ends_the_run(BaseExceptionGroup("g", [other, ctrl_c]))
    assert isinstance(found, BaseExceptionGroup)
    assert found.exceptions == (ctrl_c,)


class RaisesWhenCancelled:
    """A workflow with a child whose own cleaning up breaks."""

    async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait)
            await trio.sleep_forever()

    async def _wait(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError


async def test_what_breaks_as_the_run_is_cancelled_from_outside_makes_no_crash_of_it(
    autojump_clock: Clock,
) -> None:
    with trio.move_on_after(1) as scope:
        async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet):
            executor.submit({}, RaisesWhenCancelled())
            await trio.sleep_forever()
    assert scope.cancelled_caught
    check_closed(executor, fleet)


class KeepsACancellation:
    """A workflow that raises a cancellation of its own after the scope that it belonged to."""

    async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
        kept: BaseException | None = None
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as exc:
                kept = exc
        assert kept is not None
        raise kept


async def test_a_cancellation_that_nobody_asked_for_is_the_workflows_failure(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        executor.submit({}, KeepsACancellation())
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.FAILED
        assert "KeepsACancellation raised Cancelled" in str(result.failure)


# --- a data loader's is its caller's -------------------------------------------------------------


class Breaks:
    """A data loader of four prompts that raises once, after two."""

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]
        self._prompts = prompt_list(4)

    def __iter__(self) -> Breaks:
        return self

    def __next__(self) -> Prompt:
        if not self._prompts:
            raise StopIteration
        if len(self._prompts) == 2 and self._errors:
            raise self._errors.pop()
        return self._prompts.pop(0)


@pytest.mark.parametrize("error", [*NO_EXCEPTIONS, KeyboardInterrupt()], ids=name)
async def test_what_a_loader_raises_arrives_as_itself_and_loses_no_prompt(
    error: BaseException, autojump_clock: Clock
) -> None:
    loader = Breaks(error)
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        with pytest.raises(type(error)) as caught:
            await executor.prepare_batch(loader, Instant())
        assert caught.value is error
        batch = await executor.prepare_batch(loader, Instant())
        assert sorted(group.prompt_id for group in batch.groups) == list("0123")
