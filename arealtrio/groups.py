"""GroupTask: one group on its way through the executor, member by member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from .containment import contained, interruptible, what_ends_the_run
from .engine import RemoteEngine
from .errors import WorkflowError
from .group_policy import AfterMember, GroupPolicy
from .rollout_engine import RolloutEngine
from .rows import rows_from_result
from .settlement import Failure, RolloutResult, classify
from .staleness import Permit
from .trajectory import Group
from .types import Outcome, Trajectory
from .workflow import RolloutWorkflow

AcceptFunction: TypeAlias = Callable[[Group], bool]
WorkflowLike: TypeAlias = RolloutWorkflow | type[RolloutWorkflow] | str
"""A workflow, its class (with ``workflow_kwargs``), or the import path of either."""


Deliver: TypeAlias = Callable[["GroupTask", RolloutResult], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a member, or a group, ended.

    Args:
        outcome: In a word.
        failure: Why, where it failed or expired.
        too_late: Nothing went wrong, but no batch may hold it any more.
    """

    outcome: Outcome
    failure: Failure | None = None
    too_late: bool = False


ACCEPTED = Verdict(Outcome.ACCEPTED)
REJECTED = Verdict(Outcome.REJECTED)
CANCELLED = Verdict(Outcome.CANCELLED)
ALL_MEMBERS = GroupPolicy.all()
ONE_MEMBER = (0,)


@dataclass(slots=True, kw_only=True, eq=False)
class GroupTask:
    """One submission: what to run, what has run, and how it ends.

    Which members must succeed is the policy's to say. The group settles when the last of its tasks
    has ended, so that it leaves no orphan behind; a member that is run again does not unsettle it.

    Args:
        task_id: Unique among what is queued or running.
        data: The prompt, as its workflow gets it.
        workflow: Runs one member.
        should_accept: The filter, given the whole group.
        size: Members.
        deliver: Called once, with the group and its result.
        policy: What becomes of it when a member does not succeed.
        is_eval: Holds no permit.
        is_batched: Belongs to a batch; ``wait`` and ``wait_for_task`` do not see it.
    """

    task_id: str
    data: dict[str, Any]
    workflow: RolloutWorkflow
    should_accept: AcceptFunction | None
    size: int
    deliver: Deliver
    policy: GroupPolicy = ALL_MEMBERS
    is_eval: bool = False
    is_batched: bool = False
    permit: Permit | None = None
    number: int | None = None
    verdict: Verdict = ACCEPTED
    stopped: bool = False
    lost: int = 0  # members that did not succeed, and are not run again
    replaced: int = 0  # members run again
    retried: int = 0  # times that the whole group was run again, with its permit
    requeued: int = 0  # times that it went back into the queue, without
    prompt_id: str = field(init=False)  # as the data loader named it, else the task's id
    to_start: tuple[int, ...] = field(init=False)  # indices of members
    running: dict[int, RolloutEngine] = field(default_factory=dict)  # by index
    rows: list[tuple[Trajectory, ...]] = field(init=False)  # of each that succeeded
    member_failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        named = self.data.get("prompt_id")
        self.prompt_id = self.task_id if named is None else str(named)
        self.to_start = ONE_MEMBER if self.size == 1 else tuple(range(self.size))
        self.rows = [()] * self.size

    def __str__(self) -> str:
        return f"{self.task_id} (prompt {self.prompt_id})"

    @property
    def admitted(self) -> bool:
        """Whether it left the queue; its number is given then."""
        return self.number is not None

    @property
    def all_ended(self) -> bool:
        """Whether no member runs and none is to start."""
        return not self.to_start and not self.running

    def start_member(self, engine: RemoteEngine, timeout_s: float) -> int:
        """Count a member as started, set its deadline, and return its index.

        Args:
            engine: That it generates with.
            timeout_s: Until its deadline.
        """
        index = self.to_start[0]
        self.to_start = self.to_start[1:]
        version = self.permit.version if self.permit is not None else 0
        self.running[index] = RolloutEngine(
            engine, version, self.prompt_id, self.task_id, timeout_s
        )
        return index

    def take_result(self, index: int, result: object) -> Verdict:
        """Keep what a member's workflow returned; None rejects.

        Raises:
            WorkflowError: If it is nothing that rows can be made of.
        """
        if result is None:
            return REJECTED
        self.rows[index] = rows_from_result(result)
        return ACCEPTED

    def member_ended(self, index: int, verdict: Verdict) -> None:
        """Count a member as ended; one that did not succeed is the policy's business."""
        del self.running[index]
        if verdict.outcome is Outcome.ACCEPTED or self.stopped:
            return
        if verdict.failure is not None:
            self.member_failures += (verdict.failure,)
        after = self.policy.after(verdict.outcome, self.size, self.lost, self.replaced)
        if after is AfterMember.REPLACE:
            self.replaced += 1
            self.to_start += (index,)
        elif after is AfterMember.GO_ON:
            self.lost += 1
        else:
            self.stop(verdict)

    def stop(self, verdict: Verdict) -> None:
        """Start no further member, cancel those that run.

        The first verdict stands, but for a cancellation: what was withdrawn is not run again.
        """
        if self.verdict.outcome is Outcome.ACCEPTED or verdict.outcome is Outcome.CANCELLED:
            self.verdict = verdict
        self.stopped = True
        self.to_start = ()
        for rollout in self.running.values():
            rollout.scope.cancel()

    def begin_again(self) -> None:
        """Forget what its members did; all of them are to be run once more."""
        self.verdict, self.stopped = ACCEPTED, False
        self.lost = self.replaced = 0
        self.rows = [()] * self.size
        self.to_start = tuple(range(self.size))

    def accepted(self) -> Group:
        """The group as the trainer gets it; a member that was lost has no rows."""
        return Group.of(
            self.rows,
            number=self.number if self.number is not None else -1,
            permit_version=self.permit.version if self.permit else -1,
            prompt_id=self.prompt_id,
            task_id=self.task_id,
            member_failures=self.member_failures,
        )


def judge(group: GroupTask) -> tuple[Group | None, Verdict]:
    """A group's outcome once all have ended: its members' verdict, then the filter's."""
    if group.verdict.outcome is not Outcome.ACCEPTED:
        return None, group.verdict
    try:
        accepted = group.accepted()
        if accepts(accepted, group.should_accept):
            return accepted, group.verdict
    except BaseException as exc:  # noqa: BLE001 - the filter is user code
        if (end := what_ends_the_run(exc)) is not None:
            raise end from None
        error = contained(exc, group.should_accept)
        return None, Verdict(Outcome.FAILED, Failure(classify(error), error))
    return None, REJECTED


@interruptible
def accepts(group: Group, should_accept: AcceptFunction | None) -> bool:
    """Ask the filter, which Ctrl-C may interrupt, as all user code.

    Raises:
        WorkflowError: If it answers neither True nor False.
    """
    if should_accept is None:
        return True
    answer: object = should_accept(group)
    if isinstance(answer, (bool, np.bool_)):
        return bool(answer)
    raise WorkflowError(f"should_accept_fn returned {type(answer).__name__}, not a bool")
