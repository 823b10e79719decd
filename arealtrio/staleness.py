"""Admission: how many rollouts may still start without growing too old, and the permits to start.

The formula and the names are AReaL's, and ``StalenessManager`` stands in for its class unchanged.
What is new is ``try_submit``: check, reserve and number in one step, giving a permit that returns
its place unless it was accepted.

One rollout here is whatever one permit counts: the executor counts groups.
"""

from dataclasses import dataclass

# AReaL's public attribute ``lock`` has to be a real lock; nothing in this room ever waits for it.
from threading import Lock
from types import TracebackType
from typing import Protocol, Self, final

from ._core.counters import StalenessCounters
from .errors import ConfigError, UsageError

__all__ = ["Permit", "RolloutStat", "RolloutStatView", "StalenessManager", "VersionProvider"]


class VersionProvider(Protocol):
    """Whoever knows the current weight version."""

    def get_version(self) -> int:
        """Return the version that a rollout starting now would start with."""


@dataclass(frozen=True, slots=True)
class RolloutStat:
    """The counts of one moment. They may be negative where a caller counts out of order.

    Args:
        accepted: Ended well, those consumed long ago included.
        enqueued: Waiting to be submitted.
        rejected: Ended otherwise, with their staleness budget given back.
        running: Submitted and not settled.
    """

    accepted: int = 0
    enqueued: int = 0
    rejected: int = 0
    running: int = 0


@final
class RolloutStatView:
    """The same counts, live and read-only: each attribute is read at the moment it is asked for."""

    __slots__ = ("_counters",)

    def __init__(self, counters: StalenessCounters) -> None:
        self._counters = counters

    @property
    def accepted(self) -> int:
        """Ended well."""
        return self._counters.accepted

    @property
    def enqueued(self) -> int:
        """Waiting to be submitted."""
        return self._counters.enqueued

    @property
    def rejected(self) -> int:
        """Ended otherwise."""
        return self._counters.rejected

    @property
    def running(self) -> int:
        """Submitted and not settled."""
        return self._counters.running

    def __repr__(self) -> str:
        return f"<RolloutStatView of {RolloutStat(*self._counters.stats())!r}>"


@final
class Permit:
    """The right to start one rollout, held until it settles; from ``StalenessManager.try_submit``.

    Leaving its ``with`` block unsettled, for whatever reason, is a rejection: the place and the
    staleness budget return at once, synchronously, under cancellation as well. A permit belongs to
    one task; the manager behind it may be shared by any number of threads.
    """

    __slots__ = ("_counters", "_settled", "number", "version")

    number: int
    """Permits are numbered 0, 1, 2, … in the order granted."""
    version: int
    """The weight version whose budget it was granted from; no token of it may be older."""

    def __init__(self, counters: StalenessCounters, number: int, version: int) -> None:
        self._counters = counters
        self._settled = False
        self.number = number
        self.version = version

    @property
    def settled(self) -> bool:
        """Whether it was accepted or rejected."""
        return self._settled

    def accept(self) -> None:
        """Count the rollout as accepted: its place returns, its staleness budget stays spent.

        Raises:
            UsageError: If the permit is settled; nothing was changed.
        """
        self._require_unsettled()
        self._counters.accept()
        self._settled = True

    def reject(self) -> None:
        """Count the rollout as rejected: its place and its staleness budget return.

        Raises:
            UsageError: If the permit is settled; nothing was changed.
        """
        self._require_unsettled()
        self._counters.reject()
        self._settled = True

    def _require_unsettled(self) -> None:
        if self._settled:
            raise UsageError(f"permit {self.number} is settled; a permit settles exactly once")

    def __enter__(self) -> Self:
        self._require_unsettled()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._settled:
            self.reject()

    def __repr__(self) -> str:
        state = "settled" if self._settled else "held"
        return f"<Permit {self.number} of version {self.version}, {state}>"


