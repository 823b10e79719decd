"""WorkflowExecutor: what a trainer asks of its rollouts, inside a trio program.

Submitting and waiting, batches, versions and weights, servers. How rollouts are admitted, run and
settled is below, in ``rollouts``; the same face for an ordinary thread is above, in ``controller``.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from .arguments import ArgumentResolver, RolloutArguments, positive
from .assembly import BatchAssembly
from .batching import BatchStream, DataLoader
from .config import RolloutConfig
from .consumption import Consumption
from .engine import RemoteEngine, open_engine
from .errors import UsageError
from .group_policy import GroupPolicy
from .groups import AcceptFunction, GroupTask, WorkflowLike
from .lateness import expired, is_older
from .ledger import Ledger, LedgerStatistics
from .loader import Prompt
from .recording import Recording, open_recording
from .results import ResultPool
from .server_face import ServerFace
from .settlement import RolloutResult
from .staleness import StalenessManager
from .trajectory import Batch
from .transport import Transport
from .waiting import crash_of
from .watch import watch_slow_steps
from .weights import WeightUpdate, WeightUpdateResult, update_weights


class WorkflowExecutor(ServerFace):
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
        recording: Keeps the ledger; None where there is none.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: RemoteEngine,
        nursery: trio.Nursery,
        staleness_manager: StalenessManager | None = None,
        recording: Recording | None = None,
    ) -> None:
        super().__init__(config, engine, nursery, staleness_manager)
        self._results = ResultPool(self._order)
        self._deliver = self._results.deliver  # bound once, and not for each group
        self._consumption = Consumption(config, self.staleness_manager)
        self._assembly = BatchAssembly(
            config,
            self._order,
            self._admission,
            self._failures,
            self._consumption,
            self._requeue_accepted,
            recording,
        )
        self._recording = recording
        if recording is not None:
            recording.ledger.on_trouble = self._waiting.notify
        self._resolve = ArgumentResolver()
        self._ids = itertools.count()

    @property
    def staleness_violations(self) -> int:
        """Groups delivered beyond ``max_staleness``; only ``keep`` has any."""
        return self._consumption.violations

    # --- submit, wait ------------------------------------------------------------------------

    def submit(
        self,
        data: Prompt,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        task_id: str | None = None,
        is_eval: bool = False,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
    ) -> str:
        """Queue one prompt, and return at once.

        Args:
            data: What the workflow gets. Its ``prompt_id``, if any, survives to the batch.
            workflow: A workflow; or its class, or an import path of either.
            workflow_kwargs: For the class.
            should_accept_fn: Given the accepted ``Group``; False rejects it. Or an import path.
            task_id: To ask for with ``wait_for_task``; None makes one.
            is_eval: Uses the servers, but no permit: evaluation never consumes staleness.
            group_size: Rollouts of this prompt, 16,384 at most; the group is what settles and is
                delivered.
            group_policy: What becomes of the group when a member does not succeed; None: all must.

        Returns:
            The task id.

        Raises:
            UsageError: If the id is in use, the queue is full, or the workflow is none.
            RolloutClosed: After close.
        """
        arguments = self._resolve(
            workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
        )
        task_id = self._new_task_id(task_id)
        if not is_eval and self._admission.queued >= self._admission.queue_limit:
            raise UsageError(
                f"{self._admission.queued} groups are queued, which is the queue_size; "
                "take results with wait, or raise queue_size"
            )
        group = arguments.group(task_id, data, self._deliver, is_eval=is_eval, is_batched=False)
        self._results.expect(group)
        self._enqueue([group])
        return task_id

    def _new_task_id(self, task_id: str | None = None) -> str:
        self._check_open()
        if task_id is None:
            while self._in_use(new := f"rollout-{next(self._ids)}"):
                pass
            return new
        if self._in_use(task_id):
            raise UsageError(f"task id {task_id!r} is in use; nothing was submitted")
        return task_id

    def _in_use(self, task_id: str) -> bool:
        return task_id in self._live or task_id in self._results

    async def wait(
        self, count: int, timeout_s: float | None = None, *, is_eval: bool = False
    ) -> list[RolloutResult]:
        """Wait for results of ``submit``, and take them: one per submission, whatever its outcome.

        Under ``straggler_policy="wait"`` they leave in permit order, else as they settle.

        Args:
            count: How many.
            timeout_s: None waits as long as it takes; the rollouts' own deadlines bound it. 0 looks
                once.
            is_eval: Of evaluation, or of training.

        Raises:
            TimeoutError: With how many were there; they stay.
            UsageError: If fewer than ``count`` are there or under way: waiting would never end.
            StalenessBudgetExhausted: If what is queued can not start before the next version.
        """
        positive("count", count)
        queue = self._results.of(is_eval=is_eval)

        def poll() -> list[RolloutResult] | None:
            if queue.has_ready(count):
                return self._took(self._results.take(count, is_eval=is_eval), is_eval=is_eval)
            coming = self._results.coming(is_eval=is_eval)
            if coming < count:
                raise UsageError(
                    f"wait({count}) would never end: {len(queue)} results are there and "
                    f"{coming - len(queue)} are under way"
                )
            if not is_eval:
                self._admission.check_budget()
            return None

        return await self._wait_within(
            timeout_s, poll, lambda: f"{queue.ready} of {count} results were there"
        )

    async def wait_for_task(self, task_id: str, timeout_s: float | None = None) -> RolloutResult:
        """Wait for one submission's result, and take it; ``wait`` does not get it meanwhile.

        It is returned when it settles, without regard to the order of permits.

        Raises:
            TimeoutError: The result stays, and may be waited for again.
            UsageError: If the id was never submitted, or its result was taken.
            StalenessBudgetExhausted: As for ``wait``.
        """
        self._check_open()
        is_eval = self._results.claim(task_id, self._live.get(task_id))

        def poll() -> RolloutResult | None:
            result = self._results.take_claimed(task_id)
            if result is None and not is_eval:
                self._admission.check_budget()
            return result

        try:
            result = await self._wait_within(
                timeout_s, poll, lambda: f"task {task_id!r} has not settled"
            )
        except BaseException:  # not where it came: its id may be in use again by now
            self._results.unclaim(task_id, is_eval=is_eval)
            raise
        finally:
            self._waiting.notify()  # a result that came as this waiter gave up is for another
        (taken,) = self._took([result], is_eval=is_eval)
        return taken

    def _took(self, results: list[RolloutResult], *, is_eval: bool) -> list[RolloutResult]:
        """Results leave for their consumer; what became too old since it settled has expired."""
        if is_eval:
            return results
        oldest = self._oldest()
        taken = [self._in_time(result, oldest) for result in results]
        groups = [result.group for result in taken if result.group is not None]
        self._consumption.take(groups, oldest)
        return taken

    def _in_time(self, result: RolloutResult, oldest: int) -> RolloutResult:
        group = result.group
        if group is None or not self._is_bounded or not is_older(group, oldest):
            return result
        self._admission.discard_accepted()
        self._pump()  # its budget may let another start
        return expired(group, self.get_version())

    def is_eval(self, task_id: str) -> bool:
        """Whether a task that is queued, running or not yet taken is of evaluation."""
        live = self._live.get(task_id)
        return live.is_eval if live else bool(self._results.is_eval(task_id))

    def give_back_results(self, results: Sequence[RolloutResult], *, is_eval: bool) -> None:
        """Return results that did not reach their consumer; the next wait delivers them again."""
        for result in results:
            self._results.put(result, is_eval=is_eval)
            if not is_eval and result.group is not None:
                self._consumption.take_back([result.group])
        self._waiting.notify()

    # --- rollout_batch -----------------------------------------------------------------------

    async def rollout_batch(
        self,
        data: Sequence[Prompt],
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
    ) -> Batch:
        """Run these prompts, wait until all have settled, and return the accepted ones in order.

        Cancelling it cancels what it started.

        Returns:
            A batch whose ``failures`` hold the results of all that were not accepted.

        Raises:
            StalenessBudgetExhausted: If they can not all start before the next version.
        """
        arguments = RolloutArguments.of(
            workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
        )
        settled: dict[str, RolloutResult] = {}

        def deliver(group: GroupTask, result: RolloutResult) -> None:
            settled[group.task_id] = result

        def poll() -> list[RolloutResult] | None:
            if len(settled) == len(groups):
                return [settled[group.task_id] for group in groups]
            self._admission.check_budget()
            return None

        groups = [arguments.group(self._new_task_id(), prompt, deliver) for prompt in data]
        self._enqueue(groups)
        try:
            results = self._took(await self._wait_until(poll), is_eval=False)
        except BaseException:
            for group in groups:
                self._cancel(group)
            # What this call throws away is no debt of the batches to come, nor was it delivered.
            unwanted = sum(result.group is not None for result in settled.values())
            self._consumption.take_places(unwanted)
            raise
        accepted = tuple(result.group for result in results if result.group is not None)
        failures = tuple(result for result in results if result.group is None)
        return Batch(groups=accepted, version=self.get_version(), failures=failures)

    # --- prepare_batch -----------------------------------------------------------------------

    async def prepare_batch(
        self,
        dataloader: DataLoader,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
        dynamic_batch_size: bool = False,
    ) -> Batch:
        """Return the next training batch: exactly ``consumer_batch_size`` accepted groups.

        Prompts are read ahead and run while the trainer trains. A rejected or failed group is
        replaced by the next prompt. Arguments may change between calls: they hold for the prompts
        read from then on. At the loader's end the last batch may be short; the call after it
        raises StopAsyncIteration, and the one after that begins the next epoch.

        Args:
            dataloader: Gives prompts, or lists of prompts.
            workflow: As for ``submit``; so are the next four.
            workflow_kwargs: See there.
            should_accept_fn: See there.
            group_size: See there.
            group_policy: See there.
            dynamic_batch_size: Let a rejected group take its place in the batch instead of being
                replaced (AReaL's ``dynamic_bs``): the batch leaves once accepted and rejected are
                ``consumer_batch_size``, with the accepted ones alone, at least one. A step then
                costs the same generation whatever the filter thinks of it.

        Raises:
            StopAsyncIteration: The loader is exhausted, and everything was delivered.
            TooManyFailures: ``max_consecutive_failures`` groups failed in a row, with the causes;
                or ``max_consecutive_rejections`` were rejected; or an epoch ended without a batch
                because its groups failed.
            StalenessBudgetExhausted: If no batch can be had before the next version.
            UsageError: For another loader while prompts of the last one are under way.
            LedgerError: If what happened can not be made durable; nothing is delivered meanwhile.
        """
        arguments = RolloutArguments.of(
            workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
        )
        if self._recording is not None:
            await self.begin()
        stream = self.stream_of(dataloader, arguments, dynamic_batch_size)
        while True:
            step = await self.next_step(stream)
            if isinstance(step, Batch):
                if not step.groups:
                    raise StopAsyncIteration
                return step
            self.feed(stream, stream.feed.take(step), arguments)

    def batches(
        self,
        dataloader: DataLoader,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None = None,
        should_accept_fn: AcceptFunction | str | None = None,
        group_size: int = 1,
        group_policy: GroupPolicy | None = None,
        dynamic_batch_size: bool = False,
    ) -> Batches:
        """One epoch of ``prepare_batch``: ``async for batch in rollout.batches(…)``."""
        arguments = (dataloader, workflow, workflow_kwargs, should_accept_fn, group_size)
        return Batches(self, (*arguments, group_policy, dynamic_batch_size))

    def stream_of(
        self, dataloader: DataLoader, arguments: RolloutArguments, dynamic: bool = False
    ) -> BatchStream:
        """The stream of a data loader: the one under way, or a new epoch.

        ``stream_of``, ``next_step`` and ``feed`` are the steps of ``prepare_batch``, apart so that
        the synchronous face can iterate the data loader in the trainer's own thread.
        """
        self._check_open()
        stream = self._assembly.stream_of(dataloader, dynamic=dynamic)
        if self._recording is not None:
            self._restore(self._recording, stream, arguments)
        return stream

    def feed(
        self, stream: BatchStream, prompts: Sequence[Prompt], arguments: RolloutArguments
    ) -> None:
        """Queue prompts that were read for a stream."""
        recording = self._recording
        deliver = stream.deliver if recording is None else recording.deliver_to(stream)
        groups = [arguments.group(self._new_task_id(), prompt, deliver) for prompt in prompts]
        if recording is not None:
            recording.taken(groups)
        stream.unsettled += len(groups)
        self._enqueue(groups)

    async def next_step(self, stream: BatchStream) -> Batch | int:
        """Wait until the stream wants prompts (how many), or has a batch (empty: it has ended)."""
        return await self._wait_until(partial(self._step, stream))

    def _step(self, stream: BatchStream) -> Batch | int | None:
        version = self.engine.get_version()
        self._discard_outdated(version)
        return self._assembly.step(stream, version)

    def _discard_outdated(self, version: int) -> None:
        if self._assembly.discard_outdated(version):
            self._pump()  # its budget may let another start

    def _expire_results(self, version: int) -> None:
        """Let no result that nobody takes keep its budget: it is too old for whoever comes."""
        if not self._is_bounded:
            return
        gone = self._results.expire_older(self._oldest(), version)
        for _ in range(gone):
            self._admission.discard_accepted()
        if gone:
            self._pump()

    def _requeue_accepted(self, group: GroupTask) -> bool:
        """Queue a group again that was accepted and became too old, where the policy says so."""
        may = self._may_requeue(group)
        if may:
            self._live[group.task_id] = group
            self._alarm.arm()
            group.begin_again()
            self._admission.requeue_accepted(group)
        return may

    def give_back(self, batch: Batch) -> None:
        """Return a batch that did not reach its consumer; the next call delivers it again.

        After its epoch's end that is the call which begins the next epoch.

        Raises:
            UsageError: With a ledger, if it was given back already, or is not of the last few.
        """
        self._assembly.give_back(batch)
        self._waiting.notify()

    # --- the ledger --------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger | None:
        """The ledger that is kept; None where ``ledger_path`` names none."""
        return None if self._recording is None else self._recording.ledger

    @property
    def recording(self) -> Recording:
        """What keeps the ledger.

        Raises:
            UsageError: If none is kept.
        """
        if self._recording is None:
            raise UsageError("no ledger is kept: name its file with ledger_path in the config")
        return self._recording

    def ledger_statistics(self) -> LedgerStatistics:
        """The ledger's numbers at this moment: what was restored, and what is to be trimmed.

        Raises:
            UsageError: If no ledger is kept.
        """
        return self.recording.ledger.statistics()

    async def begin(self) -> None:
        """Decide where a run with a ledger goes on, if that is not decided; see ``recover``."""
        restored = await self.recording.begin(self.get_version())
        self._admission.restore(restored)

    def _restore(
        self, recording: Recording, stream: BatchStream, arguments: RolloutArguments
    ) -> None:
        """Let a stream go on with what was left of it by a run that was killed."""
        deliver = recording.deliver_to(stream)
        queued = []
        for entry in recording.entries():
            task = arguments.group(self._new_task_id(), entry.prompt, deliver)
            recording.adopt(task, entry)
            if entry.group is None:
                queued.append(task)
            else:
                stream.restore(task, replace(entry.group, task_id=task.task_id))
        stream.unsettled += len(queued)
        self._enqueue(queued)

    async def ack(self, batch: Batch) -> None:
        """Say that a checkpoint on the disk was trained on this batch, and all before it.

        The ledger forgets them, but for what ``ledger_checkpoints`` keeps. Durable on return.

        Raises:
            UsageError: If no ledger is kept, or it has not delivered this batch.
            LedgerError: If the ledger can not be written; then it does not count.
        """
        await self.recording.ack(batch)

    async def state_dict(self, batch: Batch | None = None) -> dict[str, Any]:
        """Return what the trainer's checkpoint has to hold for ``load_state_dict``.

        It names the last batch that was trained on, the version, and where the data loader is; all
        that it relies on is durable on return. Plain data, if the loader's own state is.

        Args:
            batch: The last one that the weights in the checkpoint were trained on. None is the last
                one delivered; a trainer that takes batches ahead has to say.

        Raises:
            UsageError: If no ledger is kept, or the batch is none of its, or an earlier one.
            LedgerError: If the ledger can not be written; then there is no checkpoint to make.
        """
        await self.begin()
        place = self.recording.placing()()  # first: what is taken by now is durable then
        return {**await self.recording.state_dict(self.get_version(), batch), **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the checkpoint that holds this state; before anything else.

        Batches after the one that it names are not trained, whether they were acknowledged or not.
        Call ``recover`` next, with the checkpoint's version and weights.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            UsageError: If no ledger is kept, the run has begun, or it is no such state.
            LedgerError: If it is not of this ledger, or too old.
        """
        self.recording.load_state_dict(state)

    # --- version, pause ----------------------------------------------------------------------

    async def set_version(self, version: int) -> None:
        """Advance to ``version`` without loading anything: the trainer moved the weights itself.

        Servers get the label, so that their reports follow.
        """
        await self.update_weights(WeightUpdate.label(version))

    async def recover(self, version: int, update: WeightUpdate | None = None) -> WeightUpdateResult:
        """Go on where a trainer that was restarted left off; before anything else is started.

        Nothing starts before every server has the version, so no token is made by weights, or under
        a label, from before the restart. What is submitted meanwhile is queued. The budget of the
        run before counts as consumed, ``version * consumer_batch_size`` groups, as it would be had
        the trainer never stopped. No rollout of it comes back but by a ledger, whose finished ones
        count as accepted besides.

        Args:
            version: Of the trainer's checkpoint.
            update: How servers get its weights, with the same version; None if they have them, and
                only the label is to be set.

        Raises:
            UsageError: If something was started or consumed, or ``update`` is of another version;
                or if the state that was loaded is of a newer one.
            LedgerError: If the ledger can not be read, or not go back so far.
            WeightUpdateError: If fewer than ``min_updated`` servers took them. Then, as after a
                cancellation, nothing starts before another call succeeds.
        """
        self._check_open()
        update = update or WeightUpdate.label(version)
        if update.version != version:
            raise UsageError(f"recover({version}) was given an update to {update.version}")
        restored = 0 if self._recording is None else self._recording.restored
        if self.counts.submitted > self.counts.queued + restored or self._consumption.groups:
            raise UsageError("recover comes first: rollouts were started already")
        if self._recording is not None:
            self._recording.check_version(version)
        self._admission.recovering = True
        result = await update_weights(self.engine.pool, update)
        await self._recovered(version)
        return result

    async def _recovered(self, version: int) -> None:
        restored = 0
        if self._recording is not None:
            self._admission.restore(await self._recording.begin(version))
            restored = self._recording.restored  # also where state_dict has begun it
        self._admission.recovering = False
        self.staleness_manager.on_version_recovered(version, restored)
        self._consumption.recover(version)
        self._changed()

    async def update_weights(self, update: WeightUpdate) -> WeightUpdateResult:
        """Bring new weights to every server while rollouts go on, then advance the version.

        After a ``recover`` that failed, it is one that succeeds.

        Raises:
            UsageError: After such a one, if the state that was loaded is of a newer version.
            WeightUpdateError: If fewer than ``min_updated`` servers took them; the version stays.
        """
        self._check_open()
        if self._admission.recovering and self._recording is not None:
            self._recording.check_version(update.version)
        result = await update_weights(self.engine.pool, update)
        if self._admission.recovering:
            await self._recovered(result.version)
            return result
        self._consumption.charge_for(result.version)  # before what is discarded lets others start
        self._expire_results(result.version)
        self._discard_outdated(result.version)
        self._stop_stragglers()
        self._changed()
        return result

    # --- admission ---------------------------------------------------------------------------

    def pause(self) -> None:
        """Start no further training rollout. What runs goes on, and evaluation too."""
        self._admission.paused = True

    def resume(self) -> None:
        """Start training rollouts again."""
        self._admission.paused = False
        self._changed()

    async def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing runs; call ``pause`` before, or it may take for ever.

        Raises:
            TimeoutError: If something still runs after ``timeout_s``.
        """
        admission = self._admission
        await self._wait_within(
            timeout_s,
            lambda: True if admission.running_members == 0 else None,
            lambda: f"{admission.running_members} rollouts still run",
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
    ledger: Ledger | None = None,
) -> AsyncIterator[WorkflowExecutor]:
    """Connect to the servers and run rollouts for the length of the block.

    Leaving it, in whatever way, cancels what still runs, aborts it on its servers, settles it as
    cancelled, wakes every waiter with RolloutClosed, and closes every connection.

    Args:
        config: Limits and policies.
        transport: How bytes travel; None makes one and closes it.
        staleness_manager: Admits; None makes one.
        ledger: Open, and the caller's to close; None opens what ``ledger_path`` names, if any.

    Raises:
        LedgerError: If the ledger can not be opened; or, at the end, not be written.
        NoServerAvailable: If a server is not ready within ``setup_timeout_s``.
        RolloutCrashed: If our own side broke; the cause is attached.
    """
    async with (
        open_recording(config, ledger) as recording,
        open_engine(config, transport=transport) as engine,
    ):
        left_with: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                executor = WorkflowExecutor(config, engine, nursery, staleness_manager, recording)
                try:
                    with watch_slow_steps(nursery, config.slow_step_warning_s) as watch:
                        executor._watch = watch
                        yield executor
                except BaseException as exc:  # noqa: BLE001 - raised again below, unwrapped
                    left_with = exc
                finally:
                    executor.close()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise crash_of(group, left_with) from group
        if left_with is not None:
            raise left_with
        executor.check_settled()
