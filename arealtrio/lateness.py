"""When a group is too old for a batch, and how it ends for that."""

from __future__ import annotations

from .config import RolloutConfig
from .errors import TooStale
from .groups import Verdict
from .settlement import Failure, RolloutResult
from .trajectory import Group
from .types import FailureKind, Outcome


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


def is_bounded(config: RolloutConfig) -> bool:
    """Whether ``max_staleness`` is a guarantee; under ``keep`` it only bounds what is admitted."""
    return config.straggler_policy != "keep"


def is_older(group: Group, version: int) -> bool:
    """Whether a group holds a token older than ``version``."""
    oldest = group.head_version
    return oldest is not None and oldest < version
