"""prepare_batch: exactly a batch, in order, within the bound, whatever loader and workflow do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.batching import FAILURES_KEPT, BatchStream
from arealtrio.delivery import PermitOrder
from arealtrio.errors import StalenessBudgetExhausted, TooManyFailures, UsageError
from arealtrio.executor import WorkflowExecutor
from arealtrio.group_policy import GroupPolicy
from arealtrio.testing import simulated_executor
from arealtrio.trajectory import Batch
from arealtrio.types import Outcome

from .puppet import (
    Deferred,
    Instant,
    Prompt,
    Puppet,
    check_counts,
    prompt_list,
    prompts,
    raises,
    settled,
)

Clock = trio.testing.MockClock


def prompt_ids(batch: Batch) -> list[int]:
    return sorted(int(group.prompt_id) for group in batch.groups)


async def step(executor: WorkflowExecutor, *arguments: Any, **more: Any) -> Batch:
    """One training step: a batch, then the next version."""
    batch = await executor.prepare_batch(*arguments, **more)
    await executor.set_version(executor.get_version() + 1)
    return batch


# --- whole batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 3])
async def test_each_batch_is_whole_in_order_and_within_the_bound(
    max_staleness: int, size: int, autojump_clock: Clock
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=size, max_staleness=max_staleness
    ) as (executor, _):
        loader = prompts()
        for version in range(5):
            batch = await step(executor, loader, Instant(), group_size=2)
            assert batch.version == version
            assert prompt_ids(batch) == list(range(version * size, (version + 1) * size))
            assert all(len(group) == 2 for group in batch.groups)
            assert batch.staleness().max() <= max_staleness
            check_counts(executor)
        assert executor.staleness_violations == 0


async def test_prompts_are_read_ahead_and_run_while_the_trainer_trains(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=2, max_staleness=1, max_concurrent_rollouts=9
    ) as (executor, _):
        puppet = Puppet()
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.prepare_batch, prompts(), puppet)
            await settled()
            assert sorted(puppet.started) == [0, 1, 2, 3]
            puppet.end_all()
        assert prompt_ids(call.value) == [0, 1]
        await settled()
        await executor.set_version(1)
        await settled()
        assert sorted(puppet.started) == [0, 1, 2, 3, 4, 5]
        assert executor.counts.queued == 6  # read ahead already


async def test_what_is_rejected_or_fails_is_replaced_and_reported(autojump_clock: Clock) -> None:
    def decide(data: Prompt) -> Any:
        number = data["prompt_id"]
        if number % 4 == 1:
            raise ValueError("bad")
        return None if number % 4 == 2 else "accept"

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        batch = await executor.prepare_batch(prompts(), Instant(decide))
        assert prompt_ids(batch) == [0, 3, 4, 7]
        outcomes = {f.prompt_id: f.outcome for f in batch.failures}
        expected = {
            "1": Outcome.FAILED,
            "2": Outcome.REJECTED,
            "5": Outcome.FAILED,
            "6": Outcome.REJECTED,
        }
        assert outcomes.items() >= expected.items()


async def test_a_filter_that_never_accepts_holds_up_no_batch_that_is_ready(
    autojump_clock: Clock,
) -> None:
    # The rest of an endless loader is rejected at once, so that prompts are wanted for ever.
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=1) as (
        executor,
        _,
    ):
        workflow = Instant(lambda data: "accept" if data["prompt_id"] < 4 else None)
        with trio.fail_after(1):
            batch = await executor.prepare_batch(prompts(), workflow)
        assert prompt_ids(batch) == [0, 1, 2, 3]


async def test_a_filter_that_accepts_nothing_ends_the_call_and_fills_no_memory(
    autojump_clock: Clock,
) -> None:
    limit = FAILURES_KEPT + 100
    async with simulated_executor(
        servers=1, consumer_batch_size=4, max_consecutive_rejections=limit
    ) as (executor, _):
        loader = prompts()
        words = r"\d+ groups were rejected in a row \(max_consecutive_rejections\)"
        with pytest.raises(TooManyFailures, match=words) as caught:
            await executor.prepare_batch(loader, Instant(lambda _: None))
        assert "returned None, or should_accept_fn False" in str(caught.value.exceptions[0])
        assert limit <= executor.counts.of(Outcome.REJECTED) < limit + 100
        batch = await executor.prepare_batch(loader, Instant())  # the count begins anew
        rejected = executor.counts.of(Outcome.REJECTED)
        for _ in range(2):
            assert len(batch.failures) == FAILURES_KEPT
            assert len(batch.failures) + batch.failures_omitted == rejected
            executor.give_back(batch)
            batch = await executor.prepare_batch(loader, Instant())


async def test_without_a_limit_a_strict_filter_is_waited_for(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=1, max_consecutive_rejections=None
    ) as (executor, _):
        workflow = Instant(lambda data: "accept" if data["prompt_id"] == 10_500 else None)
        batch = await executor.prepare_batch(prompts(), workflow)
        assert prompt_ids(batch) == [10_500]


async def test_a_batch_is_shuffled_by_its_seed(autojump_clock: Clock) -> None:
    orders = []
    for seed in (0, 0, 1):
        async with simulated_executor(servers=1, consumer_batch_size=16, seed=seed) as (
            executor,
            _,
        ):
            batch = await executor.prepare_batch(prompts(), Instant())
            orders.append([g.prompt_id for g in batch.groups])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


# --- order and age -------------------------------------------------------------------------------


async def test_a_batch_waits_for_lower_permits_and_with_keep_does_not(
    autojump_clock: Clock,
) -> None:
    for policy in ("wait", "keep"):
        async with simulated_executor(
            servers=1,
            consumer_batch_size=2,
            max_staleness=1,
            max_concurrent_rollouts=9,
            straggler_policy=policy,
        ) as (executor, _):
            puppet = Puppet()
            async with trio.open_nursery() as nursery:
                call = Deferred(nursery, executor.prepare_batch, prompts(), puppet)
                await settled()
                puppet.end(1)
                puppet.end(2)
                await settled()
                assert call.pending == (policy == "wait")
                puppet.end_all()
            assert prompt_ids(call.value) == ([0, 1] if policy == "wait" else [1, 2])


@pytest.mark.parametrize("policy", ["requeue", "drop"])
async def test_a_straggler_is_stopped_when_it_can_no_longer_be_in_time(
    policy: Any, autojump_clock: Clock
) -> None:
    async with simulated_executor(
        servers=1,
        consumer_batch_size=1,
        max_staleness=1,
        max_concurrent_rollouts=9,
        straggler_policy=policy,
    ) as (executor, _):
        puppet, loader, seen = Puppet(), prompt_list(6), []
        for version in range(1, 4):
            async with trio.open_nursery() as nursery:
                call = Deferred(nursery, executor.prepare_batch, loader, puppet)
                await settled()
                if version == 1:
                    assert sorted(puppet.started) == [0, 1]
                again = version == 3 and policy == "requeue"
                for rollout in list(puppet.running):
                    if (rollout.prompt_id == 0) == again:  # the straggler only the second time
                        rollout.end()
            batch = call.value
            assert batch.staleness().max() <= 1
            seen += prompt_ids(batch)
            await executor.set_version(version)
            await settled()
            check_counts(executor)
        assert puppet.started.count(0) == (2 if policy == "requeue" else 1)
        assert executor.counts.of(Outcome.EXPIRED) == (0 if policy == "requeue" else 1)
        assert (0 in seen) == (policy == "requeue")
        assert executor.staleness_violations == 0


async def test_keep_counts_what_is_too_old(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=1, max_concurrent_rollouts=9, straggler_policy="keep"
    ) as (executor, _):
        puppet, loader = Puppet(), prompts()
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.prepare_batch, loader, puppet)
            await settled()
            await executor.set_version(1)  # the trainer goes on without it
            puppet.end_all()
        assert call.value.staleness().tolist() == [1]
        assert executor.staleness_violations == 1
        executor.give_back(call.value)  # it did not arrive, and is counted when it does
        assert executor.staleness_violations == 0
        await executor.prepare_batch(loader, puppet)
        assert executor.staleness_violations == 1


async def test_a_result_given_back_is_a_violation_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1, straggler_policy="keep") as (
        executor,
        _,
    ):
        executor.submit({}, Instant())
        await settled()
        await executor.set_version(1)
        for _ in range(2):
            results = await executor.wait(1)
            assert executor.staleness_violations == 1
            executor.give_back_results(results, is_eval=False)
        assert executor.staleness_violations == 0


@pytest.mark.parametrize("policy", ["keep", "wait", "drop"])
async def test_a_result_given_back_after_an_update_is_no_violation_less(
    policy: str, autojump_clock: Clock
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=1, max_staleness=0, straggler_policy=policy
    ) as (executor, _):
        executor.submit({}, Instant())
        results = await executor.wait(1)
        await executor.set_version(1)
        executor.give_back_results(results, is_eval=False)
        assert executor.staleness_violations == 0
        (result,) = await executor.wait(1)
        assert (result.group is None) == (policy != "keep")
        assert executor.staleness_violations == (policy == "keep")


async def test_what_came_too_late_is_reported_and_gives_its_budget_back(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, queue_size=4) as (
        executor,
        _,
    ):
        puppet, loader = Puppet(), prompts()
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.prepare_batch, loader, puppet)
            await settled()
            puppet.end(0)
            puppet.end(1)
            await settled()
            await executor.set_version(1)  # without a batch: these four can never be in one
            puppet.end(2)
            puppet.end(3)
            await settled()
            assert len(puppet.running) == 4
            puppet.end_all()
        assert prompt_ids(call.value) == [4, 5, 6, 7]
        assert call.value.staleness().max() == 0
        late = {f.prompt_id: f for f in call.value.failures}
        assert set(late) == {"0", "1", "2", "3"}
        assert {f.outcome for f in late.values()} == {Outcome.EXPIRED}
        assert "discarded" in str(late["0"].failure)
        check_counts(executor)
        for version in (2, 3, 4):  # and nothing is owed afterwards
            await executor.set_version(version)
            async with trio.open_nursery() as nursery:
                call = Deferred(nursery, executor.prepare_batch, loader, puppet)
                await settled()
                assert len(puppet.running) == 4
                puppet.end_all()
            assert len(call.value) == 4


async def test_a_second_batch_of_one_version_raises_with_the_numbers(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        loader = prompts()
        assert prompt_ids(await executor.prepare_batch(loader, Instant())) == [0, 1]
        with pytest.raises(StalenessBudgetExhausted, match="2 accepted and 0 charged") as caught:
            await executor.prepare_batch(loader, Instant())
        assert "(max_staleness 0 + version 0 + 1) · 2" in str(caught.value)
        await executor.set_version(1)
        assert prompt_ids(await executor.prepare_batch(loader, Instant())) == [2, 3]


async def test_a_short_batch_is_charged_for(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        short = await executor.prepare_batch(loader := prompt_list(1), Instant())
        assert len(short) == 1
        with pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(loader, Instant())
        await executor.set_version(1)
        assert executor.staleness_manager.charged == 3
        assert executor.get_capacity() == 4


# --- failures ------------------------------------------------------------------------------------


async def test_a_workflow_that_always_fails_at_once_ends_the_call_with_its_causes(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=4, max_consecutive_failures=10
    ) as (executor, _):
        workflow, loader = Instant(raises(KeyError("the cause"))), prompts()
        for _ in range(2):
            with pytest.raises(TooManyFailures, match="10 groups failed in a row") as caught:
                await executor.prepare_batch(loader, workflow)
            assert len(caught.value.exceptions) == 10
            assert {type(cause) for cause in caught.value.exceptions} == {KeyError}
        assert workflow.runs < 40
        workflow.decide = lambda _: "accept"
        batch = await executor.prepare_batch(loader, workflow)  # mended, it goes on
        assert len(batch) == 4


async def test_a_workflow_that_fails_after_a_while_ends_the_call_too(
    autojump_clock: Clock,
) -> None:
    class Late:
        async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            await trio.sleep(1)
            raise ValueError(data["prompt_id"])

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        with pytest.raises(TooManyFailures) as caught:
            await executor.prepare_batch(prompts(), Late())
        assert len(caught.value.exceptions) == executor.config.max_consecutive_failures


async def test_failures_are_consecutive_only_if_nothing_else_settles_between(
    autojump_clock: Clock,
) -> None:
    def decide(data: Prompt) -> Any:
        if data["prompt_id"] % 3:
            raise ValueError("bad")
        return "accept" if data["prompt_id"] % 2 else None

    async with simulated_executor(
        servers=1, consumer_batch_size=4, max_concurrent_rollouts=1, max_consecutive_failures=3
    ) as (executor, _):
        loader = prompts()
        for _ in range(5):
            assert len(await step(executor, loader, Instant(decide))) == 4


def fails_first(times: int) -> Callable[[Prompt], Any]:
    """The first ``times`` attempts at each prompt fail."""
    attempts: Counter[int] = Counter()

    def decide(prompt: Prompt) -> Any:
        attempts[prompt["prompt_id"]] += 1
        if attempts[prompt["prompt_id"]] <= times:
            raise ValueError("told to")
        return "accept"

    return decide


@pytest.mark.parametrize(
    ("policy", "times"),
    [
        (GroupPolicy.all(max_retries=2), 2),
        (GroupPolicy.replace(max_replacements=2), 2),
        (GroupPolicy.at_least(1), 1),
    ],
)
async def test_a_group_that_its_policy_saved_is_no_failure_but_tells_of_its_members(
    policy: GroupPolicy, times: int, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_consecutive_failures=2) as (
        executor,
        _,
    ):
        workflow, loader = Instant(fails_first(times)), prompts()
        for _ in range(5):
            batch = await step(executor, loader, workflow, group_size=2, group_policy=policy)
            assert batch.failures == ()
            for group in batch.groups:
                told = [type(failure.error) for failure in group.member_failures]
                assert told in ([ValueError], [ValueError] * times)  # or its sibling came too late


async def test_a_group_that_fails_at_last_is_one_failure_however_often_it_ran(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=1, max_consecutive_failures=3, max_concurrent_rollouts=1
    ) as (executor, _):
        workflow = Instant(raises(ValueError("told to")))
        with pytest.raises(TooManyFailures) as caught:
            await executor.prepare_batch(
                prompts(), workflow, group_policy=GroupPolicy.all(max_retries=4)
            )
        assert len(caught.value.exceptions) == 3
        assert workflow.runs >= 3 * 5
        assert workflow.runs % 5 == 0 or executor.counts.running


async def test_one_bad_prompt_in_350_costs_nothing_but_itself(autojump_clock: Clock) -> None:
    def decide(data: Prompt) -> Any:
        if data["prompt_id"] == 17:
            raise ValueError("bad")
        return "accept"

    async with simulated_executor(servers=1, consumer_batch_size=35, max_staleness=1) as (
        executor,
        _,
    ):
        loader = prompt_list(350)
        seen: list[int] = []
        failures: list[Any] = []
        async for batch in executor.batches(loader, Instant(decide)):
            seen += prompt_ids(batch)
            failures += batch.failures
            await executor.set_version(batch.version + 1)
        assert seen == [n for n in range(350) if n != 17]
        assert [f.prompt_id for f in failures] == ["17"]


# --- loaders -------------------------------------------------------------------------------------


async def test_an_epoch_ends_with_a_short_batch_then_its_end_then_the_next_epoch(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        loader = prompt_list(10)
        for _ in range(2):
            batches = [await step(executor, loader, Instant()) for _ in range(3)]
            assert [prompt_ids(b) for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
            with pytest.raises(StopAsyncIteration):
                await executor.prepare_batch(loader, Instant())


async def test_batches_is_an_epoch(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        seen = []
        async for batch in executor.batches(prompt_list(9), Instant(), group_size=2):
            seen += prompt_ids(batch)
            await executor.set_version(batch.version + 1)
        assert seen == list(range(9))


async def test_an_empty_loader_ends_at_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await executor.prepare_batch([], Instant())


async def test_a_loader_of_lists_gives_the_same_prompts(autojump_clock: Clock) -> None:
    def lists() -> Iterator[list[Prompt]]:
        source = prompts(12)
        while chunk := list(islice(source, 5)):
            yield chunk

    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        loader = lists()
        batches = [await step(executor, loader, Instant()) for _ in range(3)]
        assert [prompt_ids(b) for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


class Stumbles:
    """A loader whose ``next`` raises once, and goes on."""

    def __init__(self, at: int) -> None:
        self.numbers = count()
        self.at = at

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        number = next(self.numbers)
        if number == self.at:
            raise OSError("the disk")
        return {"prompt_id": number}


async def test_a_loaders_error_arrives_as_itself_and_the_next_call_works(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        loader = Stumbles(6)
        with pytest.raises(OSError, match="the disk"):
            await executor.prepare_batch(loader, Instant())
        seen = []
        for _ in range(3):
            seen += prompt_ids(await step(executor, loader, Instant()))
        assert seen == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
        check_counts(executor)


async def test_a_loader_of_something_else_is_refused(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        with pytest.raises(UsageError, match="yields prompts"):
            await executor.prepare_batch([3], Instant())  # type: ignore[list-item]


class StatefulLoader:
    """What torchdata's StatefulDataLoader promises: it can be told where to go on, and by itself
    says where it is; each ``iter`` begins a pass, the first one where ``load_state_dict`` said."""

    def __init__(self, count: int) -> None:
        self._count, self._next, self.passes = count, 0, 0
        self._told: int | None = None

    def __iter__(self) -> Iterator[list[Prompt]]:
        self.passes += 1
        self._next, self._told = self._told or 0, None
        while self._next < self._count:
            self._next += 1
            yield [{"prompt_id": self._next - 1}]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._told = state["next"]


async def epoch(executor: WorkflowExecutor, loader: Any) -> list[list[int]]:
    seen = []
    async for batch in executor.batches(loader, Instant()):
        seen.append(prompt_ids(batch))
        await executor.set_version(executor.get_version() + 1)
    return seen


async def test_a_stateful_loader_goes_on_where_it_was_told_and_then_from_the_start(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        loader = StatefulLoader(5)
        loader.load_state_dict({"next": 2})
        assert await epoch(executor, loader) == [[2, 3], [4]]
        assert await epoch(executor, loader) == [[0, 1], [2, 3], [4]]
        assert loader.passes == 2


async def test_a_loader_that_is_its_own_iterator_has_one_epoch(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        loader = prompts(3)
        assert await epoch(executor, loader) == [[0, 1], [2]]
        assert await epoch(executor, loader) == []
        assert await epoch(executor, prompts(2)) == [[0, 1]]  # another takes its place


async def test_a_loader_that_raises_in_the_middle_of_an_epoch_loses_no_prompt(
    autojump_clock: Clock,
) -> None:
    """Several times, while earlier prompts are under way and batches wait."""

    class Stumbles:
        def __iter__(self) -> Iterator[Prompt]:
            steps = count()
            source = prompts(9)
            return iter(lambda: self._next(next(steps), source), None)

        def _next(self, step: int, source: Iterator[Prompt]) -> Prompt | None:
            if step % 3 == 2:
                raise OSError(f"at step {step}")
            return next(source, None)

    async with simulated_executor(servers=1, consumer_batch_size=2, max_staleness=1) as (
        executor,
        _,
    ):
        loader, seen, errors = Stumbles(), [], 0
        while True:
            try:
                batch = await step(executor, loader, Instant())
            except OSError:
                errors += 1
            except StopAsyncIteration:
                break
            else:
                seen += prompt_ids(batch)
        assert sorted(seen) == list(range(9))
        assert errors == 4


async def test_a_loader_that_could_not_begin_gives_way_to_another(autojump_clock: Clock) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Prompt]:
            raise OSError("no workers")

    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        with pytest.raises(OSError, match="no workers"):
            await executor.prepare_batch(Broken(), Instant())
        with pytest.raises(UsageError, match="int can not"):
            await executor.prepare_batch(5, Instant())  # type: ignore[arg-type]
        assert await epoch(executor, prompt_list(2)) == [[0, 1]]


async def test_another_loader_is_refused_while_one_is_under_way(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        first = prompt_list(6)
        await step(executor, first, Instant())
        with pytest.raises(UsageError, match="another data loader, while 4 groups"):
            await executor.prepare_batch(prompt_list(6), Instant())
        assert prompt_ids(await step(executor, first, Instant())) == [2, 3]
        assert prompt_ids(await step(executor, first, Instant())) == [4, 5]
        with pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(first, Instant())
        assert len(await executor.prepare_batch(prompts(), Instant())) == 2


async def test_arguments_may_change_and_hold_for_prompts_read_from_then_on(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, queue_size=2) as (
        executor,
        _,
    ):
        loader = prompts()
        sizes = []
        for group_size in (1, 3, 3, 3):
            batch = await step(executor, loader, Instant(), group_size=group_size)
            sizes.append([len(group) for group in batch.groups])
        assert sizes[0] == [1, 1]
        assert sizes[-1] == [3, 3]


async def test_a_cancelled_prepare_batch_loses_nothing(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=3) as (executor, _):
        puppet, loader = Puppet(), prompts()
        with trio.move_on_after(1) as scope:
            await executor.prepare_batch(loader, puppet)
        assert scope.cancelled_caught
        assert len(puppet.running) == 3  # they go on
        puppet.end_all()
        assert prompt_ids(await executor.prepare_batch(loader, puppet)) == [0, 1, 2]


async def test_a_batch_that_did_not_arrive_is_delivered_again_as_it_was(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=3) as (executor, _):
        loader = prompts()
        workflow = Instant(lambda data: None if data["prompt_id"] == 1 else "accept")
        batch = await executor.prepare_batch(loader, workflow)
        executor.give_back(batch)
        again = await executor.prepare_batch(loader, workflow)
        assert prompt_ids(again) == prompt_ids(batch) == [0, 2, 3]
        assert again.failures[:1] == batch.failures
        await executor.set_version(1)
        assert prompt_ids(await executor.prepare_batch(loader, workflow)) == [4, 5, 6]


async def test_the_last_batch_of_an_epoch_is_delivered_again_too(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=3) as (executor, _):
        loader = prompt_list(2)
        executor.give_back(await executor.prepare_batch(loader, Instant()))
        assert prompt_ids(await executor.prepare_batch(loader, Instant())) == [0, 1]
        with pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(loader, Instant())


@pytest.mark.parametrize("before", [True, False])
async def test_a_batch_given_back_after_its_epochs_end_is_the_next_epochs(
    before: bool, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=3, max_staleness=9) as (
        executor,
        _,
    ):
        loader = prompt_list(7)
        workflow = Instant(lambda data: None if data["prompt_id"] in (4, 6) else "accept")
        first, last = [batch async for batch in executor.batches(loader, workflow)]
        if before:
            executor.give_back(last)
        check_counts(executor)
        with pytest.raises(TypeError):  # a loader that can not be begun loses none of it
            await executor.prepare_batch(CanNotBegin(), workflow)
        if not before:
            executor.give_back(last)
        again = [batch async for batch in executor.batches(prompt_list(3), workflow)]
        delivered = [i for batch in again for i in prompt_ids(batch)]
        assert sorted(delivered) == sorted([*prompt_ids(last), 0, 1, 2])
        assert prompt_ids(last) == [3, 5]
        assert {3, 5} < set(prompt_ids(again[0]))
        told = [failure.prompt_id for batch in again for failure in batch.failures]
        assert told == ["4", "6"]
        check_counts(executor)
        assert len(first) == 3


class CanNotBegin:
    def __iter__(self) -> Any:
        raise TypeError


async def test_submit_and_prepare_batch_share_the_budget_and_nothing_else(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=1) as (
        executor,
        _,
    ):
        executor.submit({"prompt_id": "mine"}, Instant(), task_id="mine")
        batch = await executor.prepare_batch(prompts(), Instant())
        assert prompt_ids(batch) == [0, 1, 2, 3]
        (result,) = await executor.wait(1)
        assert result.task_id == "mine"
        check_counts(executor)


async def test_an_epochs_last_batch_waits_for_what_was_submitted_before_it(
    autojump_clock: Clock,
) -> None:
    """Its groups may not leave yet: that is neither a batch nor the end of the epoch."""
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet, loader = Puppet(), prompt_list(2)
        executor.submit({"prompt_id": "before"}, puppet)
        async with trio.open_nursery() as nursery:
            call = Deferred(nursery, executor.prepare_batch, loader, Instant())
            await settled()
            assert call.pending
            puppet.end("before", ValueError("told to"))
            await call.ended.wait()
        assert prompt_ids(call.value) == [0, 1]
        with pytest.raises(StopAsyncIteration):
            await executor.prepare_batch(loader, Instant())


async def test_a_version_without_a_batch_lets_no_more_start_than_one_with(
    autojump_clock: Clock,
) -> None:
    """It is charged for before what it made too old lets others start."""
    async with simulated_executor(servers=1, consumer_batch_size=2, max_concurrent_rollouts=64) as (
        executor,
        _,
    ):
        puppet = Puppet()
        with trio.move_on_after(1):
            await executor.prepare_batch(prompts(), puppet)
        assert len(puppet.running) == 2
        puppet.end_all()
        await settled()
        for version in (1, 2):
            await executor.set_version(version)
            await settled()
            assert len(puppet.running) == 2
            assert executor.get_capacity() == 0
            puppet.end_all()
            await settled()


# --- the parts -----------------------------------------------------------------------------------


def test_a_stream_is_of_one_loader() -> None:
    loader = prompt_list(1)
    stream = BatchStream(loader, PermitOrder(in_order=True), 1, lambda: None)
    stream.refuse(loader)
    with pytest.raises(UsageError, match="another data loader"):
        stream.refuse(prompt_list(1))
    assert not stream.ended
