"""Plan: everything that a simulated run is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import (
    BUDGET_MAX,
    CONCURRENCY_MAX,
    QUEUE_ORDERS,
    SCHEDULE_POLICIES,
    STRAGGLER_POLICIES,
    QueueOrder,
    RolloutConfig,
    SchedulePolicyName,
    StragglerPolicy,
)
from ..errors import ConfigError
from ..testing import SimulatedServerSettings
from .answers import Answers
from .servers import ServerKind

MEAN_LENGTH = 100
"""Simulated tokens of a mean answer, unless a plan has a ``grain``: a percent is enough."""
SIMULATED_MAX = 900_000
"""Of one answer: what a simulated server makes at most, and some room."""
NEVER_S = 1e12
"""No run is as long: a limit for everything that only looks after faults."""
COUNT_MAX = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One simulated run.

    Args:
        servers: The fleet.
        answers: How long they are.
        batch_size: Prompts (groups) in a training batch, at least 1.
        group_size: Answers to each of them, at least 1.
        training_s: Seconds of one training step, above 0.
        update_s: Seconds that the servers stand still for new weights, after each step.
        latency_s: Seconds from a request for tokens to the first of them: network and prefill. The
            requests that bring new weights take none: ``update_s`` is all of an update.
        slow_down: By what share of a decode step each further answer on a server lengthens it.
        steps: Training steps, at least 2.
        warm_up: Steps that are not counted, below ``steps``; None: a quarter of them.
        max_staleness: As in ``RolloutConfig``; None: no bound.
        straggler_policy: As in ``RolloutConfig``.
        schedule_policy: As in ``RolloutConfig``.
        queue_order: As in ``RolloutConfig``.
        max_concurrent_rollouts: As in ``RolloutConfig``; None: as many as there are slots.
        prompts: In an epoch; then they come again. None: as many as the answers know, or without
            end.
        grain: Tokens that are simulated as one, at least 1 and at most a mean answer; None: as many
            as leave a mean answer 100. Coarser is faster.
        seed: Of all chance.

    Raises:
        ConfigError: If a value is out of its range.
    """

    servers: Sequence[ServerKind]
    answers: Answers
    batch_size: int = 64
    group_size: int = 8
    training_s: float = 60.0
    update_s: float = 2.0
    latency_s: float = 0.0
    slow_down: float = 0.0
    steps: int = 40
    warm_up: int | None = None
    max_staleness: int | None = 4
    straggler_policy: StragglerPolicy = "wait"
    schedule_policy: SchedulePolicyName = "least_request"
    queue_order: QueueOrder = "fifo"
    max_concurrent_rollouts: int | None = None
    prompts: int | None = None
    grain: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "servers", tuple(self.servers))
        if not self.servers:
            raise ConfigError("a fleet has at least one kind of server")
        self._check_counts()
        if not 0 < self.training_s < math.inf:
            raise ConfigError("training_s must be finite and above 0")
        for name in ("update_s", "latency_s", "slow_down"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and not negative")
        self._check_choices()
        self._check_time()
        self._check_grain()
        self.config()

    def _check_counts(self) -> None:
        counts = (("batch_size", 1), ("group_size", 1), ("steps", 2), ("prompts", 1), ("grain", 1))
        for name, least in counts:
            value = getattr(self, name)
            if value is not None and not least <= value <= COUNT_MAX:
                raise ConfigError(f"{name} must be between {least} and {COUNT_MAX}, not {value}")
        if self.warm_up is not None and not 0 <= self.warm_up < self.steps:
            raise ConfigError(f"warm_up must be at least 0 and below steps, which is {self.steps}")
        if self.slots > CONCURRENCY_MAX:
            raise ConfigError(f"{self.slots} slots are more than the {CONCURRENCY_MAX} possible")

    def _check_choices(self) -> None:
        """Said here too, so that a message speaks of the plan and not of a ``RolloutConfig``."""
        for name, choices in (
            ("straggler_policy", STRAGGLER_POLICIES),
            ("schedule_policy", SCHEDULE_POLICIES),
            ("queue_order", QUEUE_ORDERS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}")

    def _check_grain(self) -> None:
        grain, answers = self.tokens_simulated_as_one, self.answers
        if answers.longest > SIMULATED_MAX * grain:
            raise ConfigError(
                f"answers of {answers.longest} tokens are too long for a grain of {grain}; choose "
                "a coarser one"
            )
        if grain > max(1, answers.mean):  # each answer would be as long as the grain at least
            raise ConfigError(
                f"answers of {answers.mean:.4g} tokens on average are too short for a grain of "
                f"{grain}; choose a finer one"
            )

    def _check_time(self) -> None:
        """Refuse what would be found out in the middle of a run. Waits are not known beforehand."""
        trained_s = self.steps * (self.training_s + self.update_s)
        answer_s = self.latency_s + self.answers.longest * max(map(self._step_s, self.servers))
        for what, seconds in (("its training steps", trained_s), ("its longest answer", answer_s)):
            if not seconds < NEVER_S:
                raise ConfigError(
                    f"a run lasts {NEVER_S:g} simulated seconds at most; {what} would take "
                    f"{seconds:.3g}"
                )

    def _step_s(self, kind: ServerKind) -> float:
        """Of a full server."""
        return (1 + self.slow_down * (kind.slots - 1)) / kind.tokens_per_s

    @property
    def slots(self) -> int:
        """Of all servers."""
        return sum(kind.count * kind.slots for kind in self.servers)

    @property
    def steps_not_counted(self) -> int:
        """The warm-up."""
        return self.steps // 4 if self.warm_up is None else self.warm_up

    @property
    def tokens_simulated_as_one(self) -> int:
        """The grain."""
        return self.grain or max(1, round(self.answers.mean / MEAN_LENGTH))

    @property
    def prompts_of_an_epoch(self) -> int | None:
        """None: without end."""
        return self.prompts or self.answers.prompts

    def kinds(self) -> list[int]:
        """The index of each server's kind, server by server."""
        return [index for index, kind in enumerate(self.servers) for _ in range(kind.count)]

    def server_settings(self) -> list[SimulatedServerSettings]:
        """One record for each server."""
        return [self._settings(self.servers[kind]) for kind in self.kinds()]

    def _settings(self, kind: ServerKind) -> SimulatedServerSettings:
        return SimulatedServerSettings(
            max_num_seqs=kind.slots,
            token_time_s=self.tokens_simulated_as_one / kind.tokens_per_s,
            batch_growth=self.slow_down,
            load_time_s=self.update_s,
            prefill_s=self.latency_s,
            max_model_len=SIMULATED_MAX + 1000,
        )

    def config(self) -> dict[str, Any]:
        """Fields of ``RolloutConfig``. Everything that looks after faults is out of the way."""
        config: dict[str, Any] = {
            "consumer_batch_size": self.batch_size,
            "max_staleness": self._bound(),
            "straggler_policy": self.straggler_policy,
            "schedule_policy": self.schedule_policy,
            "queue_order": self.queue_order,
            "max_concurrent_rollouts": self.max_concurrent_rollouts or self.slots,
            "queue_size": self._queue_size(),
            "seed": self.seed,
            **dict.fromkeys(_LIMITS, NEVER_S),
        }
        RolloutConfig(**config)  # raises here, where the plan is made, if it is none
        return config

    def _bound(self) -> int:
        """No bound is one that no run reaches."""
        if self.max_staleness is None:
            return BUDGET_MAX // self.batch_size - 1
        return self.max_staleness

    def _queue_size(self) -> int:
        """Enough for whatever may start while the trainer trains, which reads no prompts then."""
        return 4 * self.batch_size + 2 * math.ceil(self.slots / self.group_size)


_LIMITS = (
    "rollout_timeout_s",
    "segment_timeout_s",
    "control_timeout_s",
    "update_timeout_s",
    "health_timeout_s",
    "health_interval_s",  # nothing dies here, and a thousand servers' checks cost real time
    "setup_timeout_s",
    "stall_warning_s",
)
