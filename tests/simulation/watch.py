"""Watch: sees everything that one executor does, and asks the invariants at every step of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import trio

from arealtrio import Batch, Group, ModelRequest, ModelResponse, RolloutResult, WorkflowExecutor
from arealtrio.errors import RolloutError
from arealtrio.groups import GroupTask
from arealtrio.testing import SimulatedFleet, SimulatedServer

from . import invariants as hold
from .history import History
from .plan import LORA, Plan


class Watch:
    """One executor, from its opening to its close.

    It reaches into the executor at three places: ``_enqueue``, the selection of servers and the
    queue of leases. What else it knows it is told by the workflow, the trainer and the servers.

    Args:
        history: Of the run.
        executor: Just opened.
        fleet: Its servers.
    """

    def __init__(self, history: History, executor: WorkflowExecutor, fleet: SimulatedFleet) -> None:
        self.history = history
        self.plan: Plan = history.plan
        self.executor = executor
        self.fleet = fleet
        self.recovered = 0  # groups that count as accepted before this executor began
        self.running = 0  # members
        self.submitted: Counter[bool] = Counter()  # by whether it is evaluation
        self.states: dict[str, str] = {}  # training task -> how it settled, or "delivered"
        self.requeues: dict[str, int] = {}  # task -> times it had been queued again, at settling
        self.prompts: dict[str, str] = {}  # task -> prompt
        self.evaluated: Counter[str] = Counter()  # evaluation groups by outcome
        self.overdue = 0  # groups delivered beyond the bound
        self.last_number = -1  # the highest permit delivered
        self.trainer_waits = False
        self._size = self.plan.group_size
        self._limit = executor.config.max_concurrent_rollouts
        self._largest = 1
        self._largest_eval = 1
        self._most: dict[str, int] = {}  # the largest cap of each server
        self._closed = False
        self._enqueue = executor._enqueue
        executor._enqueue = self._watched_enqueue  # type: ignore[method-assign]
        policy = executor.engine.pool._policy
        self._acquire = policy.acquire
        policy.acquire = self._watched_acquire  # type: ignore[method-assign]
        for server in fleet:
            server.on_change = self._look_at_server

    # --- what goes in, and how it settles ------------------------------------------------------

    def _watched_enqueue(self, groups: Iterable[GroupTask]) -> None:
        listed = list(groups)
        for group in listed:
            self.submitted[group.is_eval] += 1
            self.prompts[group.task_id] = group.prompt_id
            if group.is_eval:
                self._largest_eval = max(self._largest_eval, group.size)
            else:
                self._largest = max(self._largest, group.size)
            group.deliver = partial(self._settled, group.deliver)
        self._enqueue(listed)

    def _settled(self, deliver: Any, group: GroupTask, result: RolloutResult) -> None:
        """A group settled: whatever is known of it is checked before anybody else sees it."""
        outcome = result.outcome.value
        self.history.groups[outcome] += 1
        with self.history.checking():
            if group.is_eval:
                hold.i7_settles_once(result.task_id, self.states.get(result.task_id), False)
                self.evaluated[outcome] += 1
            else:
                again = group.requeued > self.requeues.get(result.task_id, group.requeued)
                hold.i7_settles_once(result.task_id, self.states.get(result.task_id), again)
            self._check_result(group, result)
        self.requeues[result.task_id] = group.requeued
        self.states[result.task_id] = outcome
        deliver(group, result)
        self.look()

    def _check_result(self, group: GroupTask, result: RolloutResult) -> None:
        if result.group is not None:
            policy = group.policy
            hold.i7_whole_group(result.group, group.size, policy.needed(group.size))
            for row in result.group.rows:
                hold.i8_row(row, truth=self.truthful)
            if not group.is_eval:
                hold.i6_not_before_its_permit(result.group)
        for failure in (result.failure, *result.member_failures):
            if failure is not None and not self._may_fail(failure.error):
                hold.no_failure_of_its_own(result.outcome.value, failure.kind.value, failure.error)

    def _may_fail(self, error: Exception) -> bool:
        """Whether an error is of the user's making, where no fault is."""
        if self.plan.faulty:
            return True
        return not isinstance(error, RolloutError) or isinstance(error, self.plan_errors)

    @property
    def plan_errors(self) -> tuple[type[Exception], ...]:
        """What a calm plan may fail with, besides what its workflow raises."""
        return self.plan.expected_errors

    @property
    def truthful(self) -> bool:
        """Whether log-probabilities tell the version: an adapter leaves the base as it is."""
        return self.plan.gconfig.lora_name != LORA

    # --- what runs -----------------------------------------------------------------------------

    def member_began(self) -> None:
        """A workflow was entered."""
        self.running += 1
        self.history.rollouts += 1
        counted = self.executor.status().admission.running_members
        self.history.check(hold.i2_concurrency, self.running, counted, self.concurrency)

    def member_ended(self) -> None:
        """And left."""
        self.running -= 1

    @property
    def concurrency(self) -> int:
        """Members that may run at once."""
        batch = self.executor.config.consumer_batch_size
        return self._limit or batch * max(self._largest, self._largest_eval)

    def answered(self, name: str, request: ModelRequest, response: ModelResponse) -> None:
        """A generation ended."""
        self.history.tokens += response.output_len
        with self.history.checking():
            self._check_response(name, request, response)

    def _check_response(self, name: str, request: ModelRequest, response: ModelResponse) -> None:
        tokens, versions = response.output_tokens, response.output_versions
        gconfig = request.gconfig
        hold.i8_lengths(
            name,
            {"tokens": tokens, "logprobs": response.output_logprobs, "versions": versions},
        )
        hold.i8_versions(name, versions, 0, self.executor.engine.pool.newest_told)
        stopped = response.stop_reason == "stop"
        hold.i8_content(name, tokens, stopped=stopped, stops=gconfig.stop_token_ids)
        hold.i8_budget(name, response, gconfig.max_new_tokens)
        if self.truthful and response.versions_exact:
            hold.i8_truth(name, response.output_logprobs, versions)
        if not self.plan.faulty:
            hold.i8_known_versions(name, exact=response.versions_exact)

    # --- what is delivered ---------------------------------------------------------------------

    def batch_came(self, batch: Batch, *, short: bool) -> None:
        """The trainer has a batch."""
        with self.history.checking():
            config = self.executor.config
            hold.i7_batch_size(batch, config.consumer_batch_size, short=short)
            self.groups_came(batch.groups, batch.version)
            self._check_order([group.number for group in batch.groups])
            self.failures_came(batch.failures)

    def _check_order(self, numbers: list[int]) -> None:
        if self.executor.config.straggler_policy == "wait" and numbers:
            hold.i7_in_order(numbers, self.last_number)
            self.last_number = max(numbers)

    def results_came(self, results: Iterable[RolloutResult], *, is_eval: bool) -> None:
        """Somebody waited for results, and has them."""
        with self.history.checking():
            groups = [result.group for result in results if result.group is not None]
            if is_eval:
                for group in groups:
                    self._deliver(group)
                return
            self.groups_came(groups, self.executor.get_version())
            self.failures_came([result for result in results if result.group is None])

    def groups_came(self, groups: Iterable[Group], version: int) -> None:
        """Accepted groups reached the trainer."""
        bound = self.executor.config.max_staleness
        for group in groups:
            self._deliver(group)
            if self.plan.bounded:
                hold.i6_bound(group, version, bound)
            else:
                oldest = group.head_version
                self.overdue += oldest is not None and version - oldest > bound
        hold.i6_violations_are_counted(self.executor.staleness_violations, self.overdue)

    def _deliver(self, group: Group) -> None:
        hold.i7_delivered_once(group.task_id, self.states.get(group.task_id))
        self.states[group.task_id] = "delivered"

    def failures_came(self, failures: Iterable[RolloutResult]) -> None:
        """Records of what settled otherwise; what had been accepted has become too old."""
        for result in failures:
            state = self.states.get(result.task_id)
            if state == "accepted":
                self.states[result.task_id] = "discarded"
            elif state in ("delivered", "discarded", None):
                hold.violated("I7", f"{result.task_id} is reported as failed, and was {state}")

    def all_came(self) -> None:
        """Nobody takes anything any more."""
        counted = self.executor.staleness_violations
        hold.i6_violations_are_counted(counted, self.overdue, at_the_end=True)

    # --- at every step -------------------------------------------------------------------------

    def look(self) -> None:
        """Ask everything that holds between any two steps of any task."""
        if self._closed or self.history.violation is not None:
            return
        with self.history.checking():
            self._look_at_counts()
            if self.executor.config.schedule_policy == "least_request":
                self._look_at_waiters()

    def look_before_time_passes(self) -> None:
        """Ask what holds when nobody can go on: what waits now waits for something."""
        if self._closed or self.history.violation is not None or self.executor.closed:
            return
        self.look()
        with self.history.checking():
            self._look_at_admission()
            if self.trainer_waits:
                self._look_at_the_trainer()

    def _look_at_counts(self) -> None:
        executor = self.executor
        counts = executor.counts.as_dict()
        hold.i1_counts_add_up(counts)
        hold.i1_counts_add_up(executor.eval_counts.as_dict())
        manager = executor.staleness_manager
        stat = manager.get_stats()
        hold.i1_books_agree(counts, stat, self.recovered)
        hold.i3_admission(stat, manager.charged, executor.get_version(), executor.config)

    def _watched_acquire(self, **kwargs: Any) -> Any:
        """A slot is granted; only then may a server have no more than its cap: caps are lowered."""
        slot = self._acquire(**kwargs)
        if slot is not None:
            pool = self.executor.engine.pool
            server = pool.named(slot.server)
            allowed = server.allowed if server.state.value == "ready" else 0
            self._most[server.address] = max(self._most.get(server.address, 0), server.cap)
            self.history.check(hold.i4_outstanding, slot.server, pool.outstanding(server), allowed)
        return slot

    def _look_at_waiters(self) -> None:
        pool = self.executor.engine.pool
        if not pool.waiting:
            return
        free = [
            server
            for server in pool.servers
            if server.state.value == "ready" and pool.outstanding(server) < server.allowed
        ]
        in_service = {server.address for server in pool.in_service}
        for waiter in pool._leases if free else ():
            shunned = set() if waiter.exclude >= in_service else waiter.exclude
            usable = [
                server.address
                for server in free
                if server.version >= waiter.min_version and server.address not in shunned
            ]
            hold.i5_no_free_slot("a request", usable)

    def _look_at_admission(self) -> None:
        admission = self.executor.status().admission
        if admission.paused or admission.recovering:
            return
        hold.i5_no_idle_admission(
            admission.queued,
            admission.running_members,
            self._limit or self.executor.config.consumer_batch_size * self._largest,
            self.executor.get_capacity(),
        )

    def _look_at_the_trainer(self) -> None:
        stream = self.executor._assembly._stream
        if stream is not None:
            size = self.executor.config.consumer_batch_size
            hold.i5_no_forgotten_batch(stream.places.ready, size)

    def _look_at_server(self, server: SimulatedServer) -> None:
        most = self._most.get(server.address, 0)
        self.history.check(hold.i4_server_has_no_more, server, most)

    # --- at the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """The executor was closed; a look at what is left."""
        self._closed = True
        for server in self.fleet:
            server.on_change = lambda _: None
        with self.history.checking():
            self._check_counts_at_the_end()
            pool = self.executor.engine.pool
            hold.i4_nothing_outstanding(
                {server.address: server.outstanding for server in pool.statistics()}
            )
            hold.i9_no_rollout(self.running)

    def _check_counts_at_the_end(self) -> None:
        counts, evaluation = self.executor.counts.as_dict(), self.executor.eval_counts.as_dict()
        hold.i1_counts_add_up(counts)
        hold.i1_all_settled(counts)
        hold.i1_all_settled(evaluation)
        hold.i1_submissions_are_counted(counts, self.submitted[False])
        hold.i1_submissions_are_counted(evaluation, self.submitted[True])
        hold.i1_outcomes_are_counted(evaluation, self.evaluated)
        hold.i1_outcomes_are_counted(counts, self._outcomes())

    def _outcomes(self) -> Counter[str]:
        """Of training, each task once, as it settled last."""
        names = {"delivered": "accepted", "discarded": "expired"}
        states = Counter(names.get(state, state) for state in self.states.values())
        return states - self._evaluation_states()

    def _evaluation_states(self) -> Counter[str]:
        return self.evaluated

    def thrown_away(self, names: Iterable[str]) -> None:
        """A call was given up that had these prompts: nobody gets what they came to."""
        unwanted = set(names)
        for task, state in self.states.items():
            if self.prompts[task] in unwanted and state == "accepted":
                self.states[task] = "delivered"

    def undelivered(self) -> list[str]:
        """Tasks that were accepted, and that nobody has got."""
        return [task for task, state in self.states.items() if state == "accepted"]


class Sight(trio.abc.Instrument):
    """Calls a watch whenever no task can run, and time is about to pass."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self._runnable = 0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """See trio."""
        self._runnable += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See trio."""
        self._runnable -= 1

    def before_io_wait(self, timeout: float) -> None:
        """See trio."""
        if self.watch is not None and not self._runnable:
            self.watch.look_before_time_passes()
