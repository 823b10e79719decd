"""What a demo run did: tallied batch by batch, as numbers and as lines for a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np

from ..trajectory import Batch
from .trainer import StepReport

_ENDS = 3  # batches at either end that the gain is measured over


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The numbers of a whole run; ``rollouts`` and ``servers`` since it was started last.

    Args:
        steps: Training steps done.
        steps_before: Of these, those that were done when it was started last.
        prompts: Different prompts trained on.
        prompts_repeated: Times that one was trained on again; always 0.
        reward_first: Mean reward of the first three batches.
        reward_last: Mean reward of the last three.
        rollouts: Groups by where they ended, under the executor's names.
        tokens: Generated tokens trained on.
        seconds: From the first prompt to the last weight update.
        staleness_max: Of the oldest token in any batch, in versions.
        staleness_histogram: Trajectories by the staleness of their oldest token.
        mixed_version_trajectories: Trajectories made by more than one weight version.
        weight_updates: Times new weights reached the servers.
        servers: By address: ``requests``, as the client counted what it sent, and
            ``requests_reported``, as the server counted what it received.
    """

    steps: int
    steps_before: int
    prompts: int
    prompts_repeated: int
    reward_first: float
    reward_last: float
    rollouts: Mapping[str, int]
    tokens: int
    seconds: float
    staleness_max: int
    staleness_histogram: Mapping[int, int]
    mixed_version_trajectories: int
    weight_updates: int
    servers: Mapping[str, Mapping[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report whose ``as_dict`` became ``values``, by way of JSON or not."""
        ages = {int(age): count for age, count in values["staleness_histogram"].items()}
        return cls(**{**values, "staleness_histogram": ages})

    def lines(self) -> Iterator[str]:
        """Return the summary, none of it wider than 80 columns."""
        for name, text in self._summary():
            yield from textwrap.wrap(f"{name:<12}{text}", 80, subsequent_indent=12 * " ")

    def _summary(self) -> Iterator[tuple[str, str]]:
        trained = sum(self.staleness_histogram.values())
        yield "reward", f"{self.reward_first:.3f} at first, {self.reward_last:.3f} at last"
        yield "prompts", f"{self.prompts:,} trained on, {self.prompts_repeated} of them twice"
        since = f" since step {self.steps_before}" if self.steps_before else ""
        groups = ", ".join(f"{n} {name}" for name, n in self.rollouts.items() if n)
        yield "groups", (groups or "none") + since
        yield "tokens", f"{self.tokens:,} in {self.seconds:.1f} s"
        yield "staleness", f"{self.staleness_max} versions at most; {self._ages(trained)}"
        yield "mixed", f"{self.mixed_version_trajectories:,} of {trained:,} trajectories"
        yield "updates", f"{self.weight_updates}, each on every server"
        for address, counts in self.servers.items():
            yield (
                "server",
                (
                    f"{address}: {counts['requests']:,} requests, "
                    f"{counts['requests_reported']:,} by its own count"
                ),
            )

    def _ages(self, trained: int) -> str:
        return ", ".join(f"{age}: {n / trained:.0%}" for age, n in self.staleness_histogram.items())


@dataclass(slots=True)
class Tally:
    """Adds up the batches of a run as they are trained on.

    Args:
        rewards: The mean of each step.
        prompts: Trained on, in order.
        tokens: Generated ones, trained on.
        ages: Trajectories by the staleness of their oldest token.
        mixed: Trajectories of more than one version.
        seconds: That all this took; whoever trains tells it.
    """

    rewards: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    tokens: int = 0
    ages: Counter[int] = field(default_factory=Counter)
    mixed: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the tally whose ``as_dict`` became ``values``, by way of JSON or not."""
        ages = Counter({int(age): count for age, count in values["ages"].items()})
        return cls(**{**values, "ages": ages})

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def add(self, batch: Batch, step: StepReport) -> None:
        """Count one batch and the step that was made of it."""
        self.rewards.append(step.reward_mean)
        self.prompts += [group.prompt_id for group in batch.groups]
        self.tokens += step.tokens
        self.ages.update(batch.staleness_histogram("trajectories"))
        self.mixed += batch.mixed_version_trajectories()

    def report(
        self,
        *,
        steps_before: int,
        rollouts: Mapping[str, int],
        servers: Mapping[str, Mapping[str, int]],
    ) -> DemoReport:
        """Return the run's report; see there for the arguments."""
        return DemoReport(
            steps=len(self.rewards),
            steps_before=steps_before,
            prompts=len(set(self.prompts)),
            prompts_repeated=len(self.prompts) - len(set(self.prompts)),
            reward_first=float(np.mean(self.rewards[:_ENDS])),
            reward_last=float(np.mean(self.rewards[-_ENDS:])),
            rollouts=dict(rollouts),
            tokens=self.tokens,
            seconds=self.seconds,
            staleness_max=max(self.ages),
            staleness_histogram=dict(sorted(self.ages.items())),
            mixed_version_trajectories=self.mixed,
            weight_updates=len(self.rewards),
            servers=servers,
        )


def progress_line(number: int, steps: int, batch: Batch, step: StepReport, seconds: float) -> str:
    """Return one step's line, at most 80 columns wide."""
    ages = batch.staleness()
    return (
        f"step {number:>{len(str(steps))}}/{steps}  reward {step.reward_mean:.3f}  "
        f"staleness {ages.min()}-{ages.max()}  "
        f"mixed {batch.mixed_version_trajectories():>2}/{len(ages)}  "
        f"{step.tokens:>5} tokens  {seconds:5.1f} s"
    )
