"""Weights that the trainer broadcasts: every server receives, while the trainer sends.

A collective needs every rank, so what concerns one server concerns all. A server that says that it
failed is still asked for the chunks that follow, since its processes are still ranks; one that is
silent leaves the group without a rank, and nothing more can be received by anybody.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import trio

from ..adapters import Adapter
from ..errors import (
    ProtocolError,
    RequestRejected,
    RolloutError,
    TransportError,
    UsageError,
    WeightUpdateError,
)
from ..memory import RESTARTED_ASLEEP, rouse, wake
from ..servers import Server, ServerPool
from ..types import HttpRequest
from .steps import check_base, find_takers, updated
from .update import Chunk, WeightsGroup, WeightUpdate


async def init_weights_group(
    pool: ServerPool, group: WeightsGroup, join: Callable[[], Awaitable[object]] | None = None
) -> WeightsGroup:
    """Let every server join a process group of the trainer.

    The group meets when all its processes are there, so the trainer joins at the same time, as rank
    0 in a world of ``world_size``, in ``join`` or elsewhere. Servers that are added later, or
    restarted, are not in it: make another, with another name and port.

    Args:
        pool: The servers.
        group: Where to meet. Its ``members`` are ignored.
        join: Lets the trainer join; it is told nothing, since it knows ``group`` and how many
            servers there are. Cancelled where a server refused; where it raises, nobody waits on.

    Returns:
        The group with its members, for ``WeightUpdate.distributed``.

    Raises:
        WeightUpdateError: If a server refused or did not answer within ``update_timeout_s``; each
            is named. Nobody is taken out of service.
        UsageError: If ``join`` is not an async function.
    """
    if join is not None:
        check_async(join, "join")
    async with pool.update_lock:
        servers, _ = await find_takers(pool)
        joined = replace(group, members=tuple(s.address for s in servers))
        failed = await _join(pool, servers, joined, join)
    if failed or not servers:
        words = "; ".join(f"{address}: {error}" for address, error in failed.items())
        raise WeightUpdateError(
            f"the weights group {group.name!r} did not meet ({words or 'no server is in service'})",
            failed,
        )
    for server in servers:
        server.ungrouped = False
    return joined


async def _join(
    pool: ServerPool,
    servers: Sequence[Server],
    group: WeightsGroup,
    join: Callable[[], Awaitable[object]] | None,
) -> dict[str, str]:
    failed: dict[str, str] = {}
    trainer = _Trainer(join)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run, nursery.cancel_scope)
        async with trio.open_nursery() as requests:
            for index, server in enumerate(servers):
                request = pool.dialect.init_group(group.place(index))
                requests.start_soon(_ask, pool, server, request, failed, trainer.scope)
        with trio.move_on_after(pool.config.control_timeout_s):  # the others have joined
            await trainer.done.wait()
        trainer.scope.cancel()
    trainer.raise_error()
    if not failed and trainer.scope.cancelled_caught:
        raise WeightUpdateError("all servers joined the weights group, and the trainer did not")
    return failed


async def _ask(
    pool: ServerPool,
    server: Server,
    request: HttpRequest,
    failed: dict[str, str],
    trainer: trio.CancelScope,
) -> None:
    try:
        await pool.control(server, request, pool.config.update_timeout_s)
    except RolloutError as exc:
        failed[server.address] = str(exc)
        trainer.cancel()


class _Trainer:
    """The trainer's side of a collective: its error is kept until the servers are looked after."""

    def __init__(self, act: Callable[[], Awaitable[object]] | None) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self._act = act
        self._error: Exception | None = None

    async def run(self, others: trio.CancelScope) -> None:
        """Do its part; where that fails, nobody needs to wait for the others."""
        with self.scope:
            try:
                if self._act is not None:
                    await self._act()
            except Exception as exc:  # noqa: BLE001 - raised by raise_error
                self._error = exc
        if self.failed:
            others.cancel()
        self.done.set()

    @property
    def failed(self) -> bool:
        """Whether it did not get through."""
        return self._error is not None or self.scope.cancelled_caught

    def raise_error(self) -> None:
        """Raise what the trainer's function raised."""
        if self._error is not None:
            raise self._error


def check_async(function: Callable[..., object], name: str) -> None:
    """Refuse an ordinary function, which would block every rollout while it waits.

    Raises:
        UsageError: If it is one.
    """
    call = getattr(type(function), "__call__", None)  # noqa: B004 - an object may be callable
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)):
        raise UsageError(f"{name} must be an async function here; an ordinary one would block trio")


def check_members(pool: ServerPool, servers: Sequence[Server], update: WeightUpdate) -> None:
    """Refuse a distributed update that can not be whole, before anything is sent.

    Raises:
        WeightUpdateError: If a member of its group is not there any more, or was started again.
        UsageError: If ``send`` is not an async function, or servers of this dialect receive no
            adapters and it is of one.
    """
    if update.kind != "distributed":
        return
    assert update.group is not None
    assert update.send is not None
    check_async(update.send, "send")
    if update.adapter is not None and not pool.dialect.receives_adapters:
        raise UsageError(
            f"{pool.dialect.name} takes adapters from disk alone; use WeightUpdate.lora"
        )
    there = {server.address for server in servers if not server.ungrouped}
    if missing := [address for address in update.group.members if address not in there]:
        raise WeightUpdateError(
            f"{', '.join(missing)} of the weights group {update.group.name!r} can not take part, "
            "and a broadcast needs all; make another group with init_weights_group",
            dict.fromkeys(missing, "not in service, or started again since the group met"),
        )


