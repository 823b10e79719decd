"""AReaL's StalenessManager as its specification reads: one lock, plain integers."""

from threading import Lock
from typing import Protocol


class Versioned(Protocol):
    def get_version(self) -> int: ...


class LockedStalenessManager:
    def __init__(
        self,
        version_provider: Versioned,
        max_concurrent_rollouts: int,
        consumer_batch_size: int,
        max_staleness: int,
    ) -> None:
        self.version_provider = version_provider
        self.max_concurrent_rollouts = max_concurrent_rollouts
        self.consumer_batch_size = consumer_batch_size
        self.max_staleness = max_staleness
        self.lock = Lock()
        self.accepted = self.enqueued = self.rejected = self.running = 0

    def get_pending_limit(self) -> int:
        return (self.max_staleness + 1) * self.consumer_batch_size

    def get_capacity(self) -> int:
        with self.lock:
            return self._capacity(self.version_provider.get_version())

    def _capacity(self, version: int) -> int:
        concurrency = max(1, self.max_concurrent_rollouts) - self.running
        budget = (self.max_staleness + version + 1) * max(1, self.consumer_batch_size)
        return min(concurrency, budget - (self.accepted + self.running))

    def try_submit(self) -> bool:
        with self.lock:
            if self._capacity(self.version_provider.get_version()) <= 0:
                return False
            self.enqueued -= 1
            self.running += 1
            return True

    def on_rollout_enqueued(self) -> None:
        with self.lock:
            self.enqueued += 1

    def on_rollout_submitted(self) -> None:
        with self.lock:
            self.enqueued -= 1
            self.running += 1

    def on_rollout_accepted(self) -> None:
        with self.lock:
            self.running -= 1
            self.accepted += 1

    def on_rollout_rejected(self) -> None:
        with self.lock:
            self.running -= 1
            self.rejected += 1

    def on_version_recovered(self, version: int) -> None:
        with self.lock:
            self.accepted = version * max(1, self.consumer_batch_size)
