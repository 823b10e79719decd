"""Consumption: what left for the trainer, set against what its versions count on."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

from .config import RolloutConfig
from .lateness import is_bounded, is_older
from .staleness import StalenessManager
from .trajectory import Group


class Consumption:
    """Counts the groups that left, and charges the budget where a version came with too few.

    Args:
        config: Limits and policies.
        staleness: Is charged.

    Attributes:
        groups: That left for the trainer, or were charged for in their place.
        violations: Of them, those beyond ``max_staleness``; only ``keep`` has any.
    """

    def __init__(self, config: RolloutConfig, staleness: StalenessManager) -> None:
        self.groups = 0
        self.violations = 0
        self._staleness = staleness
        self._batch_size = config.consumer_batch_size
        self._is_bounded = is_bounded(config)
        # The violations that may still be given back. What became of the rest is not ours to hold.
        self._late: WeakSet[Group] = WeakSet()

    def take(self, groups: Sequence[Group], oldest: int) -> None:
        """Groups leave for the trainer.

        Args:
            groups: Which.
            oldest: The oldest version that one of their tokens may have.
        """
        self.groups += len(groups)
        late = [group for group in groups if is_older(group, oldest)]
        self.violations += len(late)
        self._late.update(late)

    def take_back(self, groups: Sequence[Group]) -> None:
        """Undo ``take``: they did not reach the trainer. Versions may have advanced since."""
        self.groups -= len(groups)
        late = [group for group in groups if group in self._late]
        self.violations -= len(late)
        self._late.difference_update(late)

    def take_places(self, count: int) -> None:
        """Places leave without a group: charged for when they were taken, or thrown away."""
        self.groups += count

    def charge_place(self) -> None:
        """Charge the budget for one place that a rejected group takes in a batch."""
        if self._is_bounded:
            self._staleness.charge(1)

    def charge_for(self, version: int) -> None:
        """Charge the budget for version steps that consumed less than a batch each.

        The proof in ``delivery`` has one release of B per step, so a short batch must not buy more
        rollouts than a full one. AReaL's ``keep`` has no such condition.
        """
        short = version * self._batch_size - self.groups
        if self._is_bounded and short > 0:
            self._staleness.charge(short)
            self.groups += short

    def recover(self, version: int) -> None:
        """Count as consumed what a run that never stopped would have consumed by ``version``."""
        self.groups = version * self._batch_size
