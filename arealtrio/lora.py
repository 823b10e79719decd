"""Adapters that nobody uses any more are unloaded, in the background."""

from __future__ import annotations

import logging

import trio

from .adapters import Adapter
from .errors import RolloutError
from .servers import IN_SERVICE, Server, ServerPool, ServerState

logger = logging.getLogger(__name__)

MAY_HAVE_IT = (*IN_SERVICE, ServerState.STALE, ServerState.DRAINING)


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
