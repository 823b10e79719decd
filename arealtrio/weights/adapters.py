"""Adapters: loaded on every server under a versioned name, used only when all have answered."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ..adapters import Adapter
from ..errors import ProtocolError, RolloutError
from ..lora import load_adapter
from ..memory import RESTARTED_ASLEEP, rouse, wake
from ..restarts import was_restarted
from ..servers import Server, ServerPool
from .steps import check_base, updated
from .update import WeightUpdate


async def load_adapter_everywhere(
    pool: ServerPool, servers: Sequence[Server], update: WeightUpdate, failed: dict[str, str]
) -> None:
    """Load an adapter on servers that go on generating; name in ``failed`` who did not take it.

    One that did not is out of service, unharmed: it finishes what it has with the adapter before.
    Cancelled, nothing is changed but that some servers have an adapter that nobody names.
    """
    adapter = Adapter(update.name, update.path, update.version)
    loaded: list[Server] = []

    async def load(server: Server) -> None:
        async with server.control_lock:
            try:
                await _load(pool, server, adapter)
            except RolloutError as exc:
                failed[server.address] = str(exc)
            else:
                loaded.append(server)

    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(load, server)
    for server in servers:  # together with the switch: nothing awaits between
        if server in loaded:
            updated(pool, server, update)
        else:
            words = f"adapter {adapter.served_name}: {failed[server.address]}"
            pool.mark_stale(server, words)


async def _load(pool: ServerPool, server: Server, adapter: Adapter) -> None:
    check_base(pool, server)
    if not await rouse(pool, server):
        raise ProtocolError(f"{RESTARTED_ASLEEP}, and has its first weights")
    # One that never told a label may be the same process, and gets one below. Else the label would
    # hide for good that it was restarted since somebody looked.
    if server.label_seen and await was_restarted(pool, server):
        raise ProtocolError("it was restarted, and has its first weights")
    await wake(pool, server, "weights")  # beside which an adapter is loaded
    await load_adapter(pool, server, adapter)
    await pool.label(server, adapter.version)
    if server.frozen:
        await pool.pausing.resume(server)
