"""Chaos: what happens to the fleet during a run, by plan, and how all is made well at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from arealtrio.errors import RolloutClosed
from arealtrio.testing import SimulatedFleet, SimulatedServer

from .history import History
from .plan import MEMBERSHIP, Change
from .trainer import Trainer

SLOW = 10.0  # times slower
ROUND_S = 20.0  # until an operator looks again


class Chaos:
    """Does to the fleet what the plan says.

    Args:
        history: Of the run.
        fleet: Its servers.
        trainer: Knows the executor of the moment.
    """

    def __init__(self, history: History, fleet: SimulatedFleet, trainer: Trainer) -> None:
        self._history = history
        self._fleet = fleet
        self._trainer = trainer

    async def run(self) -> None:
        """Bring it about, then end every fault and mend every server."""
        async with trio.open_nursery() as nursery:
            for change in self._history.plan.changes:
                await trio.sleep_until(change.at_s)
                self._apply(change, nursery)
        if self._fleet.faults.active:
            await trio.sleep_until(self._history.plan.horizon_s)
        self._fleet.faults.stop()
        self._history.note("all is well from here on")
        await self._restart_what_sleeps_on()

    async def _restart_what_sleeps_on(self) -> None:
        """Do what the reason of a server asks for that nobody knows to be awake."""
        while True:
            await trio.sleep(ROUND_S)
            executor = self._trainer.executor
            servers = [] if executor is None else executor.engine.pool.servers
            doubtful = [s.address for s in servers if "restart it" in s.reason and s.unwoken]
            for server in self._fleet:
                if server.address in doubtful:
                    self._history.note(f"an operator restarts {server.address}")
                    server.restart()

    def _apply(self, change: Change, nursery: trio.Nursery) -> None:
        server = self._fleet.servers[change.server]
        if change.what in MEMBERSHIP:
            with suppress(RolloutClosed):  # the trainer of the moment is dying
                self._change_membership(change, server)
        else:
            self._history.fault(f"{change.what} by plan", f"{change.what} {server.address}")
            nursery.start_soon(self._break, server, change)

    async def _break(self, server: SimulatedServer, change: Change) -> None:
        ways: dict[str, Callable[[], object]] = {
            "die": server.die,
            "hang": server.hang,
            "restart": server.restart,
            "partition": server.isolate,
            "slow": lambda: server.slow_down(SLOW),
        }
        ways[change.what]()
        await trio.sleep(change.value)
        server.mend()

    def _change_membership(self, change: Change, server: SimulatedServer) -> None:
        executor = self._trainer.executor
        if executor is None:
            return
        pool = {s.address: s for s in executor.engine.pool.servers}
        serving = [
            s.address for s in pool.values() if s.state.value in ("ready", "paused") and s.cap
        ]
        address, is_last = server.address, serving == [server.address] or not serving
        if change.what == "add" and address not in pool:
            executor.add_server(address, int(change.value) or None)
        elif change.what == "remove" and address in pool and not is_last:
            executor.remove_server(address)
        elif change.what == "cap" and address in pool and (change.value or not is_last):
            executor.set_server_cap(address, int(change.value))
        else:
            return
        self._history.fault(change.what, f"{change.what} {address} ({change.value:g})")
