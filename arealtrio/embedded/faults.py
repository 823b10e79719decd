"""Faults that a test switches on in a running server; all are off until then, none has a route.

A test that holds a ``RunningServer`` reaches them as ``server.faults``. Each stays on until it is
switched off again, except where it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio


@dataclass(slots=True)
class Faults:
    """What shall go wrong.

    Args:
        failing_loads: So many of the next weight loads fail as if the files were broken; counts
            down.
        health_delay_s: Seconds before every answer about health.
        silent: Generate requests are accepted and never answered, not even with a header; those
            that came meanwhile stay unanswered after it is switched off.
        mislabel: From the next labelling on, weights are labelled with this, whatever was asked.
    """

    failing_loads: int = 0
    health_delay_s: float = 0.0
    silent: bool = False
    mislabel: str | None = None

    def on_load(self) -> None:
        """Raise OSError if this load is to fail."""
        if self.failing_loads:
            self.failing_loads -= 1
            raise OSError("the load failed because a test asked for that")

    async def on_health(self) -> None:
        """Hold an answer about health back."""
        await trio.sleep(self.health_delay_s)

    def label(self, asked: str) -> str:
        """Return the label that is put on weights in place of ``asked``."""
        return asked if self.mislabel is None else self.mislabel
