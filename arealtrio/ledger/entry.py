"""What a ledger gives back after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..trajectory import Group


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A prompt that is in no batch of the checkpoint.

    Args:
        key: Its own, for as long as the ledger knows it.
        epoch: The pass over the data loader that it came from.
        prompt: As the data loader gave it.
        group: What it became, where that is finished and still of use; else it is to be run again.
    """

    key: int
    epoch: int
    prompt: Mapping[str, Any]
    group: Group | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Restored:
    """Where a run goes on.

    Args:
        batch: The last one that counts as trained; -1 is none.
        entries: In the order their prompts were taken.
        taken: Prompts taken of each epoch so far.
        marks: By epoch and position, what to know the prompts again by that the ledger still has.
        regenerated: Groups that were finished by weights newer than the restored ones, and are to
            be generated again.
    """

    batch: int = -1
    entries: tuple[Entry, ...] = ()
    taken: Mapping[int, int] = field(default_factory=dict)
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)
    regenerated: int = 0
