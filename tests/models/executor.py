"""What the executor's submit, wait and wait_for_task do, as lists and loops."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelGroup:
    name: str
    size: int
    is_eval: bool
    number: int | None = None
    started: int = 0
    ended: int = 0
    outcome: str | None = None
    taken: bool = False
    versions: list[int] = field(default_factory=list)  # in which each member started

    @property
    def running(self) -> int:
        return self.started - self.ended if self.outcome is None else 0


class ModelExecutor:
    def __init__(self, batch: int, max_staleness: int, slots: int, queue_size: int) -> None:
        self.batch, self.max_staleness = batch, max_staleness
        self.slots, self.queue_size = slots, queue_size
        self.version = self.consumed = self.charged = 0
        self.paused = False
        self.groups: list[ModelGroup] = []  # in the order of submission
        self.grants = [0, 0]  # of training, of evaluation

    # --- what there is ---------------------------------------------------------------------------

    def find(self, name: str) -> ModelGroup | None:
        """The group that holds this name now."""
        return next((g for g in self.groups if g.name == name and not g.taken), None)

    def queued(self, is_eval: bool) -> list[ModelGroup]:
        return [g for g in self.groups if g.is_eval == is_eval and g.number is None]

    def admitted(self, is_eval: bool) -> list[ModelGroup]:
        groups = [g for g in self.groups if g.is_eval == is_eval and g.number is not None]
        return sorted(groups, key=lambda g: g.number or 0)

    def live(self) -> list[ModelGroup]:
        return [g for g in self.groups if g.number is not None and g.outcome is None]

    def settled(self, is_eval: bool) -> list[ModelGroup]:
        return [g for g in self.admitted(is_eval) if g.outcome is not None and not g.taken]

    def counts(self, is_eval: bool) -> dict[str, int]:
        counts = dict.fromkeys(("accepted", "rejected", "failed", "expired", "cancelled"), 0)
        for group in self.admitted(is_eval):
            if group.outcome is not None:
                counts[group.outcome] += 1
        return {
            "submitted": sum(g.is_eval == is_eval for g in self.groups),
            "queued": len(self.queued(is_eval)),
            "running": sum(g.is_eval == is_eval for g in self.live()),
            **counts,
        }

    def capacity(self) -> int:
        counts = self.counts(is_eval=False)
        budget = (self.max_staleness + self.version + 1) * self.batch
        used = counts["accepted"] + counts["running"] + self.charged
        return min(self.slots - counts["running"], budget - used)

    def ready(self, is_eval: bool) -> list[ModelGroup]:
        """Settled, and for training: every lower permit has settled."""
        ready = []
        for group in self.admitted(is_eval):
            if group.outcome is None and not is_eval:
                break
            if group.outcome is not None and not group.taken:
                ready.append(group)
        return ready

    def exhausted(self) -> bool:
        running = any(not g.is_eval for g in self.live())
        waiting = bool(self.queued(is_eval=False))
        return waiting and not running and not self.paused and self.capacity() <= 0

    # --- what can happen -------------------------------------------------------------------------

    def submit(self, name: str, size: int, is_eval: bool) -> str:
        if self.find(name) is not None:
            return "refused"
        if not is_eval and len(self.queued(is_eval=False)) >= self.queue_size:
            return "refused"
        self.groups.append(ModelGroup(name, size, is_eval))
        self.start()
        return "done"

    def start(self) -> None:
        """Start member after member, each group whole before the next, evaluation first."""
        while sum(g.running for g in self.groups) < self.slots:
            group = self.next_group()
            if group is None:
                return
            if group.number is None:
                group.number = self.grants[group.is_eval]
                self.grants[group.is_eval] += 1
            group.started += 1
            group.versions.append(self.version)

    def next_group(self) -> ModelGroup | None:
        for group in self.live():
            if group.started < group.size:
                return group
        for group in self.queued(is_eval=True):
            return group
        if not self.paused and self.capacity() > 0:
            for group in self.queued(is_eval=False):
                return group
        return None

    def end(self, group: ModelGroup, outcome: str) -> None:
        group.ended += 1
        if outcome != "accepted" or group.ended == group.size:
            group.outcome = outcome
        self.start()

    def set_version(self, version: int) -> None:
        self.version = version
        short = max(0, version * self.batch - self.consumed)
        self.charged += short
        self.consumed += short
        self.start()

    def wait(self, count: int, is_eval: bool) -> str | list[str]:
        ready = self.ready(is_eval)
        if len(ready) >= count:
            return [self.take(group) for group in ready[:count]]
        coming = [g for g in self.groups if g.is_eval == is_eval and not g.taken]
        if len(coming) < count:
            return "UsageError"
        if not is_eval and self.exhausted():
            return "StalenessBudgetExhausted"
        return "TimeoutError"

    def wait_for_task(self, name: str) -> str | list[str]:
        group = self.find(name)
        if group is None:
            return "UsageError"
        if group.outcome is not None:
            return [self.take(group)]
        if not group.is_eval and self.exhausted():
            return "StalenessBudgetExhausted"
        return "TimeoutError"

    def take(self, group: ModelGroup) -> str:
        group.taken = True
        if group.outcome == "accepted" and not group.is_eval:
            if min(group.versions) < self.version - self.max_staleness:
                group.outcome = "expired"
                self.start()
            else:
                self.consumed += 1
        return f"{group.name} {group.outcome} {group.number}"
