from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.errors import RolloutCrashed
from arealtrio.waiting import BriefWaits, WaitList, background, crash_of, time_limit

from .puppet import Deferred, settled

Clock = trio.testing.MockClock


class Basket:
    """Values that waiters take, one each."""

    def __init__(self) -> None:
        self.values: deque[Any] = deque()
        self.waiting = WaitList()
        self.asked = 0

    async def take(self) -> Any:
        return await self.waiting.wait_until(self._poll)

    def _poll(self) -> Any:
        self.asked += 1
        return self.values.popleft() if self.values else None

    def put(self, *values: Any) -> None:
        self.values += values
        self.waiting.notify()


async def test_what_is_there_is_taken_at_once_and_it_is_a_checkpoint() -> None:
    basket = Basket()
    basket.put(1)
    with trio.testing.assert_checkpoints():
        assert await basket.take() == 1


async def test_a_cancellation_after_the_first_look_loses_nothing_that_it_took() -> None:
    with trio.CancelScope() as scope:

        def take() -> int:
            scope.cancel()  # it comes between the taking and the return
            return 1

        taken = await WaitList().wait_until(take)
    assert taken == 1
    assert not scope.cancelled_caught


async def test_a_cancelled_caller_takes_nothing() -> None:
    basket = Basket()
    basket.put(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await basket.take()
    assert scope.cancelled_caught
    assert list(basket.values) == [1]


async def test_waiters_are_asked_only_when_something_changed() -> None:
    basket = Basket()
    async with trio.open_nursery() as nursery:
        calls = [Deferred(nursery, basket.take) for _ in range(3)]
        await settled()
        assert basket.asked == 3
        await settled()
        assert basket.asked == 3
        basket.put("a", "b")
        await settled()
        assert [call.value for call in calls].count(None) == 1
        basket.put("c")
    assert sorted(call.value for call in calls) == ["a", "b", "c"]


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_value_and_a_cancellation_at_once_lose_nothing(cancel_first: bool) -> None:
    basket = Basket()
    async with trio.open_nursery() as nursery:
        call = Deferred(nursery, basket.take)
        await settled()
        if cancel_first:
            call.scope.cancel()
        basket.put("value")
        call.scope.cancel()
    assert call.value == (None if cancel_first else "value")
    assert list(basket.values) == (["value"] if cancel_first else [])


async def test_an_error_of_the_poll_is_its_waiters_alone() -> None:
    waiting, broken = WaitList(), False

    def poll() -> int | None:
        if broken:
            raise ZeroDivisionError
        return None

    basket = Basket()
    basket.waiting = waiting
    async with trio.open_nursery() as nursery:
        failing = Deferred(nursery, waiting.wait_until, poll)
        other = Deferred(nursery, basket.take)
        await settled()
        broken = True
        basket.put(5)
    assert isinstance(failing.error, ZeroDivisionError)
    assert other.value == 5


async def test_a_waiter_may_end_anothers_wait() -> None:
    waiting = WaitList()
    flag = False

    def ends_all() -> int | None:
        if flag:
            waiting.end(lambda: KeyError("ended"))
            return 1
        return None

    async with trio.open_nursery() as nursery:
        other = Deferred(nursery, waiting.wait_until, lambda: None)
        await settled()
        flag = True
        assert await waiting.wait_until(lambda: 3 if ends_all() else None) == 3
    assert isinstance(other.error, KeyError)


async def test_end_gives_each_waiter_an_error_of_its_own() -> None:
    waiting = WaitList()
    async with trio.open_nursery() as nursery:
        calls = [Deferred(nursery, waiting.wait_until, lambda: None) for _ in range(2)]
        await settled()
        waiting.end(lambda: KeyError("ended"))
    first, second = (call.error for call in calls)
    assert isinstance(first, KeyError)
    assert isinstance(second, KeyError)
    assert first is not second


async def test_a_time_limit_says_how_far_it_came(autojump_clock: Clock) -> None:
    words = r"after timeout_s=2.5: 1 of 3"
    with pytest.raises(TimeoutError, match=words), time_limit(2.5, lambda: "1 of 3"):
        await trio.sleep_forever()
    with time_limit(2.5, lambda: pytest.fail("asked")):
        await trio.sleep(2)
    with time_limit(None, lambda: pytest.fail("asked")):
        await trio.sleep(2000)


async def test_a_brief_wait_is_bounded_and_all_are_briefer_once_it_hurries(
    autojump_clock: Clock,
) -> None:
    brief = BriefWaits(2.0)
    ends: list[float] = []

    async def wait() -> None:
        with brief.bounded(shield=True):
            await trio.sleep_forever()
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        nursery.start_soon(wait)
        await trio.sleep(1.25)
        nursery.cancel_scope.cancel()
        brief.hurry()
        nursery.start_soon(wait)
    assert ends == [2.0, 2.75, 2.75]
    assert brief.limit_s == BriefWaits.CLOSING_S


async def test_background_ends_with_its_block_and_an_error_leaves_as_itself() -> None:
    ended = trio.Event()

    async def run() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - the block's own end raises
        async with background(run):
            await settled()
            raise KeyError("mine")
    assert ended.is_set()


async def test_a_background_that_breaks_is_a_crash() -> None:
    async def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(RolloutCrashed, match="ZeroDivisionError") as caught:
        async with background(run):
            await trio.sleep_forever()
    assert isinstance(caught.value.__cause__, ExceptionGroup)


async def test_cancelled_from_outside_is_no_crash() -> None:
    with trio.CancelScope() as scope:
        async with background(trio.sleep_forever) as nursery:
            nursery.start_soon(trio.sleep_forever)
            await settled()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


def test_what_a_crash_is() -> None:
    crash = crash_of(BaseExceptionGroup("g", [ValueError("v"), SystemExit(1)]))
    assert isinstance(crash, RolloutCrashed)
    assert "ValueError('v')" in str(crash)
    interrupted = BaseExceptionGroup("g", [BaseExceptionGroup("h", [KeyboardInterrupt()])])
    assert isinstance(crash_of(interrupted), KeyboardInterrupt)
