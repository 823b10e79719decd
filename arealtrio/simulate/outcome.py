"""Outcome: what came of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One training step, as it was measured. What says *so far* counts from the beginning.

    Args:
        ended_s: When the servers had its weights.
        wait_s: Seconds that the trainer waited for its batch.
        update_s: Seconds that bringing its weights to the servers took.
        rollouts: Trained on.
        token_staleness: Tokens trained on, by their staleness.
        head_staleness: Rollouts trained on, by the staleness of their oldest token.
        slot_seconds: In which servers of each kind generated, so far.
        violations: Groups trained on beyond the bound, so far.
        given_up: Groups that were not in time, so far.
    """

    ended_s: float
    wait_s: float
    update_s: float
    rollouts: int
    token_staleness: Mapping[int, int]
    head_staleness: Mapping[int, int]
    slot_seconds: tuple[float, ...]
    violations: int
    given_up: int

    @property
    def tokens(self) -> int:
        """Trained on."""
        return sum(self.token_staleness.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to, after its warm-up. Seconds are simulated ones.

    Args:
        steps: Training steps that were counted.
        seconds: They took.
        tokens_per_s: Generated tokens trained on.
        rollouts_per_s: Trained on.
        answer_tokens: Mean length of an answer that was trained on.
        step_s: A step, from batch to batch.
        trainer_wait_s: Of it, waiting for the batch.
        update_s: Of it, bringing the weights to the servers.
        utilisation: Share of all slots × seconds in which an answer was generated.
        utilisation_by_kind: The same for each kind of server.
        token_staleness: Tokens by their staleness in versions.
        head_staleness: Rollouts by the staleness of their oldest token.
        violations: Groups trained on beyond ``max_staleness``.
        given_up: Groups given up because they could not be in time.
        step_tokens_per_s: The throughput of each step.
    """

    steps: int
    seconds: float
    tokens_per_s: float
    rollouts_per_s: float
    answer_tokens: float
    step_s: float
    trainer_wait_s: float
    update_s: float
    utilisation: float
    utilisation_by_kind: Mapping[str, float]
    token_staleness: Mapping[int, int]
    head_staleness: Mapping[int, int]
    violations: int
    given_up: int
    step_tokens_per_s: tuple[float, ...]

    @property
    def trainer_wait(self) -> float:
        """The share of its time that the trainer waits for batches."""
        return self.trainer_wait_s / self.step_s

    @property
    def mean_staleness(self) -> float:
        """Of all tokens trained on, in versions."""
        ages = self.token_staleness
        return sum(age * count for age, count in ages.items()) / sum(ages.values())

    @property
    def oldest(self) -> int:
        """The staleness of the oldest token trained on."""
        return max(self.token_staleness)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        more = ("trainer_wait", "mean_staleness", "oldest")
        return {**asdict(self), **{name: getattr(self, name) for name in more}}

    @classmethod
    def of(cls, plan: Plan, moments: Sequence[Step]) -> Outcome | None:
        """Add up the steps of a run, which may have ended early.

        Args:
            plan: Of the run.
            moments: Its beginning, as a step that did nothing, and its steps.

        Returns:
            None where nothing is left of it after the warm-up.
        """
        counted = moments[plan.steps_not_counted :]
        if len(counted) < 2:
            return None
        before, steps = counted[0], counted[1:]
        seconds = steps[-1].ended_s - before.ended_s
        tokens, rollouts = sum(s.tokens for s in steps), sum(s.rollouts for s in steps)
        used = _shares(plan, before, steps[-1], seconds)
        return cls(
            steps=len(steps),
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            rollouts_per_s=rollouts / seconds,
            answer_tokens=tokens / rollouts,
            step_s=seconds / len(steps),
            trainer_wait_s=sum(s.wait_s for s in steps) / len(steps),
            update_s=sum(s.update_s for s in steps) / len(steps),
            utilisation=used[_ALL],
            utilisation_by_kind={name: share for name, share in used.items() if name != _ALL},
            token_staleness=_sum(s.token_staleness for s in steps),
            head_staleness=_sum(s.head_staleness for s in steps),
            violations=steps[-1].violations - before.violations,
            given_up=steps[-1].given_up - before.given_up,
            step_tokens_per_s=tuple(
                step.tokens / (step.ended_s - last.ended_s)
                for last, step in pairwise([before, *steps])
            ),
        )


_ALL = "all"


def _shares(plan: Plan, before: Step, after: Step, seconds: float) -> dict[str, float]:
    """Slot-seconds used ÷ there were, of each kind and of all; kinds that are alike are one."""
    used: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    for kind, was, now in zip(plan.servers, before.slot_seconds, after.slot_seconds, strict=True):
        for name in (str(kind), _ALL):
            used[name] += now - was  # type: ignore[assignment]  # a Counter of floats
            slots[name] += kind.count * kind.slots
    return {name: used[name] / (slots[name] * seconds) for name in used}


def _sum(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(sorted(total.items()))
