"""Pausing: who holds which servers from generating, and that each goes on when nobody does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias, TypeVarTuple

import trio

from .config import RolloutConfig
from .errors import RolloutError
from .fleet import Fleet
from .server import IN_SERVICE, OUT_OF_ORDER, Server, ServerState
from .types import HttpRequest, PauseMode
from .waiting import BriefWaits
from .wire.dialect import Dialect

Ts = TypeVarTuple("Ts")

Control: TypeAlias = Callable[[Server, HttpRequest, float], Awaitable[None]]


class Pausing:
    """The pause scopes over the servers of a pool, which may overlap.

    Args:
        config: How long a server may take to confirm.
        dialect: How servers are told to pause and to resume.
        fleet: The servers.
        control: Sends a server one control request, to be answered in so many seconds; raises
            RolloutError where it was refused, or not answered in time.
        brief: Bounds what is asked of a server that may be out of order.
    """

    def __init__(
        self,
        config: RolloutConfig,
        dialect: Dialect,
        fleet: Fleet,
        control: Control,
        brief: BriefWaits,
    ) -> None:
        self._config = config
        self._dialect = dialect
        self._fleet = fleet
        self._control = control
        self._brief = brief
        self._pauses = 0  # scopes that hold the whole pool
        self._held: dict[Server, None] = {}  # for the end of a scope to resume; removed ones, too

    def is_held(self, server: Server) -> bool:
        """Whether a pause scope holds a server, or would if the server were in service."""
        return bool(server.held or self._pauses)

    @asynccontextmanager
    async def paused(
        self,
        mode: PauseMode = "keep",
        servers: Sequence[Server] | None = None,
        *,
        drain: bool = False,
    ) -> AsyncIterator[dict[str, str]]:
        """Stop generation on servers, for the length of the block.

        Every server that was asked is resumed, also when the block raises or is cancelled, within
        ``control_timeout_s``; one that can not be resumed becomes stale. Only a server marked
        ``frozen`` meanwhile stays as it is: its weights are not to be used. Nothing new is sent to
        a server from before it is paused until after it is resumed. Scopes may overlap: a server
        goes on when the last that holds it ends. One that comes back into service waits for the
        end of a scope that holds the whole pool.

        Args:
            mode: ``keep`` freezes requests and lets them go on (with the new weights, if they
                changed); ``abort`` returns them with what they have; ``wait`` lets them finish,
                within ``update_timeout_s``.
            servers: Which; None: all, also those that are to be removed.
            drain: Let everything finish first, for at most ``update_timeout_s``; nothing new is
                sent meanwhile. Unlike ``wait``, every dialect can do it.

        Yields:
            The servers that could not be paused: address to what went wrong.

        Raises:
            ConfigError: For a mode that the dialect does not have; nothing was paused.
        """
        request = self._dialect.pause(mode)
        whole_pool = servers is None
        chosen = [s for s in (self._fleet.servers if servers is None else servers) if _can_pause(s)]
        limit_s = (
            self._config.update_timeout_s if mode == "wait" else self._config.control_timeout_s
        )
        failed: dict[str, str] = {}
        self._pauses += whole_pool
        try:
            self._hold(chosen)
            if drain:
                await self._until_empty(chosen)
            await self._each(self._pause, chosen, failed, request, limit_s)
            yield failed
        finally:
            self._pauses -= whole_pool
            with trio.CancelScope(shield=True):  # each request is bounded by control_timeout_s
                await self._each(self._let_go, chosen, {})
            if whole_pool:
                self._announce_end_of_pause()

    def _hold(self, servers: Sequence[Server]) -> None:
        for server in servers:
            server.held += 1
            self._held[server] = None
            if server.state is ServerState.READY:
                self._fleet.set_state(server, ServerState.PAUSED)

    async def _until_empty(self, servers: Sequence[Server]) -> None:
        with trio.move_on_after(self._config.update_timeout_s):
            for server in servers:
                while self._fleet.is_known(server) and self._fleet.outstanding(server):
                    server.emptied = server.emptied or trio.Event()
                    await server.emptied.wait()

    async def _pause(self, server: Server, request: HttpRequest, limit_s: float) -> None:
        async with server.pause_lock:
            await self._control(server, request, limit_s)

    async def _let_go(self, server: Server) -> None:
        """End a scope's hold on a server; it goes on where no other scope holds it.

        It is held until it was resumed: a scope that begins meanwhile pauses it after that.
        """
        try:
            if server.held == 1:  # else another scope resumes it: no need to wait for the lock
                await self._resume_last_held(server)
        except RolloutError as exc:
            server.frozen = True
            self._fleet.mark_stale(server, f"not resumed: {exc}")
        finally:
            server.held -= 1
            if not server.held:
                self._held.pop(server, None)
        if server.state is ServerState.PAUSED and not server.held and not server.frozen:
            self._fleet.set_state(server, ServerState.READY)

    async def _resume_last_held(self, server: Server) -> None:
        async with server.pause_lock:
            if server.held == 1 and server in self._held and not server.frozen:
                await self._control(server, self._dialect.resume(), self._config.control_timeout_s)

    async def resume_held(self) -> None:
        """Have every server generate that a pause scope still holds, but those that are frozen.

        For the end of a run: whoever holds them may never come to the end of its scope, and where
        it does, sends nothing. What a server answers does not matter: nobody looks after it now.
        """
        held, self._held = self._held, {}
        await self._each(self._resume_at_the_end, held, {})

    async def _resume_at_the_end(self, server: Server) -> None:
        async with server.pause_lock:
            if server.held and not server.frozen:
                await self._control(server, self._dialect.resume(), self._config.control_timeout_s)

    async def resume(self, server: Server) -> None:
        """Let a frozen server generate; one that a scope holds stays as it is, until that ends.

        Raises:
            RolloutError: If the server did not confirm it.
        """
        async with server.pause_lock:
            if not self.is_held(server):
                await self._control(server, self._dialect.resume(), self._config.control_timeout_s)
                server.frozen = False

    def _announce_end_of_pause(self) -> None:
        """Wake the probes of servers that could have come back meanwhile."""
        for server in self._fleet.servers:
            if server.state in OUT_OF_ORDER:
                self._fleet.set_state(server, server.state, server.reason)

    async def _each(
        self,
        act: Callable[[Server, *Ts], Awaitable[None]],
        servers: Iterable[Server],
        failed: dict[str, str],
        *args: *Ts,
    ) -> None:
        """Do the same with several servers at once; note who failed, and go on."""

        async def one(server: Server) -> None:
            try:
                await act(server, *args)
            except RolloutError as exc:
                failed[server.address] = str(exc)

        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(one, server)

    async def freeze(self, server: Server, reason: str) -> None:
        """Take a server whose weights are not to be used out, and give back what it was doing.

        A vLLM whose update failed answers the next generation with 500 and exits, so it must not
        generate once more: its requests are returned with the tokens they have, and it stays
        paused until a load succeeds. Where that can not be asked, its requests are cut off.
        Bounded by ``abort_timeout_s``, and goes on so long under cancellation, too: nobody resumes
        such a server, so what a pause froze on it would wait for ever. Never raises for the server.
        """
        server.frozen = server.tainted = True
        self._fleet.mark_stale(server, reason)
        with self._brief.bounded(shield=True), suppress(RolloutError):
            await self.halt(server, self._config.abort_timeout_s)
            return
        server.cut_off()

    async def halt(self, server: Server, limit_s: float) -> None:
        """Have a server return what it generates, and generate no more until it has weights.

        Raises:
            RolloutError: If it did not confirm that; it is taken to be frozen all the same.
        """
        server.frozen = server.tainted = True
        await self._pause(server, self._dialect.pause("abort"), limit_s)


def _can_pause(server: Server) -> bool:
    """Whether it may be generating, and can be asked to stop."""
    return server.state in (*IN_SERVICE, ServerState.STALE, ServerState.DRAINING)
