"""Comparison: settings that are run one after another, and what there is of them at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .outcome import Outcome, Step
from .progress import Progress
from .report import Setting
from .run import simulate


class Comparison:
    """Runs settings, the first one first.

    A signal handler may ask what there is between any two of its instructions.

    Args:
        settings: Without outcomes.
        progress: Shows them.

    Attributes:
        settings: With the outcomes of those that were run.
        done: How many those are.
    """

    def __init__(self, settings: Sequence[Setting], progress: Progress) -> None:
        self.settings = list(settings)
        self.progress = progress
        self.done = 0
        self._moments: list[Step] = []  # of the one under way

    def run(self) -> None:
        """Run them all."""
        for index, setting in enumerate(self.settings):
            self.progress.begin(self._name(index), setting.plan.steps, self._moments)
            outcome = simulate(setting.plan, self._moments, self.progress.changed)
            self.settings[index] = replace(setting, outcome=outcome)
            self._moments = []
            self.done = index + 1
        self.progress.clear()

    def _name(self, index: int) -> str:
        values = self.settings[index].values
        words = " ".join(f"{name}={value}" for name, value in values.items())
        return f"{index + 1} of {len(self.settings)} {words}".rstrip()

    def so_far(self) -> list[Setting]:
        """Return all settings, with what there is of the one under way."""
        return [
            self._under_way(setting) if index == self.done and setting.outcome is None else setting
            for index, setting in enumerate(self.settings)
        ]

    def _under_way(self, setting: Setting) -> Setting:
        return replace(setting, outcome=Outcome.of(setting.plan, list(self._moments)))
