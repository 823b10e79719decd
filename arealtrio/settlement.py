"""How a group of rollouts ends: exactly one outcome, exactly once, with its reason.

The records of it lie deeper, because groups and batches hold them; their names are public here.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import InvalidRequest, RequestRejected, RolloutError, WorkflowError
from .trajectory import RolloutResult
from .types import Failure, FailureKind, Outcome

__all__ = ["Failure", "RolloutCounts", "RolloutResult", "classify"]


def classify(error: BaseException) -> FailureKind:
    """Say whose failure an exception is.

    What a server or the way to it raised is infrastructure; a prompt that no server should see, or
    that one refused for what it is, is data; anything else came out of the user's own code.
    """
    if isinstance(error, InvalidRequest):
        return FailureKind.DATA
    if isinstance(error, RequestRejected) and error.is_of_the_content:
        return FailureKind.DATA
    if isinstance(error, RolloutError) and not isinstance(error, WorkflowError):
        return FailureKind.INFRASTRUCTURE
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return classify(error.exceptions[0])
    return FailureKind.WORKFLOW


class RolloutCounts:
    """Counts groups by where they are, and asserts invariant I1 after every change.

    submitted = queued + running + accepted + rejected + failed + expired + cancelled, each ≥ 0.
    """

    def __init__(self) -> None:
        self.submitted = 0
        self.queued = 0
        self.running = 0
        self._settled = 0  # the sum of the next
        self._ended = dict.fromkeys(Outcome, 0)

    def enqueue(self) -> None:
        """One was submitted, and waits for admission."""
        self.submitted += 1
        self.queued += 1
        self._check()

    def start(self) -> None:
        """One was admitted."""
        self.queued -= 1
        self.running += 1
        self._check()

    def requeue(self) -> None:
        """One that was admitted went back into the queue."""
        self.running -= 1
        self.queued += 1
        self._check()

    def requeue_accepted(self) -> None:
        """One that was accepted became too old, and went back into the queue."""
        self._ended[Outcome.ACCEPTED] -= 1
        self._settled -= 1
        self.queued += 1
        self._check()
        assert self._ended[Outcome.ACCEPTED] >= 0, self

    def settle(self, outcome: Outcome, *, was_running: bool) -> None:
        """One ended."""
        if was_running:
            self.running -= 1
        else:
            self.queued -= 1
        self._ended[outcome] += 1
        self._settled += 1
        self._check()

    def discard(self, count: int) -> None:
        """Some that were accepted became too old before anybody took them: they expired."""
        self._ended[Outcome.ACCEPTED] -= count
        self._ended[Outcome.EXPIRED] += count
        assert self._ended[Outcome.ACCEPTED] >= 0, self

    def of(self, outcome: Outcome) -> int:
        """How many ended so."""
        return self._ended[outcome]

    def as_dict(self) -> Mapping[str, int]:
        """Every count by its name."""
        settled = {outcome.value: count for outcome, count in self._ended.items()}
        return {
            "submitted": self.submitted,
            "queued": self.queued,
            "running": self.running,
            **settled,
        }

    def check(self) -> None:
        """Assert the invariant over every outcome; what each change asserts is its running sum."""
        self._check()
        assert self._settled == sum(self._ended.values()), self
        assert min(self._ended.values()) >= 0, self

    def _check(self) -> None:
        queued, running = self.queued, self.running
        assert queued >= 0, self
        assert running >= 0, self
        assert self.submitted == queued + running + self._settled, self

    def __repr__(self) -> str:
        return f"<RolloutCounts {dict(self.as_dict())}>"
