"""GroupPolicy: what becomes of a group when one of its members does not succeed.

``all`` cancels the siblings: group-normalised advantages (GRPO) of a partial group are biased.
``at_least`` goes on with the rest: the missing members are absent from the batch, never imputed.
``replace`` runs the member again and keeps the others: dropping a group of n for one infrastructure
failure of probability p wastes 1 − (1 − p)ⁿ of all work, a third at p = 5 %, n = 8.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, Self

from .errors import ConfigError


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
        max_replacements: Members that may be run again in one group, for ``replace``.
    """

    kind: Literal["all", "at_least", "replace"] = "all"
    least: int = 0
    max_replacements: int = 0

    @classmethod
    def all(cls) -> Self:
        """Every member must succeed; the first that does not ends the group."""
        return cls(kind="all")

    @classmethod
    def at_least(cls, least: int) -> Self:
        """Accept the group once all have ended, if at least ``least`` members succeeded.

        Raises:
            ConfigError: If ``least`` is below 1.
        """
        if least < 1:
            raise ConfigError(f"at_least needs a number of members of at least 1, not {least}")
        return cls(kind="at_least", least=least)

    @classmethod
    def replace(cls, max_replacements: int = 4) -> Self:
        """Run a member that failed, expired or was rejected again, so many times in one group.

        Raises:
            ConfigError: If ``max_replacements`` is below 1.
        """
        if max_replacements < 1:
            raise ConfigError(f"max_replacements must be at least 1, not {max_replacements}")
        return cls(kind="replace", max_replacements=max_replacements)

    def needed(self, size: int) -> int:
        """Members of a group of ``size`` that must succeed."""
        return min(self.least, size) if self.kind == "at_least" else size

    def after(self, size: int, lost: int, replaced: int) -> AfterMember:
        """Decide after a member that did not succeed.

        Args:
            size: Members of the group.
            lost: Members that did not succeed and were not replaced, this one included.
            replaced: Members run again so far.
        """
        if self.kind == "replace" and replaced < self.max_replacements:
            return AfterMember.REPLACE
        return AfterMember.GO_ON if size - lost >= self.needed(size) else AfterMember.STOP
