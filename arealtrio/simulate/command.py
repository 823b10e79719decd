"""``arealtrio simulate``: options to plans, and outcomes to wherever they are wanted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from ..command_line import PathOption
from ..config import QUEUE_ORDERS, SCHEDULE_POLICIES, STRAGGLER_POLICIES
from ..errors import ArealTrioError, ConfigError
from .answers import Answers, LogNormalAnswers
from .comparison import Comparison
from .options import (
    FLEET,
    LENGTHS,
    STALENESS,
    TRACE,
    Axis,
    positive_seconds,
    read_axes,
    seconds,
    share,
)
from .plan import Plan
from .progress import Progress
from .report import Setting, as_json, lines

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
PICTURES = (".png", ".svg", ".pdf")
_STDOUT = Path("-")


@click.command()
@click.option("--servers", type=FLEET, default="8x32@50", show_default=True,
              help="The fleet: count x slots @ tokens per second of one answer; several kinds with "
              "commas between them, 4x8@50,4x24@80.")  # fmt: skip
@click.option("--slow-down", type=seconds, default=0.0, show_default=True,
              help="Share of a step that each further answer on a server adds.")  # fmt: skip
@click.option("--lengths", type=LENGTHS, default="1000/8000", show_default=True,
              help="Tokens of an answer: one number, or median/p99 of a log-normal, or "
              "median/p99/longest.")  # fmt: skip
@click.option("--trace", type=TRACE,
              help="Recorded lengths instead, JSON Lines: a number, or {\"tokens\": …, "
              "\"prompt_id\": …}, or AReaL's rollout dump.")  # fmt: skip
@click.option("--prompt-share", type=share, default=0.5, show_default=True,
              help="Share of the lengths' log-variance that answers to one prompt have in "
              "common.")  # fmt: skip
@click.option("--prompts", type=click.IntRange(1),
              help="Prompts of an epoch. Default: the trace's, or without end.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Prompts in a training batch.")  # fmt: skip
@click.option("--group-size", type=click.IntRange(1), default=8, show_default=True,
              help="Answers to each prompt.")  # fmt: skip
@click.option("--training-s", type=positive_seconds, default=60.0, show_default=True,
              help="Seconds of a training step.")  # fmt: skip
@click.option("--update-s", type=seconds, default=2.0, show_default=True,
              help="Seconds that the servers stand still for new weights.")  # fmt: skip
@click.option("--latency-s", type=seconds, default=0.0, show_default=True,
              help="Seconds of a request to its first token: network and prefill.")  # fmt: skip
@click.option("--steps", type=click.IntRange(2), default=40, show_default=True,
              help="Training steps.")  # fmt: skip
@click.option("--warm-up", type=click.IntRange(0),
              help="Steps that are not counted. Default: a quarter.")  # fmt: skip
@click.option("--max-staleness", type=STALENESS, default="4", show_default=True,
              help="Versions that a trained token may be behind; inf is no bound.")  # fmt: skip
@click.option("--straggler-policy", type=click.Choice(STRAGGLER_POLICIES), default="wait",
              show_default=True, help="What becomes of a rollout that is overtaken.")  # fmt: skip
@click.option("--schedule-policy", type=click.Choice(SCHEDULE_POLICIES), default="least_request",
              show_default=True, help="How a request finds its server.")  # fmt: skip
@click.option("--queue-order", type=click.Choice(QUEUE_ORDERS), default="fifo", show_default=True,
              help="Which waiting request gets the next slot.")  # fmt: skip
@click.option("--max-concurrent-rollouts", type=click.IntRange(1),
              help="In flight at most. Default: the slots.")  # fmt: skip
@click.option("--grain", type=click.IntRange(1),
              help="Tokens simulated as one. Default: 1/100 of a mean answer.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of the lengths.")  # fmt: skip
@click.option("--sweep", multiple=True, metavar="OPTION=V1,V2,…",
              help="Compare settings: max_staleness=0,1,2,4,8,inf. A second one is crossed with "
              "the first.")  # fmt: skip
@click.option("--plot", type=PathOption(dir_okay=False),
              help="Draw the outcome here: .png, .svg or .pdf.")  # fmt: skip
@click.option("--json", "json_path", type=PathOption(dir_okay=False, allow_dash=True),
              help="Write all numbers here; - is standard output.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Write no report and no progress.")
@click.pass_context
def command(
    context: click.Context,
    /,
    sweep: Sequence[str],
    plot: Path | None,
    json_path: Path | None,
    quiet: bool,
    **values: Any,
) -> None:
    """Plan a fleet: whole training runs in simulated time, and what they come to."""
    axes = read_axes(context, sweep, [f.name for f in fields(Plan)] + _OF_ANSWERS)
    _check_lengths(context, axes)
    _check_places(plot, json_path)
    outputs = _Outputs(plot, json_path, quiet or json_path == _STDOUT)
    comparison = Comparison(_settings(values, axes), Progress(None if quiet else _terminal()))
    try:
        with _leaving_at_once(lambda: _interrupted(comparison, outputs)):
            comparison.run()
        outputs.write(comparison.settings)
    except BrokenPipeError:  # who read it has read enough; click ends it without a word
        raise
    except (ArealTrioError, OSError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc


# --- options to plans ----------------------------------------------------------------------------

_OF_ANSWERS = ["lengths", "trace", "prompt_share"]


def _check_lengths(context: click.Context, axes: Sequence[Axis]) -> None:
    given = {axis.name for axis in axes}
    given |= {n for n in _OF_ANSWERS if _is_given(context, n)}
    for other in ("lengths", "prompt_share"):
        if {"trace", other} <= given:
            raise click.UsageError(f"--trace and --{other.replace('_', '-')} exclude each other")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _settings(values: Mapping[str, Any], axes: Sequence[Axis]) -> list[Setting]:
    """Every combination of the swept values, checked before any of them is run."""
    settings = []
    for chosen in itertools.product(*(axis.values for axis in axes)):
        swept = {axis.name: value for axis, (_, value) in zip(axes, chosen, strict=True)}
        names = {axis.name: text for axis, (text, _) in zip(axes, chosen, strict=True)}
        try:
            plan = _plan({**values, **swept})
        except ConfigError as exc:
            raise click.UsageError(str(exc)) from exc
        settings.append(Setting(plan=plan, values=names, outcome=None))
    return settings


def _plan(values: Mapping[str, Any]) -> Plan:
    rest = {name: value for name, value in values.items() if name not in _OF_ANSWERS}
    return Plan(**rest, answers=_answers(values))


def _answers(values: Mapping[str, Any]) -> Answers:
    answers: Answers = values["trace"] or values["lengths"]
    if isinstance(answers, LogNormalAnswers):
        return replace(answers, prompt_share=values["prompt_share"])
    return answers


def _check_places(plot: Path | None, json_path: Path | None) -> None:
    """Find out before minutes of work, not after."""
    if json_path == _STDOUT and sys.stdout is None:
        raise click.BadParameter("there is no standard output", param_hint="--json")
    for path, option in ((plot, "--plot"), (json_path, "--json")):
        if path is not None and path != _STDOUT and not os.path.isdir(path.parent):
            raise click.BadParameter(f"there is no directory {path.parent}", param_hint=option)
    if plot is None:
        return
    if plot.suffix.lower() not in PICTURES:
        words = f"{plot} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        raise click.BadParameter(words, param_hint="--plot")
    try:
        _draw()
    except ImportError as exc:
        words = f"needs matplotlib ({exc}): pip install 'arealtrio[plot]'"
        raise click.BadParameter(words, param_hint="--plot") from exc


def _draw() -> Callable[[Sequence[Setting], Path], None]:
    """Only when asked for: matplotlib is an extra, and takes half a second."""
    from .figure import draw

    return draw


# --- Ctrl-C --------------------------------------------------------------------------------------


@contextmanager
def _leaving_at_once(last_words: Callable[[], None]) -> Iterator[None]:
    """On SIGINT, say what there is and leave.

    To unwind a hundred thousand simulated rollouts would take seconds, and what they hold is memory
    alone: no file, no process, no connection.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # for whoever can not wait for a second
        try:
            last_words()
        finally:
            os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(comparison: Comparison, outputs: _Outputs) -> None:
    settings = comparison.so_far()
    comparison.progress.clear()
    click.echo(f"interrupted in setting {comparison.done + 1} of {len(settings)}", err=True)
    outputs.write(settings)


# --- outcomes to wherever they are wanted --------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    plot: Path | None
    json_path: Path | None
    quiet: bool

    def write(self, settings: Sequence[Setting]) -> None:
        try:
            self._print(settings)
        finally:  # also when nobody reads what is printed
            self._save(settings)

    def _print(self, settings: Sequence[Setting]) -> None:
        if self.json_path == _STDOUT:
            click.echo(_json_text(settings), nl=False)
        if not self.quiet:
            for line in lines(settings, plain=not _takes_blocks()):
                click.echo(line)

    def _save(self, settings: Sequence[Setting]) -> None:
        if self.json_path is not None and self.json_path != _STDOUT:
            self.json_path.write_text(_json_text(settings))
        if self.plot is not None:
            _draw()(settings, self.plot)


def _json_text(settings: Sequence[Setting]) -> str:
    return json.dumps(as_json(settings), indent=2) + "\n"


# Where the shell has closed one of them, as by ``>&-``, Python has None in its place.


def _terminal() -> int | None:
    """The descriptor of standard error, if that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    return sys.stderr.fileno()


def _takes_blocks() -> bool:
    """Whether standard output can show what bars are made of."""
    if sys.stdout is None:
        return False
    try:
        "█▏▁·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
