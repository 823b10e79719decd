"""Adapters on one server: loaded there, and unloaded in the background when nobody uses them."""

from __future__ import annotations

import logging

import trio

from .adapters import Adapter
from .errors import RolloutError
from .servers import IN_SERVICE, Server, ServerPool, ServerState

logger = logging.getLogger(__name__)

MAY_HAVE_IT = (*IN_SERVICE, ServerState.STALE, ServerState.DRAINING)


async def load_adapter(pool: ServerPool, server: Server, adapter: Adapter) -> None:
    """Load an adapter on a server, in the place of whatever it has under that name.

    SGLang refuses a name that it has, and keeps what has it: the adapter of a run before this one,
    or of an update that reached too few servers. That is unloaded first. SGLang waits with it until
    no request of its own uses it, so what it runs is returned.

    Cut short, it leaves a server that may have neither out of service, until it has what it lost.

    Raises:
        RolloutError: If the server did not confirm it.
    """
    request = pool.dialect.load_adapter(adapter.served_name, adapter.path)
    limits = pool.config.control_limits(pool.config.update_timeout_s)
    response = await pool.send(server, request, limits)
    if not pool.dialect.has_adapter(response):
        pool.dialect.parse_control(response)
        return
    unload = pool.dialect.unload_adapter(adapter.served_name)
    try:
        async with pool.pausing.paused("abort", [server]):
            for again in (unload, request):
                await pool.control(server, again, pool.config.update_timeout_s)
    except BaseException:
        server.version = server.update = 0  # it has not all that its version stands for
        pool.mark_stale(server, f"its {adapter.served_name} was to be replaced")
        raise


async def unload_retired(pool: ServerPool) -> None:
    """Unload each adapter that was replaced, once no request uses it, until cancelled."""
    while True:
        changed = pool.adapters.changed
        for adapter in pool.adapters.take_unused():
            await _unload_everywhere(pool, adapter)
        await changed.wait()


async def _unload_everywhere(pool: ServerPool, adapter: Adapter) -> None:
    async with trio.open_nursery() as nursery:
        for server in pool.servers:
            if server.state in MAY_HAVE_IT:
                nursery.start_soon(_unload, pool, server, adapter)


async def _unload(pool: ServerPool, server: Server, adapter: Adapter) -> None:
    """Ask one server. What stays loaded costs it memory and nothing else."""
    request = pool.dialect.unload_adapter(adapter.served_name)
    try:
        await pool.control(server, request, pool.config.control_timeout_s)
    except RolloutError as exc:
        logger.warning("%s keeps %s loaded: %s", server.address, adapter.served_name, exc)
