"""Memory: servers that sleep while the trainer uses their GPUs, and wake with what they had.

The order is drain → sleep → train → wake the weights → update → wake the rest → resume. What was
let go of is remembered per server: a real SGLang dies when it is told to release memory while it
runs something, or to take back what it has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio

from .errors import ProtocolError, RequestRejected, RolloutError, TransportError, UsageError
from .restarts import was_restarted
from .servers import Server, ServerPool

logger = logging.getLogger(__name__)

RESTARTED_ASLEEP: Final = "it was restarted while it slept"


class Memory:
    """The GPU memory of a pool's servers: theirs, or lent to the trainer.

    Args:
        pool: The servers.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._lock = trio.Lock()
        self._pause: AsyncExitStack | None = None  # holds the pool while anything sleeps
        self._not_paused: dict[str, str] = {}
        self._put_to_sleep: dict[Server, None] = {}  # also those that were removed meanwhile

    @property
    def is_lent(self) -> bool:
        """Whether servers were put to sleep and not all woken."""
        return self._pause is not None

    async def offload(self, *, keep_weights: bool = True, drain: bool = False) -> dict[str, str]:
        """Put every server to sleep; generations wait, with the tokens they have.

        What a server runs is returned first, and goes on after ``onload``: the cache that it could
        have kept is gone in any case. Said again, it puts to sleep what was woken meanwhile, by an
        update or ``onload``. Rollouts go on waiting against their deadlines.

        Where weights do not survive (vLLM without ``keep_weights``; SGLang unless it runs with
        ``--enable-weights-cpu-backup``), a server returns with the next update, or when the last
        update from disk was repeated for it.

        Args:
            keep_weights: Keep a copy in the host's memory. Without it sleep and waking are faster;
                right where an update follows before anything is generated.
            drain: Let what runs finish first, for at most ``update_timeout_s``; for generations
                that can not go on elsewhere exactly, such as those with penalties.

        Returns:
            The servers that do not sleep, by address, with what went wrong.
        """
        async with self._lock, self._pool.update_lock:
            if self._pause is None:
                await self._hold(drain)
            failed = dict(self._not_paused)
            for server in self._pool.servers:
                if not server.held:  # when the pause began
                    failed[server.address] = f"it is {server.state.value} ({server.reason})"
            try:
                async with trio.open_nursery() as nursery:
                    for server in self._pool.servers:
                        if server.address not in failed:
                            self._put_to_sleep[server] = None
                            nursery.start_soon(
                                _attempt_sleep, self._pool, server, keep_weights, failed
                            )
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._wake_all()
                raise
            return failed

    async def _hold(self, drain: bool) -> None:
        stack = AsyncExitStack()
        paused = self._pool.pausing.paused("abort", drain=drain)
        self._not_paused = await stack.enter_async_context(paused)
        self._pause = stack

    async def onload(self, tags: Sequence[str] | None = None) -> dict[str, str]:
        """Wake what sleeps, the weights first; when nothing sleeps any more, generation goes on.

        Args:
            tags: Wake only these, of the dialect's names (``weights``, ``kv_cache``); None: all.

        Returns:
            The servers that could not be woken, by address, with what went wrong. They are out of
            service.

        Raises:
            UsageError: For a tag that this dialect does not have.
        """
        known = self._pool.dialect.memory_tags
        if unknown := set(tags or ()) - set(known):
            raise UsageError(f"no memory is called {', '.join(sorted(unknown))}; there is {known}")
        async with self._lock:
            return await self._wake_all(tags)

    async def close(self) -> None:
        """Wake what sleeps at the end of a run, cancelled or not; nobody does so after that.

        A server is given up that confirms nothing for ``close_timeout_s``. Each that is left asleep
        is named in a warning, and each that is awake generates again.
        """
        limit_s = self._pool.config.close_timeout_s
        with trio.CancelScope(shield=True):
            async with self._lock:
                for address, error in (await self._wake(limit_s=limit_s)).items():
                    logger.warning("%s may be left asleep, restart it: %s", address, error)
                with trio.move_on_after(limit_s):
                    await self._pool.pausing.resume_held()
                await self._end_pause()  # which sends nothing now

    async def _wake_all(self, tags: Sequence[str] | None = None) -> dict[str, str]:
        failed = await self._wake(tags)
        self._put_to_sleep = dict.fromkeys(s for s in self._put_to_sleep if s.asleep)
        if not self._put_to_sleep:
            await self._end_pause()
        return failed

    async def _wake(
        self, tags: Sequence[str] | None = None, limit_s: float = math.inf
    ) -> dict[str, str]:
        failed: dict[str, str] = {}
        async with trio.open_nursery() as nursery:
            for server in self._put_to_sleep:
                if server.asleep:
                    nursery.start_soon(_attempt_wake, self._pool, server, tags, failed, limit_s)
        return failed

    async def _end_pause(self) -> None:
        pause, self._pause = self._pause, None
        if pause is not None:
            await pause.aclose()

    @asynccontextmanager
    async def offloaded(
        self, *, keep_weights: bool = True, drain: bool = False
    ) -> AsyncIterator[dict[str, str]]:
        """Lend the servers' GPU memory to the trainer for the length of the block.

        Leaving it, in whatever way, wakes what sleeps and lets generation go on; each request is
        bounded by ``update_timeout_s``. An update of weights inside the block wakes the weights by
        itself, and the cache only follows at the end.

        Args:
            keep_weights: See ``offload``.
            drain: See ``offload``.

        Yields:
            The servers that do not sleep, by address, with what went wrong: their memory is not
            free.
        """
        try:
            yield await self.offload(keep_weights=keep_weights, drain=drain)
        finally:
            with trio.CancelScope(shield=True):  # each request is bounded
                await self.onload()


