"""RecordedFeed: a data loader that goes on where an earlier life of the run left it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from .errors import LedgerError
from .ledger import encode_prompt, mark_of
from .loader import LoaderFeed, Prompt

_PLACE = ("epoch", "position", "ahead", "loader", "ended")


@dataclass(frozen=True, slots=True, eq=False)
class LoaderPlace:
    """Where a data loader was when a checkpoint was made.

    Args:
        epoch: The pass over it, from 0.
        position: Prompts taken of it.
        ahead: Prompts that it gave and nobody has taken.
        loader: What its own ``state_dict`` said; None where it has none.
        ended: Whether it had said that there is no more: then such a loader begins its next pass.
    """

    epoch: int
    position: int = 0
    ahead: tuple[Prompt, ...] = ()
    loader: Any = None
    ended: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Read it out of a checkpoint."""
        epoch, position, ahead, loader, ended = (state[name] for name in _PLACE)
        return cls(epoch, position, tuple(ahead), loader, ended)

    @staticmethod
    def is_in(state: object) -> bool:
        """Whether a checkpoint holds one."""
        if not isinstance(state, Mapping) or not all(name in state for name in _PLACE):
            return False
        epoch, position, ahead, _, ended = (state[name] for name in _PLACE)
        return (
            all(type(count) is int and count >= 0 for count in (epoch, position))
            and isinstance(ahead, (list, tuple))
            and all(isinstance(prompt, Mapping) for prompt in ahead)
            and isinstance(ended, bool)
        )

    @classmethod
    def between_epochs(cls, epoch: int, loader: object) -> Self:
        """Before the next epoch's first prompt."""
        return cls(epoch, loader=state_of(loader))

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        values = (self.epoch, self.position, list(self.ahead), self.loader, self.ended)
        return dict(zip(_PLACE, values, strict=True))


def state_of(loader: object) -> Any:
    """What a data loader says of itself (torchdata's StatefulDataLoader does); None if nothing."""
    state_dict = getattr(loader, "state_dict", None)
    return None if state_dict is None else state_dict()


class RecordedFeed(LoaderFeed):
    """One pass over a data loader, of which some prompts may have been taken before a restart.

    Where the loader is one that can be told its place, it is told; else it is iterated from its
    beginning. Either way the prompts that were taken since are read past, and compared with what
    the ledger still knows of them. All this happens at the first ``read``, in the thread of whoever
    reads.

    Args:
        loader: As in the base class.
        epoch: Which pass it is, from 0.
        taken: Prompts taken of it so far.
        marks: By position, what some of them are known by.
        ended: Whether a later pass has begun: then this one has nothing left, and leaves the loader
            alone.
        place: Of the checkpoint; None if there is none, or the loader is past it.

    Attributes:
        position: Prompts taken so far.
    """

    def __init__(
        self,
        loader: Iterable[Prompt | Sequence[Prompt]],
        epoch: int,
        taken: int = 0,
        marks: Mapping[int, str] | None = None,
        *,
        ended: bool = False,
        place: LoaderPlace | None = None,
    ) -> None:
        if not isinstance(loader, Iterable):
            iter(loader)  # raises, if it is none in the old way either
        super().__init__(())  # the loader itself is begun in its reader's thread
        self.loader = loader
        self.epoch = epoch
        self.position = 0
        self._taken = taken
        self._marks = marks or {}
        self._ended = ended
        self._place = place
        self._begun = ended
        self._encoded: deque[tuple[str, bytes]] = deque()  # of what is ahead
        self._fresh: list[tuple[str, bytes]] = []  # of what was popped last

    @property
    def resumed(self) -> bool:
        """See ``LoaderFeed.resumed``."""
        return bool(self._taken)

    def read(self, count: int) -> None:
        """See ``LoaderFeed.read``.

        Raises:
            LedgerError: If the loader does not give the prompts that were taken before the restart.
            UsageError: If a prompt can not be written to the ledger.
        """
        if not self._ended or self._ahead:
            self._begin()
        super().read(count)
        while len(self._encoded) < len(self._ahead):
            self._encoded.append(_encoded(self._ahead[len(self._encoded)]))

    def pop(self, count: int) -> list[Prompt]:
        """See ``LoaderFeed.pop``."""
        prompts = super().pop(count)
        self._fresh += [self._encoded.popleft() for _ in prompts]
        self.position += len(prompts)
        return prompts

    def take_fresh(self) -> tuple[int, list[tuple[str, bytes]]]:
        """Remove what was popped since, for the ledger: the first one's position, and all."""
        fresh, self._fresh = self._fresh, []
        return self.position - len(fresh), fresh

    def place(self) -> LoaderPlace:
        """Where the loader is now."""
        if not self._begun or self.position < self._taken:
            return self._place or LoaderPlace(self.epoch)
        return LoaderPlace(
            self.epoch, self.position, tuple(self._ahead), state_of(self.loader), self._ended
        )

    # --- the prompts of an earlier life ------------------------------------------------------

    def _begin(self) -> None:
        """Go to where the last prompt was taken. Interrupted, it goes on from there."""
        if not self._begun:
            self._tell_place()
            self._begun = True
        while self.position < self._taken:
            super().read(1)
            if not self._ahead:
                raise self._other_loader("ended after them")
            self._compare(self._ahead[0])
            super().pop(1)
            self.position += 1

    def _tell_place(self) -> None:
        place, load = self._place, getattr(self.loader, "load_state_dict", None)
        if place is None or place.loader is None or load is None:
            self._iterator = iter(self.loader)
            return
        load(place.loader)
        if place.epoch == self.epoch:
            self.position = place.position
            self._ahead.extend(place.ahead)
            self._ended = place.ended
        for _ in range(place.epoch + place.ended, self.epoch):  # what is left of earlier passes
            deque(self.loader, maxlen=0)
        if not self._ended:
            self._iterator = iter(self.loader)
        if self.position > self._taken:
            raise LedgerError(
                f"the ledger knows of {self._taken} prompts of epoch {self.epoch}, and the "
                f"checkpoint of {self.position}: the file is older than the checkpoint. Put the "
                "right one back, or choose another ledger_path"
            )

    def _compare(self, prompt: Prompt) -> None:
        mark = self._marks.get(self.position)
        if mark is not None and mark != _encoded(prompt)[0]:
            raise self._other_loader("gave another one there")

    def _other_loader(self, what: str) -> LedgerError:
        return LedgerError(
            f"before the restart {self._taken} prompts of epoch {self.epoch} were taken; now the "
            f"data loader was read past {self.position} of them and {what}. Give the same loader, "
            "with an order that a seed fixes, or a state_dict of its own; or choose another "
            "ledger_path"
        )


def _encoded(prompt: Prompt) -> tuple[str, bytes]:
    blob = encode_prompt(prompt)
    return mark_of(prompt, blob), blob
