"""The start of a run: every server is waited for, asked what it is, labelled, and taken in.

What another run left asleep or paused is woken and resumed first. Only then is a server asked
whether it is well: SGLang answers that by generating, and a paused one not at all.
"""

from __future__ import annotations

import trio

from .errors import NoServerAvailable, ProtocolError, RolloutError, TransportError
from .leftovers import let_generate, wake_left_asleep
from .servers import Server, ServerPool, ServerState

SETUP_INTERVAL_S = 0.25  # between two looks at a server that is not up yet


async def join(pool: ServerPool) -> None:
    """Wait until every server of a pool answers, learn what it is, label its weights, take it in.

    Raises:
        NoServerAvailable: If a server is not healthy within ``setup_timeout_s``, or answers
            what no server of this dialect would; each is named, with what it last said.
    """
    last_words: dict[str, str] = {}
    with trio.move_on_after(pool.config.setup_timeout_s) as scope:
        async with trio.open_nursery() as nursery:
            for server in pool.servers:
                nursery.start_soon(_join_one, pool, server, last_words, nursery.cancel_scope)
    missing = [s.address for s in pool.servers if s.state is ServerState.JOINING]
    if missing:
        words = "; ".join(f"{name}: {last_words.get(name, 'no answer')}" for name in missing)
        limit = f" within setup_timeout_s={pool.config.setup_timeout_s:g}"
        raise NoServerAvailable(f"not ready{limit if scope.cancelled_caught else ''}: {words}")


async def _join_one(
    pool: ServerPool,
    server: Server,
    last_words: dict[str, str],
    all_of_them: trio.CancelScope,
) -> None:
    while True:  # a server is outside: it is asked at a named interval until it is up
        try:
            await pool.discover(server)
            await wake_left_asleep(pool, server)
            server.version = pool.version
            await _label(pool, server)
            await let_generate(pool, server)
            await pool.check_health(server)
            break
        except RolloutError as exc:
            last_words[server.address] = str(exc)
            if not isinstance(exc, TransportError) and not _may_still_start(exc):
                last_words[server.address] = f"not usable: {exc}"
                all_of_them.cancel()
        await trio.sleep(SETUP_INTERVAL_S)
    if server.tainted:
        pool.mark_stale(server, "it was found asleep, and may not have kept its weights")
    else:
        pool.set_state(server, ServerState.READY)


async def _label(pool: ServerPool, server: Server) -> None:
    """Label a server, and see that it has no other label: it could be that of weights to come."""
    await pool.label(server, pool.version)
    if not server.labelled:
        server.started = await pool.start_of(server)
    elif (reported := await pool.label_of(server)) not in (None, pool.version):
        raise ProtocolError(
            f"it reports version {reported} after it was given {pool.version}: does another "
            "trainer use it?"
        )


def _may_still_start(error: RolloutError) -> bool:
    """Whether a server that answered so may yet become healthy: it says 503 while it loads."""
    return getattr(error, "status", None) in (429, 502, 503, 504)
