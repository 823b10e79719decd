"""What is opened at its first use is closed with bounds."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from arealtrio.lifetime import CLOSE_LIMIT_S, OncePerRun

from .puppet import settled

Clock = trio.testing.MockClock


async def test_it_opens_once_and_closes_also_under_cancellation() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def open_() -> AsyncIterator[str]:
        events.append("opened")
        try:
            yield "it"
        finally:
            events.append("closed")

    resource = OncePerRun("resource", open_)
    assert [await resource.get(), await resource.get()] == ["it", "it"]
    with trio.CancelScope() as scope:
        scope.cancel()
        await resource.aclose()
    assert events == ["opened", "closed"]
    await resource.aclose()


async def test_one_that_does_not_close_is_left_behind_with_a_warning(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    may_close = trio.Event()

    @asynccontextmanager
    async def open_() -> AsyncIterator[str]:
        try:
            yield "it"
        finally:
            with trio.CancelScope(shield=True):
                await may_close.wait()

    caplog.set_level(logging.WARNING, "arealtrio")
    resource = OncePerRun("stubborn resource", open_)
    await resource.get()
    began = trio.current_time()
    await resource.aclose()
    assert trio.current_time() - began == CLOSE_LIMIT_S
    (words,) = [record.getMessage() for record in caplog.records]
    assert "stubborn resource has not closed" in words
    may_close.set()
    await settled()
