"""A few seconds of a soak, and whether its gauges find what they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .gauges import BOUNDS, MIB, SAMPLES_MIN, Bound, Gauges, Sample, slope

ROOT = Path(__file__).parents[2]


def test_a_few_seconds_end_without_a_violation() -> None:
    """In a process of its own: this one has descriptors and children of other tests."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.12"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr
    assert ended.stdout.startswith("0 violations in 0.1 minutes: ")


def run_of(bound: Bound, growth: float, noise: float = 0.0) -> Gauges:
    """Ten minutes of which one gauge grows by so much a minute, after a warm-up that grows more."""
    gauges, rng = Gauges(600), np.random.default_rng(0)
    for time_s in range(0, 600, 2):
        warm = max(0.0, 1 - time_s / gauges.warm_up_s) * 50
        value = 100 - warm + growth * time_s / 60 + noise * rng.pareto(1.5)
        sample = {"rss": 100.0 * MIB, "descriptors": 40.0, "tasks": 60.0}
        sample[bound.name] = value * bound.size
        gauges.samples.append(Sample(float(time_s), **sample))
    return gauges


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_growth_beyond_its_bound_is_named(bound: Bound, noise: float) -> None:
    assert not list(run_of(bound, 0.0, noise).violations())
    (words,) = run_of(bound, 2 * bound.per_minute, noise).violations()
    assert words.startswith(f"{bound.name} grew by")


def test_a_run_too_short_to_tell_is_not_judged() -> None:
    gauges = run_of(BOUNDS[0], 50.0)
    gauges.samples = gauges.settled()[: SAMPLES_MIN - 1]
    assert not list(gauges.violations())


def test_a_slope_is_that_of_most_points() -> None:
    times = [float(t) for t in range(100)]
    values = [3.0 * t for t in times]
    values[10:30] = [1e9] * 20
    assert slope(times, values) == pytest.approx(3.0, abs=0.2)
    assert slope([1.0], [5.0]) == 0
