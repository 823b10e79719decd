"""Admission: which rollout may start next, and whether any may.

Training groups start in the order they were submitted, each with a permit of the StalenessManager;
their members take concurrency slots one by one. A group is admitted only when its first member can
start at once, so that a permit does not age in a queue.
"""

from __future__ import annotations

import itertools
from collections import deque

from .config import RolloutConfig
from .delivery import PermitOrder
from .engine import RemoteEngine
from .errors import StalenessBudgetExhausted
from .groups import GroupTask
from .settlement import RolloutCounts
from .staleness import StalenessManager
from .types import Outcome


class Admission:
    """Two queues, the permits, and the limit of members; decides, and starts nothing itself.

    Args:
        config: Limits.
        staleness: Grants permits.
        order: Is told of every grant and settlement.
    """

    def __init__(
        self, config: RolloutConfig, staleness: StalenessManager, order: PermitOrder
    ) -> None:
        self.staleness = staleness
        self.paused = False
        self.recovering = False  # servers have no weights yet that anything may be made by
        self.running_members = 0
        self.counts = RolloutCounts()
        self.eval_counts = RolloutCounts()
        self._config = config
        self._order = order
        self._queue: deque[GroupTask] = deque()  # submitted, not admitted
        self._eval_queue: deque[GroupTask] = deque()
        self._eval_numbers = itertools.count()
        self._starting: deque[GroupTask] = deque()  # admitted, with members still to start
        self._largest_group = 1  # of training: an evaluation is no reason to train with more
        self._largest_eval_group = 1
        self._set_slots()

    @property
    def queued(self) -> int:
        """Training groups that wait for admission."""
        return len(self._queue)

    @property
    def concurrency(self) -> int:
        """Members that may run at once: as configured, or a batch of the largest training group."""
        return self._slots

    def _set_slots(self) -> None:
        """Work out the limits once, not for every rollout; they grow with the largest group."""
        self._slots = self._concurrency_of(self._largest_group)
        # Evaluation may fill more slots than training alone has.
        self._eval_slots = self._concurrency_of(max(self._largest_group, self._largest_eval_group))
        self._queue_limit = (
            max(self._config.pending_limit, 16 * self._slots)
            if self._config.queue_size is None
            else self._config.queue_size
        )

    def _concurrency_of(self, group_size: int) -> int:
        configured = self._config.max_concurrent_rollouts
        return configured or self._config.consumer_batch_size * group_size

    @property
    def queue_limit(self) -> int:
        """Groups that ``submit`` may queue."""
        return self._queue_limit

    def enqueue(self, group: GroupTask) -> None:
        """Add a group at the end of its queue."""
        if group.is_eval:
            if group.size > self._largest_eval_group:
                self._largest_eval_group = group.size
                self._set_slots()
            self.eval_counts.enqueue()
            self._eval_queue.append(group)
        else:
            if group.size > self._largest_group:
                self._largest_group = group.size
                self._set_slots()
            self.counts.enqueue()
            self.staleness.on_rollout_enqueued()
            self._queue.append(group)

    def restore(self, count: int) -> None:
        """Count groups that were accepted before a restart, and take their budget."""
        for _ in range(count):
            self.counts.enqueue()
            self.counts.start()
            self.counts.settle(Outcome.ACCEPTED, was_running=True)
            self.staleness.on_rollout_enqueued()
            self.staleness.on_rollout_submitted()
            self.staleness.on_rollout_accepted()

    def withdraw(self, group: GroupTask) -> None:
        """Let no further member of a group start."""
        if not group.admitted:
            (self._eval_queue if group.is_eval else self._queue).remove(group)
        if group in self._starting:
            self._starting.remove(group)

    def next_member(self, engine: RemoteEngine) -> tuple[GroupTask, int] | None:
        """Take a slot for the next member that may start: its group and its index in it.

        Args:
            engine: That it is to generate with.
        """
        if self.running_members >= self._eval_slots:  # of which there are no fewer than others
            return None
        if not self._starting and not ((self._queue or self._eval_queue) and self._admit()):
            return None
        group = self._starting[0]
        if self.running_members >= (self._eval_slots if group.is_eval else self._slots):
            return None
        index = group.start_member(engine, self._config.rollout_timeout_s)
        if not group.to_start:
            self._starting.popleft()
        self.running_members += 1
        return group, index

    def _admit(self) -> bool:
        """Take the next group out of its queue, if any may start; ``priority`` says which queue."""
        if self._config.priority == "eval":
            return self._admit_eval() or self._admit_training()
        return self._admit_training() or self._admit_eval()

    def _admit_eval(self) -> bool:
        if not self._eval_queue or self.recovering or self.running_members >= self._eval_slots:
            return False
        group = self._eval_queue.popleft()
        group.number = next(self._eval_numbers)
        self.eval_counts.start()
        self._starting.append(group)
        return True

    def _admit_training(self) -> bool:
        if not self._queue or self.paused or self.recovering:
            return False
        if self.running_members >= self._slots:
            return False
        permit = self.staleness.try_submit()
        if permit is None:
            return False
        group = self._queue.popleft()
        group.permit, group.number = permit, permit.number
        self._order.granted(permit.number)
        self.counts.start()
        self._starting.append(group)
        return True

    def member_ended(self, group: GroupTask) -> None:
        """Give a member's slot back; members of its group may be to start again, or no more."""
        self.running_members -= 1
        self.restart(group)

    def restart(self, group: GroupTask) -> None:
        """See that the members a group still has to start do start, before any new group.

        It holds its permit meanwhile: a fresh prompt that took the budget of a replacement would
        leave the group waiting for one that it can not get.
        """
        if group.to_start:
            if group not in self._starting:
                self._starting.appendleft(group)
        elif self._starting and group in self._starting:
            self._starting.remove(group)

    def retry(self, group: GroupTask) -> None:
        """Let all members of a group start once more, with the permit it holds."""
        group.retried += 1
        self.restart(group)

    def requeue(self, group: GroupTask) -> None:
        """Put a group that is too old back at the head of the queue, without its permit."""
        assert group.permit is not None
        group.permit.reject()
        self._order.settled(group.permit.number)
        self.counts.requeue()
        self._queue_again(group)

    def requeue_accepted(self, group: GroupTask) -> None:
        """The same for one that was accepted and became too old before anybody took it."""
        self.staleness.discard()
        self.counts.requeue_accepted()
        self._queue_again(group)

    def discard_accepted(self) -> None:
        """A group that was accepted became too old before anybody took it: its budget returns."""
        self.staleness.discard()
        self.counts.discard(1)

    def _queue_again(self, group: GroupTask) -> None:
        group.requeued += 1
        group.permit = group.number = None
        self.staleness.on_rollout_enqueued()
        self._queue.appendleft(group)

    def settled(self, group: GroupTask, outcome: Outcome) -> None:
        """Count a group's end and settle its permit; only an accepted one keeps budget spent."""
        counts = self.eval_counts if group.is_eval else self.counts
        counts.settle(outcome, was_running=group.admitted)
        permit = group.permit
        if permit is not None:
            if outcome is Outcome.ACCEPTED:
                permit.accept()
            else:
                permit.reject()
            self._order.settled(permit.number)
        elif not group.is_eval:  # withdrawn from the queue: AReaL's counters know no such step
            self.staleness.on_rollout_submitted()
            self.staleness.on_rollout_rejected()

    def check_budget(self) -> None:
        """Raise where no training group can end before the next version.

        Whoever waits is the one who has to make that version, so the wait would never end.

        Raises:
            StalenessBudgetExhausted: With the numbers.
        """
        if not self._queue or self._order.unsettled or self.paused or self.recovering:
            return
        if self.staleness.get_capacity() > 0:
            return
        stat = self.staleness.get_stats()
        raise StalenessBudgetExhausted(
            f"{self.queued} groups are queued, and none may start before the next weight version: "
            f"{stat.accepted} accepted and {self.staleness.charged} charged of "
            f"(max_staleness {self._config.max_staleness} + version "
            f"{self.staleness.version_provider.get_version()} + 1) · "
            f"{self._config.consumer_batch_size}. Update the weights (or set_version) before "
            "asking for more, or raise max_staleness"
        )
