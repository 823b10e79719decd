"""RolloutNursery: where rollouts live, and the only place that starts one or settles its group.

Every decision (who starts, how a group ends, who is woken) is a synchronous function of this
object's state; only ``_run_member`` and the waits suspend. So there is no lock, and nothing is
polled: whatever changes the state calls ``_changed``, which starts what may start and wakes who can
go on. Ctrl-C comes between two such steps and never within one: half a step is counted for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from .admission import Admission
from .config import RolloutConfig
from .containment import contained, is_cancelled_from_outside, what_ends_the_run
from .delivery import PermitOrder
from .engine import RemoteEngine
from .errors import DeadlineExceeded, RolloutClosed, WorkflowError
from .failures import FailureBudget
from .groups import CANCELLED, GroupTask, Verdict, judge
from .lateness import is_bounded, is_older, outdated, straggler
from .settlement import Failure, RolloutCounts, RolloutResult, classify
from .staleness import StalenessManager
from .stall import StallAlarm
from .status import AdmissionStatus, ExecutorStatus, members_of
from .trajectory import Group
from .types import FailureKind, Outcome
from .waiting import WaitList, time_limit
from .watch import StepWatch

T = TypeVar("T")

logger = logging.getLogger(__name__)


class RolloutNursery:
    """Admits rollouts, runs each in its own cancel scope, and settles each group exactly once.

    What a trainer asks for stands on top of it, in ``WorkflowExecutor``.

    Args:
        config: Limits and policies.
        engine: Generates.
        nursery: Where rollouts run.
        staleness_manager: Admits; None makes one from ``config``.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: RemoteEngine,
        nursery: trio.Nursery,
        staleness_manager: StalenessManager | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.staleness_manager = staleness_manager or StalenessManager(
            engine,
            config.max_concurrent_rollouts or config.consumer_batch_size,
            config.consumer_batch_size,
            config.max_staleness,
        )
        self._nursery = nursery
        self._order = PermitOrder(in_order=config.straggler_policy == "wait")
        self._admission = Admission(config, self.staleness_manager, self._order)
        self._live: dict[str, GroupTask] = {}  # task id -> queued or running
        self._waiting = WaitList()
        self._failures = FailureBudget(
            config.max_consecutive_failures, config.max_failure_ratio, config.failure_window
        )
        self._closed = False
        self._all_left = trio.Event()  # no rollout runs any more, after close
        self._alarm = StallAlarm(config.stall_warning_s, lambda: str(self.status()))
        nursery.start_soon(self._alarm.run, name="stall alarm")
        self._is_bounded = is_bounded(config)
        self._stops_stragglers = config.straggler_policy in ("requeue", "drop")
        self._watch: StepWatch | None = None

    @property
    def counts(self) -> RolloutCounts:
        """Training groups by where they are (invariant I1)."""
        return self._admission.counts

    @property
    def eval_counts(self) -> RolloutCounts:
        """Evaluation groups by where they are."""
        return self._admission.eval_counts

    def rollout_counts(self) -> Mapping[str, int]:
        """Training groups by where they are: submitted, queued, running, and each outcome."""
        return self.counts.as_dict()

    def get_version(self) -> int:
        """The weight version that every server in service has."""
        return self.engine.get_version()

    def get_capacity(self) -> int:
        """How many groups admission would let start now (AReaL's formula; may be negative)."""
        return self.staleness_manager.get_capacity()

    def status(self) -> ExecutorStatus:
        """Why am I waiting: what every unsettled rollout does, and what blocks admission.

        ``str`` of it is a table. It is also logged, as a warning of the logger ``arealtrio``, when
        nothing settled for ``stall_warning_s``.
        """
        admission = self._admission
        return ExecutorStatus(
            members=members_of(self._live.values(), trio.current_time()),
            admission=AdmissionStatus(
                queued=admission.queued,
                running_members=admission.running_members,
                concurrency=admission.concurrency,
                staleness_capacity=self.staleness_manager.get_budget(),
                version=self.get_version(),
                paused=admission.paused,
                recovering=admission.recovering,
                servers_in_service=len(self.engine.pool.in_service),
            ),
            quiet_s=self._alarm.quiet_s(),
        )

    # --- starting --------------------------------------------------------------------------------

    @enable_ki_protection
    def _enqueue(self, groups: Iterable[GroupTask]) -> None:
        if self._watch is not None and not self.counts.submitted % 16:  # a look now and then
            self._watch.called()
        for group in groups:
            self._live[group.task_id] = group
            self._admission.enqueue(group)
            self._alarm.arm()
        self._pump()

    @enable_ki_protection
    def _pump(self) -> None:
        """Start every member that may start. The only place where a rollout begins."""
        while not self._closed and (member := self._admission.next_member(self.engine)):
            group, index = member
            self._nursery.start_soon(self._run_member, group, index, name=group.task_id)

    def _changed(self) -> None:
        """Start what may start now, and wake who can go on."""
        self._pump()
        self._waiting.notify()

    # --- running ---------------------------------------------------------------------------------

    async def _run_member(self, group: GroupTask, index: int) -> None:
        """Run one rollout in its own cancel scope, and record how it ended, whatever happens."""
        watch = self._watch
        if watch is not None:
            watch.between_steps()
        verdict = CANCELLED
        engine = group.running[index]
        scope = engine.scope
        try:
            with scope:
                result = await group.workflow.arun_episode(engine, group.data)
                verdict = group.take_result(index, result)
            if scope.cancelled_caught and not group.stopped:
                verdict = self._expired(index)
        except BaseException as exc:  # noqa: BLE001 - between user code and the run
            if (end := what_ends_the_run(exc)) is not None:
                self.close()  # first: no waiter is to take that for a result
                raise end from None
            error = contained(exc, group.workflow)
            verdict = Verdict(Outcome.FAILED, Failure(classify(error), error, index))
        finally:
            if verdict.outcome is not Outcome.ACCEPTED and is_cancelled_from_outside():
                self.close()  # first: what a workflow makes of that is no failure of the prompt's
            self._member_ended(group, index, verdict)
            if watch is not None:
                watch.between_steps()

    def _expired(self, index: int) -> Verdict:
        limit = self.config.rollout_timeout_s
        error = DeadlineExceeded(f"the rollout did not settle within rollout_timeout_s={limit:g}")
        return Verdict(Outcome.EXPIRED, Failure(FailureKind.INFRASTRUCTURE, error, index))

    @enable_ki_protection
    def _member_ended(self, group: GroupTask, index: int, verdict: Verdict) -> None:
        group.member_ended(index, verdict)
        self._admission.member_ended(group)
        if self._closed and not self._admission.running_members:
            self._all_left.set()
        if group.all_ended:
            self._settle(group)
        else:
            self._pump()

    # --- settling --------------------------------------------------------------------------------

    def _settle(self, group: GroupTask) -> None:
        """Settle a group whose members have all ended: exactly once, synchronously."""
        try:
            accepted, verdict = judge(group)
        except BaseException:  # the filter was interrupted: the run ends, and settles this too
            self.close()
            raise
        if accepted is not None and group.is_batched and self._is_outdated(accepted):
            verdict = self._too_old(group, accepted)
            accepted = None
        if accepted is None and not self._closed and self._begin_again(group, verdict):
            self._changed()
            return
        self._count_failure(group, verdict)
        self._admission.settled(group, verdict.outcome)
        del self._live[group.task_id]
        if self._live:
            self._alarm.wind_up()
        else:
            self._alarm.stop()
        result = RolloutResult(
            task_id=group.task_id,
            prompt_id=group.prompt_id,
            outcome=verdict.outcome,
            group=accepted,
            failure=verdict.failure,
            member_failures=group.member_failures,
            number=group.number,
        )
        group.deliver(group, result)
        self._changed()

    def _begin_again(self, group: GroupTask, verdict: Verdict) -> bool:
        """Run a group again, where the straggler policy or its own policy says so."""
        if verdict.too_late:
            may, again = self._may_requeue(group), self._admission.requeue
        else:
            may, again = self._may_retry(group), self._admission.retry
        if may:
            group.begin_again()
            again(group)
        return may

    def _may_requeue(self, group: GroupTask) -> bool:
        requeues = self.config.straggler_policy == "requeue"
        return requeues and group.requeued < self.config.max_requeues

    def _may_retry(self, group: GroupTask) -> bool:
        """What failed and is too late besides would be run for nothing."""
        allowed = group.policy.may_begin_again(group.verdict.outcome, group.retried)
        return allowed and not self._is_straggler(group)

    def _count_failure(self, group: GroupTask, verdict: Verdict) -> None:
        """Keep the failure budget; what was withdrawn, or came too late, is nobody's failure."""
        if group.is_eval or verdict.outcome is Outcome.CANCELLED or verdict.too_late:
            return
        self._failures.record(verdict.failure.error if verdict.failure is not None else None)

    @enable_ki_protection
    def _cancel(self, group: GroupTask) -> None:
        """Withdraw a group; harmless once it has settled."""
        if group.task_id not in self._live:
            return
        self._admission.withdraw(group)
        group.stop(CANCELLED)
        if group.all_ended:  # else the last of its tasks settles it
            self._settle(group)

    # --- too late --------------------------------------------------------------------------------

    def _is_outdated(self, group: Group) -> bool:
        """Whether no batch may hold this group any more."""
        return self._is_bounded and is_older(group, self._oldest())

    def _too_old(self, task: GroupTask, group: Group) -> Verdict:
        """How a group ends that is too old although it was made well, if it was.

        No server's token is older than the version that its rollout started in: what is comes from
        the workflow, and would come again, from every prompt and for ever.
        """
        if task.permit is None or task.permit.version < self._oldest():
            return outdated(group, self.get_version())
        error = WorkflowError(
            f"it returned a token of version {group.head_version}, from before it started (in "
            f"{task.permit.version}) and too old for any batch: give rows the versions of the "
            "responses they are made of"
        )
        return Verdict(Outcome.FAILED, Failure(FailureKind.WORKFLOW, error))

    def _stop_stragglers(self) -> None:
        """Cancel what runs and can no longer be in time, where the policy is not to wait for it."""
        if not self._stops_stragglers:
            return
        version = self.get_version()
        for group in [group for group in self._live.values() if self._is_straggler(group)]:
            assert group.permit is not None
            group.stop(straggler(group.permit.version, version))
            self._admission.restart(group)
            if group.all_ended:
                self._settle(group)

    def _is_straggler(self, group: GroupTask) -> bool:
        """Whether a group is not waited for any more."""
        if group.permit is None or not self._stops_stragglers:
            return False
        return group.permit.version < self._oldest()

    def _oldest(self) -> int:
        """The oldest version that a token consumed now may have."""
        return self.engine.get_version() - self.config.max_staleness

    # --- waiting ---------------------------------------------------------------------------------

    async def _wait_within(
        self, timeout_s: float | None, poll: Callable[[], T | None], words: Callable[[], str]
    ) -> T:
        """Wait for at most ``timeout_s``; what is there already is returned even with 0."""
        self._check_open()
        await trio.lowlevel.checkpoint_if_cancelled()
        value = poll()
        if value is not None:
            return value
        with time_limit(timeout_s, words):
            return await self._wait_until(poll)

    async def _wait_until(self, poll: Callable[[], T | None]) -> T:
        self._check_open()
        return await self._waiting.wait_until(poll)

    # --- closing ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()

    @enable_ki_protection
    def close(self) -> None:
        """Wake every waiter, settle what is queued as cancelled, cancel what runs. Idempotent."""
        if self._closed:
            return  # each rollout that the end of the run cancels comes by here
        self._closed = True
        self.engine.pool.brief.hurry()
        self._waiting.end(_closed_error)  # first: what is cancelled below is no result to wait for
        for group in list(self._live.values()):
            self._cancel(group)
        if self._admission.running_members:
            self._nursery.start_soon(self._name_those_who_stay, name="close")

    async def _name_those_who_stay(self) -> None:
        """Warn of rollouts that ignore their cancellation; close ends when they do."""
        limit_s = self.config.close_timeout_s
        with trio.CancelScope(deadline=trio.current_time() + limit_s, shield=True):
            await self._all_left.wait()
            return
        logger.warning(
            "close waits for %d rollouts that have not ended %g s after they were cancelled "
            "(close_timeout_s): do they shield themselves, catch trio.Cancelled, or wait for a "
            "thread?\n%s",
            self._admission.running_members,
            limit_s,
            self.status(),
        )

    def check_settled(self) -> None:
        """Assert that nothing is left: every submission has settled."""
        for counts in (self.counts, self.eval_counts):
            counts.check()
            assert counts.queued == 0, counts
            assert counts.running == 0, counts


def _closed_error() -> RolloutClosed:
    return RolloutClosed("the executor is closed")
