"""How long answers are, in tokens: the one property of a model that scheduling depends on."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Protocol, Self

from ..checks import finite, integer, items
from ..errors import ConfigError


class Lengths(Protocol):
    """Draws the length of one answer."""

    def draw(self, rng: random.Random, /) -> int:
        """Return a length in tokens, the end-of-sequence token included; at least 1.

        Args:
            rng: The fleet's; no other source of chance, or a run can not be repeated.
        """


class FixedLengths:
    """Every answer has the same length.

    Args:
        tokens: That length, at least 1.

    Raises:
        ConfigError: If it is below 1.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = integer("the length of an answer", tokens, 1)

    def draw(self, _: random.Random) -> int:
        """See ``Lengths``."""
        return self._tokens


class LogNormalLengths:
    """Log-normal lengths: what reasoning models show, many short answers and a long tail.

    Args:
        median: In tokens, at least 1.
        sigma: Of the logarithm. p99 ÷ p50 is exp(2.326·sigma): 0.945 gives 9.
        longest: Answers are cut there, in tokens.

    Raises:
        ConfigError: If a value is out of its range.
    """

    def __init__(self, median: float, sigma: float, longest: int) -> None:
        median, sigma = finite("median", median), finite("sigma", sigma)
        longest = integer("longest", longest, 1)
        if not (1 <= median <= longest and sigma >= 0):
            raise ConfigError(
                "lengths need 1 <= median <= longest and a finite sigma of at least 0"
            )
        self._mu = math.log(median)
        self._sigma = sigma
        self._longest = longest

    @classmethod
    def with_tail(cls, median: float, p99: float, longest: int) -> Self:
        """The distribution with this median and 99th percentile, in tokens.

        Raises:
            ConfigError: If a value is out of its range, or the percentile below the median.
        """
        if not 0 < finite("median", median) <= finite("p99", p99):
            raise ConfigError("the 99th percentile of lengths is at least their median, above 0")
        return cls(median, math.log(p99 / median) / NormalDist().inv_cdf(0.99), longest)

    def draw(self, rng: random.Random) -> int:
        """See ``Lengths``."""
        return min(self._longest, max(1, round(rng.lognormvariate(self._mu, self._sigma))))


class RecordedLengths:
    """Lengths as they were recorded, handed out in the order answers begin, over and over.

    Args:
        tokens: At least one length, each at least 1.

    Raises:
        ConfigError: If there is none, or one is below 1.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        lengths = items("recorded lengths", tokens, "numbers of tokens")
        recorded = [integer("each of the recorded lengths", length, 1) for length in lengths]
        if not recorded:
            raise ConfigError("recorded lengths are one or more numbers of at least 1")
        self._tokens = itertools.cycle(recorded)

    @classmethod
    def from_jsonl(cls, path: str | Path, field: str = "usage.completion_tokens") -> Self:
        """Read them from a file with one JSON value a line, such as a log of answers.

        Args:
            path: The file; empty lines are skipped.
            field: Where in an object the length is, its keys joined by dots; the default is where
                an OpenAI answer has it. A line that is a number is a length.

        Raises:
            ConfigError: A line has no length, or is not UTF-8; it is named.
            OSError: The file can not be read.
        """
        with Path(path).open("rb") as lines:
            return cls(
                _length(line, field, f"line {number} of {path}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            )

    def draw(self, _: random.Random) -> int:
        """See ``Lengths``."""
        return next(self._tokens)


def _length(line: bytes, field: str, where: str) -> int:
    try:
        value = json.loads(line.decode())  # which json.loads would take for UTF-16 now and then
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{where} is not UTF-8") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where} is not JSON") from exc
    for key in field.split("."):
        if isinstance(value, dict):
            value = value.get(key)
    if isinstance(value, dict) or value is None:
        raise ConfigError(f"{where} has no {field}; name the field that holds the length")
    return integer(f"the length in {where}", value, 1)
