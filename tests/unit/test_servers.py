"""The one queue in front of the servers: who gets a slot, and that none is ever lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from arealtrio.config import RolloutConfig
from arealtrio.errors import ConfigError, RolloutClosed, UsageError
from arealtrio.ordering import Origin
from arealtrio.servers import Lease, Server, ServerPool, ServerState
from arealtrio.transport import HttpTransport
from arealtrio.types import HttpRequest, HttpResponse
from arealtrio.wire.vllm import VllmDialect

A, B = "http://a:1", "http://b:1"


def pool_of(caps: dict[str, int], policy: Any = "least_request", **more: Any) -> ServerPool:
    """A pool whose servers are in service; nothing is ever sent."""
    config = RolloutConfig(servers=list(caps), schedule_policy=policy, **more)
    pool = ServerPool(config, VllmDialect(), HttpTransport())
    for server in pool.servers:
        server.cap = caps[server.address]
        pool.set_state(server, ServerState.READY)
    return pool


def server_of(pool: ServerPool, address: str) -> Server:
    return next(s for s in pool.servers if s.address == address)


def outstanding(pool: ServerPool) -> dict[str, int]:
    return {s.address: s.outstanding for s in pool.statistics()}


class Holders:
    """Tasks that hold a lease until told; ``order`` is the order in which they got one."""

    def __init__(self, pool: ServerPool, nursery: trio.Nursery) -> None:
        self.pool = pool
        self.nursery = nursery
        self.order: list[str] = []
        self.server: dict[str, str] = {}
        self._release: dict[str, trio.Event] = {}
        self._scopes: dict[str, trio.CancelScope] = {}

    async def start(self, name: str, **wants: object) -> None:
        self._release[name], self._scopes[name] = trio.Event(), trio.CancelScope()
        self.nursery.start_soon(self._hold, name, wants)
        await trio.testing.wait_all_tasks_blocked()

    async def _hold(self, name: str, wants: dict[str, object]) -> None:
        with self._scopes[name], await self.pool.lease(**wants) as lease:  # type: ignore[arg-type]
            self.order.append(name)
            self.server[name] = lease.server.address
            await self._release[name].wait()

    async def release(self, *names: str) -> None:
        for name in names:
            self._release[name].set()
        await trio.testing.wait_all_tasks_blocked()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self._scopes[name].cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def release_all(self) -> None:
        await self.release(*self._release)


async def test_a_released_slot_goes_to_the_waiter_that_came_first() -> None:
    pool = pool_of({A: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        for name in ("first", "second", "third"):
            await holders.start(name)
        assert holders.order == ["first"]
        assert pool.waiting == 2
        await holders.release("first")
        assert holders.order == ["first", "second"]
        await holders.release_all()
    assert holders.order == ["first", "second", "third"]
    assert outstanding(pool) == {A: 0}


@pytest.mark.parametrize(
    ("queue_order", "expected"), [("fifo", ["young", "old"]), ("deadline", ["old", "young"])]
)
async def test_queue_order_says_who_goes_first(queue_order: str, expected: list[str]) -> None:
    pool = pool_of({A: 1}, queue_order=queue_order)
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("holder")
        await holders.start("young", origin=Origin("p", 5))
        await holders.start("old", origin=Origin("q", 0))
        await holders.release("holder")
        await holders.release("old", "young")
        assert holders.order == ["holder", *expected]


async def test_the_least_loaded_server_by_share_of_its_cap_is_taken() -> None:
    pool = pool_of({A: 1, B: 3})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        for name in ("1", "2", "3", "4"):
            await holders.start(name)
        assert outstanding(pool) == {A: 1, B: 3}
        assert pool.waiting == 0
        await holders.release_all()


async def test_a_cancelled_waiter_leaves_the_queue_and_takes_nothing() -> None:
    pool = pool_of({A: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        for name in ("holder", "waiter", "next"):
            await holders.start(name)
        await holders.cancel("waiter")
        assert pool.waiting == 1
        await holders.release("holder")
        assert holders.order == ["holder", "next"]
        await holders.release_all()
    assert outstanding(pool) == {A: 0}


async def test_a_cancelled_holder_gives_its_slot_to_the_next() -> None:
    pool = pool_of({A: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("holder")
        await holders.start("waiter")
        await holders.cancel("holder")
        assert holders.order == ["holder", "waiter"]
        await holders.release_all()
    assert outstanding(pool) == {A: 0}


async def test_a_waiter_cancelled_in_the_moment_of_hand_over_loses_no_slot() -> None:
    pool = pool_of({A: 1})
    got: list[Lease] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with await pool.lease() as lease:
                    got.append(lease)
                    await trio.lowlevel.checkpoint()

            held = await pool.lease()
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            held.release()  # hands the slot over: the waiter is scheduled, and has not run yet
            scope.cancel()
    assert len(got) == 1
    assert outstanding(pool) == {A: 0}
    assert pool.waiting == 0


async def test_a_lease_is_released_once() -> None:
    pool = pool_of({A: 2})
    lease, other = await pool.lease(), await pool.lease()
    lease.release()
    with pytest.raises(UsageError, match="released before"):
        lease.release()
    assert outstanding(pool) == {A: 1}
    other.release()


async def test_a_waiter_that_excludes_a_server_does_not_hold_up_the_others() -> None:
    pool = pool_of({A: 1, B: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("on a", exclude=frozenset({B}))
        await holders.start("on b", exclude=frozenset({A}))
        await holders.start("not a", exclude=frozenset({A}))
        await holders.start("any")
        await holders.release("on a")
        assert holders.server.get("any") == A
        assert "not a" not in holders.server
        await holders.release("on b")
        assert holders.server["not a"] == B
        await holders.release_all()


async def test_a_server_that_failed_is_better_than_none() -> None:
    pool = pool_of({A: 1, B: 1})
    (await pool.lease(exclude=frozenset({A, B}))).release()
    pool.set_state(server_of(pool, B), ServerState.EJECTED)
    with await pool.lease(exclude=frozenset({A})) as lease:
        assert lease.server.address == A


async def test_one_that_waits_for_another_takes_the_failed_server_once_it_is_alone() -> None:
    pool = pool_of({A: 1, B: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("on b", exclude=frozenset({A}))
        await holders.start("not a", exclude=frozenset({A}))
        assert pool.waiting == 1
        pool.set_state(server_of(pool, B), ServerState.EJECTED)
        await trio.testing.wait_all_tasks_blocked()
        assert holders.server["not a"] == A
        await holders.release_all()


async def test_one_at_the_head_waits_before_all_others() -> None:
    pool = pool_of({A: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        for name in ("holder", "fresh"):
            await holders.start(name)
        await holders.start("interrupted", at_head=True)
        await holders.release("holder")
        assert holders.order == ["holder", "interrupted"]
        await holders.release_all()


async def test_a_preferred_server_is_used_only_while_it_has_a_free_slot() -> None:
    pool = pool_of({A: 1, B: 3})
    first = await pool.lease(prefer=B)
    second = await pool.lease(prefer=B)
    third = await pool.lease(prefer=A)
    spilled = await pool.lease(prefer=A)
    assert [x.server.address for x in (first, second, third, spilled)] == [B, B, A, B]
    for lease in (first, second, third, spilled):
        lease.release()


async def test_a_lease_waits_for_a_server_that_is_new_enough() -> None:
    pool = pool_of({A: 1, B: 1})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("wants 1", min_version=1)
        await holders.start("wants 0")
        assert holders.order == ["wants 0"]
        newer = server_of(pool, B if holders.server["wants 0"] == A else A)
        newer.version = 1
        pool.set_state(newer, ServerState.READY)
        await trio.testing.wait_all_tasks_blocked()
        assert holders.server["wants 1"] == newer.address
        await holders.release_all()


@pytest.mark.parametrize(
    "state", [s for s in ServerState if s not in (ServerState.READY, ServerState.GONE)]
)
async def test_only_a_ready_server_takes_requests_and_becoming_ready_wakes(
    state: ServerState,
) -> None:
    pool = pool_of({A: 2})
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("before")
        pool.set_state(server_of(pool, A), state)
        await holders.start("during")
        assert holders.order == ["before"]
        if state is not ServerState.DRAINING:  # which is gone with its last request
            await holders.release("before")  # one that came before is released normally
        assert holders.order == ["before"]
        pool.set_state(server_of(pool, A), ServerState.READY)
        await trio.testing.wait_all_tasks_blocked()
        assert holders.order == ["before", "during"]
        await holders.release_all()
    assert outstanding(pool) == {A: 0}


async def test_closing_wakes_every_waiter_with_a_clear_error() -> None:
    pool = pool_of({A: 1})
    errors: list[RolloutClosed] = []

    async def wait() -> None:
        with pytest.raises(RolloutClosed, match="closed while") as caught:
            await pool.lease()
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        with pool.open():
            held = await pool.lease()
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
    assert len(errors) == 2
    assert errors[0] is not errors[1]
    held.release()
    with pytest.raises(RolloutClosed):
        await pool.lease()


async def test_strict_rotation_waits_for_its_turn_though_another_server_is_idle() -> None:
    pool = pool_of({A: 1, B: 2}, policy="round_robin")
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        for name in ("1", "2", "3"):
            await holders.start(name)
        assert [holders.server[n] for n in ("1", "2")] == [A, B]
        assert pool.waiting == 1  # it is A's turn, and A is full; B has a free slot
        await holders.release("1")
        assert holders.server["3"] == A
        await holders.release_all()


def test_a_pool_needs_servers() -> None:
    with pytest.raises(ConfigError, match="no servers"):
        ServerPool(RolloutConfig(), VllmDialect(), HttpTransport())


@pytest.mark.parametrize("seed", range(20))
async def test_under_random_holds_and_cancels_no_slot_is_lost_and_none_is_idle(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    draw = random.Random(seed)
    caps = {f"http://s{i}:1": draw.randint(1, 4) for i in range(4)}
    pool = pool_of(caps)
    finished = 0

    async def user(delay: float, hold: float, patience: float, exclude: frozenset[str]) -> None:
        nonlocal finished
        await trio.sleep(delay)
        with trio.move_on_after(patience):
            with await pool.lease(exclude=exclude):
                check()
                await trio.sleep(hold)
        finished += 1

    def check() -> None:
        for row in pool.statistics():
            assert 0 <= row.outstanding <= caps[row.address]  # I4
        free = {r.address for r in pool.statistics() if r.outstanding < caps[r.address]}
        if pool.waiting:  # I5: whoever waits excludes every server that has a free slot
            assert all(free <= waiter.exclude for waiter in pool._leases)

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            exclude = frozenset(draw.sample(sorted(caps), draw.choice([0, 0, 0, 1, 2])))
            nursery.start_soon(
                user, draw.random() * 5, draw.random(), draw.choice([0.01, 0.5, 99.0]), exclude
            )
    assert finished == 200
    assert pool.waiting == 0
    assert set(outstanding(pool).values()) == {0}


async def test_the_smallest_limit_follows_servers_that_come_speak_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def models(_: ServerPool, server: Server, request: HttpRequest, *__: object) -> object:
        if request.path != "/v1/models":
            return HttpResponse(404, {}, b'{"detail":"Not Found"}')
        length = 1000 if server.address == A else 500
        return HttpResponse(200, {}, b'{"data": [{"id": "m", "max_model_len": %d}]}' % length)

    monkeypatch.setattr(ServerPool, "send", models)
    pool = pool_of({A: 1})
    assert pool.fleet.smallest("max_model_len") is None
    await pool.discover(server_of(pool, A))
    assert pool.fleet.smallest("max_model_len") == 1000
    await pool.discover(pool.fleet.add(B, 1))
    assert pool.fleet.smallest("max_model_len") == 500
    pool.fleet.remove(B)
    assert pool.fleet.smallest("max_model_len") == 1000


async def test_a_new_version_hands_out_no_slot_of_a_server_that_missed_it() -> None:
    """A waiter that needs it would be given tokens of older weights, and fail."""
    pool = pool_of({A: 1, B: 1})
    new, old = (server_of(pool, address) for address in (A, B))
    pool.told(1)
    new.version = 1
    async with trio.open_nursery() as nursery:
        holders = Holders(pool, nursery)
        await holders.start("first", prefer=A)
        await holders.start("waits", min_version=1)
        pool.advance(1, ())
        assert (new.state, old.state) == (ServerState.READY, ServerState.STALE)
        assert old.reason == "missed the update to version 1: it has 0"
        await trio.testing.wait_all_tasks_blocked()
        assert holders.order == ["first"]
        nursery.cancel_scope.cancel()
