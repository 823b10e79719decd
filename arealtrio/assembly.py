"""BatchAssembly: what ``prepare_batch`` decides, step by step. It waits for nothing itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .admission import Admission
from .batching import BatchStream, DataLoader
from .config import RolloutConfig
from .consumption import Consumption
from .delivery import PermitOrder
from .errors import TooManyFailures
from .failures import FailureBudget
from .groups import GroupTask
from .lateness import expired, is_bounded
from .recording import Recording
from .trajectory import Batch, Group
from .types import Outcome

logger = logging.getLogger(__name__)


class BatchAssembly:
    """Says when to read prompts, and puts groups that have settled together as batches.

    Args:
        config: Limits and policies.
        order: Of all permits.
        admission: Of the rollouts; asked what is queued, and told what nobody will take.
        failures: Spent, it ends a call.
        consumption: Is told of what leaves.
        requeue: Queues a group again that was accepted, and may do so no more often than it says.
        recording: Is told what becomes of batches; None where no ledger is kept.
    """

    def __init__(
        self,
        config: RolloutConfig,
        order: PermitOrder,
        admission: Admission,
        failures: FailureBudget,
        consumption: Consumption,
        requeue: Callable[[GroupTask], bool],
        recording: Recording | None = None,
    ) -> None:
        self._config = config
        self._order = order
        self._admission = admission
        self._failures = failures
        self._consumption = consumption
        self._requeue = requeue
        self._recording = recording
        self._is_bounded = is_bounded(config)
        self._pending_limit = config.pending_limit
        self._wanted_least = max(1, self._pending_limit // 4)  # each question costs a round trip
        self._stream: BatchStream | None = None
        # For the next stream: groups given back after an epoch's end, and failures nobody was told.
        self._left: list[Group] = []
        self._untold: list[Batch] = []
        self._shuffle = np.random.default_rng(config.seed)

    def stream_of(self, loader: DataLoader, *, dynamic: bool) -> BatchStream:
        """The stream of a data loader: the one under way, or a new epoch.

        Raises:
            UsageError: For another loader while prompts of the last one are under way.
        """
        if self._stream is None or self._never_begun(self._stream, loader):
            self._stream = self._begin_stream(loader, self._stream)
        self._stream.refuse(loader)
        self._consumption.take_places(self._stream.set_dynamic(dynamic))
        return self._stream

    def _begin_stream(self, loader: DataLoader, instead_of: BatchStream | None) -> BatchStream:
        """The stream of a new epoch, with what is left of the last one."""
        stream = BatchStream(
            loader,
            self._order,
            self._config.consumer_batch_size,
            self._consumption.charge_place,
            self._config.max_consecutive_rejections,
            None if self._recording is None else self._recording.open_feed(loader),
        )
        if instead_of is not None:
            self._left += [entry for entry in instead_of.places if isinstance(entry, Group)]
            self._untold.append(instead_of.batch((), 0))
        for group in self._left:
            stream.put(group)
        for batch in reversed(self._untold):
            stream.tell_again(batch)
        self._left, self._untold = [], []
        return stream

    def _never_begun(self, stream: BatchStream, loader: DataLoader) -> bool:
        """Whether ``loader`` may take the place of a stream's, which could not even be iterated."""
        other = stream.feed.loader is not loader
        return other and not stream.feed.begun and self._recording is None

    def step(self, stream: BatchStream, version: int) -> Batch | int | None:
        """How many prompts to read now; or a batch, empty at the end; None while there is neither.

        Args:
            stream: Of ``stream_of``.
            version: The trainer's; ``discard_outdated`` was called with it.

        Raises:
            TooManyFailures: A budget is spent, and no batch is ready; or an epoch gave none.
            StalenessBudgetExhausted: If no batch can be had before the next version.
            LedgerError: While the ledger can not be written.
        """
        if self._recording is not None:
            self._recording.check()
        size = self._config.consumer_batch_size
        ready = stream.places.has_ready(size)
        if not ready:
            self._check_failures(stream)
        wanted = self._prompts_wanted(stream)
        # A batch that is ready is held up once at most: rollouts that fail or are rejected at once
        # would want prompts for ever.
        if wanted and not (ready and stream.read_ahead):
            stream.read_ahead = ready
            return wanted
        if ready:
            return self._release(stream, size, version)
        if stream.ended and stream.places.ready == len(stream.places):
            if not stream.has_groups:
                return self._end_stream(stream, version)
            return self._release(stream, stream.places.ready, version)
        self._admission.check_budget()
        return None

    def _check_failures(self, stream: BatchStream) -> None:
        for budget in (self._failures, stream.rejections):
            if budget.spent:
                raise budget.take_error()

    def _prompts_wanted(self, stream: BatchStream) -> int:
        """How many prompts to read now; not a few at a time."""
        wanted = self._pending_limit - self._admission.queued
        return wanted if wanted >= self._wanted_least and not stream.feed.exhausted else 0

    def _end_stream(self, stream: BatchStream, version: int) -> Batch:
        """End an epoch with an empty batch. What failed since the last one is told in the next.

        Raises:
            TooManyFailures: It gave no batch, so that its failures would be told to nobody.
        """
        if stream is not self._stream:  # its end was told to another caller
            return Batch(groups=(), version=version)
        self._consumption.take_places(stream.give_up_places())
        untold = stream.batch((), version)
        self._stream, self._untold = None, [untold]
        if self._recording is not None:
            self._recording.end_epoch()
        errors = _errors_of(untold)
        if errors and stream.any_failed and not stream.delivered:
            words = f"an epoch ended without a batch: {len(errors)} of its groups failed"
            raise TooManyFailures(words, errors)
        if errors:
            logger.warning(
                "failed after the last batch of an epoch: %d, the first with %r; see the failures "
                "of the next epoch's first batch",
                len(errors),
                errors[0],
            )
        return Batch(groups=(), version=version)

    def _release(self, stream: BatchStream, count: int, version: int) -> Batch:
        stream.read_ahead, stream.delivered = False, True
        groups = stream.take(count)
        self._consumption.take(groups, version - self._config.max_staleness)
        self._consumption.take_places(count - len(groups))  # charged for when they were rejected
        shuffled = [groups[i] for i in self._shuffle.permutation(len(groups))]
        batch = stream.batch(shuffled, version)
        return batch if self._recording is None else self._recording.delivered(batch)

    def give_back(self, batch: Batch) -> None:
        """Return a batch that did not reach its consumer; the next one to leave holds it.

        Raises:
            UsageError: If the ledger does not know any more what was in it.
        """
        if self._recording is not None:
            self._recording.returned(batch)
        if self._stream is None:
            self._left += batch.groups
            self._untold.insert(0, replace(batch, groups=()))
        else:
            for group in batch.groups:
                self._stream.put(group)
            self._stream.tell_again(batch)
        self._consumption.take_back(batch.groups)

    def discard_outdated(self, version: int) -> bool:
        """Drop, or queue again, what waits for a batch and is too old for ``version``.

        Its budget returns. Under ``requeue`` it is a straggler like any other: that it ended after
        the last batch it could be in, and not a version later, makes no difference.

        Returns:
            Whether there was any.
        """
        if self._stream is None or not self._is_bounded:
            return False
        old = self._stream.take_older_than(version - self._config.max_staleness)
        for group, task in old:
            if task is not None and self._requeue(task):
                self._stream.unsettled += 1
                if self._recording is not None:
                    self._recording.reopen(group.task_id)
            else:
                self._stream.failed(expired(group, version))
                self._admission.discard_accepted()
                if self._recording is not None:
                    self._recording.close(group.task_id)
        return bool(old)


def _errors_of(batch: Batch) -> list[Exception]:
    """Why groups failed; what was rejected or came too late is no failure."""
    failed = (result for result in batch.failures if result.outcome is Outcome.FAILED)
    return [result.failure.error for result in failed if result.failure is not None]
