"""Amounts that the kit is given: numbers that must be above 0, or at least 0."""

from __future__ import annotations

from ..checks import finite, shown
from ..errors import ConfigError


def positive(name: str, value: object) -> float:
    """Return a finite number above 0.

    Raises:
        ConfigError: It is none; ``name`` is told.
    """
    number = finite(name, value)
    if number <= 0:
        raise ConfigError(f"{name} must be above 0, not {shown(value)}")
    return number


def not_negative(name: str, value: object) -> float:
    """Return a finite number of at least 0.

    Raises:
        ConfigError: It is none; ``name`` is told.
    """
    number = finite(name, value)
    if number < 0:
        raise ConfigError(f"{name} must be at least 0, not {shown(value)}")
    return number


def share(name: str, value: object) -> float:
    """Return a number from 0 to 1.

    Raises:
        ConfigError: It is none; ``name`` is told.
    """
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise ConfigError(f"{name} must be within 0 … 1, not {shown(value)}")
    return number
