"""The course of a weight update, the same for every kind.

The order is pause → load on every server → drop the prefix cache → version label → resume →
version + 1. The version of the pool advances only when every server in service has the weights; a
server that failed is out of service, and the result names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from ..errors import ProtocolError, RolloutError, WeightUpdateError
from ..memory import RESTARTED_ASLEEP, rouse, wake
from ..servers import IN_SERVICE, Server, ServerPool
from ..types import HttpRequest
from .adapters import load_adapter_everywhere
from .distributed import check_members, receive_everywhere
from .steps import find_takers, lacks_weights, takers, updated
from .update import WeightUpdate, WeightUpdateResult


async def update_weights(pool: ServerPool, update: WeightUpdate) -> WeightUpdateResult:
    """Bring every server of the pool to ``update``, then advance the pool's version.

    Servers that are out of service for an update missed earlier are updated too, and return; nobody
    is paused for one that has failed its health checks and does not answer. One that fails is taken
    out before it is asked to generate again, its requests go on elsewhere with the tokens they
    have, and it is tried again until it has the weights.

    Cancelled, it resumes every server but those that had not confirmed the weights: they are out of
    service, and their requests go on elsewhere.

    Raises:
        WeightUpdateError: If fewer than ``min_updated`` servers took the weights. The version
            stays; the servers that failed are named and out of service.
    """
    async with pool.update_lock:
        servers, lost = await find_takers(pool)
        check_members(pool, servers, update)
        try:
            return await _update_all(pool, servers, update, failed=lost)
        finally:
            pool.take_out_outdated()


async def _update_all(
    pool: ServerPool, servers: Sequence[Server], update: WeightUpdate, failed: dict[str, str]
) -> WeightUpdateResult:
    started = trio.current_time()
    attempted: list[Server] = []
    pool.begin_update(update.version)
    for turn in [[server] for server in servers] if update.rolling else [servers]:
        batch = takers(turn)  # who went out of service meanwhile is not paused any more
        attempted += batch
        await _update(pool, batch, update, failed)
    result = WeightUpdateResult(
        version=update.version,
        updated=tuple(
            s.address for s in attempted if s.address not in failed and s.state in IN_SERVICE
        ),
        failed=failed,
        seconds=trio.current_time() - started,
    )
    _advance(pool, update, result)
    return result


def _advance(pool: ServerPool, update: WeightUpdate, result: WeightUpdateResult) -> None:
    needed = max(1, min(pool.config.min_updated, len(pool.servers)))
    if len(result.updated) < needed:
        words = "; ".join(f"{address}: {error}" for address, error in result.failed.items())
        raise WeightUpdateError(
            f"version {result.version} reached {len(result.updated)} of the {needed} servers "
            f"that min_updated asks for ({words or 'no server is in service'}); the version stays "
            f"{pool.version}. Mend the servers and update again",
            dict(result.failed),
        )
    if not update.has_base:
        pool.adapters.switch(update.name, update.path, update.version)
    pool.advance(update.version, _recipe(pool, update), has_base=update.has_base)


def _recipe(pool: ServerPool, update: WeightUpdate) -> Sequence[HttpRequest] | None:
    """What a server that comes later has to be sent; None where only the trainer can do it."""
    if not update.has_base:
        return pool.recipe  # of the base model, which stays
    if update.kind != "disk":
        return None
    return tuple(pool.dialect.load_weights(update.path, update.version))


async def _update(
    pool: ServerPool, servers: Sequence[Server], update: WeightUpdate, failed: dict[str, str]
) -> None:
    if update.kind == "label":
        await _load_everywhere(pool, servers, update, failed)
        return
    with _taking(servers):
        if update.kind == "lora":
            await load_adapter_everywhere(pool, servers, update, failed)
            return
        async with pool.pausing.paused(update.pause, servers) as not_paused:
            failed.update(not_paused)
            if update.kind == "distributed":
                await receive_everywhere(pool, servers, update, failed)
            else:
                await _load_everywhere(pool, servers, update, failed)


@contextmanager
def _taking(servers: Sequence[Server]) -> Iterator[None]:
    """Let nobody bring servers the weights that are old now, be it under way or to come."""
    for server in servers:
        server.taking = True
        if server.restoring is not None:
            server.restoring.cancel()
    try:
        yield
    finally:
        for server in servers:
            server.taking = False


async def _load_everywhere(
    pool: ServerPool, servers: Sequence[Server], update: WeightUpdate, failed: dict[str, str]
) -> None:
    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(_load_one, pool, server, update, failed)


async def _load_one(
    pool: ServerPool, server: Server, update: WeightUpdate, failed: dict[str, str]
) -> None:
    words = f"update to version {update.version}"
    async with server.control_lock:
        if server.address in failed:  # it could not be paused, so nothing is known about it
            await pool.pausing.freeze(server, f"{words}: {failed[server.address]}")
            return
        if update.kind == "label" and (reason := lacks_weights(pool, server)):
            failed[server.address] = f"{reason}; a label alone does not mend that"
            pool.mark_stale(server, f"{words}: {failed[server.address]}")
            return
        try:
            await _send(pool, server, update)
        except RolloutError as exc:
            failed[server.address] = str(exc)
            await pool.pausing.freeze(server, f"{words}: {exc}")
            return
        except trio.Cancelled:  # what it serves now is not known
            await pool.pausing.freeze(server, f"its {words} was cancelled")
            raise
        updated(pool, server, update)


async def _send(pool: ServerPool, server: Server, update: WeightUpdate) -> None:
    same = await rouse(pool, server)
    if update.kind == "label":
        if not same:
            raise ProtocolError(f"{RESTARTED_ASLEEP}, and has its first weights")
        await pool.label(server, update.version)
        return
    await wake(pool, server, "weights")
    server.told, server.loading = update.version, True
    for request in pool.dialect.load_weights(update.path, update.version):
        await pool.control(server, request, pool.config.update_timeout_s)
    server.labelled = pool.dialect.has_labels
    await pool.confirm(server, update.version)
