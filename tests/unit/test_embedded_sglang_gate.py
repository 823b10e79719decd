"""Who may go through SGLang's gate, and who waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from arealtrio.embedded.sglang_gate import Gate


class Visitors:
    """Requests and loads at a gate, each of which stays inside until it is let go."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.gate = Gate()
        self.inside: list[str] = []
        self._go: dict[str, trio.Event] = {}
        self._nursery = nursery

    async def come(self, name: str, kind: str = "request") -> None:
        self._go[name] = trio.Event()
        self._nursery.start_soon(self._visit, name, kind)
        await wait_all_tasks_blocked()

    async def leave(self, name: str) -> None:
        self._go[name].set()
        await wait_all_tasks_blocked()

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        await self.gate.enter()
        try:
            yield
        finally:
            self.gate.leave()

    async def _visit(self, name: str, kind: str) -> None:
        async with self._request() if kind == "request" else self.gate.load():
            self.inside.append(name)
            try:
                await self._go[name].wait()
            finally:
                self.inside.remove(name)


async def test_a_pause_holds_new_requests_back_and_no_load() -> None:
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery)
        await visitors.come("before")
        visitors.gate.pause()
        await visitors.come("after")
        await visitors.come("load", "load")
        assert visitors.inside == ["before", "load"]
        assert visitors.gate.waiting == 1
        visitors.gate.resume()
        await wait_all_tasks_blocked()
        assert visitors.inside == ["before", "load", "after"]
        nursery.cancel_scope.cancel()


async def test_a_load_is_alone_and_comes_before_later_requests() -> None:
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery)
        await visitors.come("first")
        await visitors.come("load", "load")
        await visitors.come("second")
        assert visitors.inside == ["first"]
        await visitors.leave("first")
        assert visitors.inside == ["load"]
        await visitors.come("other load", "load")
        await visitors.leave("load")
        assert visitors.inside == ["other load"]
        await visitors.leave("other load")
        assert visitors.inside == ["second"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["request", "load"])
async def test_one_that_gives_up_while_waiting_holds_nobody_back(kind: str) -> None:
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery)
        await visitors.come("first")
        if kind == "request":
            visitors.gate.pause()
        async with trio.open_nursery() as others:
            impatient = Visitors(others)
            impatient.gate = visitors.gate
            await impatient.come("impatient", kind)
            assert visitors.gate.waiting == (kind == "request")
            others.cancel_scope.cancel()
        visitors.gate.resume()
        assert visitors.gate.waiting == 0
        await visitors.come("next")
        assert visitors.inside == ["first", "next"]
        nursery.cancel_scope.cancel()
