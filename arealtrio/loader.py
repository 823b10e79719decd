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
    loader arrives as itself, and what was read before it is not lost; the next read goes on, as far
    as the loader does (a generator that raised has ended).

    Args:
        loader: Any iterable. ``iter`` is called once, at the first read: a loader may start its
            workers there, which is to be in its reader's thread too.

    Raises:
        UsageError: If it is none.
    """

    def __init__(self, loader: Iterable[Prompt | Sequence[Prompt]]) -> None:
        if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise UsageError(f"a data loader can be iterated; {type(loader).__name__} can not")
        self.loader = loader
        self._ended = False
        self._iterator: Iterator[Prompt | Sequence[Prompt]] | None = None
        self._ahead: deque[Prompt] = deque()  # read, and not yet removed

    @property
    def begun(self) -> bool:
        """Whether anything was read."""
        return self._iterator is not None

    @property
    def resumed(self) -> bool:
        """Whether some of it was taken in an earlier life of the run."""
        return False

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
        if self._iterator is None:
            self._iterator = iter(self.loader)
        try:
            item = next(self._iterator)
        except StopIteration:
            self._ended = True
            return
        if type(item) is dict or isinstance(item, Mapping):
            self._ahead.append(_whole(item))
        elif isinstance(item, Sequence) and all(isinstance(prompt, Mapping) for prompt in item):
            self._ahead.extend(map(_whole, item))
        else:
            raise UsageError(
                "a data loader yields prompts (mappings) or lists of them, "
                f"not {type(item).__name__}"
            )


def _whole(prompt: Prompt) -> Prompt:
    """A prompt whose own code has run: what it raises comes now, and costs no other one.

    A mapping may decode an image only when it is looked at; an id may be anything with a text.
    """
    if not isinstance(prompt, dict):
        prompt = dict(prompt)
    str(prompt.get("prompt_id"))
    return prompt
