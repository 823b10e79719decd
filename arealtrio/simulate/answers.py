"""How long the answers to a prompt are, whichever server makes them and whenever.

A length belongs to its prompt, epoch and place in the group. So settings that are compared see the
same answers, in whatever order they run them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Protocol

from ..errors import ConfigError

TOKENS_MAX = 100_000_000
"""The longest answer, in tokens."""
_TAIL = 4  # where log-normal lengths are cut, ÷ their 99th percentile, unless one says


class Answers(Protocol):
    """The lengths of answers."""

    @property
    def mean(self) -> float:
        """The mean length in tokens; an estimate will do."""

    @property
    def longest(self) -> int:
        """The longest that can come, in tokens."""

    @property
    def prompts(self) -> int | None:
        """How many prompts there are; None where there is no end of them."""

    def of_prompt(self, prompt: int, epoch: int, seed: int) -> Iterator[int]:
        """Return the lengths of the answers to one prompt in one epoch, without end.

        Args:
            prompt: Its number.
            epoch: How often all prompts were answered before.
            seed: Of all chance.
        """


@dataclass(frozen=True)
class FixedAnswers:
    """Every answer has the same length.

    Args:
        tokens: That length, at least 1.

    Raises:
        ConfigError: If it is out of its range.
    """

    tokens: int

    def __post_init__(self) -> None:
        _check_length(self.tokens)

    def __str__(self) -> str:
        return f"{self.tokens}"

    @property
    def mean(self) -> float:
        """See ``Answers``."""
        return self.tokens

    @property
    def longest(self) -> int:
        """See ``Answers``."""
        return self.tokens

    @property
    def prompts(self) -> None:
        """See ``Answers``."""

    def of_prompt(self, prompt: int, epoch: int, seed: int) -> Iterator[int]:  # noqa: ARG002
        """See ``Answers``."""
        return repeat(self.tokens)


@dataclass(frozen=True)
class LogNormalAnswers:
    """Log-normal lengths: what reasoning models show, many short answers and a long tail.

    Args:
        median: In tokens, at least 1.
        p99: 99th percentile in tokens, at least the median.
        cut: Answers are cut there (``max_new_tokens``); None: at four times the percentile.
        prompt_share: Of the logarithm's variance, what the answers to one prompt have in common,
            0 to 1: how much harder one prompt is than another. It is what the queue order
            ``longest_expected`` can know.

    Raises:
        ConfigError: If a value is out of its range.
    """

    median: float
    p99: float
    cut: int | None = None
    prompt_share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.median <= self.p99 <= TOKENS_MAX:
            raise ConfigError(f"lengths {self}: 1 <= median <= p99 <= {TOKENS_MAX} must hold")
        if self.cut is not None and not self.median <= self.cut <= TOKENS_MAX:
            raise ConfigError(f"lengths {self}: they can not be cut below their median")
        if not 0 <= self.prompt_share <= 1:
            raise ConfigError(f"prompt_share must be between 0 and 1, not {self.prompt_share}")

    def __str__(self) -> str:
        return "/".join(f"{x:g}" for x in (self.median, self.p99, self.cut) if x is not None)

    @property
    def longest(self) -> int:
        """See ``Answers``."""
        return self.cut or min(TOKENS_MAX, math.ceil(_TAIL * self.p99))

    @property
    def prompts(self) -> None:
        """See ``Answers``."""

    @cached_property
    def _sigma(self) -> float:
        return math.log(self.p99 / self.median) / NormalDist().inv_cdf(0.99)

    @cached_property
    def mean(self) -> float:
        """See ``Answers``. Of what is left after the cut: E[min(X, longest)], in closed form."""
        mu, sigma, cut = math.log(self.median), self._sigma, self.longest
        if sigma == 0:
            return self.median
        z, below = (math.log(cut) - mu) / sigma, NormalDist().cdf
        return self.median * math.exp(sigma**2 / 2) * below(z - sigma) + cut * (1 - below(z))

    def of_prompt(self, prompt: int, epoch: int, seed: int) -> Iterator[int]:
        """See ``Answers``."""
        common = random.Random(f"{seed} {prompt}").gauss(0, 1) * math.sqrt(self.prompt_share)
        own, rest = random.Random(f"{seed} {prompt} {epoch}"), math.sqrt(1 - self.prompt_share)
        while True:
            z = common + own.gauss(0, 1) * rest
            yield min(self.longest, max(1, round(self.median * math.exp(self._sigma * z))))


class RecordedAnswers:
    """Lengths that were recorded.

    Where they are known by prompt, there are as many prompts as in the record, and the answers to
    one are its recorded ones in random order, over and over. Else each is drawn from all of them.

    Args:
        lengths: Of each prompt, or of all answers together, in tokens.
        name: Of the record, for messages.

    Raises:
        ConfigError: If there is none, or one is out of its range.
    """

    def __init__(
        self, lengths: Mapping[str, Sequence[int]] | Sequence[int], name: str = "a record"
    ) -> None:
        self._name = name
        self._by_prompt: list[Sequence[int]] | None = None
        if isinstance(lengths, Mapping):
            self._by_prompt = [recorded for recorded in lengths.values() if recorded]
        self._all = _flat(lengths)
        if not self._all:
            raise ConfigError(f"{name} holds no lengths")
        for tokens in self._all:
            _check_length(tokens)
        self.mean = fmean(self._all)
        self.longest = max(self._all)

    @classmethod
    def load(cls, path: Path) -> RecordedAnswers:
        """Read a record: JSON Lines, an answer on each, blank lines aside.

        A line is a number of tokens; or an object with ``tokens`` and, if answers are to be grouped
        by prompt, ``prompt_id``; or a line of AReaL's rollout dump, whose length is ``seqlen`` -
        ``prompt_len`` and whose prompt is its ``task_id``. All lines or none name a prompt.

        Raises:
            ConfigError: With the number of the first line that is neither, or if the file can not
                be read.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
            raise ConfigError(f"{path} can not be read: {reason}") from exc
        return cls(_grouped(_numbered(text), str(path)), str(path))

    def __str__(self) -> str:
        return self._name

    @property
    def prompts(self) -> int | None:
        """See ``Answers``."""
        return None if self._by_prompt is None else len(self._by_prompt)

    def of_prompt(self, prompt: int, epoch: int, seed: int) -> Iterator[int]:
        """See ``Answers``."""
        chance = random.Random(f"{seed} {prompt} {epoch}")
        while self._by_prompt is None:
            yield chance.choice(self._all)
        recorded = self._by_prompt[prompt % len(self._by_prompt)]
        while True:
            yield from chance.sample(recorded, len(recorded))


