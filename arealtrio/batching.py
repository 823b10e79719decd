"""BatchStream: from a data loader's prompts to training batches, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .delivery import DeliveryQueue, PermitOrder
from .errors import TooStale, UsageError
from .group_policy import GroupPolicy
from .groups import (
    ALL_MEMBERS,
    AcceptFunction,
    Deliver,
    GroupTask,
    Verdict,
    WorkflowLike,
    resolve_accept,
    resolve_workflow,
)
from .loader import LoaderFeed, Prompt
from .settlement import Failure, RolloutResult
from .trajectory import Group
from .types import FailureKind, Outcome
from .workflow import RolloutWorkflow

DataLoader: TypeAlias = Iterable[Prompt | Sequence[Prompt]]


@dataclass(frozen=True, slots=True)
class RolloutArguments:
    """What a call wants done with its prompts, checked.

    Args:
        workflow: Runs one member.
        should_accept: The filter.
        group_size: Members of a group.
        policy: What becomes of a group when a member does not succeed.
    """

    workflow: RolloutWorkflow
    should_accept: AcceptFunction | None
    group_size: int
    policy: GroupPolicy

    @classmethod
    def of(
        cls,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None,
        should_accept_fn: AcceptFunction | str | None,
        group_size: int,
        group_policy: GroupPolicy | None = None,
    ) -> RolloutArguments:
        """Resolve a caller's arguments.

        Raises:
            UsageError: If one of them is not what it should be.
        """
        return cls(
            resolve_workflow(workflow, workflow_kwargs),
            resolve_accept(should_accept_fn),
            positive("group_size", group_size),
            group_policy or ALL_MEMBERS,
        )

    def group(
        self,
        task_id: str,
        prompt: Prompt,
        deliver: Deliver,
        *,
        is_eval: bool = False,
        is_batched: bool = True,
    ) -> GroupTask:
        """A group of one prompt."""
        return GroupTask(
            task_id=task_id,
            data=prompt,
            workflow=self.workflow,
            should_accept=self.should_accept,
            size=self.group_size,
            policy=self.policy,
            deliver=deliver,
            is_eval=is_eval,
            is_batched=is_batched,
        )


class BatchStream:
    """The groups that ``prepare_batch`` draws from one data loader: under way, or ready to leave.

    Args:
        loader: The data loader; ``iter`` is called once.
        order: Of all permits.
    """

    def __init__(self, loader: DataLoader, order: PermitOrder) -> None:
        self.feed = LoaderFeed(loader)
        self.accepted: DeliveryQueue[Group] = DeliveryQueue(order)
        self.unsettled = 0
        self.read_ahead = False  # whether prompts were read since a batch became ready
        self.failures: list[RolloutResult] = []  # what settled otherwise since the last batch
        self._tasks: dict[str, GroupTask] = {}  # of what is accepted: it may be queued again

    @property
    def ended(self) -> bool:
        """Whether no prompt is left and nothing is under way."""
        return self.feed.exhausted and not self.unsettled

    def deliver(self, task: GroupTask, result: RolloutResult) -> None:
        """A group of this stream settled."""
        self.unsettled -= 1
        if result.group is not None:
            self._tasks[result.task_id] = task
            self.accepted.put(result.group)
        elif result.outcome is not Outcome.CANCELLED:
            self.failures.append(result)

    def take(self, count: int) -> list[Group]:
        """Remove the ``count`` groups that are first to leave."""
        groups = self.accepted.take(count)
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
        old = self.accepted.take_where(lambda group: is_older(group, oldest))
        return [(group, self._tasks.pop(group.task_id, None)) for group in reversed(old)]

    def take_failures(self) -> tuple[RolloutResult, ...]:
        """What settled otherwise since this was last asked."""
        failures, self.failures = tuple(self.failures), []
        return failures

    def refuse(self, loader: DataLoader) -> None:
        """Raise if ``loader`` is another one than this stream's.

        Raises:
            UsageError: With what is still under way.
        """
        if loader is not self.feed.loader:
            raise UsageError(
                f"prepare_batch was given another data loader, while {self.unsettled} groups of "
                f"the last one are under way and {len(self.accepted)} wait to be delivered; "
                "read the last one to its end first"
            )


def expired(group: Group, version: int) -> RolloutResult:
    """The result of a group that was accepted, and became too old before anybody took it."""
    verdict = outdated(group, version)
    return RolloutResult(
        task_id=group.task_id,
        prompt_id=group.prompt_id,
        outcome=verdict.outcome,
        failure=verdict.failure,
        number=group.number,
    )


def outdated(group: Group, version: int) -> Verdict:
    """How a group ends that was made well, and is too old for a batch of ``version``."""
    error = TooStale(
        f"discarded: its oldest token is of version {group.head_version} and the trainer is at "
        f"{version}, beyond max_staleness"
    )
    return Verdict(Outcome.EXPIRED, Failure(FailureKind.DATA, error), too_late=True)


def straggler(permit_version: int, version: int) -> Verdict:
    """How a group ends that still runs when it can no longer be in time."""
    error = TooStale(
        f"it started in version {permit_version} and the trainer is at {version}, beyond "
        "max_staleness; straggler_policy decides what becomes of it"
    )
    return Verdict(Outcome.EXPIRED, Failure(FailureKind.DATA, error), too_late=True)


def is_older(group: Group, version: int) -> bool:
    """Whether a group holds a token older than ``version``."""
    return group.head_version is not None and group.head_version < version


def positive(name: str, value: int) -> int:
    """Return ``value``.

    Raises:
        UsageError: If it is not an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an integer of at least 1, not {value!r}")
    return value
