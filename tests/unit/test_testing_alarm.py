"""An alarm wakes its one sleeper, and no exception does."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from arealtrio.testing.alarm import Alarm


async def test_it_rings_at_its_hour(autojump_clock: MockClock) -> None:
    begun = trio.current_time()
    await Alarm().sleep_until(begun + 5)
    assert trio.current_time() == begun + 5


async def test_it_rings_at_once_for_an_hour_that_has_passed(autojump_clock: MockClock) -> None:
    begun = trio.current_time()
    await Alarm().sleep_until(begun - 5)
    assert trio.current_time() == begun


async def test_its_hour_moves_both_ways(autojump_clock: MockClock) -> None:
    alarm, begun = Alarm(), trio.current_time()
    woken: list[float] = []

    async def sleep() -> None:
        for _ in range(2):
            await alarm.sleep_until(begun + 5)
            woken.append(trio.current_time() - begun)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleep)
        await wait_all_tasks_blocked()
        alarm.move(begun + 3)
        await trio.sleep(3.5)
        assert woken == [3]
        alarm.move(begun + 7)
    assert woken == [3, 7]


async def test_nobody_sleeps_and_nothing_happens(autojump_clock: MockClock) -> None:
    alarm, begun = Alarm(), trio.current_time()
    alarm.move(begun + 1)
    await alarm.sleep_until(begun + 2)
    assert trio.current_time() == begun + 2


async def test_what_is_around_it_can_be_cancelled(autojump_clock: MockClock) -> None:
    alarm, begun = Alarm(), trio.current_time()
    with trio.move_on_after(1) as scope:
        await alarm.sleep_until(begun + 5)
    assert scope.cancelled_caught
    assert trio.current_time() == begun + 1


async def test_a_cancellation_at_the_hour_itself_is_not_lost(autojump_clock: MockClock) -> None:
    alarm, begun = Alarm(), trio.current_time()
    with trio.move_on_at(begun + 5) as scope:
        while True:
            await alarm.sleep_until(begun + 5)
    assert scope.cancelled_caught
    assert trio.current_time() == begun + 5
