"""What a demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import flag, integer, items, one_of, shown, text
from ..config import SCHEDULE_POLICIES, SchedulePolicyName
from ..errors import ConfigError

# What a run that was cut off goes on with; the servers and how they are chosen may change.
_OF_THE_RUN = ("steps", "batch_size", "group_size", "max_staleness", "seed", "freeze_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to run.

    Args:
        steps: Training steps, at least 1.
        servers: Embedded servers to start, each a process.
        server_urls: Embedded servers that run already, to be used in their place; they load weights
            from this machine's disk, and stay when the demo ends.
        max_staleness: Versions that a trained token may be behind.
        schedule_policy: ``least_request`` or ``round_robin``.
        batch_size: Prompts in a training batch.
        group_size: Answers to each of them.
        seed: Of the base model, the prompts and the trainer. Runs of one seed still differ: which
            version makes which token is a matter of timing.
        state: Where to keep ledger, checkpoint and weights, so that a run that was cut off goes on
            where it was; None keeps nothing.
        keep_weights: Where to leave the weights of every version; None deletes those that no server
            needs any more.
        freeze_weights: Withhold the trainer's updates: every version is the base model again. All
            else is equal, so what is learnt without this is learnt through the weights.

    Raises:
        ConfigError: A value is of another type or out of its range.
    """

    steps: int = 20
    servers: int = 4
    server_urls: tuple[str, ...] = ()
    max_staleness: int = 4
    schedule_policy: SchedulePolicyName = "least_request"
    batch_size: int = 16
    group_size: int = 4
    seed: int = 0
    state: Path | None = None
    keep_weights: Path | None = None
    freeze_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("servers", 1),
            ("batch_size", 1),
            ("group_size", 1),
            ("max_staleness", 0),
            ("seed", 0),
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        urls = items("server_urls", self.server_urls, "URLs")
        object.__setattr__(self, "server_urls", tuple(text("server_urls", url) for url in urls))
        one_of("schedule_policy", self.schedule_policy, SCHEDULE_POLICIES)
        flag("freeze_weights", self.freeze_weights)
        for name in ("state", "keep_weights"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, Path):
                raise ConfigError(f"{name} must be a Path, not {shown(path)}")
            text(name, str(path))  # which servers are told in JSON

    @property
    def prompts(self) -> int:
        """How many the run trains on."""
        return self.steps * self.batch_size

    def of_the_run(self) -> dict[str, Any]:
        """Return those that have to stay, by name, when a run that was cut off goes on."""
        return {name: getattr(self, name) for name in _OF_THE_RUN}
