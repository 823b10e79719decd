"""The asynchronous face: submit and wait, outcomes, groups, versions, pause, close."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RolloutClosed,
    RolloutCrashed,
    StalenessBudgetExhausted,
    TooManyFailures,
    TransportError,
    UsageError,
    WorkflowError,
)
from arealtrio.group_policy import GroupPolicy
from arealtrio.settlement import RolloutResult
from arealtrio.testing import FixedLengths, checkpoint, simulated_executor
from arealtrio.trajectory import Batch, Group
from arealtrio.types import FailureKind, Outcome, Trajectory
from arealtrio.weights import WeightUpdate

from .puppet import (
    Deferred,
    Generates,
    Instant,
    Prompt,
    Puppet,
    check_closed,
    check_counts,
    prompt_list,
    prompts,
    raises,
    row,
    settled,
)

Clock = trio.testing.MockClock


def ids(results: list[RolloutResult]) -> list[str]:
    return [result.task_id for result in results]


# --- submit, wait --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hello", None, 5, [1, 2]])
async def test_a_prompt_that_is_no_mapping_is_refused_and_nothing_queued(
    prompt: Any, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        workflow = Instant()
        for is_eval in (False, True):
            with pytest.raises(UsageError, match=f"a mapping, .* not {type(prompt).__name__}"):
                executor.submit(prompt, workflow, task_id="it", is_eval=is_eval)
        with pytest.raises(UsageError, match="a prompt is a mapping"):
            await executor.rollout_batch([{}, prompt], workflow)
        assert executor.counts.submitted == executor.eval_counts.submitted == 0
        executor.submit({}, workflow, task_id="it")
        assert ids(await executor.wait(1)) == ["it"]
        assert workflow.runs == 1


async def test_every_submission_has_one_result(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        names = [executor.submit(prompt, Instant()) for prompt in prompts(5)]
        check_counts(executor)
        results = await executor.wait(5)
        assert ids(results) == names
        assert [r.prompt_id for r in results] == list("01234")
        assert {r.outcome for r in results} == {Outcome.ACCEPTED}
        assert [r.number for r in results] == [0, 1, 2, 3, 4]
        check_counts(executor)


async def test_results_leave_in_permit_order_and_with_keep_as_they_settle(
    autojump_clock: Clock,
) -> None:
    for policy, expected in (("wait", ["a", "b", "c"]), ("keep", ["a", "b", "c"])):
        async with simulated_executor(
            servers=1, consumer_batch_size=8, straggler_policy=policy
        ) as (executor, _):
            puppet = Puppet()
            for name in "abc":
                executor.submit({"prompt_id": name}, puppet, task_id=name)
            await settled()
            puppet.end("c")
            puppet.end("b")
            await settled()
            queue = executor._results.of(is_eval=False)
            assert queue.ready == (0 if policy == "wait" else 2)
            puppet.end("a")
            assert ids(await executor.wait(3)) == expected


async def test_a_task_id_in_use_is_refused_and_nothing_is_poisoned(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        puppet = Puppet()
        assert executor.submit({"prompt_id": 1}, puppet, task_id="mine") == "mine"
        for _ in range(2):  # while it runs, and while its result waits
            before = executor.counts.as_dict()
            with pytest.raises(UsageError, match="'mine' is in use"):
                executor.submit({}, puppet, task_id="mine")
            assert executor.counts.as_dict() == before
            await settled()
            puppet.end_all()
            await settled()
        assert ids(await executor.wait(1)) == ["mine"]
        executor.submit({"prompt_id": 2}, puppet, task_id="mine")
        await settled()
        puppet.end(2)
        assert (await executor.wait_for_task("mine")).prompt_id == "2"


async def test_a_generated_id_avoids_one_that_the_caller_made(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        executor.submit({}, Instant(), task_id="rollout-0")
        names = {executor.submit({}, Instant()) for _ in range(3)}
        assert len(names | {"rollout-0"}) == 4
        assert {r.task_id for r in await executor.wait(4)} == names | {"rollout-0"}


async def test_a_full_queue_refuses_and_says_what_to_do(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1, queue_size=2) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(3):  # one runs, two are queued
            executor.submit(prompt, puppet)
        before = executor.counts.as_dict()
        with pytest.raises(UsageError, match="2 groups are queued, which is the queue_size"):
            executor.submit({}, puppet)
        assert executor.counts.as_dict() == before
        executor.submit({"prompt_id": "eval"}, puppet, is_eval=True)  # has its own queue


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ex: ex.submit({}, object()), "coroutine method arun_episode"),
        (lambda ex: ex.submit({}, "no.such:thing"), "can not be imported"),
        (lambda ex: ex.submit({}, Instant(), {"x": 1}), "made already"),
        (lambda ex: ex.submit({}, Instant(), None, 3), "can not be called"),
        (lambda ex: ex.submit({}, Instant(), group_size=0), "group_size must be an integer"),
        (lambda ex: ex.submit({}, Instant(), group_size=True), "group_size must be an integer"),
    ],
)
async def test_a_wrong_argument_changes_nothing(
    call: Callable[..., Any], words: str, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        with pytest.raises(UsageError, match=words):
            call(executor)
        assert executor.counts.submitted == 0


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
async def test_a_wait_for_no_number_is_refused(count: Any, autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        with pytest.raises(UsageError, match="count must be an integer of at least 1"):
            await executor.wait(count)


async def test_a_wait_that_could_never_end_raises_at_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        with pytest.raises(UsageError, match=r"wait\(1\) would never end: 0 results"):
            await executor.wait(1)
        puppet = Puppet()
        executor.submit({}, puppet)
        with pytest.raises(UsageError, match="1 are under way"):
            await executor.wait(2)
        with pytest.raises(UsageError, match="0 are under way"):
            await executor.wait(1, is_eval=True)


async def test_a_wait_raises_when_another_took_what_it_waited_for(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": 1}, puppet)
        async with trio.open_nursery() as nursery:
            calls = [Deferred(nursery, executor.wait, 1) for _ in range(2)]
            await settled()
            assert all(call.pending for call in calls)
            puppet.end(1)
        errors = [call.error for call in calls if call.error]
        assert len(errors) == 1
        assert isinstance(errors[0], UsageError)


@pytest.mark.parametrize("name", ["never", "taken", "batched"])
async def test_a_task_that_is_not_there(name: str, autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        executor.submit({}, Instant(), task_id="taken")
        await executor.wait(1)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(executor.prepare_batch, prompts(), Puppet())
                await settled()
                asked = next(iter(executor._live)) if name == "batched" else name
                with pytest.raises(UsageError, match="never submitted, taken, or waited for"):
                    await executor.wait_for_task(asked)
                scope.cancel()


async def test_a_time_out_takes_nothing(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        puppet = Puppet()
        for name in "ab":
            executor.submit({"prompt_id": name}, puppet, task_id=name)
        await settled()
        puppet.end("a")
        with pytest.raises(TimeoutError, match=r"timeout_s=3: 1 of 2 results were there"):
            await executor.wait(2, timeout_s=3)
        with pytest.raises(TimeoutError, match="task 'b' has not settled"):
            await executor.wait_for_task("b", timeout_s=3)
        puppet.end("b")
        assert (await executor.wait_for_task("b", timeout_s=3)).outcome is Outcome.ACCEPTED
        assert ids(await executor.wait(1, timeout_s=3)) == ["a"]


async def test_a_result_that_came_just_as_its_waiter_gave_up_is_anybodys(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=8) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": 1}, puppet, task_id="a")
        async with trio.open_nursery() as nursery:
            waiter = Deferred(nursery, executor.wait_for_task, "a")
            await settled()
            waiter.scope.cancel()
            puppet.end(1)
        if waiter.value is None:  # whichever was first, it is there exactly once
            assert ids(await executor.wait(1)) == ["a"]
        with pytest.raises(UsageError):
            await executor.wait(1)


async def test_a_result_freed_by_a_waiter_that_gave_up_wakes_another(
    autojump_clock: Clock,
) -> None:
    for _ in range(20):  # in whichever order trio runs the two tasks
        async with (
            simulated_executor(servers=1, consumer_batch_size=8) as (executor, _),
            trio.open_nursery() as nursery,
        ):
            puppet = Puppet()
            for name in "ab":
                executor.submit({"prompt_id": name}, puppet, task_id=name)
            by_task = Deferred(nursery, executor.wait_for_task, "a")
            await settled()
            by_count = Deferred(nursery, executor.wait, 1)
            await settled()
            by_task.scope.cancel()
            puppet.end("a")
            await settled()
            assert (by_task.value is None) == (not by_count.pending)
            puppet.end_all()


async def test_an_id_may_be_used_again_as_soon_as_its_result_is_taken(
    autojump_clock: Clock,
) -> None:
    async with (
        simulated_executor(servers=1, consumer_batch_size=64) as (executor, _),
        trio.open_nursery() as nursery,
    ):
        puppet = Puppet()

        async def again() -> RolloutResult:
            executor.submit({"prompt_id": "second"}, puppet, task_id="a")
            return await executor.wait_for_task("a")

        for _ in range(20):  # who runs first, the waiter that was woken or the other, is chance
            executor.submit({"prompt_id": "first"}, puppet, task_id="a")
            first = Deferred(nursery, executor.wait_for_task, "a")
            await settled()
            puppet.end_all()
            while "a" in executor._results or "a" in executor._live:
                await trio.lowlevel.checkpoint()
            second = Deferred(nursery, again)
            await settled()
            puppet.end_all()
            await settled()
            assert (first.error, second.error) == (None, None)
            assert [first.value.prompt_id, second.value.prompt_id] == ["first", "second"]


async def test_wait_wait_for_task_and_evaluation_steal_nothing_from_each_other(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=16) as (executor, _):
        puppet = Puppet()
        names = [executor.submit({"prompt_id": i}, puppet, task_id=f"t{i}") for i in range(8)]
        evals = [
            executor.submit({"prompt_id": f"e{i}"}, puppet, task_id=f"e{i}", is_eval=True)
            for i in range(3)
        ]
        async with trio.open_nursery() as nursery:
            by_task = [Deferred(nursery, executor.wait_for_task, f"t{i}") for i in (1, 5)]
            await settled()
            by_count = [Deferred(nursery, executor.wait, 3) for _ in range(2)]

            async def evaluate() -> list[RolloutResult]:
                return await executor.wait(3, is_eval=True)

            evaluated = Deferred(nursery, evaluate)
            await settled()
            puppet.end_all()
        assert [call.value.task_id for call in by_task] == ["t1", "t5"]
        taken = [r.task_id for call in by_count for r in call.value]
        assert sorted(taken) == sorted(set(names) - {"t1", "t5"})
        assert ids(evaluated.value) == evals
        check_counts(executor)
        assert executor.counts.submitted == 8
        assert executor.eval_counts.of(Outcome.ACCEPTED) == 3


async def test_one_task_has_one_waiter(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        puppet = Puppet()
        executor.submit({}, puppet, task_id="a")
        async with trio.open_nursery() as nursery:
            first = Deferred(nursery, executor.wait_for_task, "a")
            await settled()
            with pytest.raises(UsageError, match="waited for already"):
                await executor.wait_for_task("a")
            puppet.end_all()
        assert first.value.outcome is Outcome.ACCEPTED


# --- outcomes ------------------------------------------------------------------------------------


def refuse(group: Group) -> bool:
    return False


def broken_filter(group: Group) -> bool:
    raise ZeroDivisionError("in the filter")


@pytest.mark.parametrize(
    ("workflow", "accept", "outcome", "kind", "error"),
    [
        (Instant(), None, Outcome.ACCEPTED, None, None),
        (Instant(), refuse, Outcome.REJECTED, None, None),
        (Instant(lambda _: None), None, Outcome.REJECTED, None, None),
        (Instant(raises(KeyError("k"))), None, Outcome.FAILED, FailureKind.WORKFLOW, KeyError),
        (Instant(lambda _: 7), None, Outcome.FAILED, FailureKind.WORKFLOW, WorkflowError),
        (Instant(lambda _: []), None, Outcome.FAILED, FailureKind.WORKFLOW, WorkflowError),
        (Instant(), broken_filter, Outcome.FAILED, FailureKind.WORKFLOW, ZeroDivisionError),
        (Instant(), lambda _: "yes", Outcome.FAILED, FailureKind.WORKFLOW, WorkflowError),
        (
            Instant(raises(InvalidRequest("too long"))),
            None,
            Outcome.FAILED,
            FailureKind.DATA,
            InvalidRequest,
        ),
        (
            Instant(raises(ExceptionGroup("g", [TransportError("reset")]))),
            None,
            Outcome.FAILED,
            FailureKind.INFRASTRUCTURE,
            ExceptionGroup,
        ),
    ],
)
async def test_how_a_rollout_ends(
    workflow: Instant, accept: Any, outcome: Outcome, kind: Any, error: Any, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        executor.submit({}, workflow, should_accept_fn=accept)
        (result,) = await executor.wait(1)
        assert result.outcome is outcome
        assert (result.group is not None) == (outcome is Outcome.ACCEPTED)
        assert executor.counts.of(outcome) == 1
        check_counts(executor)
        if error is None:
            assert result.failure is None
        else:
            assert result.failure is not None
            assert result.failure.kind is kind
            assert isinstance(result.failure.error, error)
            assert kind.value in str(result.failure)
        # Only an accepted one keeps its budget spent.
        assert executor.get_capacity() == (1 if outcome is Outcome.ACCEPTED else 2)


async def test_a_failure_keeps_its_traceback(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        executor.submit({}, Instant(raises(KeyError("here"))))
        (result,) = await executor.wait(1)
    assert result.failure is not None
    frames = []
    frame = result.failure.error.__traceback__
    while frame is not None:
        frames.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    assert frames[-1] == "decide"
    assert "arun_episode" in frames


async def test_a_request_no_server_should_see_is_the_datas_failure(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        executor.submit({"input_ids": []}, Generates())
        (result,) = await executor.wait(1)
        assert result.failure is not None
        assert result.failure.kind is FailureKind.DATA
        assert result.outcome is Outcome.FAILED


async def test_a_server_that_dies_costs_its_own_rollouts_and_their_slots_come_back(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(
        servers=2, lengths=FixedLengths(50), consumer_batch_size=8, max_failovers=0
    ) as (
        executor,
        fleet,
    ):
        for prompt in prompts(8):
            executor.submit(prompt, Generates())
        await trio.sleep(0.1)
        assert [server.generations for server in fleet] == [4, 4]
        fleet.servers[0].die()
        results = await executor.wait(8)
        failed = [r for r in results if r.outcome is Outcome.FAILED]
        assert len(failed) == 4
        assert {r.failure.kind for r in failed if r.failure} == {FailureKind.INFRASTRUCTURE}
        assert executor.counts.of(Outcome.ACCEPTED) == 4
        assert all(row.outstanding == 0 for row in executor.engine.statistics())
        assert executor.get_capacity() == 4
    check_closed(executor, fleet)


async def test_a_rollout_expires_at_its_deadline_and_is_aborted_on_its_server(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, lengths=FixedLengths(10_000), rollout_timeout_s=5) as (
        executor,
        fleet,
    ):
        started = trio.current_time()
        executor.submit({"input_ids": [3]}, Generates())
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.EXPIRED
        assert result.failure is not None
        assert isinstance(result.failure.error, DeadlineExceeded)
        assert "rollout_timeout_s=5" in str(result.failure.error)
        assert fleet.servers[0].generations == 0
        assert executor.get_capacity() == 1
        assert trio.current_time() - started == pytest.approx(5)


async def test_rows_of_a_workflow_that_catches_its_deadline_are_not_thrown_away(
    autojump_clock: Clock,
) -> None:
    class Stubborn:
        async def arun_episode(self, engine: object, data: Prompt) -> Trajectory:
            with suppress(trio.Cancelled):
                await trio.sleep_forever()
            return row()

    async with simulated_executor(servers=1, rollout_timeout_s=5) as (executor, fleet):
        executor.submit({}, Stubborn())
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.ACCEPTED
        check_counts(executor)
    check_closed(executor, fleet)


async def test_what_runs_at_close_is_cancelled_and_nothing_is_left(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=2, lengths=FixedLengths(10_000), consumer_batch_size=40, max_concurrent_rollouts=30
    ) as (executor, fleet):
        for prompt in prompts(20):
            executor.submit(prompt, Generates(), group_size=2)
        executor.submit({"input_ids": [3]}, Generates(), is_eval=True)
        await trio.sleep(1)
        assert executor.counts.running > 0
        assert executor.counts.queued > 0
        assert sum(server.generations for server in fleet) == 16
        check_counts(executor)
    check_closed(executor, fleet)
    assert executor.counts.of(Outcome.CANCELLED) == 20
    assert executor.eval_counts.of(Outcome.CANCELLED) == 1


# --- groups --------------------------------------------------------------------------------------


async def test_a_group_is_its_members_in_order(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": "p"}, puppet, group_size=3)
        await settled()
        assert len(puppet.running) == 3
        for reward, rollout in reversed(list(enumerate(puppet.running))):
            rollout.end(row(reward=reward))
        (result,) = await executor.wait(1)
        assert result.group is not None
        assert len(result.group) == 3
        assert sorted(result.group.rewards) == [0, 1, 2]
        assert [r.member_index for r in result.group.rows] == [0, 1, 2]
        assert {r.prompt_id for r in result.group.rows} == {"p"}
        assert executor.counts.submitted == 1


@pytest.mark.parametrize(
    ("how", "outcome"),
    [(ValueError("one"), Outcome.FAILED), (None, Outcome.REJECTED), (3, Outcome.FAILED)],
)
async def test_one_member_ends_the_others(
    how: Any, outcome: Outcome, autojump_clock: Clock
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        puppet = Puppet()
        executor.submit({}, puppet, group_size=3)
        await settled()
        puppet.running[1].end(how)
        (result,) = await executor.wait(1)
        assert result.outcome is outcome
        assert not puppet.running
        assert executor._admission.running_members == 0
        if outcome is Outcome.FAILED:
            assert result.failure is not None
            assert result.failure.member_index in range(3)
        check_counts(executor)


async def test_a_failed_members_siblings_are_aborted_on_the_server_before_the_group_settles(
    autojump_clock: Clock,
) -> None:
    class OneFails(Generates):
        async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            first, self.first = getattr(self, "first", True), False
            if first:
                await trio.sleep(0.5)
                raise ValueError("one")
            return await super().arun_episode(engine, data)

    async with simulated_executor(
        servers=1, lengths=FixedLengths(10_000), consumer_batch_size=1, traced=True
    ) as (executor, fleet):
        executor.submit({"input_ids": [3]}, OneFails(), group_size=4)
        await trio.sleep(0.25)
        assert fleet.servers[0].generations == 3
        (result,) = await executor.wait(1)
        assert result.outcome is Outcome.FAILED
        assert isinstance(result.failure and result.failure.error, ValueError)
        assert fleet.servers[0].generations == 0
        aborts = [x for x in fleet.trace if "abort" in x.request and not x.outcome]
        assert len(aborts) == 3
        assert executor._admission.running_members == 0
        assert [row.outstanding for row in executor.engine.statistics()] == [0]


async def test_members_that_have_not_started_never_do(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, max_concurrent_rollouts=2) as (
        executor,
        _,
    ):
        puppet = Puppet()
        executor.submit({"prompt_id": "first"}, puppet, group_size=4)
        executor.submit({"prompt_id": "second"}, puppet)
        await settled()
        assert puppet.started == ["first", "first"]
        puppet.running[0].end(None)
        await settled()
        assert puppet.started == ["first", "first", "second"]
        puppet.end_all()
        assert [r.outcome for r in await executor.wait(2)] == [Outcome.REJECTED, Outcome.ACCEPTED]


# --- rollout_batch -------------------------------------------------------------------------------


async def test_rollout_batch_returns_the_accepted_in_order_and_the_rest_as_failures(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=9) as (executor, _):

        def decide(data: Prompt) -> Any:
            if data["prompt_id"] % 3 == 1:
                raise ValueError("bad")
            return None if data["prompt_id"] % 3 == 2 else "accept"

        batch = await executor.rollout_batch(prompt_list(9), Instant(decide), group_size=2)
        assert [g.prompt_id for g in batch.groups] == ["0", "3", "6"]
        assert [f.prompt_id for f in batch.failures] == ["1", "2", "4", "5", "7", "8"]
        assert {len(g) for g in batch.groups} == {2}
        check_counts(executor)


async def test_rollout_batch_of_nothing_is_empty(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1) as (executor, _):
        batch = await executor.rollout_batch([], Instant())
        assert len(batch) == 0


async def test_rollout_batch_beyond_the_budget_says_so_and_leaves_nothing(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2, max_staleness=1) as (
        executor,
        _,
    ):
        with pytest.raises(StalenessBudgetExhausted, match="1 groups are queued") as caught:
            await executor.rollout_batch(prompt_list(5), Instant())
        assert r"(max_staleness 1 + version 0 + 1) · 2" in str(caught.value)
        assert executor.counts.queued == executor.counts.running == 0
        assert not executor._live
        check_counts(executor)


async def test_what_a_failed_rollout_batch_threw_away_is_no_debt_for_ever(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        with pytest.raises(StalenessBudgetExhausted):
            await executor.rollout_batch(prompt_list(3), Instant())
        await executor.set_version(1)
        assert executor.get_capacity() == 2
        loader = prompts()
        for version in range(1, 4):
            assert len(await executor.prepare_batch(loader, Instant())) == 2
            await executor.set_version(version + 1)


async def test_a_cancelled_rollout_batch_cancels_what_it_started(autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, lengths=FixedLengths(10_000), consumer_batch_size=8
    ) as (executor, fleet):
        with trio.move_on_after(1):
            await executor.rollout_batch(prompt_list(6), Generates())
        await settled()
        assert executor.counts.of(Outcome.CANCELLED) == 6
        assert fleet.servers[0].generations == 0
        check_counts(executor)
        assert executor.get_capacity() == 8


async def test_what_was_withdrawn_is_not_run_again(autojump_clock: Clock) -> None:
    class Lingers(Puppet):
        async def arun_episode(self, engine: Any, data: Prompt, /) -> Any:
            try:
                return await super().arun_episode(engine, data)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)  # as an abort may take

    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        puppet, policy = Lingers(), GroupPolicy.all(max_retries=5)
        async with trio.open_nursery() as nursery:
            batch = partial(executor.rollout_batch, prompt_list(1), puppet, group_policy=policy)
            call = Deferred(nursery, partial(batch, group_size=2))
            await settled()
            puppet.running[0].end(ValueError("one of them"))
            await trio.sleep(1.5)  # the group has failed, and its other member is leaving
            call.scope.cancel()
        await trio.sleep(5)
        assert not puppet.running
        assert len(puppet.started) == 2
        assert executor.counts.of(Outcome.CANCELLED) == 1
        check_counts(executor)


# --- version, pause ------------------------------------------------------------------------------


async def test_a_new_version_lets_rollouts_start_at_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        await settled()
        assert sorted(puppet.started) == [0, 1]
        puppet.end_all()
        await executor.wait(2)
        await executor.set_version(1)
        now = trio.current_time()
        await settled()
        assert sorted(puppet.started) == [0, 1, 2, 3]
        assert trio.current_time() == now


async def test_pause_starts_nothing_but_harvests_and_evaluates(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_concurrent_rollouts=2) as (
        executor,
        _,
    ):
        puppet = Puppet()
        for prompt in prompts(4):
            executor.submit(prompt, puppet)
        await settled()
        executor.pause()
        puppet.end_all()
        assert [r.prompt_id for r in await executor.wait(2)] == ["0", "1"]
        executor.submit({"prompt_id": "eval"}, puppet, is_eval=True)
        await settled()
        assert set(puppet.started) == {0, 1, "eval"}
        puppet.end_all()
        assert len(await executor.wait(1, is_eval=True)) == 1
        await executor.drain()
        check_counts(executor)
        executor.resume()
        await settled()
        assert set(puppet.started) == {0, 1, "eval", 2, 3}


async def test_drain_waits_for_what_runs_and_names_what_is_left(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        puppet = Puppet()
        for prompt in prompts(3):
            executor.submit(prompt, puppet)
        await settled()
        executor.pause()
        with pytest.raises(TimeoutError, match="3 rollouts still run"):
            await executor.drain(timeout_s=1)
        puppet.end_all()
        await executor.drain(timeout_s=1)
        assert executor.counts.running == 0


async def test_evaluation_costs_no_staleness_budget(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        before = executor.get_capacity()
        for prompt in prompts(5):
            executor.submit(prompt, Instant(), is_eval=True)
        assert len(await executor.wait(5, is_eval=True)) == 5
        assert executor.get_capacity() == before
        assert executor.counts.submitted == 0
        assert executor.eval_counts.of(Outcome.ACCEPTED) == 5


async def test_a_wait_that_needs_the_next_version_raises_with_the_numbers(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=2) as (executor, _):
        for prompt in prompts(3):
            executor.submit(prompt, Instant(), task_id=str(prompt["prompt_id"]))
        assert len(await executor.wait(2)) == 2
        for call in (lambda: executor.wait(1), lambda: executor.wait_for_task("2")):
            with pytest.raises(StalenessBudgetExhausted, match="2 accepted and 0 charged"):
                await call()
        await executor.set_version(1)
        assert (await executor.wait_for_task("2")).outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("policy", ["wait", "drop", "keep"])
async def test_a_result_that_ages_before_it_is_taken_has_expired(
    policy: Any, autojump_clock: Clock
) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=1, max_staleness=1, straggler_policy=policy
    ) as (executor, _):
        for prompt in prompts(2):
            executor.submit(prompt, Instant(), task_id=f"{prompt['prompt_id']}")
        await settled()
        for version in (1, 2):
            await executor.set_version(version)
        first = await executor.wait_for_task("0")
        (second,) = await executor.wait(1)
        kept = policy == "keep"
        wanted = Outcome.ACCEPTED if kept else Outcome.EXPIRED
        assert [first.outcome, second.outcome] == [wanted, wanted]
        assert executor.staleness_violations == (2 if kept else 0)
        assert executor.counts.of(wanted) == 2
        check_counts(executor)
        assert executor.get_capacity() > 0  # what nobody consumed holds no budget


async def test_a_wait_of_no_time_looks_once(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, _):
        executor.submit({}, Instant(), task_id="there")
        executor.submit({}, Puppet(), task_id="running")
        await settled()
        assert ids(await executor.wait(1, timeout_s=0)) == ["there"]
        with pytest.raises(TimeoutError):
            await executor.wait(1, timeout_s=0)
        with pytest.raises(TimeoutError):
            await executor.wait_for_task("running", timeout_s=0)


async def test_recovery_sets_a_high_version_and_goes_on(autojump_clock: Clock) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=4, max_staleness=1) as (
        executor,
        _,
    ):
        await executor.set_version(1000)
        assert executor.get_capacity() == min(4, 8)
        loader = prompts()
        for version in range(1000, 1004):
            batch = await executor.prepare_batch(loader, Instant())
            assert len(batch) == 4
            assert batch.version == version
            assert batch.staleness().max() <= 1
            await executor.set_version(version + 1)
        assert executor.staleness_violations == 0


# --- closing, crashing ---------------------------------------------------------------------------


async def test_close_wakes_every_waiter_at_once_and_refuses_what_comes_after(
    autojump_clock: Clock,
) -> None:
    async with (
        trio.open_nursery() as nursery,
        simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet),
    ):
        executor.submit({}, Puppet(), task_id="a")
        executor.submit({}, Puppet(), task_id="b")
        loader = prompts()
        calls = [
            Deferred(nursery, executor.wait_for_task, "a"),
            Deferred(nursery, executor.wait, 1),
            Deferred(nursery, executor.prepare_batch, loader, Puppet()),
            Deferred(nursery, executor.rollout_batch, prompt_list(2), Puppet()),
            Deferred(nursery, executor.drain),
        ]
        await settled()
        assert all(call.pending for call in calls)
    assert [type(call.error) for call in calls] == [RolloutClosed] * 5
    check_closed(executor, fleet)
    for use in (
        lambda: executor.wait(1),
        lambda: executor.wait_for_task("a"),
        lambda: executor.wait_for_task("unknown"),
        lambda: executor.prepare_batch(loader, Instant()),
        lambda: executor.rollout_batch(prompt_list(1), Instant()),
        lambda: executor.update_weights(WeightUpdate.label(1)),
        lambda: executor.set_version(1),
    ):
        with pytest.raises(RolloutClosed):
            await use()
    with pytest.raises(RolloutClosed):
        executor.submit({}, Instant())
    assert executor.counts.queued == 0


async def test_a_crash_hides_no_error_of_the_block(autojump_clock: Clock) -> None:
    error, crash = ZeroDivisionError("the block's"), AssertionError("a bug of ours")

    async def break_down() -> None:
        raise crash

    with pytest.raises(RolloutCrashed) as caught:  # noqa: PT012 - the block's own end raises
        async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet):
            executor.submit({}, Puppet())
            executor._nursery.start_soon(break_down)
            raise error
    cause = caught.value.__cause__
    assert isinstance(cause, BaseExceptionGroup)
    assert cause.exceptions == (crash,)
    assert cause.__context__ is error
    assert str(error) in "".join(traceback.format_exception(caught.value))
    check_closed(executor, fleet)


async def test_an_error_in_the_block_arrives_as_itself(autojump_clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block's own end raises
        async with simulated_executor(servers=1, consumer_batch_size=4) as (executor, fleet):
            executor.submit({}, Puppet())
            await settled()
            raise ZeroDivisionError
    check_closed(executor, fleet)


async def test_cancelling_the_block_from_outside_leaves_nothing(autojump_clock: Clock) -> None:
    with trio.move_on_after(1) as scope:
        async with simulated_executor(
            servers=1, lengths=FixedLengths(10_000), consumer_batch_size=4
        ) as (executor, fleet):
            for prompt in prompts(6):
                executor.submit(prompt, Generates())
            await trio.sleep_forever()
    assert scope.cancelled_caught
    check_closed(executor, fleet)
    assert executor.counts.of(Outcome.CANCELLED) == 6


# --- what the config says reaches whom it is for -------------------------------------------------


async def test_a_generation_asks_for_the_version_of_its_permit(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with simulated_executor(servers=1, consumer_batch_size=1, max_staleness=4) as (
        executor,
        _,
    ):
        asked: list[int] = []
        lease = executor.engine.pool.lease

        def noted(**how: Any) -> Any:
            asked.append(how["min_version"])
            return lease(**how)

        monkeypatch.setattr(executor.engine.pool, "lease", noted)
        for version in (0, 3):
            if version:
                await executor.set_version(version)
            executor.submit({"prompt_id": 0, "input_ids": [5]}, Generates())
            await executor.wait(1)
        assert asked == [0, 3]
        executor.submit({"input_ids": [5]}, Generates(), is_eval=True)
        await executor.wait(1, is_eval=True)
        assert asked[2:] == [0]  # it has no permit


@pytest.mark.parametrize("priority", ["eval", "train"])
async def test_priority_says_which_starts_first(priority: str, autojump_clock: Clock) -> None:
    async with simulated_executor(
        servers=1, consumer_batch_size=4, max_concurrent_rollouts=1, priority=priority
    ) as (executor, _):
        puppet = Puppet()
        executor.submit({"prompt_id": "first"}, puppet)
        executor.submit({"prompt_id": "train"}, puppet)
        executor.submit({"prompt_id": "eval"}, puppet, is_eval=True)
        for _ in range(3):
            await settled()
            puppet.end_all()
        await settled()
        assert puppet.started[:2] == ["first", priority]


async def test_too_large_a_share_of_the_configured_window_ends_prepare_batch(
    autojump_clock: Clock,
) -> None:
    def every_other(data: Prompt) -> Any:
        if data["prompt_id"] % 2:
            raise ValueError
        return None

    # One at a time, so that they settle in the order of their prompts; and the window is full
    # before a batch is.
    async with simulated_executor(
        servers=1,
        consumer_batch_size=8,
        max_concurrent_rollouts=1,
        max_failure_ratio=0.4,
        failure_window=10,
    ) as (executor, _):
        with pytest.raises(TooManyFailures, match=r"5 of the last 10 .*max_failure_ratio=0.4"):
            await executor.prepare_batch(prompts(), Instant(every_other))


# --- weights -------------------------------------------------------------------------------------


async def test_weights_change_under_rollouts_in_flight_and_every_token_says_so(
    autojump_clock: Clock,
) -> None:
    async with simulated_executor(
        servers=2, lengths=FixedLengths(100), consumer_batch_size=4, max_staleness=2
    ) as (executor, fleet):
        for prompt in prompts(4):
            executor.submit(prompt, Generates())
        await trio.sleep(0.5)
        result = await executor.update_weights(WeightUpdate.from_disk(checkpoint(1), 1))
        assert result.version == executor.get_version() == 1
        assert result.updated == fleet.addresses
        assert result.failed == {}
        results = await executor.wait(4)
        batch = Batch(groups=tuple(r.group for r in results if r.group), version=1)
        assert batch.mixed_version_trajectories() == 4
        assert all(r.head_version == 0 and r.tail_version == 1 for r in batch.rows)
