"""ServerFace: what a trainer may ask of the servers, and do to them, while rollouts run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from .rollouts import RolloutNursery
from .servers import ServerStatistics
from .types import PauseMode
from .weights import WeightsGroup, init_weights_group


class ServerFace(RolloutNursery):
    """The nursery, and the servers under it: numbers, membership, caps, pauses, sleep, groups.

    All of it is the engine's; after close it raises RolloutClosed.
    """

    def statistics(self) -> tuple[ServerStatistics, ...]:
        """Every server's numbers at this moment."""
        self._check_open()
        return self.engine.statistics()

    async def health(self) -> dict[str, str | None]:
        """Ask every server whether it is alive: address to None, or to what is wrong."""
        self._check_open()
        return await self.engine.pool.health()

    def add_server(self, address: str, cap: int | None = None) -> None:
        """Add a server, and return at once; it takes requests when it is up and has the weights.

        Args:
            address: Its base URL.
            cap: Requests in flight at most; None asks the server.

        Raises:
            UsageError: If it is there already.
            ConfigError: If the address is none, or the cap is no integer in 1 … 2**20.
        """
        self._check_open()
        self.engine.pool.fleet.add(address, cap)

    def remove_server(self, address: str) -> None:
        """Take a server out, and return at once; it finishes what it has, and gets no more.

        Raises:
            UsageError: If it is not there.
        """
        self._check_open()
        self.engine.pool.fleet.remove(address)

    def set_server_cap(self, address: str, cap: int) -> None:
        """Change how many requests a server may have at once; 0 drains it, and keeps it.

        Raises:
            UsageError: If it is not there, or the cap is no integer from 0 on.
        """
        self._check_open()
        self.engine.pool.fleet.set_cap(address, cap)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every server is ready, but those that are leaving.

        Args:
            timeout_s: Choose it above the time a server takes to start and to load its weights.

        Raises:
            NoServerAvailable: If one is not; each is named, with the reason.
        """
        self._check_open()
        await self.engine.pool.wait_ready(timeout_s)

    def paused(self, mode: PauseMode = "keep") -> AbstractAsyncContextManager[dict[str, str]]:
        """Stop generation on every server for the length of an ``async with`` block.

        See ``Pausing.paused``.
        """
        self._check_open()
        return self.engine.paused(mode)

    async def init_weights_group(
        self, group: WeightsGroup, join: Callable[[], Awaitable[object]] | None = None
    ) -> WeightsGroup:
        """Let every server join a process group of the trainer. See ``weights``.

        Args:
            group: Where to meet.
            join: Lets the trainer join at the same time, as rank 0; an async function.

        Returns:
            The group with its members, for ``WeightUpdate.distributed``.

        Raises:
            WeightUpdateError: If a server did not join; each is named.
        """
        self._check_open()
        return await init_weights_group(self.engine.pool, group, join)

    async def offload(self, *, keep_weights: bool = True, drain: bool = False) -> dict[str, str]:
        """Put every server to sleep until ``onload``; rollouts wait. See ``Memory.offload``."""
        self._check_open()
        return await self.engine.offload(keep_weights=keep_weights, drain=drain)

    async def onload(self, tags: Sequence[str] | None = None) -> dict[str, str]:
        """Wake what sleeps, or a part of it. See ``Memory.onload``."""
        return await self.engine.onload(tags)

    def offloaded(
        self, *, keep_weights: bool = True, drain: bool = False
    ) -> AbstractAsyncContextManager[dict[str, str]]:
        """Lend the servers' GPUs to the trainer for an ``async with`` block.

        See ``Memory.offloaded``.
        """
        self._check_open()
        return self.engine.offloaded(keep_weights=keep_weights, drain=drain)
