"""LoaderFeed: a data loader read a few prompts at a time, in the thread of whoever calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from .errors import UsageError

Prompt: TypeAlias = Mapping[str, Any]


class LoaderFeed:
    """One pass over a data loader.

    A loader yields prompts, or lists of prompts (as a batching loader does). An exception of the
    loader arrives as itself, and what was read before it is not lost.

    Args:
        loader: Any iterable; ``iter`` is called once.
    """

    def __init__(self, loader: Iterable[Prompt | Sequence[Prompt]]) -> None:
        self.loader = loader
        self._ended = False
        self._iterator: Iterator[Prompt | Sequence[Prompt]] = iter(loader)
        self._ahead: deque[Prompt] = deque()  # read, and not yet removed

    @property
    def exhausted(self) -> bool:
        """Whether no prompt is left."""
        return self._ended and not self._ahead

    def read(self, count: int) -> None:
        """Read until ``count`` prompts are there to ``pop``, or the loader ends.

        Interrupted, or with an error of the loader, it keeps what it has read.
        """
        while len(self._ahead) < count and not self._ended:
            self._read()

    def pop(self, count: int) -> list[Prompt]:
        """Remove the next prompts of those that were read, at most ``count``."""
        return [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]

    def take(self, count: int) -> list[Prompt]:
        """Read and remove the next prompts, at most ``count``; fewer only at the end."""
        self.read(count)
        return self.pop(count)

    def _read(self) -> None:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._ended = True
            return
        if isinstance(item, Mapping):
            self._ahead.append(item)
        elif isinstance(item, Sequence) and all(isinstance(prompt, Mapping) for prompt in item):
            self._ahead.extend(item)
        else:
            raise UsageError(
                "a data loader yields prompts (mappings) or lists of them, "
                f"not {type(item).__name__}"
            )
