"""Training: the loop of the demo, with what it takes to be killed and to go on."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..controller import RolloutController
from ..errors import ConfigError
from ..ledger import LedgerStatistics
from ..weights import WeightUpdate
from .checkpoint import Checkpoint, StateDirectory
from .options import DemoOptions
from .report import DemoReport, Tally, progress_line
from .task import BudgetWorkflow, Prompts, base_model
from .trainer import PolicyTrainer

STEPS_PER_CHECKPOINT = 2  # in a real run, too, a checkpoint is too large for one every step
NO_VALUES = (KeyError, TypeError, ValueError, AttributeError)  # what a damaged checkpoint raises


def report_in(saved: Checkpoint) -> DemoReport | None:
    """Return the report of a run that has finished; None of one that has not.

    Raises:
        ConfigError: The checkpoint holds something else in its place.
    """
    if saved.report is None:
        return None
    try:
        return DemoReport.from_dict(saved.report)
    except NO_VALUES as exc:
        raise ConfigError("the checkpoint holds no report; choose another directory") from exc


class Training:
    """One run, as far as it has come.

    Args:
        options: What to run.
        saved: Where to begin.
        state: Where to keep checkpoints; None keeps none.
        weights: Where servers find each version's weights.
        out: For progress.

    Raises:
        ConfigError: The checkpoint holds no trainer.
    """

    def __init__(
        self,
        options: DemoOptions,
        saved: Checkpoint,
        state: StateDirectory | None,
        weights: Path,
        out: TextIO,
    ) -> None:
        self._options = options
        self._saved = saved
        self._state = state
        self._weights = weights
        self._out = out
        self._base = base_model(options.seed)
        self._trainer = PolicyTrainer(self._base, seed=options.seed)
        self._tally = Tally()
        if saved.trainer is not None and saved.tally is not None:
            self._load(saved.trainer, saved.tally)
        self._steps_before = self.step

    def _load(self, trainer: Mapping[str, Any], tally: Mapping[str, Any]) -> None:
        try:
            self._trainer.load_state_dict(trainer)
            self._tally = Tally.from_dict(tally)
        except NO_VALUES as exc:
            raise ConfigError("the checkpoint holds no trainer; choose another directory") from exc

    @property
    def step(self) -> int:
        """Steps done, which is the version of the weights."""
        return len(self._tally.rewards)

    def save_weights(self) -> Path:
        """Write the weights that servers are to have now, and return where."""
        path = self._weights / f"v{self.step}"
        model = self._base if self._options.freeze_weights else self._trainer.model
        model.save(path)
        return path

    def take_up(self, rollout: RolloutController) -> None:
        """Let the servers, whatever they have, and the ledger go on from the checkpoint."""
        if self._saved.rollout is not None:
            rollout.load_state_dict(self._saved.rollout)
        path = self._weights / f"v{self.step}"
        rollout.recover(self.step, WeightUpdate.from_disk(path, version=self.step))
        if self._state is not None:
            self._say_where(rollout.ledger_statistics())

    def _say_where(self, found: LedgerStatistics) -> None:
        if not (self.step or found.restored or found.requeued):
            return
        words = (
            f"going on after step {self.step} of {self._options.steps}: {found.restored} finished "
            f"groups taken over, {found.requeued} unfinished prompts to run again"
        )
        if found.regenerated:
            words += f", {found.regenerated} of them as their weights are lost"
        self._out.write(f"{textwrap.fill(words, 80)}\n")
        self._out.flush()

    def train(self, rollout: RolloutController, check_servers: Callable[[], None]) -> None:
        """Train what is left, a batch at a time.

        Args:
            rollout: Taken up.
            check_servers: Raises if one has died.

        Raises:
            ArealTrioError: What ``check_servers`` or the controller raise.
            OSError: Weights or a checkpoint can not be written.
        """
        options = self._options
        began = time.monotonic() - self._tally.seconds
        prompts = Prompts(options.seed, options.prompts)
        for batch in rollout.batches(prompts, BudgetWorkflow(), group_size=options.group_size):
            step = self._trainer.step(batch.padded())  # rollouts go on meanwhile
            self._tally.add(batch, step)
            check_servers()
            self._update_servers(rollout)
            self._tally.seconds = time.monotonic() - began
            self._keep(rollout)
            line = progress_line(self.step, options.steps, batch, step, self._tally.seconds)
            self._out.write(f"{line}\n")
            self._out.flush()

    def _update_servers(self, rollout: RolloutController) -> None:
        path = self.save_weights()
        rollout.update_weights(WeightUpdate.from_disk(path, version=self.step))
        if self._options.keep_weights is None:  # nobody asks for another version any more
            for other in set(self._weights.glob("v*")) - {path}:
                shutil.rmtree(other)

    def _keep(self, rollout: RolloutController) -> None:
        """Write a checkpoint, where one is due: the ledger first, which it relies on."""
        due = self.step % STEPS_PER_CHECKPOINT == 0 or self.step == self._options.steps
        if self._state is not None and due:
            self._write(self._state, rollout=rollout.state_dict())

    def _write(self, state: StateDirectory, **more: Mapping[str, Any]) -> None:
        self._saved = replace(
            self._saved, trainer=self._trainer.state_dict(), tally=self._tally.as_dict(), **more
        )
        state.write(self._saved)

    def finish(
        self, rollouts: Mapping[str, int], servers: Mapping[str, Mapping[str, int]]
    ) -> DemoReport:
        """Return the report of a run that has come to its end; see ``Tally.report``."""
        report = self._tally.report(
            steps_before=self._steps_before, rollouts=rollouts, servers=servers
        )
        if self._state is not None:
            self._write(self._state, report=report.as_dict())
        return report
