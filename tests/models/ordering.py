"""What ``ordering`` promises, by looking at everybody who waits, every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, median


@dataclass
class Waiting:
    """One request in the line."""

    name: int
    number: int  # how many came before; -1 at the head
    prompt: str | None
    version: int
    explores: bool


@dataclass
class ModelLine:
    """A list that is sorted whenever somebody asks."""

    order: str
    overtakes_max: int
    waiting: list[Waiting] = field(default_factory=list)
    arrived: int = 0
    left: int = 0
    answers: list[tuple[str | None, int]] = field(default_factory=list)
    explored: set[str] = field(default_factory=set)

    def enter(self, name: int, prompt: str | None, version: int) -> None:
        explores = prompt is not None and prompt not in self.explored and not self.of(prompt)
        if prompt is not None and explores:
            self.explored.add(prompt)
        self.waiting.append(Waiting(name, self.arrived, prompt, version, explores))
        self.arrived += 1

    def enter_at_head(self, name: int) -> None:
        self.waiting.insert(0, Waiting(name, -1, None, 0, explores=False))

    def leave(self, name: int) -> None:
        gone = next(w for w in self.waiting if w.name == name)
        self.waiting.remove(gone)
        self.left += gone.number >= 0

    def of(self, prompt: str | None) -> list[int]:
        return [tokens for p, tokens in self.answers if p == prompt and p is not None]

    def learn(self, prompt: str | None, tokens: int) -> None:
        self.answers.append((prompt, tokens))

    def rank(self, request: Waiting) -> float:
        if self.order == "fifo":
            return 0
        if self.order == "deadline":
            return request.version
        if answers := self.of(request.prompt):
            return -fmean(answers)
        if request.explores:
            return -float("inf")
        return -median([tokens for _, tokens in self.answers] or [0])

    def in_order(self) -> list[int]:
        """Serve everybody, one after the other."""
        names = [w.name for w in self.waiting if w.number < 0]
        queue = sorted((w for w in self.waiting if w.number >= 0), key=lambda w: w.number)
        left = self.left
        while queue:
            request = queue[0]
            if self.order == "fifo" or left - request.number < self.overtakes_max:
                request = min(queue, key=lambda w: (self.rank(w), w.number))
            queue.remove(request)
            names.append(request.name)
            left += 1
        return names
