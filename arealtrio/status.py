"""Why am I waiting? What each unsettled rollout does, and what keeps the next from starting."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .groups import GroupTask

LISTED = 40  # members in a printed table; what is oldest comes first
WIDTH = 80  # columns
NAME_WIDTH = 44  # columns that a rollout gets at most: a UUID, and which member
INDENT = 8 * " "  # of a line that goes on


class Stage(enum.Enum):
    """What a rollout that has not settled does."""

    QUEUED = "queued"  # for admission, or for a concurrency slot
    WAITING = "waiting for a server"
    GENERATING = "generating"
    WORKFLOW = "in the workflow"  # its own code, a tool, a reward
    SETTLING = "settling"  # cancelled, and not gone yet


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """One rollout that has not settled.

    Args:
        task_id: Of its group.
        prompt_id: Of the prompt.
        member_index: In the group.
        is_eval: Of evaluation.
        stage: What it does.
        server: That generates for it now; None in other stages.
        version: Of that server's weights.
        age_s: Since it started; 0 while it is queued.
        tokens: Made so far. Those of the request under way count only where they are streamed.
    """

    task_id: str
    prompt_id: str
    member_index: int
    is_eval: bool
    stage: Stage
    server: str | None = None
    version: int | None = None
    age_s: float = 0.0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self._name}: {self._doing}, {self.age_s:.1f} s, {self.tokens} tokens"

    @property
    def _name(self) -> str:
        return f"{self.task_id}[{self.member_index}]{' eval' if self.is_eval else ''}"

    @property
    def _doing(self) -> str:
        if self.server is None:
            return self.stage.value
        return f"{self.stage.value} on {self.server.removeprefix('http://')} (v{self.version})"

    @property
    def _cells(self) -> tuple[str, str, str, str]:
        return self._name, f"{self.age_s:.1f}", str(self.tokens), self._doing


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStatus:
    """What the next training group waits for.

    Args:
        queued: Training groups that wait for admission.
        running_members: Rollouts that have a concurrency slot.
        concurrency: Slots.
        staleness_capacity: Groups that could start before the next weight version; at 0 and below
            none can, and it lacks ``1 - staleness_capacity``.
        version: The weight version.
        paused: Whether ``pause`` was called.
        servers_in_service: Servers that take requests.
        recovering: Whether ``recover`` was called, and has not succeeded.
    """

    queued: int
    running_members: int
    concurrency: int
    staleness_capacity: int
    version: int
    paused: bool
    servers_in_service: int
    recovering: bool = False

    @property
    def blocked_by(self) -> tuple[str, ...]:
        """What keeps the next group from starting, each in a few words; empty if nothing does."""
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[str]:
        if not self.queued:
            yield "queue empty: nothing was submitted or read that has not started"
        if self.paused:
            yield "paused: call resume"
        if self.recovering:
            yield "recovering: recover has not succeeded yet"
        if self.running_members >= self.concurrency:
            yield f"concurrency: {self.running_members} of {self.concurrency} rollouts run"
        if self.staleness_capacity <= 0:
            lacking = 1 - self.staleness_capacity
            yield f"staleness: short by {lacking} at version {self.version}; update the weights"
        if not self.servers_in_service:
            yield "no server: none is in service"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorStatus:
    """An executor at one moment. ``str`` gives a table of at most 80 columns.

    Args:
        members: Every rollout that has not settled, the oldest first.
        admission: Of the next training group.
        quiet_s: Since anything settled or, if later, since there was anything to settle.
    """

    members: tuple[MemberStatus, ...]
    admission: AdmissionStatus
    quiet_s: float = 0.0

    def count(self, stage: Stage) -> int:
        """Rollouts in a stage."""
        return sum(member.stage is stage for member in self.members)

    def __str__(self) -> str:
        return "\n".join(map(_wrapped, self._lines()))

    def _lines(self) -> Iterator[str]:
        counts = ((self.count(stage), stage.value) for stage in Stage)
        stages = ", ".join(f"{count} {stage}" for count, stage in counts if count)
        rollouts = f"{len(self.members)} rollout{'' if len(self.members) == 1 else 's'}"
        yield f"{rollouts}: {stages}" if stages else rollouts
        yield f"nothing settled for {self.quiet_s:.1f} s"
        for block in self.admission.blocked_by or ("nothing",):
            yield f"admission is blocked by {block}"
        started = [member for member in self.members if member.stage is not Stage.QUEUED]
        if started:
            yield from _table([HEAD, *(member._cells for member in started[:LISTED])])
        if len(started) > LISTED:
            yield f"… and {len(started) - LISTED} younger ones"


HEAD = ("rollout", "age/s", "tokens", "stage")


def _table(rows: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    """Columns as wide as they need to be; the last one is as long as it is."""
    name, age, tokens, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        yield f"{row[0]:{min(name, NAME_WIDTH)}} {row[1]:>{age}} {row[2]:>{tokens}} {row[3]}"


def _wrapped(line: str) -> str:
    """Over several lines where it is too long: a name that is cut may be another's."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False))


def members_of(groups: Iterable[GroupTask], now: float) -> tuple[MemberStatus, ...]:
    """The status of every unsettled member, the oldest first.

    Args:
        groups: Queued and running.
        now: On trio's clock.
    """
    found = [status for group in groups for status in _of_group(group, now)]
    return tuple(sorted(found, key=lambda status: -status.age_s))


def _of_group(group: GroupTask, now: float) -> Iterator[MemberStatus]:
    for index in group.running:
        yield _of_member(group, index, now)
    for index in group.to_start:
        yield MemberStatus(
            task_id=group.task_id,
            prompt_id=group.prompt_id,
            member_index=index,
            is_eval=group.is_eval,
            stage=Stage.QUEUED,
        )


def _of_member(group: GroupTask, index: int, now: float) -> MemberStatus:
    rollout = group.running[index]
    progress = rollout.progress  # none before it first asks for tokens
    lease = progress.lease if progress else None
    if rollout.scope.cancel_called:
        stage = Stage.SETTLING
    elif lease is not None:
        stage = Stage.GENERATING
    else:
        stage = Stage.WAITING if progress and progress.under_way else Stage.WORKFLOW
    return MemberStatus(
        task_id=group.task_id,
        prompt_id=group.prompt_id,
        member_index=index,
        is_eval=group.is_eval,
        stage=stage,
        server=lease.server.address if lease else None,
        version=lease.server.version if lease else None,
        age_s=now - rollout.started,
        tokens=progress.tokens if progress else 0,
    )
