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
        self.running_members = 0
        self.counts = RolloutCounts()
        self.eval_counts = RolloutCounts()
        self._config = config
        self._order = order
        self._queue: deque[GroupTask] = deque()  # submitted, not admitted
        self._eval_queue: deque[GroupTask] = deque()
        self._eval_numbers = itertools.count()
        self._starting: GroupTask | None = None  # admitted, with members still to start
        self._largest_group = 1

    @property
    def queued(self) -> int:
        """Training groups that wait for admission."""
        return len(self._queue)

    @property
    def concurrency(self) -> int:
        """Members that may run at once."""
        configured = self._config.max_concurrent_rollouts
        return configured or self._config.consumer_batch_size * self._largest_group

    @property
    def queue_limit(self) -> int:
        """Groups that ``submit`` may queue."""
        if self._config.queue_size is not None:
            return self._config.queue_size
        return max(self._config.pending_limit, 16 * self.concurrency)

    def enqueue(self, group: GroupTask) -> None:
        """Add a group at the end of its queue."""
        self._largest_group = max(self._largest_group, group.size)
        if group.is_eval:
            self.eval_counts.enqueue()
            self._eval_queue.append(group)
        else:
            self.counts.enqueue()
            self.staleness.on_rollout_enqueued()
            self._queue.append(group)

    def withdraw(self, group: GroupTask) -> None:
        """Let no further member of a group start."""
        if not group.admitted:
            (self._eval_queue if group.is_eval else self._queue).remove(group)
        if self._starting is group:
            self._starting = None

    def next_member(self) -> tuple[GroupTask, int] | None:
        """Take a slot for the next member that may start: its group and its index in it."""
        if self.running_members >= self.concurrency:
            return None
        group = self._starting or self._admit()
        if group is None:
            return None
        index = group.start_member(self._config.rollout_timeout_s)
        self._starting = group if group.to_start else None
        self.running_members += 1
        return group, index

    def _admit(self) -> GroupTask | None:
        """Take the next group out of its queue: evaluation goes before training.

        A trainer that evaluates waits for it, and evaluation is short; training is bounded by its
        own budget anyway.
        """
        if self._eval_queue:
            group = self._eval_queue.popleft()
            group.number = next(self._eval_numbers)
            self.eval_counts.start()
            return group
        if self.paused or not self._queue:
            return None
        permit = self.staleness.try_submit()
        if permit is None:
            return None
        group = self._queue.popleft()
        group.permit, group.number = permit, permit.number
        self._order.granted(permit.number)
        self.counts.start()
        return group

    def member_ended(self, group: GroupTask) -> None:
        """Give a member's slot back."""
        self.running_members -= 1
        if self._starting is group and not group.to_start:
            self._starting = None

    def settled(self, group: GroupTask, outcome: Outcome) -> None:
        """Count a group's end and settle its permit; only an accepted one keeps budget spent."""
        counts = self.eval_counts if group.is_eval else self.counts
        counts.settle(outcome, was_running=group.admitted)
        if group.permit is not None:
            if outcome is Outcome.ACCEPTED:
                group.permit.accept()
            else:
                group.permit.reject()
            self._order.settled(group.permit.number)
        elif not group.is_eval:  # withdrawn from the queue: AReaL's counters know no such step
            self.staleness.on_rollout_submitted()
            self.staleness.on_rollout_rejected()

    def check_budget(self) -> None:
        """Raise where no training group can end before the next version.

        Whoever waits is the one who has to make that version, so the wait would never end.

        Raises:
            StalenessBudgetExhausted: With the numbers.
        """
        if self._order.unsettled or self.paused or not self._queue:
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
