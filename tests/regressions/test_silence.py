"""What was told to nobody: epochs that vanish, and work that is thrown away for ever."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import trio
import trio.testing

from arealtrio import WeightUpdate
from arealtrio.arguments import RolloutArguments
from arealtrio.errors import TooManyFailures, WorkflowError
from arealtrio.testing import FixedLengths, checkpoint, simulated_executor
from arealtrio.types import Outcome
from arealtrio.workflow import Engine

from ..unit.puppet import Generates, Instant, Prompt, prompt_list, prompts, row, settled

Clock = trio.testing.MockClock


def fails_from(number: int) -> Instant:
    def decide(prompt: Prompt) -> Any:
        return "accept" if prompt["prompt_id"] < number else ZeroDivisionError(prompt["prompt_id"])

    return Instant(decide)


async def test_an_epoch_in_which_everything_fails_says_so(autojump_clock: Clock) -> None:
    """A loop over its batches did nothing, and ended as if all were well."""
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=4) as (
        executor,
        _,
    ):
        loader = prompt_list(6)
        with pytest.raises(TooManyFailures, match="without a batch: 6 of its groups") as caught:
            await executor.prepare_batch(loader, fails_from(0))
        assert {type(error) for error in caught.value.exceptions} == {WorkflowError}
        batch = await executor.prepare_batch(loader, Instant())
        assert (len(batch.groups), len(batch.failures)) == (4, 6)


async def test_failures_after_the_last_batch_are_logged_and_told_in_the_next(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=4) as (
        executor,
        _,
    ):
        loader, workflow = prompt_list(8), fails_from(4)
        batch = await executor.prepare_batch(loader, workflow)
        told = len(batch.failures)
        with caplog.at_level(logging.WARNING, "arealtrio"), pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(loader, workflow)
        (record,) = caplog.records
        assert f"after the last batch of an epoch: {4 - told}, the first" in record.message
        assert "ZeroDivisionError" in record.message
        batch = await executor.prepare_batch(loader, Instant())
        assert len(batch.failures) == 4 - told


async def test_whoever_learns_late_that_an_epoch_has_ended_leaves_the_next_one_alone(
    autojump_clock: Clock,
) -> None:
    """Of two callers the second ended the epoch that the first had begun: its groups were lost."""
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=4) as (
        executor,
        _,
    ):
        loader = prompt_list(4)
        arguments = RolloutArguments.of(Instant(), None, None, 1)
        assert len((await executor.prepare_batch(loader, Instant())).groups) == 4
        late = executor.stream_of(loader, arguments)
        with pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(loader, Instant())
        following = executor.stream_of(loader, arguments)
        executor.feed(following, following.feed.take(4), arguments)
        await settled()
        assert (await executor.next_step(late)).groups == ()  # type: ignore[union-attr]
        assert len((await executor.prepare_batch(loader, Instant())).groups) == 4
        assert executor.counts.of(Outcome.ACCEPTED) == 8


@pytest.mark.parametrize("policy", ["wait", "drop", "requeue"])
async def test_rows_that_a_workflow_stamps_with_versions_of_its_own_fail(
    autojump_clock: Clock, policy: Literal["wait", "drop", "requeue"]
) -> None:
    """Each was thrown away as too old, which no budget counts: ``prepare_batch`` never ended."""

    class StampsZero:
        async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
            await trio.sleep(1)
            return row(version=0)

    async with simulated_executor(
        servers=1, consumer_batch_size=2, max_staleness=0, straggler_policy=policy,
        max_consecutive_failures=4,
    ) as (executor, _):  # fmt: skip
        loader = prompts()
        assert len((await executor.prepare_batch(loader, StampsZero())).groups) == 2
        await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        with trio.fail_after(600), pytest.raises(TooManyFailures) as caught:
            await executor.prepare_batch(loader, StampsZero())
        assert all(isinstance(error, WorkflowError) for error in caught.value.exceptions)
        assert "version 0, from before it started" in str(caught.value.exceptions[0])


@pytest.mark.parametrize("how", ["raises", "returns None"])
async def test_what_a_workflow_makes_of_the_end_of_the_run_is_no_failure_of_its_prompt(
    autojump_clock: Clock, how: str
) -> None:
    """With a ledger the prompt was closed for good, as was each that took the place it left."""

    class HidesItsCancellation(Generates):
        async def arun_episode(self, engine: Engine, data: Prompt, /) -> Any:
            try:
                return await super().arun_episode(engine, data)
            except trio.Cancelled:
                if how == "raises":
                    raise OSError("the tool went away") from None
                return None

    with trio.move_on_after(5):
        async with (
            simulated_executor(
                servers=1, lengths=FixedLengths(50_000), consumer_batch_size=4, max_staleness=1
            ) as (executor, _),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(executor.prepare_batch, prompt_list(16), HidesItsCancellation())
            await settled()
            with trio.CancelScope(shield=True):  # the trainer's step, in a thread
                await trio.sleep(10)
    ended = executor.counts.as_dict()
    assert (ended["failed"], ended["rejected"], ended["cancelled"]) == (0, 0, ended["submitted"])
    assert ended["submitted"] > 0
