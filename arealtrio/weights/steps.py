"""What every kind of weight update does with one server."""

from __future__ import annotations

from ..errors import RolloutError
from ..servers import IN_SERVICE, Server, ServerPool, ServerState
from .update import WeightUpdate


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
    if server.base_version < pool.base_version or not pool.is_current(server.version):
        return f"it has version {server.version}, not {pool.version}"
    return ""


def check_base(pool: ServerPool, server: Server) -> None:
    """Refuse a server for an adapter that has not the base weights it is for.

    Raises:
        RolloutError: It has others, or nobody knows which.
    """
    if server.tainted or server.base_version < pool.base_version:
        raise RolloutError("its base weights are not current; an adapter alone does not mend that")


def updated(pool: ServerPool, server: Server, update: WeightUpdate) -> None:
    """Note that a server has the weights: one that was out of service for them is back."""
    server.version = update.version
    if update.has_base:
        server.base_version = update.version
    server.frozen = server.tainted = server.loading = False
    if server.state is ServerState.STALE:  # it has what it missed; a held one is resumed later
        held = pool.pausing.is_held(server)
        pool.set_state(server, ServerState.PAUSED if held else ServerState.READY)
