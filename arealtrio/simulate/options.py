"""What the options of ``arealtrio simulate`` take, and the values of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..checks import shown
from ..command_line import PathOption
from ..errors import ConfigError
from .answers import FixedAnswers, LogNormalAnswers, RecordedAnswers
from .servers import ServerKind, fleet

AXES_MAX = 2
SETTINGS_MAX = 1000
UNBOUNDED = "inf"
DIGITS_MAX = 15


class _Converted(click.ParamType[Any]):
    """An option whose text is read by ``read``; a ConfigError is that option's error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # click converts a default of ours twice
        try:
            return self.read(value)
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)

    def read(self, text: str) -> Any:
        raise NotImplementedError


class _Fleet(_Converted):
    name = "fleet"

    def read(self, text: str) -> tuple[ServerKind, ...]:
        return fleet(text)


class _Lengths(_Converted):
    name = "lengths"

    def read(self, text: str) -> FixedAnswers | LogNormalAnswers:
        parts = [_number(part, text) for part in text.split("/")]
        if len(parts) == 1:
            return FixedAnswers(_whole(parts[0], text))
        if len(parts) == 2:
            return LogNormalAnswers(parts[0], parts[1])
        if len(parts) == 3:
            return LogNormalAnswers(parts[0], parts[1], _whole(parts[2], text))
        raise _no_lengths(text)


class _Trace(_Converted):
    name = "file"
    path = PathOption()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the file, if its name can be one."""
        if isinstance(value, str):
            self.path.convert(value, param, ctx)
        return super().convert(value, param, ctx)

    def read(self, text: str) -> RecordedAnswers:
        return RecordedAnswers.load(Path(text))


class _Staleness(_Converted):
    name = "integer or inf"

    def read(self, text: str) -> int | None:
        """Return the bound; None is none."""
        if text == UNBOUNDED:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX):
            raise ConfigError(f"{shown(text)} is no whole number of at least 0, nor inf")
        return int(text)


class _Finite(click.FloatRange):
    """A FloatRange that takes no ``nan`` and no ``inf``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


FLEET, LENGTHS, TRACE, STALENESS = _Fleet(), _Lengths(), _Trace(), _Staleness()
seconds = _Finite(0)
share = _Finite(0, 1)
positive_seconds = _Finite(0, min_open=True)


def _number(part: str, text: str) -> float:
    try:
        return float(part)
    except ValueError as exc:
        raise _no_lengths(text) from exc


def _whole(number: float, text: str) -> int:
    if not number.is_integer():  # so of inf and nan
        raise _no_lengths(text)
    return int(number)


def _no_lengths(text: str) -> ConfigError:
    return ConfigError(f"{text!r} is neither TOKENS nor MEDIAN/P99 nor MEDIAN/P99/LONGEST")


@dataclass(frozen=True, slots=True)
class Axis:
    """One option that is swept.

    Args:
        name: Of the option, with underscores.
        values: As written, and as the option reads it.
    """

    name: str
    values: tuple[tuple[str, Any], ...]


def read_axes(context: click.Context, sweeps: Sequence[str], names: Sequence[str]) -> list[Axis]:
    """Read every ``--sweep``.

    Args:
        context: Of the command, whose options say how a value is read.
        sweeps: As written: ``max_staleness=0,1,inf``.
        names: What may be swept, as far as there is an option of that name.

    Raises:
        click.BadParameter: With the first thing that is wrong.
    """
    options = {p.name: p for p in context.command.params if p.name and p.name in names}
    axes = [_axis(context, sweep, options) for sweep in sweeps]
    if len(axes) > AXES_MAX:
        raise _wrong(f"at most {AXES_MAX} options can be swept at once")
    if len({axis.name for axis in axes}) < len(axes):
        raise _wrong(f"{axes[0].name} is swept twice")
    if math.prod(len(axis.values) for axis in axes) > SETTINGS_MAX:
        raise _wrong(f"these are more than {SETTINGS_MAX} settings")
    return axes


def _axis(context: click.Context, sweep: str, options: Mapping[str, click.Parameter]) -> Axis:
    name, equals, rest = sweep.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not equals:
        raise _wrong(f"{sweep!r} is not written OPTION=VALUE,VALUE")
    if name not in options:
        known = ", ".join(sorted(options))
        raise _wrong(f"{name!r} is nothing that can be swept; choose from {known}")
    texts = [text.strip() for text in rest.split(",")]
    if len(set(texts)) < len(texts):
        raise _wrong(f"{sweep!r} names a value twice")
    try:
        values = [options[name].type.convert(text, None, context) for text in texts]
    except click.BadParameter as exc:
        raise _wrong(f"{name}: {exc.message}") from exc
    return Axis(name, tuple(zip(texts, values, strict=True)))


def _wrong(words: str) -> click.BadParameter:
    return click.BadParameter(words, param_hint="--sweep")
