"""The production executor on a simulated fleet, in one line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from ..config import RolloutConfig
from ..errors import ConfigError
from ..executor import WorkflowExecutor, open_executor
from ..recording import open_ledger_of
from .faults import Faults
from .fleet import DEFAULT_LENGTHS, SimulatedFleet, open_fleet
from .lengths import Lengths
from .script import EOS, LONGEST
from .settings import SimulatedServerSettings

# On a clock that jumps, much happens at the same time: how long that takes says nothing.
_DEFAULTS: Final = {"slow_step_warning_s": None}


@asynccontextmanager
async def simulated_executor(
    *,
    servers: int | Sequence[SimulatedServerSettings] = 4,
    lengths: Lengths = DEFAULT_LENGTHS,
    seed: int = 0,
    faults: Faults | None = None,
    traced: bool = False,
    **config: Any,
) -> AsyncIterator[tuple[WorkflowExecutor, SimulatedFleet]]:
    """Open the real executor over servers in memory.

    Nothing of it is simulated but the servers and the network. Run it on a
    ``trio.testing.MockClock(autojump_threshold=0)``, or wait for real seconds.

    Args:
        servers: How many default servers, or one record for each.
        lengths: Of the answers.
        seed: Of the lengths, and of the order within a batch unless ``config`` gives one.
        faults: What goes wrong once the executor is there; then they are ``fleet.faults``. None:
            nothing unasked.
        traced: Whether to keep every exchange in ``fleet.trace``.
        config: Further fields of ``RolloutConfig``; ``backend`` is the servers' dialect.

    Example:
        A test of a training loop, in milliseconds::

            async def main() -> None:
                async with simulated_executor(consumer_batch_size=8) as (executor, fleet):
                    async for batch in executor.batches(prompts, workflow):
                        version = batch.version + 1
                        update = WeightUpdate.from_disk(checkpoint(version), version)
                        await executor.update_weights(update)

            trio.run(main, clock=MockClock(autojump_threshold=0))
    """
    async with open_fleet(
        servers, lengths=lengths, seed=seed, faults=faults, traced=traced
    ) as fleet:
        settings = RolloutConfig(
            **{**_DEFAULTS, "seed": seed, **_spoken_by(fleet), **config},
            servers=fleet.addresses,
        )
        async with AsyncExitStack() as stack:
            ledger = None
            if settings.ledger_path is not None:  # written inline: no thread in virtual time
                ledger = await stack.enter_async_context(open_ledger_of(settings, inline=True))
            with fleet.faults.quiet():
                executor = await stack.enter_async_context(
                    open_executor(settings, transport=fleet, ledger=ledger)
                )
            yield executor, fleet


def _spoken_by(fleet: SimulatedFleet) -> dict[str, Any]:
    """The dialect of the servers, and what has to be known of a model that speaks it."""
    dialects = {server.settings.dialect for server in fleet}
    if len(dialects) > 1:
        raise ConfigError(f"one executor speaks one dialect, not {' and '.join(sorted(dialects))}")
    return {"backend": dialects.pop(), "vocab_size": EOS + LONGEST} if dialects else {}
