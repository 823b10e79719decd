"""What every kind of weight update does with one server."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import trio

from ..errors import RolloutError
from ..servers import IN_SERVICE, Server, ServerPool, ServerState
from .update import WeightUpdate


def takers(servers: Iterable[Server]) -> list[Server]:
    """Those that take an update now; one that is ejected comes back by way of supervision."""
    return [server for server in servers if server.state in (*IN_SERVICE, ServerState.STALE)]


async def find_takers(pool: ServerPool) -> tuple[list[Server], dict[str, str]]:
    """Who takes an update now, and who is lost: out of service, and answers nothing at all.

    All that are paused with a server that hangs would wait for it, at every update. That it fails
    its health checks does not tell: so does an SGLang that is only frozen.
    """
    lost: dict[str, str] = {}
    limit = pool.config.eject_after_failures
    suspects = [s for s in takers(pool.servers) if s.state is ServerState.STALE and s.sick >= limit]
    if suspects:
        async with trio.open_nursery() as nursery:
            for server in suspects:
                nursery.start_soon(_ask_whether_lost, pool, server, lost)
    return [s for s in takers(pool.servers) if s.address not in lost], lost


async def _ask_whether_lost(pool: ServerPool, server: Server, lost: dict[str, str]) -> None:
    limits = pool.config.control_limits(pool.config.health_timeout_s)
    with pool.brief.bounded(), suppress(RolloutError):
        await pool.send(server, pool.dialect.weight_version(), limits)
        return
    lost[server.address] = f"it does not answer ({server.reason})"


def lacks_weights(pool: ServerPool, server: Server) -> str:
    """Why a label would name weights that a server may not have; empty where the trainer knows.

    One that is out of service and frozen was out of the trainer's reach, whatever it has.
    """
    if server.tainted and "weights" in server.asleep:
        return "its weights did not survive its sleep, and it was not woken for others"
    if server.state in IN_SERVICE:
        return ""
    if server.frozen or server.tainted:
        return f"it is {server.state.value} ({server.reason})"
    if not pool.is_current(server):
        return f"it has version {server.version}, not {pool.version}"
    return ""


def check_base(pool: ServerPool, server: Server) -> None:
    """Refuse a server for an adapter that has not the base weights it is for.

    Raises:
        RolloutError: It has others, or nobody knows which.
    """
    if server.tainted or server.base_update < pool.base_update:
        raise RolloutError("its base weights are not current; an adapter alone does not mend that")


def updated(pool: ServerPool, server: Server, update: WeightUpdate) -> None:
    """Note that a server has the weights: one that was out of service for them is back."""
    server.version, server.update = update.version, pool.updates
    if update.has_base:
        server.base_update = pool.updates
    server.frozen = server.tainted = server.loading = False
    if server.state is ServerState.STALE:  # it has what it missed; a held one is resumed later
        held = pool.pausing.is_held(server)
        pool.set_state(server, ServerState.PAUSED if held else ServerState.READY)