class StalenessManager:
    """Says how many rollouts may start, by AReaL's formula, and lets them start one by one.

    capacity = min(max_concurrent_rollouts - running,
                   (max_staleness + version + 1)·consumer_batch_size - (accepted + running))

    less what was charged for batches that left short. A limit below 1 counts as 1 in it, except
    ``max_staleness``. Accepted rollouts stay counted after they are consumed; the version's advance
    is what makes room again.

    Every method is atomic and safe from any thread, without a lock. The version is asked of its
    provider first and then brought into the counters together with the check, so a provider that
    is slow, or holds a lock of its own, delays its caller alone. The formula bounds volume: that
    nothing is consumed too old also takes an order of consumption (the executor's part).

    Unlike AReaL's class, ``lock`` is held by no method: it is there for callers that use it among
    themselves. ``rollout_stat`` is read-only.

    Args:
        version_provider: Knows the current weight version. Asked at each check, never before.
        max_concurrent_rollouts: Rollouts running at once. Enough to fill every server; assign to
            change it while running, as with the next two.
        consumer_batch_size: Accepted rollouts that the trainer consumes with each version.
        max_staleness: Versions that a rollout may be behind when consumed; 0 is on-policy. 2 to 8
            is usual, 4 and above with a loss that corrects for it.

    Raises:
        ConfigError: If a limit is beyond the counters' range (2**23 running, a budget of 2**39).
    """

    def __init__(
        self,
        version_provider: VersionProvider,
        max_concurrent_rollouts: int,
        consumer_batch_size: int,
        max_staleness: int,
    ) -> None:
        self.version_provider = version_provider
        self.lock = Lock()
        try:
            self._counters = StalenessCounters(
                max_concurrent_rollouts, consumer_batch_size, max_staleness
            )
        except OverflowError as exc:
            raise ConfigError(f"the staleness limits are out of range: {exc}") from exc
        self._rollout_stat = RolloutStatView(self._counters)

    @property
    def max_concurrent_rollouts(self) -> int:
        """Rollouts running at once."""
        return self._counters.max_concurrent

    @max_concurrent_rollouts.setter
    def max_concurrent_rollouts(self, value: int) -> None:
        self._set_limits(value, self.consumer_batch_size, self.max_staleness)

    @property
    def consumer_batch_size(self) -> int:
        """Accepted rollouts that one version consumes."""
        return self._counters.batch

    @consumer_batch_size.setter
    def consumer_batch_size(self, value: int) -> None:
        self._set_limits(self.max_concurrent_rollouts, value, self.max_staleness)

    @property
    def max_staleness(self) -> int:
        """Versions that a rollout may be behind when consumed."""
        return self._counters.max_staleness

    @max_staleness.setter
    def max_staleness(self, value: int) -> None:
        self._set_limits(self.max_concurrent_rollouts, self.consumer_batch_size, value)

    @property
    def rollout_stat(self) -> RolloutStatView:
        """The counts, live and read-only."""
        return self._rollout_stat

    @property
    def charged(self) -> int:
        """Budget taken by ``charge``."""
        return self._counters.charged

    def get_pending_limit(self) -> int:
        """Return how many may be pending at most: (max_staleness + 1)·consumer_batch_size."""
        return (self.max_staleness + 1) * self.consumer_batch_size

    def get_capacity(self) -> int:
        """Return how many rollouts may start now; negative where limits or version went down.

        By the time the caller acts on it another thread may have started some: ``try_submit``
        checks and starts in one step.
        """
        self._counters.set_version(self.version_provider.get_version())
        return self._counters.capacity

    def get_budget(self) -> int:
        """Return how many may start before the next version, were there no limit of running ones.

        The second term of the capacity; negative where limits or version went down.
        """
        self._counters.set_version(self.version_provider.get_version())
        return self._counters.slack

    def try_submit(self) -> Permit | None:
        """Start one rollout if the capacity allows, as one step with the check.

        Counts as ``on_rollout_submitted`` does; the permit counts the rest. Never grants more than
        the capacity at the version the provider gave, from however many threads.

        Returns:
            The permit, numbered in the order granted; None if there is no capacity.
        """
        version = self.version_provider.get_version()
        number = self._counters.grant(version)
        return Permit(self._counters, number, version) if number >= 0 else None

    def charge(self, n: int) -> None:
        """Take n from the staleness budget for good, for the unfilled places of a short batch.

        A batch of B - n moves the version on, and with it the budget, by a whole B. Without the
        charge that surplus would admit n rollouts too many, and they would leave too old. It does
        not help permits granted before: a short batch moves those it leaves behind n places less
        than they count on, so release short only what is the last there is.

        Args:
            n: consumer_batch_size less the number released; at least 0.
        """
        self._counters.charge(n)

    def discard(self, n: int = 1) -> None:
        """Count n accepted rollouts as rejected: they were dropped before anybody consumed them.

        Args:
            n: How many; at least 0.
        """
        self._counters.discard(n)

    def on_rollout_enqueued(self) -> None:
        """Count one as waiting to be submitted."""
        self._counters.enqueue()

    def on_rollout_submitted(self) -> None:
        """Count one as running and no longer waiting, whatever the capacity."""
        self._counters.submit()

    def on_rollout_accepted(self) -> None:
        """Count one running as accepted."""
        self._counters.accept()

    def on_rollout_rejected(self) -> None:
        """Count one running as rejected."""
        self._counters.reject()

    def get_stats(self) -> RolloutStat:
        """Return a copy of the counts, all of one moment."""
        return RolloutStat(*self._counters.stats())

    def on_version_recovered(self, version: int, unconsumed: int = 0) -> None:
        """Set what counts as accepted to what a resumed run has consumed: version·batch.

        The version itself still comes from the provider.

        Args:
            version: The recovered weight version.
            unconsumed: Accepted rollouts that were restored too, and wait for their batch.
        """
        self._counters.recover(version, unconsumed)

    def _set_limits(self, max_concurrent: int, batch: int, max_staleness: int) -> None:
        try:
            self._counters.set_limits(max_concurrent, batch, max_staleness)
        except OverflowError as exc:
            raise ConfigError(f"the staleness limits are out of range: {exc}") from exc

    def __repr__(self) -> str:
        return (
            f"<StalenessManager [Limits: {self.max_concurrent_rollouts} concurrent, "
            f"batch {self.consumer_batch_size}, staleness {self.max_staleness}] {self._counters!r}>"
        )
