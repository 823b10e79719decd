from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest

from arealtrio.delivery import DeliveryQueue, PermitOrder


@dataclass(frozen=True)
class Entry:
    number: int

    @property
    def task_id(self) -> str:
        return f"task-{self.number}"


def granted(*permits: int, in_order: bool = True) -> tuple[PermitOrder, DeliveryQueue[Entry]]:
    order = PermitOrder(in_order=in_order)
    for number in permits:
        order.granted(number)
    return order, DeliveryQueue(order)


def settle(order: PermitOrder, queue: DeliveryQueue[Entry], number: int) -> None:
    order.settled(number)
    queue.put(Entry(number))


def test_the_young_wait_for_the_old() -> None:
    order, queue = granted(0, 1, 2)
    settle(order, queue, 2)
    settle(order, queue, 1)
    assert (len(queue), queue.ready, order.unsettled) == (2, 0, 1)
    settle(order, queue, 0)
    assert queue.take(3) == [Entry(0), Entry(1), Entry(2)]


def test_a_rejected_permit_makes_way() -> None:
    order, queue = granted(0, 1)
    settle(order, queue, 1)
    order.settled(0)  # without an entry
    assert queue.take(1) == [Entry(1)]


def test_what_is_granted_later_holds_up_nothing_below_it() -> None:
    order, queue = granted(0)
    settle(order, queue, 0)
    order.granted(1)
    assert (order.frontier, queue.ready) == (1, 1)


def test_out_of_order_everything_may_leave_at_once_lowest_first() -> None:
    order, queue = granted(0, 1, 2, in_order=False)
    settle(order, queue, 2)
    settle(order, queue, 1)
    assert order.frontier == inf
    assert order.unsettled == 1
    assert queue.take(2) == [Entry(1), Entry(2)]


def test_one_order_holds_up_every_queue() -> None:
    order, first = granted(0, 1)
    second = DeliveryQueue[Entry](order)
    settle(order, second, 1)
    assert second.ready == 0
    settle(order, first, 0)
    assert second.ready == first.ready == 1


def test_what_was_given_back_leaves_first_again() -> None:
    order, queue = granted(0, 1)
    settle(order, queue, 0)
    (entry,) = queue.take(1)
    settle(order, queue, 1)
    queue.put(entry)
    assert queue.take(2) == [Entry(0), Entry(1)]


def test_take_where_leaves_what_may_not_leave_yet() -> None:
    order, queue = granted(0, 1, 2, 3)
    for number in (0, 1, 3):
        settle(order, queue, number)
    assert queue.take_where(lambda entry: entry.number % 2 == 1) == [Entry(1)]
    order.settled(2)
    assert queue.take(queue.ready) == [Entry(0), Entry(3)]


def test_a_task_is_taken_without_regard_to_the_order() -> None:
    order, queue = granted(0, 1)
    settle(order, queue, 1)
    assert queue.pop_task("task-1") == Entry(1)
    assert (len(queue), order.unsettled) == (0, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_taking_more_than_is_ready_is_our_own_bug_and_changes_nothing(count: int) -> None:
    order, queue = granted(0, 1)
    settle(order, queue, 1)
    with pytest.raises(AssertionError):
        queue.take(count)
    assert len(queue) == 1


def test_a_permit_settles_once_and_numbers_grow() -> None:
    order, _ = granted(0, 1)
    order.settled(1)
    with pytest.raises(AssertionError):
        order.settled(1)
    with pytest.raises(AssertionError):
        order.granted(1)
    assert order.unsettled == 1
