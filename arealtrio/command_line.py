"""What the commands have in common: a path as an argument."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class PathOption(click.Path):
    """A path that a file can have; it comes as a ``Path``.

    An empty one is refused: ``--state "$DIR"`` without a ``DIR`` would mean this directory.

    Args:
        options: As for ``click.Path``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it; a wrong one is the option's error, and exit status 2."""
        if value == "":
            self.fail("a path is not empty", param, ctx)
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            self.fail(f"{value!a} can not be the name of a file", param, ctx)
        return super().convert(value, param, ctx)
