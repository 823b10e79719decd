"""PermitOrder and two DeliveryQueues that share it, against a list that is looked through."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from arealtrio.delivery import DeliveryQueue, PermitOrder

from ..models.delivery import Deliveries

QUEUES = st.sampled_from([0, 1])


@dataclass(frozen=True)
class Entry:
    number: int

    @property
    def task_id(self) -> str:
        return f"task-{self.number}"


def numbers(entries: list[Entry]) -> list[int]:
    return [entry.number for entry in entries]


class DeliveryMachine(RuleBasedStateMachine):
    @initialize(in_order=st.booleans())
    def start(self, in_order: bool) -> None:
        self.order = PermitOrder(in_order=in_order)
        self.queues = [DeliveryQueue[Entry](self.order) for _ in range(2)]
        self.model = Deliveries(in_order=in_order)
        self.next_number = 0
        self.delivered: dict[int, Entry] = {}  # what left and was not given back
        self.queue_of: dict[int, int] = {}  # where an entry was put first

    @rule(gap=st.integers(0, 2))
    def grant(self, gap: int) -> None:
        number = self.next_number + gap
        self.next_number = number + 1
        self.order.granted(number)
        self.model.granted(number)

    @precondition(lambda self: self.model.unsettled())
    @rule(data=st.data(), queue=st.one_of(st.none(), QUEUES))
    def settle(self, data: st.DataObject, queue: int | None) -> None:
        number = data.draw(st.sampled_from(self.model.unsettled()))
        self.order.settled(number)
        self.model.settled(number, queue)
        if queue is not None:
            self.queue_of[number] = queue
            self.queues[queue].put(Entry(number))

    @rule(queue=QUEUES, share=st.floats(0, 1))
    def take(self, queue: int, share: float) -> None:
        ready = self.model.ready(queue)
        count = round(share * len(ready))
        self.leave(self.queues[queue].take(count), ready[:count])

    @rule(queue=QUEUES, divisor=st.integers(2, 4))
    def take_where(self, queue: int, divisor: int) -> None:
        taken = self.queues[queue].take_where(lambda entry: entry.number % divisor == 0)
        self.leave(taken, [n for n in self.model.ready(queue) if n % divisor == 0])

    @precondition(lambda self: self.model.queue_of)
    @rule(data=st.data())
    def pop_task(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.queue_of)))
        entry = self.queues[self.model.queue_of[number]].pop_task(f"task-{number}")
        self.leave([entry], [number])

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        entry = self.delivered.pop(data.draw(st.sampled_from(sorted(self.delivered))))
        queue = self.queue_of[entry.number]
        self.queues[queue].put(entry)
        self.model.give_back(entry.number, queue)

    def leave(self, taken: list[Entry], expected: list[int]) -> None:
        assert numbers(taken) == expected
        for entry in taken:
            assert entry.number not in self.delivered, "delivered twice"
            self.delivered[entry.number] = entry
        self.model.leave(expected)

    @invariant()
    def agrees(self) -> None:
        assert self.order.unsettled == len(self.model.unsettled())
        for index, queue in enumerate(self.queues):
            assert len(queue) == len(self.model.entries(index))
            assert queue.ready == len(self.model.ready(index))

    def teardown(self) -> None:
        """Once everything has settled everything leaves, each entry once."""
        if not hasattr(self, "order"):
            return
        for number in self.model.unsettled():
            self.order.settled(number)
            self.model.settled(number, None)
        for index, queue in enumerate(self.queues):
            self.leave(queue.take(queue.ready), self.model.entries(index))
        assert sorted(self.delivered) == sorted(self.queue_of)


TestDelivery = DeliveryMachine.TestCase