async def receive_everywhere(
    pool: ServerPool, servers: Sequence[Server], update: WeightUpdate, failed: dict[str, str]
) -> None:
    """Bring the chunks of a distributed update to paused servers; name in ``failed`` who failed.

    Cancelled, every server is out of service: nobody knows what it has.

    Raises:
        Exception: What ``send`` raised; every server is out of service then, too.
    """
    assert update.group is not None
    members = [s for s in servers if s.address in update.group.members]
    for server in servers:
        if server not in members:
            failed[server.address] = f"it is not in the weights group {update.group.name!r}"
            pool.mark_stale(server, failed[server.address])
    async with AsyncExitStack() as locks:
        for server in members:
            await locks.enter_async_context(server.control_lock)
        reception = _Reception(pool, members, update, failed)
        try:
            await reception.run()
        except BaseException:
            with trio.CancelScope(shield=True):
                await reception.give_up(f"its update to version {update.version} was cut short")
            raise


class _Reception:
    """One distributed update on the servers of its group.

    Args:
        pool: Theirs.
        servers: The members.
        update: What is sent.
        failed: Who failed, by address.
    """

    def __init__(
        self,
        pool: ServerPool,
        servers: Sequence[Server],
        update: WeightUpdate,
        failed: dict[str, str],
    ) -> None:
        self._pool = pool
        self._servers = servers
        self._update = update
        self._failed = failed
        self._lost: str | None = None  # who left the group without a rank

    async def run(self) -> None:
        """Begin, receive every chunk, end; servers that failed are frozen."""
        lost_before = [s.address for s in self._servers if s.address in self._failed]
        self._lost = lost_before[0] if lost_before else None
        await self._each(self._begin)
        chunks = self._update.chunks
        for number, chunk in enumerate(chunks, 1):
            if self._lost is not None:
                self._fail_the_rest(f"{self._lost} was lost before chunk {number}/{len(chunks)}")
                break
            await self._transfer(chunk, last=number == len(chunks))
        await self._each(self._end)
        await self._freeze_failed()

    async def give_up(self, reason: str) -> None:
        """Freeze every server."""
        self._fail_the_rest(reason)
        await self._freeze_failed()

    def _fail_the_rest(self, reason: str) -> None:
        for server in self._servers:
            self._failed.setdefault(server.address, reason)

    async def _freeze_failed(self) -> None:
        words = f"update to version {self._update.version}"
        async with trio.open_nursery() as nursery:
            for server in self._servers:
                if error := self._failed.get(server.address):
                    nursery.start_soon(self._pool.pausing.freeze, server, f"{words}: {error}")

    async def _each(self, step: Callable[[Server], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:
            for server in self._servers:
                nursery.start_soon(self._attempt, server, step)

    async def _attempt(self, server: Server, step: Callable[[Server], Awaitable[None]]) -> None:
        try:
            await step(server)
        except RolloutError as exc:
            self._failed.setdefault(server.address, str(exc))
            if isinstance(exc, TransportError):
                self._lost = server.address

    async def _begin(self, server: Server) -> None:
        if server.address in self._failed:
            return
        try:
            if not await rouse(self._pool, server):
                raise ProtocolError(f"{RESTARTED_ASLEEP}, and is in no weights group")
            await wake(self._pool, server, "weights")
            await self._open(server)
        except RolloutError:
            self._lost = server.address  # it will refuse the chunks, too
            raise

    async def _open(self, server: Server) -> None:
        begin = self._pool.dialect.begin_update()
        if begin is None:
            return
        try:
            await self._control(server, begin)
        except RequestRejected:
            again = self._pool.dialect.reopen_update()
            if again is None:
                raise
            await self._control(server, again)  # what an update left open that failed
            await self._control(server, begin)

    async def _transfer(self, chunk: Chunk, *, last: bool) -> None:
        send = self._update.send
        assert send is not None
        trainer = _Trainer(lambda: send(chunk))
        trainer.scope.deadline = trio.current_time() + self._pool.config.update_timeout_s
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_chunk, chunk, last)
            nursery.start_soon(trainer.run, nursery.cancel_scope)
        trainer.raise_error()
        if trainer.failed:
            self._lost = "the trainer's send"
            self._fail_the_rest("the trainer did not send within update_timeout_s")

    async def _receive_chunk(self, chunk: Chunk, last: bool) -> None:
        adapter = self._update.adapter
        if adapter is not None:
            served = Adapter(adapter.name, "", self._update.version).served_name
            adapter = replace(adapter, name=served)

        async def receive(server: Server) -> None:
            assert self._update.group is not None
            server.told, server.loading = self._update.version, adapter is None
            group = self._update.group.name
            for request in self._pool.dialect.receive(chunk, group, last=last, adapter=adapter):
                await self._control(server, request)

        await self._each(receive)

    async def _end(self, server: Server) -> None:
        if server.address in self._failed:
            return
        if self._update.adapter is not None:
            check_base(self._pool, server)
        for request in self._pool.dialect.end_update(self._update.version):
            await self._control(server, request)
        server.labelled = self._pool.dialect.has_labels
        updated(self._pool, server, self._update)

    async def _control(self, server: Server, request: HttpRequest) -> None:
        """Send a request; a route that an older server does without may be absent."""
        try:
            await self._pool.control(server, request, self._pool.config.update_timeout_s)
        except RequestRejected as exc:
            absent = exc.status in (404, 405)
            if not (absent and request.path in self._pool.dialect.optional_routes):
                raise
