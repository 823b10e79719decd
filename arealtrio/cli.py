"""The ``arealtrio`` command."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .config import SCHEDULE_POLICIES
from .demo.report import DemoReport
from .demo.run import DemoOptions, run_demo
from .embedded.__main__ import command as serve_command
from .errors import ArealTrioError
from .simulate.command import command as simulate_command

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
TERMINATED = 143  # and that SIGTERM ended


@click.group()
@click.version_option(package_name="arealtrio")
def main() -> None:
    """The rollout half of asynchronous reinforcement learning for language models."""


@main.command()
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True,
              help="Training steps.")  # fmt: skip
@click.option("--servers", type=click.IntRange(1), default=4, show_default=True,
              help="Inference servers, each a process of its own.")  # fmt: skip
@click.option("--max-staleness", type=click.IntRange(0), default=4, show_default=True,
              help="Weight versions that a trained token may be behind.")  # fmt: skip
@click.option("--schedule-policy", type=click.Choice(SCHEDULE_POLICIES), default="least_request",
              show_default=True, help="How a request finds its server.")  # fmt: skip
@click.option("--group-size", type=click.IntRange(1), default=4, show_default=True,
              help="Answers to each prompt.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of the model, the prompts and the trainer.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the numbers of the run here.")  # fmt: skip
@click.option("--keep-weights", type=click.Path(file_okay=False, path_type=Path),
              help="Leave every version's weights here.")  # fmt: skip
@click.option("--freeze-weights", is_flag=True,
              help="Withhold the trainer's updates from the servers, to compare with.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Write nothing but errors.")
def demo(json_path: Path | None, quiet: bool, **values: Any) -> None:
    """Train a tiny model by asynchronous RL on this machine, in seconds."""
    # os.path's, which says no of a name that is too long, where pathlib's raises.
    if json_path is not None and not os.path.isdir(json_path.parent):
        raise click.BadParameter(f"there is no directory {json_path.parent}", param_hint="--json")
    _make_directory(values["keep_weights"], "--keep-weights")
    try:
        with _sigterm_unwinds():
            report = _run(quiet, DemoOptions(**values))
        if json_path is not None:
            _write_json(json_path, report)
    except KeyboardInterrupt:
        click.echo("interrupted; every server has ended", err=True)
        sys.exit(INTERRUPTED)
    except (ArealTrioError, OSError) as exc:
        raise click.ClickException(_one_line(exc)) from exc


main.add_command(serve_command, "serve")
main.add_command(simulate_command, "simulate")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave through the same clean-up as an error, where it would end at once."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(quiet: bool, options: DemoOptions) -> DemoReport:
    if not quiet:
        return run_demo(options, sys.stdout)
    with Path(os.devnull).open("w") as nowhere:
        return run_demo(options, nowhere)


def _make_directory(path: Path | None, option: str) -> None:
    """Make a directory now, so that a path that can not be one is that option's error."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        words = f"{path} can not be made: {exc.strerror}"
        raise click.BadParameter(words, param_hint=option) from exc


def _write_json(path: Path, report: DemoReport) -> None:
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def _one_line(error: Exception) -> str:
    """Return what happened without line breaks; of a group, with the first of its causes."""
    text = str(error)
    if isinstance(error, BaseExceptionGroup):
        text = f"{error.message}; the first: {error.exceptions[0]}"
    return " ".join(text.split())
