"""What one embedded server is, in one frozen record."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ..checks import finite, flag, integer, one_of, shown, text
from ..errors import ConfigError
from ..types import INT32_MAX
from .sampling import LogprobsMode

INT64_MAX = 2**63 - 1

DialectName: TypeAlias = Literal["vllm", "sglang"]

# What each real server can report, its default first. SGLang's is after temperature and before the
# filters; raw is its SGLANG_RETURN_ORIGINAL_LOGPROB=1.
LOGPROBS_MODES: dict[DialectName, tuple[LogprobsMode, ...]] = {
    "vllm": ("raw_logprobs", "processed_logprobs"),
    "sglang": ("scaled_logprobs", "raw_logprobs"),
}


_COUNTS = (
    ("port", 0, 65535),
    ("max_num_seqs", 1, INT32_MAX),
    ("max_model_len", 2, INT32_MAX),
    ("seed", -INT64_MAX, INT64_MAX),
)


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
        logprobs_mode: Of which distribution logprobs are reported; they differ as soon as the
            temperature is not 1. vLLM has ``raw_logprobs`` and ``processed_logprobs``, SGLang has
            ``scaled_logprobs`` and ``raw_logprobs``; None takes the first. See ``sampling.draw``.
        dialect: Whose HTTP interface to speak.
        incremental_streaming_output: SGLang only: each event of a stream holds the new tokens
            instead of all tokens so far.
        health_time_s: SGLang only: how often a health check looks whether its probe came back. A
            real one takes 1 s, so that a healthy answer takes a second, and one asked while
            generation is paused is a 503 after 20. 0 answers at once, paused or not.
        areal: vLLM only: have AReaL's own routes for pausing and for weights, as a vLLM that AReaL
            started, and none of vLLM's for development; ``backend="vllm_areal"`` speaks to it.
        tell_experts: Tell which experts tokens went through, as ``--enable-return-routed-experts``
            does; the experts are made up.
        fragile: SGLang only: die where a real one dies, of a token id outside the vocabulary, of
            memory released while requests run, of memory resumed that was not released. Off, these
            are refused with a 400.

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
    logprobs_mode: LogprobsMode | None = None
    dialect: DialectName = "vllm"
    incremental_streaming_output: bool = False
    health_time_s: float = 0.0
    areal: bool = False
    tell_experts: bool = False
    fragile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weights, (str, os.PathLike)):
            raise ConfigError(f"weights must be a directory's path, not {shown(self.weights)}")
        object.__setattr__(self, "weights", Path(self.weights))
        for name, least, most in _COUNTS:
            object.__setattr__(self, name, integer(name, getattr(self, name), least, most))
        for name in ("token_time_s", "health_time_s"):
            value = finite(name, getattr(self, name))
            self._check(value >= 0, f"{name} must be finite and not negative")
            object.__setattr__(self, name, value)
        for name in ("host", "served_model_name"):
            text(name, getattr(self, name))
        for name in ("incremental_streaming_output", "areal", "tell_experts", "fragile"):
            flag(name, getattr(self, name))
        one_of("dialect", self.dialect, get_args(DialectName))
        self._check(not self.areal or self.dialect == "vllm", "areal is of vLLM alone")
        modes = LOGPROBS_MODES[self.dialect]
        if self.logprobs_mode is not None:
            one_of(f"logprobs_mode of {self.dialect}", self.logprobs_mode, modes)

    @property
    def reported_logprobs(self) -> LogprobsMode:
        """The mode in force."""
        return self.logprobs_mode or LOGPROBS_MODES[self.dialect][0]

    @staticmethod
    def _check(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)
