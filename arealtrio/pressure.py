"""Caps under pressure: a server that is short of cache gets fewer requests until it is not.

A server runs as many requests as it may, and finds out as their answers grow that its key-value
cache does not hold them all. It then puts some back into its queue and computes their prefix again
later: work done twice. What waits in its queue waits for it alone, though another server may have
room. Held at what it can run, its surplus waits here, for whichever is free first.

What it is worth, in tests/simulation/test_pressure.py: two servers of which one has a tenth of the
other's cache take 57 s instead of 67, with 72 preemptions instead of 1046. A lone server preempts a
tenth as often too, and takes 96 s instead of 84: nobody else takes what it gives up, and a cap that
probes is at times too low.

Additive increase, multiplicative decrease, as TCP finds its window (Chiu and Jain, 1989): it
converges wherever the right cap lies, and follows it as answers get longer.
"""

from __future__ import annotations

import trio

from .errors import RolloutError
from .servers import Server, ServerPool, ServerState
from .wire.dialect import ServerLoad

KV_CACHE_FULL = 0.95
"""Share of the cache above which it counts as full: what is left is a few steps of a full batch."""
DECREASE = 0.9
"""What a cap is multiplied with under pressure. TCP halves; here each request given up by mistake
costs throughput at once, and pressure that stays is seen again at the next look."""
INCREASE = 1 / 64
"""What is added without pressure, in shares of the full cap, and at least one request."""


class CapController:
    """Decides one server's cap from its reports. It neither waits nor asks.

    Attributes:
        cap: Requests the server may have; None: as many as without pressure.
    """

    __slots__ = ("_preemptions", "_version", "cap")

    def __init__(self) -> None:
        self.cap: int | None = None
        self._preemptions: int | None = None  # at the last report; None: there is none to compare
        self._version = 0

    def forget(self) -> None:
        """What the server counts may have changed for another reason than pressure."""
        self._preemptions = None

    def observe(self, load: ServerLoad, full_cap: int, version: int) -> int | None:
        """Take a report; return the new cap.

        It is lowered only once the server is down to the one before: requests in flight leave at
        their end, and until then their pressure says nothing of the new cap.

        Args:
            load: What the server says.
            full_cap: Its cap without pressure.
            version: Its weights. A weight update puts every request back into the queue, to compute
                its prefix again, so a count that rose over one is no sign of pressure.
        """
        if version != self._version:
            self.forget()
            self._version = version
        if self._is_under_pressure(load):
            self._lower(load, full_cap)
        else:
            self._raise(full_cap)
        self._preemptions = load.preemptions
        return self.cap

    def _is_under_pressure(self, load: ServerLoad) -> bool:
        since = self._preemptions
        rose = since is not None and load.preemptions > since  # it falls where a server restarts
        return rose or load.preempted > 0 or load.kv_cache_usage >= KV_CACHE_FULL

    def _lower(self, load: ServerLoad, full_cap: int) -> None:
        now = full_cap if self.cap is None else self.cap
        if self.cap is None or load.running + load.waiting <= now:
            self.cap = max(1, int(DECREASE * min(now, load.running)))

    def _raise(self, full_cap: int) -> None:
        if self.cap is not None:
            raised = self.cap + max(1, int(INCREASE * full_cap))
            self.cap = raised if raised < full_cap else None


async def relieve_pressure(pool: ServerPool) -> None:
    """Adjust the cap of every server of a pool, those added later too, until cancelled.

    A server whose metrics can not be read keeps its cap; whether it is well is for its health
    checks to say. SGLang has metrics with ``--enable-metrics`` only.
    """
    known: set[Server] = set()
    async with trio.open_nursery() as nursery:
        while True:
            changed = pool.service_changed
            for server in pool.servers:
                if server not in known:
                    known.add(server)
                    nursery.start_soon(_relieve, pool, server)
            known.intersection_update(pool.servers)
            await changed.wait()


async def _relieve(pool: ServerPool, server: Server) -> None:
    controller = CapController()
    while server.state is not ServerState.GONE:
        await trio.sleep(pool.config.pressure_interval_s)
        load = await _load_of(pool, server)
        if load is None or server.state is not ServerState.READY:
            controller.forget()
        else:
            pool.fleet.relieve(server, controller.observe(load, server.cap, server.version))


async def _load_of(pool: ServerPool, server: Server) -> ServerLoad | None:
    if server.state is not ServerState.READY:
        return None
    try:
        return await pool.load_of(server)
    except RolloutError:
        return None
