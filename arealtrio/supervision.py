"""Looks after each server: health checks while it serves, and its way back when it does not.

What is outside has to be asked: these are the only timers, each with its name in ``config``.
Ejection is decided in ``ejection``, from requests and health checks alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from .errors import RolloutError
from .leftovers import let_generate, wake_left_asleep
from .lora import load_adapter
from .memory import rouse
from .restarts import take_out_if_restarted
from .servers import (
    IN_SERVICE,
    OUT_OF_ORDER,
    Server,
    ServerPool,
    ServerState,
)
from .types import HttpRequest


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
        await take_out_if_restarted(pool, server)
    except RolloutError as exc:
        pool.ejection.unhealthy(server, exc)
    else:
        pool.ejection.healthy(server)


async def _bring_back(pool: ServerPool, server: Server) -> None:
    """Probe a server at growing intervals until it is healthy and has the current weights.

    They go on growing where it comes back and fails again, until it has proved itself.
    """
    while server.state in OUT_OF_ORDER:
        with trio.move_on_after(_probe_interval_s(pool, server)):
            await server.changed.wait()
        if server.state in OUT_OF_ORDER and not _is_in_other_hands(pool, server):
            server.probes += 1
            await _try_to_bring_back(pool, server)


def _probe_interval_s(pool: ServerPool, server: Server) -> float:
    """Seconds until the next look. Starting is no failure: a server that joins is not put off."""
    config = pool.config
    if server.state is ServerState.JOINING:
        now = not server.probes and not _is_in_other_hands(pool, server)
        return 0.0 if now else config.probe_interval_s
    doublings = min(server.probes, 60)  # a float has room for them
    return min(config.probe_interval_s * 2.0**doublings, config.probe_interval_max_s)


def _is_in_other_hands(pool: ServerPool, server: Server) -> bool:
    return server.taking or pool.pausing.is_held(server)


async def _try_to_bring_back(pool: ServerPool, server: Server) -> None:
    with trio.CancelScope() as server.restoring:  # an update with newer weights ends it
        async with server.control_lock:
            try:
                await _restore_and_check(pool, server)
            except _LacksUpdateError as exc:
                _leave_to_update(pool, server, str(exc))
            except RolloutError as exc:
                server.reason = f"{type(exc).__name__}: {exc}"
                pool.ejection.unhealthy(server, exc)
            else:
                _take_back(pool, server)
    server.restoring = None


class _LacksUpdateError(RolloutError):
    """A server is well, and lacks what the trainer alone can give it."""


def _leave_to_update(pool: ServerPool, server: Server, reason: str) -> None:
    """Leave a server to the next update, which asks those that are stale, and no others."""
    if server.state in OUT_OF_ORDER and server.state is not ServerState.STALE:
        server.frozen = _may_be_paused(server)  # as it was: it was not asked to generate yet
        pool.mark_stale(server, reason)
    server.reason = reason


async def _restore_and_check(pool: ServerPool, server: Server) -> None:
    """Bring a server to the pool's weights, if it is well.

    One that may be paused can not be asked that before: SGLang answers it by generating. Whether it
    answers at all is asked instead.
    """
    may_be_paused = _may_be_paused(server)
    if may_be_paused:
        limits = pool.config.control_limits(pool.config.health_timeout_s)
        await pool.send(server, pool.dialect.weight_version(), limits)
    else:
        await _check_health(pool, server)
    await pool.discover(server)
    server.version, server.update = await _restore(pool, server)
    if may_be_paused:
        await _check_health(pool, server)


def _may_be_paused(server: Server) -> bool:
    """Whether somebody left it so: an update of this run that failed, or a run before."""
    return server.frozen or server.state is ServerState.JOINING


async def _check_health(pool: ServerPool, server: Server) -> None:
    await pool.check_health(server)
    pool.ejection.healthy(server)


def _take_back(pool: ServerPool, server: Server) -> None:
    """Put a server into service again, unless an update or a pause began meanwhile."""
    overtaken = not pool.is_current(server) or _is_in_other_hands(pool, server)
    if server.state in OUT_OF_ORDER and not overtaken:
        pool.ejection.take_back(server)


async def _restore(pool: ServerPool, server: Server) -> tuple[int, int]:
    """Give a server the pool's weights, unless it has them, and let it generate again.

    Returns:
        Their version, and the update that gave the pool that.
    """
    await _notice_restart(pool, server)
    if server.state is ServerState.JOINING:
        await wake_left_asleep(pool, server)
    await rouse(pool, server)
    version, update = server.version, server.update
    if not _has_its_weights(pool, server):
        version, update, label = pool.version, pool.update, server.info.weight_version
        if not _has_its_base(pool, server):
            label = await _restore_base(pool, server)
        await _load_adapters(pool, server)
        if label != version or not server.labelled:
            await pool.label(server, version)
    await pool.confirm(server, version)
    server.tainted = False
    if _may_be_paused(server):
        await let_generate(pool, server)
    return version, update


async def _restore_base(pool: ServerPool, server: Server) -> int | None:
    """Give a server the base weights of this moment; the pool may go on to others meanwhile.

    Returns:
        The label that it carries then. It came before the weights, and is not set again: a server
        that was started again after them does not have it.
    """
    base_version, base_update = pool.base_version, pool.base_update
    recipe = _recipe_for(pool, server)
    await _load(pool, server, recipe)
    if recipe:
        server.labelled = pool.dialect.has_labels
        await pool.confirm(server, base_version)
        server.loading = False
    server.base_update = base_update
    return base_version if recipe else server.info.weight_version


async def _notice_restart(pool: ServerPool, server: Server) -> None:
    """A server that had our label and has none is another process, with its first weights.

    So is one that takes none and started at another time. One that was given labels and never told
    one may be the same process still, and have whatever it was sent.
    """
    if server.label_seen and server.info.weight_version is None:
        _forget(server)
    if server.labelled:
        return
    started = await pool.start_of(server)
    if None not in (started, server.started) and started != server.started:
        _forget(server)
    server.started = started


def _forget(server: Server) -> None:
    """Forget what the process before had; what it made by first weights is of no use.

    One that was restarted while it was sent weights may have them.
    """
    server.labelled = server.label_seen = False
    server.version = server.update = server.base_update = 0  # no label must name what it had before
    server.ungrouped = True
    server.unwoken.clear()
    server.tainted = server.loading
    server.cut_off()


def _has_its_base(pool: ServerPool, server: Server) -> bool:
    """Whether it missed nothing but adapters."""
    known = server.labelled and server.info.weight_version is not None and not server.tainted
    return known and server.base_update == pool.base_update


async def _load_adapters(pool: ServerPool, server: Server) -> None:
    for adapter in pool.adapters.current:
        if not adapter.path:
            raise _LacksUpdateError(
                f"the adapter {adapter.served_name} was sent by the trainer, which alone can do "
                "that again; it returns with the next update"
            )
        await load_adapter(pool, server, adapter)


def _has_its_weights(pool: ServerPool, server: Server) -> bool:
    """Whether it was out of service for another reason, and missed no update."""
    ours = server.labelled and not server.tainted
    return ours and server.info.weight_version == server.version and pool.is_current(server)


def _recipe_for(pool: ServerPool, server: Server) -> Sequence[HttpRequest]:
    """The requests that bring a server to the pool's version, if anybody can."""
    reported = server.info.weight_version
    if pool.recipe is None:
        # Our own label of before an update to the same version tells of weights that it missed.
        ours = server.labelled and reported == server.version
        missed = ours and server.base_update < pool.base_update
        if reported == pool.version and not server.tainted and not missed:
            return ()
        raise _LacksUpdateError(
            f"its weights, of version {reported}, are not those of the update to {pool.version}, "
            "which can not be repeated; it returns with the next"
        )
    # Or it is back from another membership, in which it was sent what is not yet the pool's.
    told = reported is not None and pool.version < reported <= pool.newest_told
    if not pool.recipe and (server.tainted or told or (server.labelled and reported is not None)):
        raise _LacksUpdateError(
            "its weights may not be those that it started with, and no update of this run can be "
            "repeated; it returns with the next, or when it is restarted"
        )
    return pool.recipe


async def _load(pool: ServerPool, server: Server, recipe: Sequence[HttpRequest]) -> None:
    """Load weights, under nobody's feet: what an ejected server still generates is returned."""
    if not recipe:
        return
    await pool.pausing.halt(server, pool.config.control_timeout_s)
    server.loading = True
    for request in recipe:
        await pool.control(server, request, pool.config.update_timeout_s)


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
