"""What a run that was killed leaves behind: servers that sleep, or are paused, and stay so.

They answer health checks, and a generation would wait for ever. Nobody else can wake them: the run
that would have is gone.
"""

from __future__ import annotations

from .errors import RequestRejected
from .servers import Server, ServerPool


async def wake_left_asleep(pool: ServerPool, server: Server) -> None:
    """Wake a server that was asleep when it was found, where its kind tells.

    What weights it has then, nobody knows: it may have been told to forget them.

    Raises:
        RolloutError: If it did not confirm it.
    """
    question = pool.dialect.sleeping()
    if question is None:
        return
    limits = pool.config.control_limits(pool.config.control_timeout_s)
    if not pool.dialect.parse_sleeping(await pool.send(server, question, limits)):
        return
    server.tainted = True
    for tag in pool.dialect.memory_tags:
        await pool.control(server, pool.dialect.wake(tag), pool.config.update_timeout_s)


async def let_generate(pool: ServerPool, server: Server) -> None:
    """Have a server go on, whoever paused it; one that a scope holds stays as it is.

    One without the route was not paused by it.

    Raises:
        RolloutError: If it did not confirm it.
    """
    try:
        await pool.pausing.resume(server)
    except RequestRejected as exc:
        if server.frozen or not exc.is_of_the_route:
            raise
