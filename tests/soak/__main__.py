"""``python -m tests.soak --minutes 10``: train on servers that die and return, and stay flat.

Real sockets, servers in processes of their own in both dialects, weight updates, evaluation beside
training, and waits that are given up. It prints a line a minute and a summary; the exit status is
1 if memory, descriptors or tasks grew, anything was left on a server, or a rollout did not settle
once.
"""

from __future__ import annotations

import sys

import click
import trio

from .run import soak

LENGTH = click.FloatRange(0, 24 * 60, min_open=True)


@click.command()
@click.option("--minutes", type=LENGTH, default=10.0, show_default=True,
              help="How long. Growth is judged from six on.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of who dies when, and of which wait is given up.")  # fmt: skip
def main(minutes: float, seed: int) -> None:
    """Train on servers that die and return for so long, and say what did not stay flat."""
    violations = trio.run(soak, 60 * minutes, seed, _say)
    sys.exit(1 if violations else 0)


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main(prog_name="python -m tests.soak")
