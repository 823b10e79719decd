"""What a caller gave, as the type that is documented, or one error that names it.

Whatever is given, what is raised is the error that was asked for: a value is looked at before it is
computed with, and before it goes into a message. NumPy's numbers are taken for Python's, since they
come out of every sweep of a setting; a truth value is taken for no number.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from contextlib import suppress

from .errors import ArealTrioError, ConfigError

SHOWN_SIZE = 60  # characters of a value that a message may repeat
_OF_ADDRESSES = frozenset("@?#")


def shown(value: object) -> str:
    """A value as a message may repeat it: a number or a short word, and of all else the type.

    Nor is text repeated that may be an address, since that may hold a password.
    """
    if isinstance(value, str) and _OF_ADDRESSES & set(value):
        return f"text of {len(value)} characters"
    if value is None or isinstance(value, (bool, int, float, str)):
        try:
            words = repr(value)
        except ValueError:  # Python writes no integer of more than 4,300 digits
            return "an integer of thousands of digits"
        return words if len(words) <= SHOWN_SIZE else f"{words[: SHOWN_SIZE - 1]}…"
    return f"an object of type {type(value).__name__}"


def integer(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    error: type[ArealTrioError] = ConfigError,
) -> int:
    """Return an integer from ``least`` to ``most``.

    Args:
        name: The argument's, for the error.
        value: What was given.
        least: The smallest that is taken.
        most: The largest; None is any.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it is another.
    """
    number = value if type(value) is int else _index(value)
    if number is None or number < least:
        raise error(f"{name} must be an integer of at least {least}, not {shown(value)}")
    if most is not None and number > most:
        raise error(f"{name} must be at most {most}, not {shown(value)}")
    return number


def _index(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(operator.index(value))


def finite(name: str, value: object, *, error: type[ArealTrioError] = ConfigError) -> float:
    """Return a finite number: an ``int`` or ``float`` as it is, any other real one as a float.

    Args:
        name: The argument's, for the error.
        value: What was given.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it is none, or beyond what a float holds.
    """
    number = value if type(value) is float or type(value) is int else _float(value)
    if number is None or not _is_finite(number):
        raise error(f"{name} must be a finite number, not {shown(value)}")
    return number


def _float(value: object) -> float | None:
    """A Python float of another real number; NumPy's are subclasses that no codec writes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float can hold
        return False


def flag(name: str, value: object, *, error: type[ArealTrioError] = ConfigError) -> bool:
    """Return True or False.

    Args:
        name: The argument's, for the error.
        value: What was given.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it is another.
    """
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, not {shown(value)}")
    return value


def text(name: str, value: object, *, error: type[ArealTrioError] = ConfigError) -> str:
    """Return text that UTF-8 can write, and so JSON and HTTP.

    Args:
        name: The argument's, for the error.
        value: What was given.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it is another type, or holds half of a surrogate pair.
    """
    if type(value) is str and value.isascii():
        return value
    if not isinstance(value, str):
        raise error(f"{name} must be text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"{name} holds a character that UTF-8 can not write") from None
    return str.__str__(value)  # of a subclass, such as NumPy's, the text alone


def items(
    name: str, value: object, of: str, *, error: type[ArealTrioError] = ConfigError
) -> tuple[object, ...]:
    """Return what a sequence holds.

    Args:
        name: The argument's, for the error.
        value: What was given; text is no sequence here.
        of: What it should hold, for the error.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it can not be gone through.
    """
    if not isinstance(value, (str, bytes)) and isinstance(value, Iterable):
        with suppress(TypeError):  # NumPy's scalars are arrays that can not be gone through
            return tuple(value)
    raise error(f"{name} must be a sequence of {of}, not {shown(value)}")


def one_of(
    name: str,
    value: object,
    choices: tuple[str, ...],
    *,
    error: type[ArealTrioError] = ConfigError,
) -> None:
    """Check that a word is one of those that are known.

    Args:
        name: The argument's, for the error.
        value: What was given.
        choices: The words.
        error: What is raised.

    Raises:
        ArealTrioError: ``error``, if it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
