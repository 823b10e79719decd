"""SimulatedServerSettings: what one simulated server is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..checks import finite, integer, one_of
from ..embedded.settings import DialectName
from ..errors import ConfigError
from ..types import INT32_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServerSettings:
    """What one simulated server is.

    Args:
        max_num_seqs: Sequences decoded at once; more wait in the server's queue.
        token_time_s: Seconds of one decode step with one sequence, above 0.
        batch_growth: By what share of that a step grows with each further sequence.
        speed: Divides the time of a step; 0.5 is half as fast.
        load_time_s: Seconds it takes to load weights.
        latency_s: Seconds between a request's departure and its arrival, whatever it asks.
        prefill_s: Seconds more of a request for tokens, before it takes a slot or waits for one.
        max_model_len: Prompt and answer together at most, in tokens.
        dialect: ``vllm`` or ``sglang``.
        event_tokens: Tokens in one event of a stream. 1 is what servers do; more make a simulation
            of streams cheaper, which otherwise wakes for each token.

    Raises:
        ConfigError: If a value is out of its range.
    """

    max_num_seqs: int = 8
    token_time_s: float = 0.02
    batch_growth: float = 0.0
    speed: float = 1.0
    load_time_s: float = 0.0
    latency_s: float = 0.0
    prefill_s: float = 0.0
    max_model_len: int = 100_000
    dialect: DialectName = "vllm"
    event_tokens: int = 1

    def __post_init__(self) -> None:
        one_of("dialect", self.dialect, get_args(DialectName))
        for name, least in (("max_num_seqs", 1), ("max_model_len", 2), ("event_tokens", 1)):
            value = integer(name, getattr(self, name), least, INT32_MAX)
            object.__setattr__(self, name, value)
        positive = ("token_time_s", "speed")
        not_negative = ("batch_growth", "load_time_s", "latency_s", "prefill_s")
        for name in positive + not_negative:
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be finite and above 0")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be finite and not negative")
