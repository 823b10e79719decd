"""StalenessCounters in plain integers of any size: AReaL's formula, read as it is written."""

from dataclasses import dataclass


@dataclass
class PlainCounters:
    max_concurrent: int
    batch: int
    max_staleness: int
    version: int = 0
    accepted: int = 0
    enqueued: int = 0
    rejected: int = 0
    running: int = 0
    charged: int = 0
    granted: int = 0

    @property
    def free(self) -> int:
        return max(1, self.max_concurrent) - self.running

    @property
    def slack(self) -> int:
        budget = (self.max_staleness + self.version + 1) * max(1, self.batch)
        return budget - (self.accepted + self.running) - self.charged

    @property
    def capacity(self) -> int:
        return min(self.free, self.slack)

    @property
    def in_range(self) -> bool:
        return -(2**23) <= self.free < 2**23 and -(2**39) <= self.slack < 2**39

    def enqueue(self, n: int) -> None:
        self.enqueued += n

    def submit(self, n: int) -> None:
        self.enqueued -= n
        self.running += n

    def try_submit(self, n: int) -> bool:
        if self.capacity < n:
            return False
        self.submit(n)
        return True

    def accept(self, n: int) -> None:
        self.running -= n
        self.accepted += n

    def reject(self, n: int) -> None:
        self.running -= n
        self.rejected += n

    def discard(self, n: int) -> None:
        self.accepted -= n
        self.rejected += n

    def charge(self, n: int) -> None:
        self.charged += n

    def set_version(self, version: int) -> None:
        self.version = version

    def set_limits(self, max_concurrent: int, batch: int, max_staleness: int) -> None:
        self.max_concurrent = max_concurrent
        self.batch = batch
        self.max_staleness = max_staleness

    def recover(self, version: int, unconsumed: int) -> None:
        self.accepted = version * max(1, self.batch) + unconsumed
        self.charged = 0

    def grant(self, version: int) -> int:
        self.version = version
        if not self.try_submit(1):
            return -1
        self.granted += 1
        return self.granted - 1
