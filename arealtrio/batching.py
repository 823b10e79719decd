"""BatchStream: from a data loader's prompts to training batches, one step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import TypeAlias

from .delivery import DeliveryQueue, PermitOrder
from .errors import UsageError
from .failures import RejectionBudget
from .groups import (
    GroupTask,
)
from .lateness import is_older
from .loader import LoaderFeed, Prompt
from .settlement import RolloutResult
from .trajectory import Batch, Group
from .types import Outcome

FAILURES_KEPT = 1024
"""Records of failures that one batch holds at most: each may hold an exception with its frames."""

DataLoader: TypeAlias = Iterable[Prompt | Sequence[Prompt]]


class BatchStream:
    """The groups that ``prepare_batch`` draws from one data loader: under way, or ready to leave.

    Args:
        loader: The data loader; ``iter`` is called once.
        order: Of all permits.
        size: Groups in a batch.
        charge: Takes one place from the staleness budget for good.
        max_rejections: Groups that may be rejected in a row; None is any number.
        feed: Reads the loader; None makes one.
    """

    def __init__(
        self,
        loader: DataLoader,
        order: PermitOrder,
        size: int,
        charge: Callable[[], None],
        max_rejections: int | None = None,
        feed: LoaderFeed | None = None,
    ) -> None:
        self.feed = LoaderFeed(loader) if feed is None else feed
        # Of the batches to come: the accepted groups, and rejected ones that count.
        self.places: DeliveryQueue[Group | RolloutResult] = DeliveryQueue(order)
        self.unsettled = 0
        self.read_ahead = False  # whether prompts were read since a batch became ready
        self.any_failed = False
        self.delivered = self.feed.resumed  # whether a batch left, as far as anybody knows
        # What settled otherwise since the last batch: the newest, and how many came before them.
        self.failures: deque[RolloutResult] = deque(maxlen=FAILURES_KEPT)
        self.failures_omitted = 0
        self.rejections = RejectionBudget(max_rejections)
        self.dynamic = False
        self.rejected = 0  # places that rejected groups have
        self._oldest = inf  # no group that waits holds an older token
        self._size = size
        self._charge = charge
        self._tasks: dict[str, GroupTask] = {}  # of what is accepted: it may be queued again

    @property
    def ended(self) -> bool:
        """Whether no prompt is left and nothing is under way."""
        return self.feed.exhausted and not self.unsettled

    def deliver(self, task: GroupTask, result: RolloutResult) -> None:
        """A group of this stream settled."""
        self.unsettled -= 1
        self.rejections.record(result.outcome)
        self.any_failed |= result.outcome is Outcome.FAILED
        if result.group is not None:
            self._tasks[result.task_id] = task
            self.put(result.group)
        elif result.outcome is not Outcome.CANCELLED:
            self.failed(result)
            self._count_rejected(result)

    def restore(self, task: GroupTask, group: Group) -> None:
        """A group waits for its batch that settled before a restart, as that task."""
        self._tasks[group.task_id] = task
        self.put(group)

    def put(self, group: Group) -> None:
        """Let a group wait for its batch; or again, for the next, where nobody got its batch."""
        self.places.put(group)
        self._oldest = min(self._oldest, _age(group))

    def _count_rejected(self, result: RolloutResult) -> None:
        """Let a rejected group take a place of a dynamic batch, but for the last one.

        The place is charged for at once, before another prompt gets it: charged only when the batch
        leaves, it would let in a group that counts on one more to leave before it. Without a place
        for an accepted group no batch would ever leave.
        """
        if not self.dynamic or result.outcome is not Outcome.REJECTED:
            return
        if self.rejected < self._size - 1:
            self.rejected += 1
            self.places.put(result)
            self._charge()

    def set_dynamic(self, dynamic: bool) -> int:
        """Say whether rejected groups take places from now on; return how many gave theirs up."""
        self.dynamic = dynamic
        return 0 if dynamic else self.give_up_places()

    def give_up_places(self) -> int:
        """Remove the places that rejected groups have, and return how many there were."""
        given_up, self.rejected = self.rejected, 0
        if given_up:
            self.places.remove_where(lambda entry: isinstance(entry, RolloutResult))
        return given_up

    @property
    def has_groups(self) -> bool:
        """Whether an accepted group waits."""
        return len(self.places) > self.rejected

    def take(self, count: int) -> list[Group]:
        """Empty the ``count`` places that are first to leave, and return the groups in them."""
        taken = self.places.take(count)
        groups = [entry for entry in taken if isinstance(entry, Group)]
        self.rejected -= len(taken) - len(groups)
        for group in groups:
            self._tasks.pop(group.task_id, None)
        return groups

    def take_older_than(self, oldest: int) -> list[tuple[Group, GroupTask | None]]:
        """Remove what became too old because versions advanced without it, with its task.

        A trainer that takes one batch per version and waits for every straggler never has any; see
        ``delivery``. Every group is looked at, not just the lowest: the age does not follow the
        number where a rollout does something else, or waits for a server, before its first token.

        Args:
            oldest: The oldest admissible version.

        Returns:
            The highest number first. A group that was given back has no task any more.
        """
        if self._oldest >= oldest:  # nearly always: versions advance once a batch
            return []
        self._look_again()  # what was the oldest may have left with a batch
        if self._oldest >= oldest:
            return []
        old = self.places.take_where(
            lambda entry: isinstance(entry, Group) and is_older(entry, oldest)
        )
        self._look_again()
        groups = [entry for entry in reversed(old) if isinstance(entry, Group)]
        return [(group, self._tasks.pop(group.task_id, None)) for group in groups]

    def _look_again(self) -> None:
        """Bring ``_oldest`` up to date."""
        versions = [entry.head_version for entry in self.places if isinstance(entry, Group)]
        self._oldest = min((v for v in versions if v is not None), default=inf)

    def failed(self, result: RolloutResult) -> None:
        """Keep the record of what settled otherwise, if need be in an older one's place."""
        self.failures_omitted += len(self.failures) == FAILURES_KEPT
        self.failures.append(result)

    def batch(self, groups: Sequence[Group], version: int) -> Batch:
        """A batch of these groups, with what settled otherwise since the last one."""
        batch = Batch(
            groups=tuple(groups),
            version=version,
            failures=tuple(self.failures),
            failures_omitted=self.failures_omitted,
        )
        self.failures.clear()
        self.failures_omitted = 0
        return batch

    def tell_again(self, batch: Batch) -> None:
        """Let the next batch tell what this one did, which nobody got."""
        later = list(self.failures)
        self.failures.clear()
        self.failures_omitted += batch.failures_omitted
        for result in (*batch.failures, *later):
            self.failed(result)

    def refuse(self, loader: DataLoader) -> None:
        """Raise if ``loader`` is another one than this stream's.

        Raises:
            UsageError: With what is still under way.
        """
        if loader is not self.feed.loader:
            waiting = len(self.places) - self.rejected
            raise UsageError(
                f"prepare_batch was given another data loader, while {self.unsettled} groups of "
                f"the last one are under way and {waiting} wait to be delivered; "
                "read the last one to its end first"
            )


def _age(group: Group) -> float:
    """The version of its oldest token; infinite where nothing was generated."""
    version = group.head_version
    return inf if version is None else version
