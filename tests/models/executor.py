"""What the executor does for a trainer, as lists and loops: every rule, and in what order.

Nothing runs here. A rollout that is cancelled ends in ``finish``, after what its cancellation let
start: so it is on a schedule that runs tasks in the order they were made.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

OUTCOMES = ("accepted", "rejected", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class Rules:
    """The configuration, as far as it decides anything here."""

    batch: int = 1
    max_staleness: int = 0
    slots: int = 1
    queue_size: int = 1
    straggler_policy: str = "wait"
    max_requeues: int = 0
    group_policy: tuple[str, int] = ("all", 0)
    dynamic: bool = False
    max_failures: int = 64
    max_rejections: int = 10_000
    epoch: int = 10  # prompts that a data loader gives

    @property
    def bounded(self) -> bool:
        return self.straggler_policy != "keep"

    @property
    def in_order(self) -> bool:
        return self.straggler_policy == "wait"

    def needed(self, size: int) -> int:
        kind, number = self.group_policy
        return min(number, size) if kind == "at_least" else size


@dataclass(eq=False)
class ModelGroup:
    name: str
    size: int
    is_eval: bool
    batched: bool = False
    number: int | None = None
    permit_version: int = 0
    to_start: int = 0
    rows: list[tuple[int, bool]] = field(default_factory=list)  # version, liked by the filter
    lost: int = 0
    replaced: int = 0
    retried: int = 0
    requeued: int = 0
    verdict: str | None = None  # what stopped it
    too_late: bool = False
    outcome: str | None = None
    taken: bool = False

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.to_start = self.size
        self.rows, self.lost, self.replaced = [], 0, 0
        self.verdict, self.too_late, self.outcome = None, False, None

    @property
    def head(self) -> float:
        return min((version for version, _ in self.rows), default=math.inf)


@dataclass(eq=False)
class ModelMember:
    """One that runs."""

    group: ModelGroup
    version: int  # in which it started


@dataclass
class ModelStream:
    """An epoch of ``prepare_batch``."""

    unread: list[str]
    size: int
    exhausted: bool = False  # known only once more was asked for than is left
    read_ahead: bool = False
    rejections: int = 0
    # of the batches to come: accepted groups, and rejected ones that count
    places: list[ModelGroup] = field(default_factory=list)
    unsettled: int = 0
    delivered: bool = False
    any_failed: bool = False

    @property
    def rejected(self) -> int:
        return sum(group.outcome == "rejected" for group in self.places)


class ModelExecutor:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.version = self.consumed = self.charged = self.violations = 0
        self.paused = False
        self.groups: list[ModelGroup] = []  # in the order of submission
        self.live: list[ModelGroup] = []  # queued or running, in the order they came
        self.queues: dict[bool, list[ModelGroup]] = {False: [], True: []}
        self.starting: list[ModelGroup] = []  # admitted, with members still to start
        self.members: list[ModelMember] = []  # in the order they started
        self.started: Counter[str] = Counter()  # members that ever did, by group
        self.grants = {False: itertools.count(), True: itertools.count()}
        self.failures_in_a_row = 0
        self.untold: list[str] = []  # failures that no batch has told of yet
        self.stream: ModelStream | None = None

    # --- what there is ---------------------------------------------------------------------------

    def find(self, name: str) -> ModelGroup | None:
        """The group that holds this name now."""
        return next((g for g in self.submitted() if g.name == name and not g.taken), None)

    def submitted(self) -> list[ModelGroup]:
        return [g for g in self.groups if not g.batched]

    def running(self, is_eval: bool) -> list[ModelGroup]:
        return [g for g in self.live if g.is_eval == is_eval and g.number is not None]

    def counts(self, is_eval: bool) -> dict[str, int]:
        groups = [g for g in self.groups if g.is_eval == is_eval]
        return {
            "submitted": len(groups),
            "queued": len(self.queues[is_eval]),
            "running": len(self.running(is_eval)),
            **{name: sum(g.outcome == name for g in groups) for name in OUTCOMES},
        }

    def budget(self) -> int:
        rules = self.rules
        used = self.counts(is_eval=False)["accepted"] + len(self.running(False)) + self.charged
        return (rules.max_staleness + self.version + 1) * rules.batch - used

    def capacity(self) -> int:
        return min(self.rules.slots - len(self.running(False)), self.budget())

    def oldest(self) -> int:
        """The oldest version that a token consumed now may have."""
        return self.version - self.rules.max_staleness

    def released(self, groups: list[ModelGroup], is_eval: bool = False) -> list[ModelGroup]:
        """Those of settled groups that may leave, lowest permit first."""
        frontier = math.inf
        if self.rules.in_order and not is_eval:
            frontier = min((g.number or 0 for g in self.running(False)), default=math.inf)
        ready = [g for g in groups if g.number is not None and g.number < frontier]
        return sorted(ready, key=lambda g: g.number or 0)

    def settled(self, is_eval: bool) -> list[ModelGroup]:
        """Results of ``submit`` that nobody took."""
        groups = [g for g in self.submitted() if g.is_eval == is_eval]
        return [g for g in groups if g.outcome is not None and not g.taken]

    def ready(self, is_eval: bool) -> list[ModelGroup]:
        return self.released(self.settled(is_eval), is_eval)

    def exhausted(self) -> bool:
        waiting = self.queues[False] and not self.running(False)
        return bool(waiting) and not self.paused and self.capacity() <= 0

    # --- starting --------------------------------------------------------------------------------

    def submit(self, name: str, size: int, is_eval: bool) -> str:
        if self.find(name) is not None:
            return "refused"
        if not is_eval and len(self.queues[False]) >= self.rules.queue_size:
            return "refused"
        self.enqueue(ModelGroup(name, size, is_eval))
        self.start()
        self.finish()
        return "done"

    def enqueue(self, group: ModelGroup) -> None:
        self.groups.append(group)
        self.live.append(group)
        self.queues[group.is_eval].append(group)

    def start(self) -> None:
        """Start member after member, each group whole before the next, evaluation first."""
        while len(self.members) < self.rules.slots:
            if not self.starting and not self.admit():
                return
            group = self.starting[0]
            group.to_start -= 1
            if not group.to_start:
                self.starting.remove(group)
            self.members.append(ModelMember(group, self.version))
            self.started[group.name] += 1

    def admit(self) -> bool:
        may_train = not self.paused and self.capacity() > 0
        for is_eval in (True, False) if may_train else (True,):
            for group in self.queues[is_eval][:1]:
                self.queues[is_eval].remove(group)
                group.number = next(self.grants[is_eval])
                group.permit_version = self.version
                self.starting.append(group)
                return True
        return False

    def restart(self, group: ModelGroup) -> None:
        if group.to_start and group not in self.starting:
            self.starting.insert(0, group)
        if not group.to_start and group in self.starting:
            self.starting.remove(group)

    # --- ending ----------------------------------------------------------------------------------

    def end(self, member: ModelMember, how: str, version: int) -> None:
        """A rollout ends by itself, with a token of ``version`` if it ends well."""
        group = member.group
        if how in ("accepted", "disliked"):
            group.rows.append((version, how == "accepted"))
        else:
            self.after(group, how)
        self.ended(member)
        self.finish()

    def after(self, group: ModelGroup, how: str) -> None:
        kind, number = self.rules.group_policy
        if kind == "replace" and how == "failed" and group.replaced < number:
            group.replaced += 1
            group.to_start += 1
        elif group.size - group.lost > self.rules.needed(group.size):
            group.lost += 1
        else:
            self.stop(group, how)

    def stop(self, group: ModelGroup, verdict: str, too_late: bool = False) -> None:
        group.verdict, group.too_late, group.to_start = verdict, too_late, 0

    def ended(self, member: ModelMember) -> None:
        self.members.remove(member)
        self.restart(member.group)
        if not self.settle_if_ended(member.group):
            self.start()

    def finish(self) -> None:
        """What was cancelled ends."""
        while cancelled := [member for member in self.members if member.group.verdict]:
            self.ended(cancelled[0])

    def settle_if_ended(self, group: ModelGroup) -> bool:
        over = not group.to_start and all(m.group is not group for m in self.members)
        if over:
            self.settle(group)
        return over

    def settle(self, group: ModelGroup) -> None:
        self.judge(group)
        if not self.begin_again(group):
            self.live.remove(group)
            self.count_failure(group)
            if group.batched:
                self.deliver(group)
        self.start()

    def judge(self, group: ModelGroup) -> None:
        liked = all(liked for _, liked in group.rows)
        group.outcome = group.verdict or ("accepted" if liked else "rejected")
        if group.outcome == "accepted" and group.batched and self.is_too_old(group):
            group.outcome, group.too_late = "expired", True

    def is_too_old(self, group: ModelGroup) -> bool:
        return self.rules.bounded and group.head < self.oldest()

    def begin_again(self, group: ModelGroup) -> bool:
        """Run a group that has just ended once more, if anything says so."""
        kind, number = self.rules.group_policy
        if group.too_late:
            return self.requeue(group)
        if kind == "all" and group.outcome == "failed" and group.retried < number:
            group.retried += 1
            group.begin()
            self.restart(group)
            return True
        return False

    def requeue(self, group: ModelGroup) -> bool:
        """Queue a group again, at the head; the place and budget of its permit are free."""
        may = self.rules.straggler_policy == "requeue" and group.requeued < self.rules.max_requeues
        if may:
            group.requeued += 1
            group.number = None
            group.begin()
            self.queues[False].insert(0, group)
        return may

    def count_failure(self, group: ModelGroup) -> None:
        if not group.is_eval and not group.too_late:
            failed = group.outcome == "failed"
            self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0

    # --- versions --------------------------------------------------------------------------------

    def set_version(self, version: int) -> None:
        self.version = version
        if self.rules.bounded:
            short = max(0, version * self.rules.batch - self.consumed)
            self.charged += short
            self.consumed += short
            self.expire_results()
            self.discard_outdated()
        if self.rules.straggler_policy in ("requeue", "drop"):
            self.stop_stragglers()
        self.start()
        self.finish()

    def stop_stragglers(self) -> None:
        running = self.running(is_eval=False)
        for group in [g for g in running if g.permit_version < self.oldest()]:
            self.stop(group, "expired", too_late=True)
            self.restart(group)
            self.settle_if_ended(group)

    def expire_results(self) -> None:
        """What waits to be taken and is too old gives its budget back at once."""
        for group in self.ready(is_eval=False):
            if group.outcome == "accepted" and self.is_too_old(group):
                group.outcome = "expired"
        self.start()

    def discard_outdated(self) -> None:
        """What waits for a batch and is too old: queued again, the lowest first, or dropped."""
        stream = self.stream
        if stream is None or not self.rules.bounded:
            return
        for group in reversed(self.released(stream.places)):
            if group.outcome == "accepted" and self.is_too_old(group):
                stream.places.remove(group)
                if self.requeue(group):
                    stream.unsettled += 1
                    self.live.append(group)
                else:
                    group.outcome = "expired"
                    self.untold.append(f"{group.name} expired")
        self.start()

    # --- wait ------------------------------------------------------------------------------------

    def wait(self, count: int, is_eval: bool) -> str | list[str]:
        ready = self.ready(is_eval)
        if len(ready) >= count:
            return [self.take(group) for group in ready[:count]]
        coming = [g for g in self.submitted() if g.is_eval == is_eval and not g.taken]
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
            if self.is_too_old(group):
                group.outcome = "expired"
                self.start()
            else:
                self.consume([group])
        return f"{group.name} {group.outcome} {group.number}"

    def consume(self, groups: list[ModelGroup]) -> None:
        self.consumed += len(groups)
        self.violations += sum(group.head < self.oldest() for group in groups)

    # --- prepare_batch ---------------------------------------------------------------------------

    def deliver(self, group: ModelGroup) -> None:
        stream = self.stream
        assert stream is not None
        stream.unsettled -= 1
        if group.outcome == "accepted":
            stream.rejections = 0
            stream.places.append(group)
            return
        self.untold.append(f"{group.name} {group.outcome}")
        stream.any_failed |= group.outcome == "failed"
        if group.outcome == "rejected":
            stream.rejections += 1
            if self.rules.dynamic and stream.rejected < stream.size - 1:
                stream.places.append(group)
                self.charged += self.rules.bounded

    def prepare_batch(self, epoch: list[str], size: int) -> str | tuple[list[str], list[str]]:
        """The names and numbers of a batch, and of what settled otherwise; or how the call ends.

        ``epoch`` names the prompts if one begins; ``size`` is of the groups that are read now.
        """
        if self.stream is None:
            self.stream = ModelStream(list(epoch), self.rules.batch)
        stream = self.stream
        while True:
            self.discard_outdated()
            ready = self.released(stream.places)
            whole = len(ready) >= stream.size
            if not whole and self.too_much_went_wrong():
                return "TooManyFailures"
            wanted = self.prompts_wanted()
            if wanted and not (whole and stream.read_ahead):
                stream.read_ahead = whole
                self.read(wanted, size)
            elif whole:
                return self.release(ready[: stream.size])
            elif not stream.exhausted or stream.unsettled or len(ready) < len(stream.places):
                return "StalenessBudgetExhausted" if self.exhausted() else "Cancelled"
            elif len(ready) > stream.rejected:
                return self.release(ready)
            else:
                self.consumed += stream.rejected
                self.stream = None
                in_vain = stream.any_failed and not stream.delivered
                return "TooManyFailures" if in_vain else "StopAsyncIteration"

    def too_much_went_wrong(self) -> bool:
        assert self.stream is not None
        if self.failures_in_a_row >= self.rules.max_failures:
            self.failures_in_a_row = 0
        elif self.stream.rejections >= self.rules.max_rejections:
            self.stream.rejections = 0
        else:
            return False
        return True

    def prompts_wanted(self) -> int:
        assert self.stream is not None
        limit = self.rules.queue_size
        wanted = limit - len(self.queues[False])
        return wanted if wanted >= max(1, limit // 4) and not self.stream.exhausted else 0

    def read(self, count: int, size: int) -> None:
        assert self.stream is not None
        self.stream.exhausted = count > len(self.stream.unread)
        names, self.stream.unread = self.stream.unread[:count], self.stream.unread[count:]
        self.stream.unsettled += len(names)
        for name in names:
            self.enqueue(ModelGroup(name, size, is_eval=False, batched=True))
        self.start()
        self.finish()

    def release(self, taken: list[ModelGroup]) -> tuple[list[str], list[str]]:
        assert self.stream is not None
        self.stream.read_ahead, self.stream.delivered = False, True
        for group in taken:
            self.stream.places.remove(group)
        accepted = [group for group in taken if group.outcome == "accepted"]
        self.consume(accepted)
        self.consumed += len(taken) - len(accepted)
        told, self.untold = self.untold, []
        return [f"{group.name} {group.number}" for group in accepted], told
