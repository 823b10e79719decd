"""Restarts: whether a server is still the process that the pool gave its weights to.

One that was started again has its first weights, no adapter, and perhaps other settings. It answers
as before, so it has to be asked: regularly, and when it refuses what it should be able to do.
"""

from __future__ import annotations

from .errors import RequestRejected
from .servers import IN_SERVICE, Server, ServerPool


async def take_out_if_restarted(pool: ServerPool, server: Server) -> bool:
    """Ask a server whether it was restarted; if so, it is out of service until it has the weights.

    What it is working on is made by its first weights, and is given up. A server that is sent
    weights just now is left to whoever sends them.

    Returns:
        Whether it was.

    Raises:
        RolloutError: If it could not be asked.
    """
    if not await was_restarted(pool, server):
        return False
    server.ungrouped = True
    if server.state in IN_SERVICE and not server.control_lock.locked():
        pool.mark_stale(server, "it was restarted, and has its first weights")
        server.cut_off()
    return True


async def was_restarted(pool: ServerPool, server: Server) -> bool:
    """Whether it lost the label that the pool gave it, or the route that tells it.

    One that takes no label is known by its start, where it tells that.

    Raises:
        RolloutError: If it could not be asked.
    """
    if not server.labelled:
        return await pool.is_another_process(server)
    limits = pool.config.control_limits(pool.config.health_timeout_s)
    response = await pool.send(server, pool.dialect.weight_version(), limits)
    try:
        return pool.dialect.parse_weight_version(response) is None
    except RequestRejected as exc:
        if exc.is_of_the_route:
            return True
        raise
