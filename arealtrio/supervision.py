"""Looks after each server: health checks while it serves, and its way back when it does not.

What is outside has to be asked: these are the only timers, each with its name in ``config``.
Ejection is decided in ``servers``, from requests and health checks alike.
"""

from __future__ import annotations

import trio

from .errors import RolloutError
from .servers import IN_SERVICE, OUT_OF_ORDER, Server, ServerPool, ServerState


async def supervise(pool: ServerPool) -> None:
    """Look after every server of a pool, those added later too, until cancelled."""
    known: set[Server] = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fail_waiters_without_servers, pool)
        while True:
            changed = pool.service_changed
            for server in pool.servers:
                if server not in known:
                    known.add(server)
                    nursery.start_soon(_look_after, pool, server)
            known.intersection_update(pool.servers)
            await changed.wait()


async def _look_after(pool: ServerPool, server: Server) -> None:
    while server.state is not ServerState.GONE:
        if server.state in OUT_OF_ORDER:
            await _bring_back(pool, server)
        else:
            await _check_regularly(pool, server)


async def _check_regularly(pool: ServerPool, server: Server) -> None:
    """Check a serving server's health at ``health_interval_s``, until its state changes."""
    while server.state not in (*OUT_OF_ORDER, ServerState.GONE):
        with trio.move_on_after(pool.config.health_interval_s) as scope:
            await server.changed.wait()
        if scope.cancelled_caught and server.state is ServerState.READY:
            await _check_once(pool, server)


async def _check_once(pool: ServerPool, server: Server) -> None:
    try:
        await pool.check_health(server)
    except RolloutError as exc:
        pool.failed(server, exc)
    else:
        if server.trial_cap is None:  # one on trial has to prove itself on real requests
            server.failures = 0


async def _bring_back(pool: ServerPool, server: Server) -> None:
    """Probe a server at growing intervals until it is healthy and has the current weights."""
    interval_s = pool.config.probe_interval_s
    while server.state in OUT_OF_ORDER:
        with trio.move_on_after(interval_s):
            await server.changed.wait()
        interval_s = min(2 * interval_s, pool.config.probe_interval_max_s)
        if server.state in OUT_OF_ORDER:
            await _try_to_bring_back(pool, server)


async def _try_to_bring_back(pool: ServerPool, server: Server) -> None:
    try:
        async with server.control_lock:
            await pool.check_health(server)
            await pool.learn(server)
            version = await _restore(pool, server)
    except RolloutError as exc:
        server.reason = f"{type(exc).__name__}: {exc}"
        return
    server.version = version
    if server.state in OUT_OF_ORDER and version >= pool.version:  # no update overtook it
        server.failures = 0
        pool.set_state(server, ServerState.READY)


async def _restore(pool: ServerPool, server: Server) -> int:
    """Give a server the pool's weights, unless it has them, and let it generate again."""
    version, recipe = pool.version, pool.recipe
    if server.info.weight_version != version or server.frozen:
        if recipe is None:
            raise RolloutError(
                f"its weights are of version {server.info.weight_version}, not {version}, and the "
                "last update can not be repeated; it returns with the next"
            )
        for request in recipe:
            await pool.control(server, request, pool.config.update_timeout_s)
        await pool.label(server, version)
    if server.frozen:
        await pool.control(server, pool.dialect.resume(), pool.config.control_timeout_s)
        server.frozen = False
    return version


async def _fail_waiters_without_servers(pool: ServerPool) -> None:
    """When no server is in service for ``no_server_grace_s``, tell the waiters why, not nothing."""
    while True:
        changed = pool.service_changed
        if any(server.state in IN_SERVICE for server in pool.servers):
            await changed.wait()
        else:
            await _give_grace(pool)


async def _give_grace(pool: ServerPool) -> None:
    grace_s = pool.config.no_server_grace_s
    with trio.move_on_after(grace_s):
        while not pool.in_service:
            await pool.service_changed.wait()
        return
    while not pool.in_service:
        pool.fail_waiters(_why(pool, grace_s))
        with trio.move_on_after(grace_s):
            await pool.service_changed.wait()


def _why(pool: ServerPool, grace_s: float) -> str:
    words = "; ".join(f"{s.address} is {s.state.value} ({s.reason})" for s in pool.servers)
    return f"no server in service for no_server_grace_s={grace_s:g}: {words or 'there is none'}"
