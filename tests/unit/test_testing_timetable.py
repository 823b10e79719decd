"""One task calls each timer at its hour, and at no other."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from arealtrio.testing import run_virtually
from arealtrio.testing.timetable import Timer, Timetable

HOURS = st.integers(0, 12) | st.just(math.inf)


class Calls:
    """Timers by name, and when each called."""

    def __init__(self, timetable: Timetable) -> None:
        self.made: list[tuple[float, str]] = []
        self.begun = trio.current_time()
        self._timetable = timetable

    def timer(self, name: str, then: Callable[[], None] = lambda: None) -> Timer:
        def call() -> None:
            self.made.append((trio.current_time() - self.begun, name))
            then()

        return self._timetable.timer(call)

    def at(self, name: str, seconds: float) -> Timer:
        timer = self.timer(name)
        timer.set(self.begun + seconds)
        return timer


@asynccontextmanager
async def calls() -> AsyncIterator[Calls]:
    timetable = Timetable()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timetable.run)
        yield Calls(timetable)
        nursery.cancel_scope.cancel()


async def test_each_is_called_at_its_hour_and_once(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        timers = [seen.at(*one) for one in (("late", 7), ("early", 2), ("twin", 2), ("middle", 5))]
        await trio.sleep(20)
        assert seen.made == [(2, "early"), (2, "twin"), (5, "middle"), (7, "late")]
        assert {timer.hour for timer in timers} == {math.inf}


async def test_an_hour_moves_both_ways(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        sooner, later, never = (seen.at(name, 5) for name in ("sooner", "later", "never"))
        await trio.sleep(1)
        sooner.set(seen.begun + 3)
        later.set(seen.begun + 8)
        never.set(math.inf)
        await trio.sleep(20)
        assert seen.made == [(3, "sooner"), (8, "later")]


async def test_an_hour_that_has_passed_means_now(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        await trio.sleep(5)
        seen.at("now", 2)
        await trio.sleep(5)
        assert seen.made == [(5, "now")]


async def test_hours_that_differ_by_rounding_are_one(autojump_clock: MockClock) -> None:
    assert 0.1 + 0.2 > 0.3
    async with calls() as seen:
        seen.at("sum", 0.1 + 0.2)
        seen.at("number", 0.3)
        await trio.sleep(1)
        (first, _), (second, _) = seen.made
        assert first == second


async def test_a_call_may_set_its_own_hour_and_those_of_others(autojump_clock: MockClock) -> None:
    async with calls() as seen:

        def twice() -> None:
            if len(seen.made) == 1:
                again.set(seen.begun + 6)
                put_off.set(seen.begun + 9)
                stopped.stop()
                brought_forward.set(seen.begun + 5)

        again = seen.timer("again", twice)
        again.set(seen.begun + 4)
        put_off, stopped, brought_forward = (
            seen.at("off", 4),
            seen.at("stop", 4),
            seen.at("soon", 7),
        )
        await trio.sleep(20)
        assert seen.made == [(4, "again"), (5, "soon"), (6, "again"), (9, "off")]


async def test_who_is_always_due_leaves_a_turn_to_the_others(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        timer = seen.timer("always due", lambda: timer.set(trio.current_time()))
        timer.set(seen.begun)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        assert 1 < len(seen.made) <= 5


async def test_one_that_is_stopped_calls_never_again(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        due, later = seen.at("due", 3), seen.at("later", 4)
        await trio.sleep(1)
        due.stop()
        later.stop()
        later.set(seen.begun + 5)
        due.stop()
        await trio.sleep(20)
        assert seen.made == []


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from("abc"), HOURS), max_size=12))
def test_the_calls_are_those_of_a_dumb_model(moves: list[tuple[int, str, float]]) -> None:
    moves.sort(key=lambda move: move[0])

    async def main() -> list[tuple[float, str]]:
        async with calls() as seen:
            timers = {name: seen.timer(name) for name in "abc"}
            for after, name, hour in moves:
                if trio.current_time() < seen.begun + after + 0.5:
                    await trio.sleep_until(seen.begun + after + 0.5)
                timers[name].set(seen.begun + hour)
            await trio.sleep_until(seen.begun + 20)
        return seen.made

    assert sorted(run_virtually(main)) == called(moves)


def called(moves: list[tuple[int, str, float]]) -> list[tuple[float, str]]:
    """What is called when, found by looking at every half hour. Moves come at the halves."""
    hours, made = dict.fromkeys("abc", math.inf), []
    for now in (half / 2 for half in range(40)):
        hours |= {name: hour for after, name, hour in moves if after + 0.5 == now}
        due = [name for name, hour in hours.items() if hour <= now]
        made += [(now, name) for name in due]
        hours |= dict.fromkeys(due, math.inf)
    return made


async def test_with_nobody_left_there_is_no_hour_to_wake_at(autojump_clock: MockClock) -> None:
    async with calls() as seen:
        timers = [seen.at("early", 2), seen.at("late", 4)]
        await trio.sleep(1)
        for timer in timers:
            timer.set(math.inf)
        await trio.sleep(0.5)
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf


async def test_what_a_call_raises_ends_the_run(autojump_clock: MockClock) -> None:
    def fail() -> None:
        raise LookupError("at its hour")

    timetable = Timetable()
    timetable.timer(fail).set(trio.current_time() + 1)
    with pytest.raises(LookupError, match="at its hour"):
        await timetable.run()
