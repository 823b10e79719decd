"""The ``arealtrio`` command."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .command_line import PathOption
from .config import SCHEDULE_POLICIES
from .demo.report import DemoReport
from .demo.run import DemoOptions, run_demo
from .errors import ArealTrioError

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
TERMINATED = 143  # and that SIGTERM ended

_ELSEWHERE = {"serve": ".embedded.__main__", "simulate": ".simulate.command"}


class _Commands(click.Group):
    """Commands of which some are imported when they are asked for: they bring heavy libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command = import_module(_ELSEWHERE[cmd_name], __package__).command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands)
@click.version_option(package_name="arealtrio")
def main() -> None:
    """The rollout half of asynchronous reinforcement learning for language models."""


@main.command()
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True,
              help="Training steps.")  # fmt: skip
@click.option("--servers", type=click.IntRange(1), default=4, show_default=True,
              help="Inference servers, each a process of its own.")  # fmt: skip
@click.option("--server", "server_urls", metavar="URL", multiple=True,
              help="An embedded server that runs already (arealtrio serve), in place of "
              "--servers; once for each.")  # fmt: skip
@click.option("--max-staleness", type=click.IntRange(0), default=4, show_default=True,
              help="Weight versions that a trained token may be behind.")  # fmt: skip
@click.option("--schedule-policy", type=click.Choice(SCHEDULE_POLICIES), default="least_request",
              show_default=True, help="How a request finds its server.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True,
              help="Prompts in a training batch.")  # fmt: skip
@click.option("--group-size", type=click.IntRange(1), default=4, show_default=True,
              help="Answers to each prompt.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of the model, the prompts and the trainer.")  # fmt: skip
@click.option("--state", type=PathOption(file_okay=False), metavar="DIR",
              help="Keep ledger, checkpoint and weights in DIR: the same command again goes on "
              "where it was, whatever ended it.")  # fmt: skip
@click.option("--json", "json_path", type=PathOption(dir_okay=False),
              help="Write the numbers of the run here.")  # fmt: skip
@click.option("--keep-weights", type=PathOption(file_okay=False),
              help="Leave every version's weights here.")  # fmt: skip
@click.option("--freeze-weights", is_flag=True,
              help="Withhold the trainer's updates from the servers, to compare with.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Write nothing but errors.")
def demo(json_path: Path | None, quiet: bool, **values: Any) -> None:
    """Train a tiny model by asynchronous RL on this machine, in seconds."""
    # os.path's, which says no of a name that is too long, where pathlib's raises.
    if json_path is not None and not os.path.isdir(json_path.parent):
        raise click.BadParameter(f"there is no directory {json_path.parent}", param_hint="--json")
    _check_servers(values["server_urls"])
    _make_directory(values["keep_weights"], "--keep-weights")
    _make_directory(values["state"], "--state")
    try:
        with _sigterm_unwinds():
            report = _run(quiet, DemoOptions(**values))
        if json_path is not None:
            _write_json(json_path, report)
    except KeyboardInterrupt:
        click.echo(_interrupted(values["state"], values["server_urls"]), err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who read it has read enough; click ends it without a word
        raise
    except (ArealTrioError, OSError) as exc:
        raise click.ClickException(_one_line(exc)) from exc


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave through the same clean-up as an error, where it would end at once."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(quiet: bool, options: DemoOptions) -> DemoReport:
    if not quiet and sys.stdout is not None:  # as it is where the shell closed it: ``>&-``
        return run_demo(options, sys.stdout)
    with Path(os.devnull).open("w") as nowhere:
        return run_demo(options, nowhere)


def _check_servers(urls: Sequence[str]) -> None:
    given = click.get_current_context().get_parameter_source("servers")
    if urls and given is not ParameterSource.DEFAULT:
        raise click.UsageError("--server and --servers contradict each other; give one of them")


def _interrupted(state: Path | None, urls: Sequence[str]) -> str:
    servers = "the servers run on" if urls else "every server has ended"
    more = "; the same command goes on from there" if state is not None else ""
    return f"interrupted; {servers}{more}"


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
