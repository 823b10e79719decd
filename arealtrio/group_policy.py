"""GroupPolicy: what becomes of a group when one of its members does not succeed.

``all`` cancels the siblings: group-normalised advantages (GRPO) of a partial group are biased.
``at_least`` goes on with the rest: the missing members are absent from the batch, never imputed.
``replace`` runs the member again and keeps the others: dropping a group of n for one infrastructure
failure of probability p wastes 1 − (1 − p)ⁿ of all work, a third at p = 5 %, n = 8.

The failure budget (``max_consecutive_failures``) counts a group once, as it settles. One that its
policy saved is no failure, or a policy against frequent failures would end the run that it keeps
going; what its members failed of is in ``Group.member_failures``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, Self

from .checks import integer, one_of
from .types import Outcome


class AfterMember(enum.Enum):
    """What to do after a member that did not succeed."""

    STOP = "stop"  # the group ends with this member's verdict
    GO_ON = "go on"  # without it
    REPLACE = "replace"  # run it again


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPolicy:
    """Which groups are whole enough. Use the class methods.

    Args:
        kind: The policy's name.
        least: Members that must succeed, for ``at_least``.
        max_again: Members (``replace``) or whole groups (``all``) that may be run again.
    """

    kind: Literal["all", "at_least", "replace"] = "all"
    least: int = 0
    max_again: int = 0

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ("all", "at_least", "replace"))
        for name in ("least", "max_again"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0))

    @classmethod
    def all(cls, max_retries: int = 0) -> Self:
        """Every member must succeed; the first that does not ends the group.

        Args:
            max_retries: Times that a group with a failed or expired member is run again as a whole.
                A workflow that always fails is run so many times more before the failure budget
                ends the call.

        Raises:
            ConfigError: If ``max_retries`` is negative.
        """
        return cls(kind="all", max_again=integer("max_retries", max_retries, 0))

    @classmethod
    def at_least(cls, least: int) -> Self:
        """Accept the group once all have ended, if at least ``least`` members succeeded.

        Raises:
            ConfigError: If ``least`` is below 1.
        """
        members = integer("at_least's number of members", least, 1)
        return cls(kind="at_least", least=members)

    @classmethod
    def replace(cls, max_replacements: int = 4) -> Self:
        """Run a member that failed or expired again; so many times in one group.

        A member that its workflow rejected is not run again, and ends the group: to draw until the
        workflow likes it would bias what is trained on.

        Raises:
            ConfigError: If ``max_replacements`` is below 1.
        """
        again = integer("max_replacements", max_replacements, 1)
        return cls(kind="replace", max_again=again)

    def needed(self, size: int) -> int:
        """Members of a group of ``size`` that must succeed."""
        return min(self.least, size) if self.kind == "at_least" else size

    def after(self, outcome: Outcome, size: int, lost: int, replaced: int) -> AfterMember:
        """Decide after a member that did not succeed.

        Args:
            outcome: How it ended.
            size: Members of the group.
            lost: Other members that did not succeed, and are not run again.
            replaced: Members run again so far.
        """
        if outcome is Outcome.CANCELLED:
            return AfterMember.STOP
        may_repeat = self.kind == "replace" and outcome in _REPEATABLE
        if may_repeat and replaced < self.max_again:
            return AfterMember.REPLACE
        return AfterMember.GO_ON if size - lost > self.needed(size) else AfterMember.STOP

    def may_begin_again(self, outcome: Outcome, times: int) -> bool:
        """Whether a group that ended so is run again as a whole.

        Args:
            outcome: How it ended.
            times: It was run again before.
        """
        return self.kind == "all" and outcome in _REPEATABLE and times < self.max_again


_REPEATABLE = (Outcome.FAILED, Outcome.EXPIRED)