def _flat(lengths: Mapping[str, Sequence[int]] | Sequence[int]) -> list[int]:
    if isinstance(lengths, Mapping):
        return list(chain.from_iterable(lengths.values()))
    return list(lengths)


def _numbered(text: str) -> Iterable[tuple[int, str]]:
    """The lines that hold something, counted from 1."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _grouped(lines: Iterable[tuple[int, str]], name: str) -> dict[str, list[int]] | list[int]:
    by_prompt: dict[str, list[int]] = {}
    alone: list[int] = []
    for number, line in lines:
        try:
            prompt, tokens = _read(line)
        except ConfigError as exc:
            raise ConfigError(f"{name}, line {number}: {exc}") from exc
        (alone if prompt is None else by_prompt.setdefault(prompt, [])).append(tokens)
        if alone and by_prompt:
            raise ConfigError(f"{name}, line {number}: some lines name a prompt and some do not")
    return by_prompt or alone


def _read(line: str) -> tuple[str | None, int]:
    """Return the prompt, if it is named, and the tokens of one line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError("it is not JSON") from exc
    if not isinstance(value, dict):
        return None, _check_length(value)
    if "tokens" in value:
        prompt = value.get("prompt_id")
        return None if prompt is None else str(prompt), _check_length(value["tokens"])
    if {"seqlen", "prompt_len", "task_id"} <= value.keys():
        whole, asked = _check_length(value["seqlen"]), value["prompt_len"]
        return str(value["task_id"]), _check_length(whole - _check_length(asked, least=0))
    raise ConfigError("it has neither 'tokens' nor AReaL's 'seqlen', 'prompt_len' and 'task_id'")


def _check_length(tokens: Any, least: int = 1) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise ConfigError("a length is a whole number of tokens")
    if not least <= tokens <= TOKENS_MAX:
        raise ConfigError(f"a length is {least} to {TOKENS_MAX} tokens")
    return tokens
