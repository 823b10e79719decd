"""``python -m arealtrio.embedded``: one server as a process."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import click

from ..command_line import PathOption
from ..errors import ConfigError
from .model import TinyModel
from .sampling import LogprobsMode
from .serve import main
from .settings import DialectName, ServerSettings


class Seconds(click.FloatRange):
    """Seconds of at least 0, which neither ``nan`` nor ``inf`` are."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read them."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@click.command()
@click.option("--weights", type=PathOption(),
              help="Directory of the first weights. Default: a random model.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True,
              help="0 takes a free one.")  # fmt: skip
@click.option("--served-model-name", default="tiny", show_default=True)
@click.option("--max-num-seqs", type=click.IntRange(1), default=8, show_default=True,
              help="Sequences decoded at once.")  # fmt: skip
@click.option("--token-time-s", type=Seconds(0), default=0.0, show_default=True,
              help="Seconds of a decode step.")  # fmt: skip
@click.option("--max-model-len", type=click.IntRange(2), default=2048, show_default=True,
              help="Prompt and answer, tokens.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--logprobs-mode", type=click.Choice(get_args(LogprobsMode)),
              help="Default: the dialect's own.")  # fmt: skip
@click.option("--dialect", type=click.Choice(get_args(DialectName)), default="vllm",
              show_default=True)  # fmt: skip
@click.option("--incremental-streaming-output", is_flag=True,
              help="SGLang: events of a stream hold the new tokens alone.")  # fmt: skip
@click.option("--health-time-s", type=Seconds(0), default=0.0, show_default=True,
              help="SGLang: seconds of a health check; 1 as in a real server.")  # fmt: skip
@click.option("--areal", is_flag=True,
              help="vLLM: AReaL's own routes in place of those for development.")  # fmt: skip
@click.option("--tell-experts", is_flag=True,
              help="Tell made-up experts, as --enable-return-routed-experts.")  # fmt: skip
@click.option("--fragile", is_flag=True,
              help="SGLang: die of requests that kill a real server.")  # fmt: skip
@click.option("--exit-with-parent", is_flag=True,
              help="End when standard input ends, that is, when the parent has died.")  # fmt: skip
def command(exit_with_parent: bool, weights: Path | None, **values: Any) -> None:
    """Serve a tiny real model; print one line with the address when it listens."""
    try:
        with _first_weights(weights, values["seed"]) as directory:
            settings = ServerSettings(weights=directory, **values)
            code = main(settings, on_listening=_announce, exit_with_parent=exit_with_parent)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except (OSError, ValueError) as exc:
        raise click.ClickException(" ".join(str(exc).split())) from exc
    sys.exit(code)


@contextmanager
def _first_weights(weights: Path | None, seed: int) -> Iterator[Path]:
    """The directory asked for, or one with a random model, for as long as the server runs."""
    if weights is not None:
        yield weights
        return
    with TemporaryDirectory(prefix="arealtrio-") as directory:
        TinyModel.random(seed).save(directory)
        yield Path(directory)


def _announce(url: str) -> None:
    click.echo(f"listening on {url}")


if __name__ == "__main__":
    command(prog_name="python -m arealtrio.embedded")
