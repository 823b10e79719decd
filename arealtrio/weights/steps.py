"""What every kind of weight update does with one server."""

from __future__ import annotations

from ..servers import Server, ServerPool, ServerState
from .update import WeightUpdate


def updated(pool: ServerPool, server: Server, update: WeightUpdate) -> None:
    """Note that a server has the weights: one that was out of service for them is back."""
    server.version = update.version
    if update.kind != "lora":
        server.base_version = update.version
    server.frozen = server.tainted = False
    if server.state is ServerState.STALE:  # it has what it missed; a held one is resumed later
        held = pool.is_held(server)
        pool.set_state(server, ServerState.PAUSED if held else ServerState.READY)
