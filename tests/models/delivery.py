"""The order of delivery as the promise reads: a list of permits, looked through each time."""

from __future__ import annotations


class Deliveries:
    """Permits by number: running, settled without an entry, waiting in some queue, or gone."""

    def __init__(self, *, in_order: bool) -> None:
        self.in_order = in_order
        self.state: dict[int, str] = {}
        self.queue_of: dict[int, int] = {}

    def granted(self, number: int) -> None:
        self.state[number] = "running"

    def settled(self, number: int, queue: int | None) -> None:
        self.state[number] = "settled" if queue is None else "waiting"
        if queue is not None:
            self.queue_of[number] = queue

    def unsettled(self) -> list[int]:
        return [number for number, state in self.state.items() if state == "running"]

    def entries(self, queue: int) -> list[int]:
        return sorted(n for n, q in self.queue_of.items() if q == queue)

    def ready(self, queue: int) -> list[int]:
        blocked = self.in_order and self.unsettled()
        return [n for n in self.entries(queue) if not blocked or n < min(self.unsettled())]

    def leave(self, numbers: list[int]) -> None:
        for number in numbers:
            del self.queue_of[number]
            self.state[number] = "gone"

    def give_back(self, number: int, queue: int) -> None:
        assert self.state[number] == "gone"
        self.settled(number, queue)