async def _attempt_sleep(
    pool: ServerPool, server: Server, keep_weights: bool, failed: dict[str, str]
) -> None:
    async with server.control_lock:
        try:
            await _sleep(pool, server, keep_weights)
        except RolloutError as exc:
            failed[server.address] = str(exc)


async def _sleep(pool: ServerPool, server: Server, keep_weights: bool) -> None:
    """Put to sleep what is awake of a server. Where no answer tells, it is taken to sleep.

    Then it has to be woken.
    """
    dialect = pool.dialect
    if not await rouse(pool, server):
        _note_restart(pool, server)
    await _label(pool, server)
    awake = [tag for tag in dialect.memory_tags if tag not in server.asleep]
    if not awake:
        return
    request = dialect.sleep(awake, keep_weights=keep_weights)
    if request is None:
        raise RolloutError(f"it can not let go of its {' and '.join(awake)} alone")
    server.asleep.update(awake)
    try:
        await pool.control(server, request, pool.config.update_timeout_s)
    except RequestRejected:
        server.asleep.difference_update(awake)
        raise
    except TransportError as exc:
        if not exc.request_sent:
            server.asleep.difference_update(awake)
        raise
    survive = dialect.weights_survive_sleep and keep_weights
    if not survive and not server.info.weights_backed_up:
        server.frozen = server.tainted = True  # and out of service when it wakes without an update


def _note_restart(pool: ServerPool, server: Server) -> None:
    pool.mark_stale(server, RESTARTED_ASLEEP)
    server.labelled = server.label_seen = False
    server.version = server.update = server.base_update = 0
    server.tainted = server.loading


async def _label(pool: ServerPool, server: Server) -> None:
    """Label a server that has no label, since it was restarted.

    Without one it could not be told from the process after it, which is awake: after a waking that
    was not confirmed it would be asked for a restart again and again.
    """
    if not server.labelled:
        await pool.label(server, server.version)


async def _attempt_wake(
    pool: ServerPool,
    server: Server,
    tags: Sequence[str] | None,
    failed: dict[str, str],
    limit_s: float,
) -> None:
    """Wake a server; give it up when it confirms nothing for so long."""
    with trio.move_on_after(limit_s) as scope:
        async with server.control_lock:
            try:
                await _check_not_restarted(pool, server)
                for tag in pool.dialect.memory_tags:
                    if tags is None or tag in tags:
                        scope.deadline = trio.current_time() + limit_s
                        await wake(pool, server, tag)
                if server.tainted and not server.asleep:
                    pool.mark_stale(server, "its weights did not survive its sleep")
            except RolloutError as exc:
                failed[server.address] = str(exc)
                server.unwoken |= dict.fromkeys(server.asleep, False)
                server.asleep = set()
                await pool.pausing.freeze(server, f"not woken: {exc}")
    if scope.cancelled_caught:
        failed[server.address] = f"it confirmed nothing for {limit_s:g} s"
        server.frozen = True


async def _check_not_restarted(pool: ServerPool, server: Server) -> None:
    """Raise for a server that was restarted: another process, which let go of nothing."""
    if await was_restarted(pool, server):
        server.asleep = set()
        raise ProtocolError(RESTARTED_ASLEEP)


async def wake(pool: ServerPool, server: Server, tag: str) -> None:
    """Wake what sleeps of one tag, if it sleeps; nothing is ever woken twice.

    Raises:
        RolloutError: If the server did not confirm it.
    """
    if tag not in server.asleep:
        return
    server.asleep.discard(tag)
    server.unwoken[tag] = True
    try:
        await pool.control(server, pool.dialect.wake(tag), pool.config.update_timeout_s)
    except TransportError as exc:
        server.unwoken[tag] = exc.request_sent
        raise
    except trio.Cancelled:
        server.frozen = server.tainted = True
        pool.mark_stale(server, "its waking was cut short")
        raise
    del server.unwoken[tag]


async def rouse(pool: ServerPool, server: Server) -> bool:
    """Wake what a server did not confirm to have taken back, before anything else is woken.

    Returns:
        Whether it is the process that was put to sleep. Another has let go of nothing.

    Raises:
        RolloutError: If it did not confirm that either; or may not be asked, as it may be awake.
    """
    if not server.asleep and not server.unwoken:
        return True
    if await was_restarted(pool, server):
        server.asleep.clear()
        server.unwoken.clear()
        return False
    if not server.unwoken:
        return True
    known = server.labelled and not any(server.unwoken.values())
    if not known and not pool.dialect.wakes_twice:
        raise RolloutError(
            "it did not confirm that it woke, and a server that is awake dies when it is woken: "
            "restart it"
        )
    for tag in pool.dialect.memory_tags:
        if tag in server.unwoken:
            server.asleep.add(tag)
            await wake(pool, server, tag)
    return True
