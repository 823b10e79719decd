"""WorkflowExecutor: the nursery that rollouts live in, and the only place that starts one.

Every decision (who starts, how a group ends, who is woken) is a synchronous function of the
executor's state; only ``_run_member`` and the waits suspend. So there is no lock, and nothing is
polled: whatever changes the state calls ``_pump`` (start what may start) and ``_notify`` (wake who
can go on).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import trio

from .config import RolloutConfig
from .delivery import DeliveryQueue, PermitOrder
from .engine import RemoteEngine, open_engine
from .errors import (
    DeadlineExceeded,
    RolloutClosed,
    RolloutCrashed,
    StalenessBudgetExhausted,
    TooManyFailures,
    UsageError,
)
from .groups import (
    AcceptFunction,
    Deliver,
    GroupTask,
    Verdict,
    WorkflowLike,
    accepts,
    resolve_accept,
    resolve_workflow,
)
from .loader import LoaderFeed, Prompt
from .rows import rows_from_result
from .settlement import Failure, RolloutCounts, RolloutResult, classify
from .staleness import StalenessManager
from .trajectory import Batch, Group
from .transport import Transport
from .types import FailureKind, ModelRequest, ModelResponse, Outcome
from .waiting import WaitList, time_limit
from .weights import WeightUpdate, WeightUpdateResult, update_weights
from .workflow import RolloutWorkflow

T = TypeVar("T")


class RolloutEngine:
    """The engine as one rollout sees it: no server older than the rollout's permit.

    Args:
        engine: What really generates.
        min_version: The version of the permit; 0 where there is none.
    """

    def __init__(self, engine: RemoteEngine, min_version: int) -> None:
        self._engine = engine
        self._min_version = min_version

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        """See ``RemoteEngine.agenerate``."""
        return await self._engine.agenerate(request, min_version=self._min_version)

    def get_version(self) -> int:
        """The version that every server in service has."""
        return self._engine.get_version()


class BatchStream:
    """The groups that ``prepare_batch`` draws from one data loader: queued, running, ready."""

    def __init__(self, feed: LoaderFeed, order: PermitOrder) -> None:
        self.feed = feed
        self.accepted: DeliveryQueue[Group] = DeliveryQueue(order)
        self.unsettled = 0
        self.failures: list[RolloutResult] = []  # what settled otherwise since the last batch


class WorkflowExecutor:
    """Runs rollouts: admits them, supervises them, settles each exactly once, delivers them.

    Make one with ``open_executor``. All methods are to be called in its trio run; from another
    thread use ``RolloutController``. Synchronous methods act at once. A wait that is cancelled, or
    times out, takes nothing: what it did not return stays for the next.

    Args:
        config: Limits and policies.
        engine: Generates.
        nursery: Where rollouts run.
        staleness_manager: Admits; None makes one from ``config``. It must be the only owner of
            admission for its servers: two levels of counting deadlock.
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
        self.counts = RolloutCounts()
        self.eval_counts = RolloutCounts()
        self.staleness_violations = 0
        self.staleness_manager = staleness_manager or StalenessManager(
            engine,
            config.max_concurrent_rollouts or config.consumer_batch_size,
            config.consumer_batch_size,
            config.max_staleness,
        )
        self._nursery = nursery
        self._paused = False
        self._closed = False
        self._crash: BaseException | None = None
        self._running_members = 0
        self._largest_group = 1
        self._ids = itertools.count()
        self._queue: deque[GroupTask] = deque()  # submitted, not admitted
        self._eval_queue: deque[GroupTask] = deque()
        self._starting: GroupTask | None = None  # admitted, with members still to start
        self._live: dict[str, GroupTask] = {}  # task id -> queued or running
        self._order = PermitOrder(in_order=config.straggler_policy == "wait")
        self._no_order = PermitOrder(in_order=False)
        self._eval_numbers = itertools.count()
        self._results = DeliveryQueue[RolloutResult](self._order)  # of submit, for wait
        self._eval_results = DeliveryQueue[RolloutResult](self._no_order)
        self._held: dict[str, bool] = {}  # task id of a result in one of the two -> is_eval
        self._claimed: dict[str, RolloutResult | None] = {}  # wait_for_task waits for it
        self._stream: BatchStream | None = None
        self._consumed = 0  # groups delivered to the trainer, and versions' worth charged for
        self._failed_in_a_row: deque[Exception] = deque(maxlen=config.max_consecutive_failures)
        self._waiting = WaitList()
        self._shuffle = np.random.default_rng(config.seed)

    # --- submitting --------------------------------------------------------------------------

    def submit(
        self,
        data: Prompt,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        task_id: str | None = None,
        is_eval: bool = False,
        group_size: int = 1,
    ) -> str:
        """Queue one prompt, and return at once.

        Args:
            data: What the workflow gets. Its ``prompt_id``, if any, survives to the batch.
            workflow: A workflow; or its class, or an import path of either.
            workflow_kwargs: For the class.
            should_accept_fn: Given the accepted ``Group``; False rejects it. Or an import path.
            task_id: To ask for with ``wait_for_task``; None makes one.
            is_eval: Uses the servers, but no permit: evaluation never consumes staleness.
            group_size: Rollouts of this prompt; the group is what settles and is delivered.

        Returns:
            The task id.

        Raises:
            UsageError: If the id is in use, the queue is full, or the workflow is none.
            RolloutClosed: After close.
        """
        group = GroupTask(
            task_id=self._new_task_id(task_id),
            data=data,
            workflow=resolve_workflow(workflow, workflow_kwargs),
            should_accept=resolve_accept(should_accept_fn),
            size=_positive("group_size", group_size),
            is_eval=is_eval,
            deliver=self._deliver_result,
        )
        if not is_eval and len(self._queue) >= self._queue_limit():
            raise UsageError(
                f"{len(self._queue)} groups are queued, which is the queue_size; "
                "take results with wait, or raise queue_size"
            )
        self._enqueue([group])
        return group.task_id

    def _queue_limit(self) -> int:
        if self.config.queue_size is not None:
            return self.config.queue_size
        return max(self.config.pending_limit, 16 * self._concurrency())

    def _new_task_id(self, task_id: str | None) -> str:
        self._check_open()
        if task_id is None:
            return f"rollout-{next(self._ids)}"
        if task_id in self._live or task_id in self._held:
            raise UsageError(f"task id {task_id!r} is in use; nothing was submitted")
        return task_id

    def _enqueue(self, groups: Iterable[GroupTask]) -> None:
        for group in groups:
            self._live[group.task_id] = group
            self._largest_group = max(self._largest_group, group.size)
            if group.is_eval:
                self.eval_counts.enqueue()
                self._eval_queue.append(group)
            else:
                self.counts.enqueue()
                self.staleness_manager.on_rollout_enqueued()
                self._queue.append(group)
        self._pump()

    # --- admission ---------------------------------------------------------------------------

    def _concurrency(self) -> int:
        """Members that may run at once."""
        configured = self.config.max_concurrent_rollouts
        return configured or self.config.consumer_batch_size * self._largest_group

    def _pump(self) -> None:
        """Start every member that may start. The only place where a rollout begins."""
        while self._running_members < self._concurrency() and not self._closed:
            group = self._starting or self._admit()
            if group is None:
                return
            index = group.start_member()
            self._starting = group if group.to_start else None
            self._running_members += 1
            self._nursery.start_soon(self._run_member, group, index, name=f"rollout {group}")

    def _admit(self) -> GroupTask | None:
        """Take the next group whose first member may start now: evaluation goes before training.

        A trainer that evaluates waits for it, and evaluation is short; training is bounded by its
        own budget anyway.
        """
        if self._eval_queue:
            group = self._eval_queue.popleft()
            group.number = next(self._eval_numbers)
            self.eval_counts.start()
            return group
        if self._paused or not self._queue:
            return None
        permit = self.staleness_manager.try_submit()
        if permit is None:
            return None
        group = self._queue.popleft()
        group.permit, group.number = permit, permit.number
        self._order.granted(permit.number)
        self.counts.start()
        return group

    # --- running -----------------------------------------------------------------------------

    async def _run_member(self, group: GroupTask, index: int) -> None:
        """Run one rollout in its own cancel scope, and record how it ended, whatever happens."""
        verdict = Verdict(Outcome.CANCELLED)
        scope = group.scopes[index]
        scope.deadline = trio.current_time() + self.config.rollout_timeout_s
        try:
            with scope:
                verdict = await self._episode(group, index)
            if scope.cancelled_caught and not group.cancelled:
                verdict = self._expired(index)
        except Exception as exc:  # noqa: BLE001 - the one boundary between user code and the run
            verdict = Verdict(Outcome.FAILED, Failure(classify(exc), exc, index))
        finally:
            self._running_members -= 1
            self._member_ended(group, verdict)

    async def _episode(self, group: GroupTask, index: int) -> Verdict:
        version = group.permit.version if group.permit else 0
        result = await group.workflow.arun_episode(RolloutEngine(self.engine, version), group.data)
        if result is None:
            return Verdict(Outcome.REJECTED)
        group.rows[index] = rows_from_result(result)
        return Verdict(Outcome.ACCEPTED)

    def _expired(self, index: int) -> Verdict:
        limit = self.config.rollout_timeout_s
        error = DeadlineExceeded(f"the rollout did not settle within rollout_timeout_s={limit:g}")
        return Verdict(Outcome.EXPIRED, Failure(FailureKind.INFRASTRUCTURE, error, index))

    def _member_ended(self, group: GroupTask, verdict: Verdict) -> None:
        group.member_ended(verdict)
        if self._starting is group and not group.to_start:
            self._starting = None
        if group.all_ended:
            self._settle(group)
        else:
            self._pump()

    # --- settling ----------------------------------------------------------------------------

    def _settle(self, group: GroupTask) -> None:
        """Settle a group whose members have all ended: exactly once, synchronously."""
        accepted, verdict = self._judge(group)
        counts = self.eval_counts if group.is_eval else self.counts
        counts.settle(verdict.outcome, was_running=group.admitted)
        if group.permit is not None:
            _settle_permit(group, verdict.outcome)
            self._order.settled(group.permit.number)
        elif not group.is_eval:  # never admitted: it leaves the queue's count
            self.staleness_manager.on_rollout_submitted()
            self.staleness_manager.on_rollout_rejected()
        self._count_failure(group, verdict)
        del self._live[group.task_id]
        group.deliver(
            group,
            RolloutResult(
                task_id=group.task_id,
                prompt_id=group.prompt_id,
                outcome=verdict.outcome,
                group=accepted,
                failure=verdict.failure,
                number=group.number,
            ),
        )
        self._changed()

    def _judge(self, group: GroupTask) -> tuple[Group | None, Verdict]:
        """The group's outcome: its members' verdict, then the filter's."""
        if group.verdict.outcome is not Outcome.ACCEPTED:
            return None, group.verdict
        try:
            accepted = group.accepted()
            if accepts(accepted, group.should_accept):
                return accepted, group.verdict
            return None, Verdict(Outcome.REJECTED)
        except Exception as exc:  # noqa: BLE001 - the filter is user code
            return None, Verdict(Outcome.FAILED, Failure(classify(exc), exc))

    def _count_failure(self, group: GroupTask, verdict: Verdict) -> None:
        if group.is_eval or verdict.outcome is Outcome.CANCELLED:
            return
        if verdict.failure is None:
            self._failed_in_a_row.clear()
        else:
            self._failed_in_a_row.append(verdict.failure.error)

    # --- delivering --------------------------------------------------------------------------

    def _deliver_result(self, group: GroupTask, result: RolloutResult) -> None:
        if result.task_id in self._claimed:
            self._claimed[result.task_id] = result
        else:
            self._hold(result, is_eval=group.is_eval)

    def _hold(self, result: RolloutResult, *, is_eval: bool) -> None:
        """Keep a result for ``wait`` or ``wait_for_task``; after close nobody can ask for it."""
        if not self._closed:
            self._held[result.task_id] = is_eval
            self._results_of(is_eval).put(result)

    def _results_of(self, is_eval: bool) -> DeliveryQueue[RolloutResult]:
        return self._eval_results if is_eval else self._results

    def _consume(self, groups: Sequence[Group]) -> None:
        """Groups leave for the trainer: count them, and what is older than the bound."""
        self._consumed += len(groups)
        oldest = self.get_version() - self.config.max_staleness
        self.staleness_violations += sum(_is_older(group, oldest) for group in groups)

    # --- waiting -----------------------------------------------------------------------------

    async def _wait_until(self, poll: Callable[[], T | None]) -> T:
        self._check_open()
        return await self._waiting.wait_until(poll)

    def _changed(self) -> None:
        """Start what may start now, and wake who can go on."""
        self._pump()
        self._waiting.notify()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise self._closing_error()

    def _closing_error(self) -> Exception:
        if self._crash is None:
            return RolloutClosed("the executor is closed")
        error = RolloutCrashed(f"the rollout side died: {self._crash!r}")
        error.__cause__ = self._crash
        return error

    async def wait(
        self, count: int, timeout_s: float | None = None, *, is_eval: bool = False
    ) -> list[RolloutResult]:
        """Wait for results of ``submit``, and take them: one per submission, whatever its outcome.

        Under ``straggler_policy="wait"`` they leave in permit order, else as they settle.

        Args:
            count: How many.
            timeout_s: None waits as long as it takes; the rollouts' own deadlines bound it.
            is_eval: Of evaluation, or of training.

        Raises:
            TimeoutError: With how many were there; they stay.
            UsageError: If fewer than ``count`` are there or under way: waiting would never end.
            StalenessBudgetExhausted: If what is queued can not start before the next version.
        """
        _positive("count", count)
        queue = self._results_of(is_eval)

        def poll() -> list[RolloutResult] | None:
            if queue.ready >= count:
                return [self._take(result, is_eval=is_eval) for result in queue.take(count)]
            self._check_can_come(count, is_eval)
            return None

        with time_limit(timeout_s, lambda: f"{queue.ready} of {count} results were there"):
            return await self._wait_until(poll)
        raise AssertionError("unreachable")

    def _take(self, result: RolloutResult, *, is_eval: bool) -> RolloutResult:
        """A result leaves for its consumer."""
        self._held.pop(result.task_id, None)
        if not is_eval and result.group is not None:
            self._consume([result.group])
        return result

    def _check_can_come(self, count: int, is_eval: bool) -> None:
        there = len(self._results_of(is_eval))
        under_way = sum(
            g.is_eval == is_eval and not g.is_batched and g.task_id not in self._claimed
            for g in self._live.values()
        )
        if there + under_way < count:
            raise UsageError(
                f"wait({count}) would never end: {there} results are there and "
                f"{under_way} are under way"
            )
        if not is_eval:
            self._check_budget()

    async def wait_for_task(self, task_id: str, timeout_s: float | None = None) -> RolloutResult:
        """Wait for one submission's result, and take it; ``wait`` does not get it meanwhile.

        It is returned when it settles, without regard to the order of permits.

        Raises:
            TimeoutError: The result stays, and may be waited for again.
            UsageError: If the id was never submitted, or its result was taken.
            StalenessBudgetExhausted: As for ``wait``.
        """
        is_eval = self._claim(task_id)

        def poll() -> RolloutResult | None:
            if (result := self._claimed[task_id]) is not None:
                del self._claimed[task_id]
                return self._take(result, is_eval=is_eval)
            if not is_eval:
                self._check_budget()
            return None

        try:
            with time_limit(timeout_s, lambda: f"task {task_id!r} has not settled"):
                return await self._wait_until(poll)
            raise AssertionError("unreachable")
        finally:
            unclaimed = self._claimed.pop(task_id, None)
            if unclaimed is not None:  # it came, and was not taken
                self._hold(unclaimed, is_eval=is_eval)

    def _claim(self, task_id: str) -> bool:
        """Reserve a result for one waiter; return whether it is of evaluation."""
        live = self._live.get(task_id)
        is_eval = self._held.get(task_id, live.is_eval if live else None)
        if is_eval is None or (live and live.is_batched) or task_id in self._claimed:
            raise UsageError(
                f"task {task_id!r} is not there: never submitted, taken, or waited for already"
            )
        held = None
        if task_id in self._held:
            del self._held[task_id]
            held = self._results_of(is_eval).pop_task(task_id)
        self._claimed[task_id] = held
        return is_eval

    def _check_budget(self) -> None:
        """Raise where nothing can happen before the next version, which the waiter has to make."""
        if self._order.unsettled or self._paused or not self._queue:
            return
        capacity = self.staleness_manager.get_capacity()
        if capacity > 0:
            return
        stat = self.staleness_manager.get_stats()
        raise StalenessBudgetExhausted(
            f"{len(self._queue)} groups are queued, and none may start before the next weight "
            f"version: {stat.accepted} accepted and {self.staleness_manager.charged} charged of "
            f"(max_staleness {self.config.max_staleness} + version {self.get_version()} + 1) · "
            f"{self.config.consumer_batch_size}. Update the weights (or set_version) before "
            "asking for more, or raise max_staleness"
        )

    # --- rollout_batch -----------------------------------------------------------------------

    async def rollout_batch(
        self,
        data: Sequence[Prompt],
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
    ) -> Batch:
        """Run these prompts, wait until all have settled, and return the accepted ones in order.

        Cancelling it cancels what it started.

        Returns:
            A batch whose ``failures`` hold the results of all that were not accepted.

        Raises:
            StalenessBudgetExhausted: If they can not all start before the next version.
        """
        self._check_open()
        resolved = resolve_workflow(workflow, workflow_kwargs)
        accept = resolve_accept(should_accept_fn)
        size = _positive("group_size", group_size)
        settled: dict[str, RolloutResult] = {}
        groups = [
            GroupTask(
                task_id=self._new_task_id(None),
                data=prompt,
                workflow=resolved,
                should_accept=accept,
                size=size,
                is_batched=True,
                deliver=lambda group, result: settled.__setitem__(group.task_id, result),
            )
            for prompt in data
        ]

        def poll() -> list[RolloutResult] | None:
            if len(settled) == len(groups):
                return [settled[group.task_id] for group in groups]
            self._check_budget()
            return None

        self._enqueue(groups)
        try:
            return self._as_batch(await self._wait_until(poll))
        finally:
            for group in groups:
                self._cancel(group)

    def _as_batch(self, results: Sequence[RolloutResult]) -> Batch:
        groups = tuple(result.group for result in results if result.group is not None)
        self._consume(groups)
        failures = tuple(result for result in results if result.group is None)
        return Batch(groups=groups, version=self.get_version(), failures=failures)

    def _cancel(self, group: GroupTask) -> None:
        """Withdraw a group; harmless once it has settled."""
        if group.task_id not in self._live:
            return
        if not group.admitted:
            (self._eval_queue if group.is_eval else self._queue).remove(group)
        if self._starting is group:
            self._starting = None
        group.stop(Verdict(Outcome.CANCELLED))
        if group.all_ended:  # else the last of its tasks settles it
            self._settle(group)

    # --- prepare_batch -----------------------------------------------------------------------

    async def prepare_batch(
        self,
        dataloader: Iterable[Prompt | Sequence[Prompt]],
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
    ) -> Batch:
        """Return the next training batch: exactly ``consumer_batch_size`` accepted groups.

        Prompts are read ahead and run while the trainer trains. A rejected or failed group is
        replaced by the next prompt. Arguments may change between calls: they hold for the prompts
        read from then on. At the loader's end the last batch may be short; the call after it
        raises StopAsyncIteration, and the one after that begins the next epoch.

        Raises:
            StopAsyncIteration: The loader is exhausted, and everything was delivered.
            TooManyFailures: ``max_consecutive_failures`` groups failed in a row, with the causes.
            StalenessBudgetExhausted: If no batch can be had before the next version.
            UsageError: For another loader while prompts of the last one are under way.
        """
        stream = self.stream_of(dataloader)
        arguments = BatchArguments.of(workflow, workflow_kwargs, should_accept_fn, group_size)
        while True:
            step = await self.next_step(stream)
            if isinstance(step, Batch):
                if not step.groups:
                    raise StopAsyncIteration
                return step
            self.feed(stream, stream.feed.take(step), arguments)

    def batches(
        self,
        dataloader: Iterable[Prompt | Sequence[Prompt]],
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
    ) -> Batches:
        """One epoch of ``prepare_batch``: ``async for batch in rollout.batches(…)``."""
        return Batches(self, (dataloader, workflow, workflow_kwargs, should_accept_fn, group_size))

    def stream_of(self, dataloader: Iterable[Prompt | Sequence[Prompt]]) -> BatchStream:
        """The stream of a data loader: the one under way, or a new epoch.

        ``stream_of``, ``next_step`` and ``feed`` are the steps of ``prepare_batch``, apart so that
        the synchronous face can iterate the data loader in the trainer's own thread.
        """
        self._check_open()
        stream = self._stream
        if stream is None:
            stream = self._stream = BatchStream(LoaderFeed(dataloader), self._order)
        elif stream.feed.loader is not dataloader:
            raise UsageError(
                f"prepare_batch was given another data loader, while {stream.unsettled} groups of "
                f"the last one are under way and {len(stream.accepted)} wait to be delivered; "
                "read the last one to its end first"
            )
        return stream

    def feed(
        self, stream: BatchStream, prompts: Sequence[Prompt], arguments: BatchArguments
    ) -> None:
        """Queue prompts that were read for a stream."""

        def deliver(_: GroupTask, result: RolloutResult) -> None:
            stream.unsettled -= 1
            if result.group is not None:
                stream.accepted.put(result.group)
            elif result.outcome is not Outcome.CANCELLED:
                stream.failures.append(result)

        stream.unsettled += len(prompts)
        self._enqueue(
            arguments.group_of(self._new_task_id(None), prompt, deliver) for prompt in prompts
        )

    async def next_step(self, stream: BatchStream) -> Batch | int:
        """Wait until the stream wants prompts (how many), or has a batch (empty: it has ended)."""
        return await self._wait_until(lambda: self._look(stream))

    def _look(self, stream: BatchStream) -> Batch | int | None:
        wanted = self.config.pending_limit - len(self._queue)
        # Asking for one prompt at a time would cost the trainer's thread a round trip each.
        if not stream.feed.exhausted and wanted >= max(1, self.config.pending_limit // 4):
            return wanted
        self._discard_too_old(stream)
        if stream.accepted.ready >= self.config.consumer_batch_size:
            return self._release(stream, self.config.consumer_batch_size)
        if len(self._failed_in_a_row) == self.config.max_consecutive_failures:
            raise self._too_many_failures()
        if stream.feed.exhausted and not stream.unsettled:
            if not stream.accepted:
                self._stream = None
            return self._release(stream, stream.accepted.ready)
        self._check_budget()
        return None

    def _discard_too_old(self, stream: BatchStream) -> None:
        """Under ``wait``, drop what became too old because versions advanced without a batch.

        A trainer that takes one batch per version never gets here; see ``delivery``.
        """
        if self.config.straggler_policy != "wait":
            return
        oldest = self.get_version() - self.config.max_staleness
        while stream.accepted.ready and _is_older(stream.accepted.first(), oldest):
            (group,) = stream.accepted.take(1)
            self._consumed += 1
            error = UsageError(
                f"discarded: its oldest token is of version {group.head_version}, the trainer is "
                f"at {self.get_version()}, max_staleness is {self.config.max_staleness}; "
                "the version advanced without a batch"
            )
            failure = Failure(FailureKind.DATA, error)
            stream.failures.append(
                RolloutResult(
                    task_id=group.task_id,
                    prompt_id=group.prompt_id,
                    outcome=Outcome.EXPIRED,
                    failure=failure,
                    number=group.number,
                )
            )

    def _release(self, stream: BatchStream, count: int) -> Batch:
        groups = stream.accepted.take(count)
        self._consume(groups)
        failures, stream.failures = tuple(stream.failures), []
        shuffled = tuple(groups[i] for i in self._shuffle.permutation(len(groups)))
        return Batch(groups=shuffled, version=self.get_version(), failures=failures)

    def _too_many_failures(self) -> TooManyFailures:
        causes = list(self._failed_in_a_row)
        self._failed_in_a_row.clear()
        return TooManyFailures(
            f"{len(causes)} groups failed in a row (max_consecutive_failures)", causes
        )

    def is_eval(self, task_id: str) -> bool:
        """Whether a task that is queued, running or not yet taken is of evaluation."""
        live = self._live.get(task_id)
        return live.is_eval if live else self._held.get(task_id, False)

    def give_back_results(self, results: Sequence[RolloutResult], *, is_eval: bool) -> None:
        """Return results that did not reach their consumer; the next wait delivers them again."""
        for result in results:
            self._hold(result, is_eval=is_eval)
            if not is_eval and result.group is not None:
                self._consumed -= 1
        self._waiting.notify()

    def give_back(self, batch: Batch) -> None:
        """Return a batch that did not reach its consumer; the next call delivers it again."""
        if self._stream is not None:
            for group in batch.groups:
                self._stream.accepted.put(group)
            self._stream.failures[:0] = batch.failures
            self._consumed -= len(batch.groups)
            self._waiting.notify()

    # --- version, pause ----------------------------------------------------------------------

    def get_version(self) -> int:
        """The weight version that every server in service has."""
        return self.engine.get_version()

    async def set_version(self, version: int) -> None:
        """Advance to ``version`` without loading anything: the trainer moved the weights itself.

        Servers get the label, so that their reports follow.
        """
        await self.update_weights(WeightUpdate.label(version))

    async def update_weights(self, update: WeightUpdate) -> WeightUpdateResult:
        """Bring new weights to every server while rollouts go on, then advance the version.

        Raises:
            WeightUpdateError: If fewer than ``min_updated`` servers took them; the version stays.
        """
        self._check_open()
        result = await update_weights(self.engine.pool, update)
        self._charge_for(result.version)
        self._changed()
        return result

    def _charge_for(self, version: int) -> None:
        """Charge the budget for a version step that consumes less than a batch.

        The proof in ``delivery`` has one release of B per step. A short batch must not buy more
        rollouts than a full one; AReaL's ``keep`` has no such condition.
        """
        if self.config.straggler_policy != "wait":
            return
        short = version * self.config.consumer_batch_size - self._consumed
        if short > 0:
            self.staleness_manager.charge(short)
            self._consumed += short

    def get_capacity(self) -> int:
        """How many groups admission would let start now (AReaL's formula; may be negative)."""
        return self.staleness_manager.get_capacity()

    def pause(self) -> None:
        """Start no further training rollout. What runs goes on, and evaluation too."""
        self._paused = True

    def resume(self) -> None:
        """Start training rollouts again."""
        self._paused = False
        self._changed()

    async def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing runs; call ``pause`` before, or it may take for ever.

        Raises:
            TimeoutError: If something still runs after ``timeout_s``.
        """

        def poll() -> bool | None:
            return True if self._running_members == 0 else None

        with time_limit(timeout_s, lambda: f"{self._running_members} rollouts still run"):
            await self._wait_until(poll)

    # --- closing -----------------------------------------------------------------------------

    def close(self, crash: BaseException | None = None) -> None:
        """Settle what is queued as cancelled, cancel what runs, wake every waiter. Idempotent."""
        self._closed = True
        self._crash = self._crash or crash
        self._starting = None
        for group in list(self._live.values()):
            self._cancel(group)
        self._waiting.end(self._closing_error)

    def check_settled(self) -> None:
        """Assert that nothing is left: every submission has settled."""
        for counts in (self.counts, self.eval_counts):
            assert counts.queued == 0, counts
            assert counts.running == 0, counts


class BatchArguments:
    """What a ``prepare_batch`` call wants done with the prompts it reads."""

    def __init__(
        self, workflow: RolloutWorkflow, should_accept: AcceptFunction | None, group_size: int
    ) -> None:
        self._workflow = workflow
        self._should_accept = should_accept
        self._group_size = group_size

    @classmethod
    def of(
        cls,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None,
        should_accept_fn: AcceptFunction | str | None,
        group_size: int,
    ) -> BatchArguments:
        """Check and resolve the caller's arguments."""
        return cls(
            resolve_workflow(workflow, workflow_kwargs),
            resolve_accept(should_accept_fn),
            _positive("group_size", group_size),
        )

    def group_of(self, task_id: str, prompt: Prompt, deliver: Deliver) -> GroupTask:
        """A group of one prompt."""
        return GroupTask(
            task_id=task_id,
            data=prompt,
            workflow=self._workflow,
            should_accept=self._should_accept,
            size=self._group_size,
            is_batched=True,
            deliver=deliver,
        )


class Batches:
    """An epoch of batches; see ``WorkflowExecutor.batches``."""

    def __init__(self, executor: WorkflowExecutor, arguments: tuple[Any, ...]) -> None:
        self._executor = executor
        self._arguments = arguments

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Batch:
        return await self._executor.prepare_batch(*self._arguments)


@asynccontextmanager
async def open_executor(
    config: RolloutConfig,
    *,
    transport: Transport | None = None,
    staleness_manager: StalenessManager | None = None,
) -> AsyncIterator[WorkflowExecutor]:
    """Connect to the servers and run rollouts for the length of the block.

    Leaving it, in whatever way, cancels what still runs, aborts it on its servers, settles it as
    cancelled, wakes every waiter with RolloutClosed, and closes every connection.

    Args:
        config: Limits and policies.
        transport: How bytes travel; None makes one and closes it.
        staleness_manager: Admits; None makes one.

    Raises:
        NoServerAvailable: If a server is not ready within ``setup_timeout_s``.
        RolloutCrashed: If our own side broke; the cause is attached.
    """
    async with open_engine(config, transport=transport) as engine:
        left_with: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                executor = WorkflowExecutor(config, engine, nursery, staleness_manager)
                try:
                    yield executor
                except BaseException as exc:  # noqa: BLE001 - raised again below, unwrapped
                    left_with = exc
                finally:
                    executor.close()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise RolloutCrashed(f"the rollout side died: {group.exceptions[0]!r}") from group
        if left_with is not None:
            raise left_with
        executor.check_settled()


def _settle_permit(group: GroupTask, ended: Outcome) -> None:
    assert group.permit is not None
    if ended is Outcome.ACCEPTED:
        group.permit.accept()
    else:
        group.permit.reject()


def _is_older(group: Group, version: int) -> bool:
    return group.head_version is not None and group.head_version < version


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an integer of at least 1, not {value!r}")
    return value
