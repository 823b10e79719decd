"""What must stay flat in a process that runs for long, and whether it did."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import trio

MIB = 2**20
WARM_UP_S = 120.0  # at most: caches fill, and memory that comes and goes has reached its height
WARM_UP_SHARE = 0.25
SAMPLES_MIN = 120  # fewer say nothing of a slope


@dataclass(frozen=True, slots=True)
class Bound:
    """How fast a gauge may grow.

    Args:
        name: Of the gauge, a field of ``Sample``.
        unit: Of the slope, for people.
        size: What one unit is.
        per_minute: Units a minute at most.
    """

    name: str
    unit: str
    size: float
    per_minute: float


# Half of a mebibyte a minute is what a leak of 100 bytes for each rollout of these runs comes to.
BOUNDS = (
    Bound("rss", "MiB", MIB, 0.5),
    Bound("descriptors", "descriptors", 1, 0.5),
    Bound("tasks", "tasks", 1, 1.0),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The process at one moment.

    Args:
        time_s: Since the start.
        rss: Resident memory, in bytes.
        descriptors: Open ones.
        tasks: trio's, living.
    """

    time_s: float
    rss: float
    descriptors: float
    tasks: float


def take(time_s: float) -> Sample:
    """Look. Garbage in cycles is collected before, so that what is left is held by something."""
    gc.collect()
    process = psutil.Process()
    return Sample(
        time_s=time_s,
        rss=process.memory_info().rss,
        descriptors=process.num_fds(),
        tasks=trio.lowlevel.current_statistics().tasks_living,
    )


@dataclass(slots=True)
class Gauges:
    """Samples of one run, and what is to be said of them.

    Args:
        duration_s: Of the run, of which the beginning does not count.
    """

    duration_s: float
    samples: list[Sample] = field(default_factory=list)

    @property
    def warm_up_s(self) -> float:
        """How long the beginning is."""
        return min(WARM_UP_S, WARM_UP_SHARE * self.duration_s)

    def settled(self) -> list[Sample]:
        """The samples that count."""
        return [sample for sample in self.samples if sample.time_s >= self.warm_up_s]

    def violations(self) -> Iterator[str]:
        """What grew faster than its bound; nothing of a run too short to tell."""
        samples = self.settled()
        if len(samples) < SAMPLES_MIN:
            return
        for bound in BOUNDS:
            growth = self.growth(bound)
            if growth > bound.per_minute:
                yield (
                    f"{bound.name} grew by {growth:.2f} {bound.unit} a minute, "
                    f"more than {bound.per_minute}"
                )

    def growth(self, bound: Bound) -> float:
        """Of one gauge, in its unit a minute."""
        samples = self.settled()
        values = [getattr(sample, bound.name) / bound.size for sample in samples]
        return 60 * slope([sample.time_s for sample in samples], values)

    def summary(self) -> str:
        """All gauges on one line."""
        return ", ".join(
            f"{bound.name} {getattr(self.samples[-1], bound.name) / bound.size:.1f} {bound.unit} "
            f"({self.growth(bound):+.3f}/min)"
            for bound in BOUNDS
        )


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Theil 1950, Sen 1968).

    A third of the points may be anywhere at all: a server that dies just then, a burst, a batch.
    """
    if len(times) < 2:
        return 0.0
    x, y = np.asarray(times), np.asarray(values, dtype=float)
    left, right = np.triu_indices(len(x), k=1)
    return float(np.median((y[right] - y[left]) / (x[right] - x[left])))
