"""LengthEstimator: how long the next answer to a prompt will be, from the answers there were.

Much of what varies in an answer's length is the prompt's own, so one earlier answer says more than
any average over all prompts. Nothing here waits or knows of servers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from typing import Final, NamedTuple

PROMPTS_MAX: Final = 65_536
"""Prompts remembered; the one that was answered longest ago is forgotten first."""
WINDOW: Final = 1024
"""Answers that the running median is of."""
MEMORY: Final = 16
"""A prompt's mean weighs an answer at least 1/16, so that it follows a model that changes."""


class _History(NamedTuple):
    """The answers to one prompt."""

    answers: int
    mean: float


class LengthEstimator:
    """Expected answer lengths in tokens, by prompt.

    Answers of an earlier epoch and finished siblings of the same group count alike: both are
    answers to the same prompt.

    Args:
        prompts_max: Prompts remembered. Choose it above the size of the training set, if history
            is to last from one epoch to the next.
        window: Answers that the running median is of.
    """

    def __init__(self, prompts_max: int = PROMPTS_MAX, window: int = WINDOW) -> None:
        self._prompts_max = prompts_max
        self._histories: OrderedDict[str, _History] = OrderedDict()  # least recently answered first
        self._recent: deque[int] = deque(maxlen=window)
        self._sorted: list[int] = []  # the same, ascending

    @property
    def median(self) -> float:
        """Of the last answers to whatever prompts; 0 before the first."""
        if not self._sorted:
            return 0.0
        high = len(self._sorted) // 2
        return (self._sorted[high] + self._sorted[~high]) / 2

    def expected(self, prompt: str | None) -> float | None:
        """The mean of the answers to a prompt; None where there was none."""
        history = None if prompt is None else self._histories.get(prompt)
        return None if history is None else history.mean

    def learn(self, prompt: str | None, tokens: int) -> None:
        """Count one whole answer.

        Args:
            prompt: Its key, the same in every epoch; None where it is not known.
            tokens: The answer's length.
        """
        self._remember(tokens)
        if prompt is None:
            return
        answers, mean = self._histories.pop(prompt, _History(0, 0.0))
        answers = min(answers + 1, MEMORY)
        self._histories[prompt] = _History(answers, mean + (tokens - mean) / answers)
        if len(self._histories) > self._prompts_max:
            self._histories.popitem(last=False)

    def _remember(self, tokens: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(tokens)
        insort(self._sorted, tokens)
