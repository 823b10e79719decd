"""What one embedded server is, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ..errors import ConfigError
from .sampling import LogprobsMode

DialectName: TypeAlias = Literal["vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What to serve, where, and how fast.

    Args:
        weights: Directory with the first weights (``weights.npz``).
        host: Address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one; the server reports which.
        served_model_name: The name requests must give, if they give one.
        max_num_seqs: Sequences decoded at once; more wait in the server's queue.
        token_time_s: Seconds of one decode step, whatever the batch. 0: as fast as it goes. Set it
            to the real server's inter-token latency to see real proportions.
        max_model_len: Prompt and answer together at most, in tokens.
        seed: Sequences without a seed of their own derive theirs from it.
        logprobs_mode: ``raw_logprobs`` (vLLM's default) or ``processed_logprobs``; they differ as
            soon as the temperature is not 1.
        dialect: Whose HTTP interface to speak.

    Raises:
        ConfigError: A value is out of its range.
    """

    weights: Path
    host: str = "127.0.0.1"
    port: int = 0
    served_model_name: str = "tiny"
    max_num_seqs: int = 8
    token_time_s: float = 0.0
    max_model_len: int = 2048
    seed: int = 0
    logprobs_mode: LogprobsMode = "raw_logprobs"
    dialect: DialectName = "vllm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Path(self.weights))
        self._check(0 <= self.port <= 65535, "port must be between 0 and 65535")
        self._check(self.max_num_seqs >= 1, "max_num_seqs must be at least 1")
        self._check(self.max_model_len >= 2, "max_model_len must be at least 2")
        self._check(math.isfinite(self.token_time_s) and self.token_time_s >= 0,
                    "token_time_s must be finite and not negative")  # fmt: skip
        self._check(self.logprobs_mode in get_args(LogprobsMode),
                    f"logprobs_mode must be one of {get_args(LogprobsMode)}")  # fmt: skip
        self._check(self.dialect in get_args(DialectName),
                    f"dialect must be one of {get_args(DialectName)}")  # fmt: skip

    @staticmethod
    def _check(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)
