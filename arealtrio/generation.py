"""Generation: one answer in the making, from segment to segment. It decides and never waits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ._core import vectors
from .config import RolloutConfig
from .errors import ProtocolError
from .experts import RoutedExperts
from .ordering import Origin
from .servers import Lease
from .types import (
    PROMPT_VERSION,
    Float32Array,
    GenerationHyperparameters,
    Int32Array,
    IntegerArray,
    ModelRequest,
    ModelResponse,
    Segment,
    StopReason,
)
from .wire.dialect import SegmentRequest, SegmentResponse, StreamParser

Scalar = TypeVar("Scalar", np.int32, np.float32)

_SEED_MASK = 2**64 - 1


def state_kept_by_server(gconfig: GenerationHyperparameters) -> str:
    """The options whose effect depends on more than prompt + tokens so far; empty if none.

    ``repetition_penalty`` is not among them: it looks at prompt and output alike, so it sees the
    same tokens after a resume.
    """
    used = {
        "frequency_penalty": gconfig.frequency_penalty != 0,
        "presence_penalty": gconfig.presence_penalty != 0,
        "stop strings": bool(gconfig.stop),
    }
    return ", ".join(name for name, is_used in used.items() if is_used)


@dataclass(slots=True, eq=False)
class Generation:
    """The state of one generation: what it has, what it may still ask for.

    Args:
        request: What was asked.
        rid: The stem of its segments' ids.
        budget: Tokens to generate at most.
        origin: Whose it is, and the least version it may be made by.
        session: Generations that share a prefix share this; None: it shares none.

    Attributes:
        server: Where it last ran well; None before.
        failed_on: The server that failed it last.
        redo: Tokens that a failed server may have made and that are not there.
        lease: Of the segment under way; None while it waits for a server.
        arrived: Where that segment's tokens are collected, if they are streamed.
    """

    request: ModelRequest
    rid: str
    budget: int
    origin: Origin
    session: str | None = None
    server: str | None = None
    wait_s: float = 0.0
    interruptions: int = 0
    failovers: int = 0
    failed_on: frozenset[str] = frozenset()
    redo: int = 0
    lease: Lease | None = None
    arrived: StreamParser | None = None
    stop_reason: StopReason = "abort"
    ended: bool = False
    exact: bool = True
    tokens: list[Int32Array] = field(default_factory=list)
    logprobs: list[Float32Array] = field(default_factory=list)
    versions: list[Int32Array] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    experts: RoutedExperts | None = None  # if they are asked for
    prompt_ids: Int32Array | None = None  # of a chat, as the server read it
    count: int = 0
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if self.request.gconfig.return_routed_experts:
            self.experts = RoutedExperts()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to ask for."""
        return self.ended or self.count >= self.budget

    @property
    def under_way(self) -> bool:
        """Whether it ran before: then it waits for nobody that has not."""
        return bool(self.count or self.failovers or self.interruptions)

    @property
    def lowest_admissible_version(self) -> int:
        """Versions never go back within a generation (I8), nor below the permit's."""
        last = int(self.versions[-1][-1]) if self.count else PROMPT_VERSION
        return max(self.origin.version, last)

    def next_segment(
        self, config: RolloutConfig, lease: Lease, adapter: str = ""
    ) -> SegmentRequest:
        """The next question to a server: what is missing, after what is there."""
        gconfig = self.request.gconfig
        number = next(self._numbers)
        tokens = self.request.input_ids
        if self.count:
            tokens = np.concatenate([tokens, *self.tokens])
        most = min(self.budget - self.count, self._segment_limit(config))
        least = min(gconfig.min_new_tokens, self.budget) - self.count
        return SegmentRequest(
            # Of one width, because SGLang aborts every request whose id begins so: "q-0" of one
            # caller would end "q-0-0" of another.
            request_id=f"{self.rid}-{number:04d}",
            token_ids=tokens,
            max_new_tokens=most,
            min_new_tokens=min(max(0, least), most),  # the rest is for the segments that follow
            gconfig=gconfig,
            model=adapter or gconfig.lora_name or config.model or lease.server.info.model or "",
            seed=None if gconfig.seed is None else _seed_of_segment(gconfig.seed, number),
            messages=self.request.messages,
            experts_from=0 if self.experts is None else self.experts.count,
        )

    def _segment_limit(self, config: RolloutConfig) -> int:
        """``segment_tokens``, where a joint between segments changes nothing."""
        if config.segment_tokens is None or self.obstacle(config):
            return self.budget
        return config.segment_tokens

    def obstacle(self, config: RolloutConfig) -> str:
        """What forbids to go on from its tokens on another server; empty if nothing does."""
        if self.request.messages:
            return "messages"
        return "" if config.allow_inexact_resume else state_kept_by_server(self.request.gconfig)

    def take(
        self,
        server: str,
        segment: SegmentRequest,
        answer: SegmentResponse,
        versions: Int32Array,
        exact: bool,
    ) -> None:
        """Append an answer; raise, changing nothing, where it breaks invariant I8."""
        count, asked = len(answer.token_ids), segment.max_new_tokens
        if len(answer.logprobs) != count or count > asked:
            raise ProtocolError(
                f"{server} answered {count} tokens and {len(answer.logprobs)} logprobs "
                f"where at most {asked} were asked for"
            )
        floor = self.lowest_admissible_version
        if not vectors.ascends(versions, floor):
            raise ProtocolError(f"{server} reports weight versions that go back, or below {floor}")
        if count and self.experts is not None:
            read = segment.token_ids if answer.prompt_ids is None else answer.prompt_ids
            self.experts.take(_told(answer, server), len(read) + count, server)
        self.stop_reason = answer.stop_reason
        self.server = server
        self.failed_on = frozenset()
        if count:
            self.tokens.append(answer.token_ids)
            self.logprobs.append(answer.logprobs)
            self.versions.append(versions)
            self.segments.append(Segment(server, self.count, self.count + count))
            self.exact = self.exact and exact
            self.prompt_ids = answer.prompt_ids
        self.count += count
        cut_by_us = answer.stop_reason == "length" and count == asked
        self.ended = answer.stop_reason != "abort" and not (cut_by_us and self.count < self.budget)

    @property
    def wants_experts(self) -> bool:
        """Whether tokens are of no use without the experts they went through."""
        return self.experts is not None

    def expect_again(self, count: int) -> None:
        """So many tokens, at most, have to be made again: the next ones are not new."""
        self.redo = max(self.redo, count)

    def made_again(self, count: int) -> int:
        """Of ``count`` new tokens, those that replace some that were made before, at most."""
        again = min(self.redo, count)
        self.redo -= again
        return again

    def response(self, latency_s: float) -> ModelResponse:
        """The whole answer."""
        return ModelResponse(
            rid=self.rid,
            input_tokens=self.request.input_ids if self.prompt_ids is None else self.prompt_ids,
            output_tokens=_joined(self.tokens, np.int32),
            output_logprobs=_joined(self.logprobs, np.float32),
            output_versions=_joined(self.versions, np.int32),
            stop_reason="length" if self.stop_reason == "abort" else self.stop_reason,
            versions_exact=self.exact,
            segments=tuple(self.segments),
            routed_experts=self.experts.joined() if self.experts and self.count else None,
            latency_s=latency_s,
            wait_s=self.wait_s,
        )


class Progress:
    """What the generations of one rollout have come to, for whoever asks while they run."""

    __slots__ = ("_running", "_tokens")

    def __init__(self) -> None:
        self._running: list[Generation] = []
        self._tokens = 0  # of those that ended

    def began(self, generation: Generation) -> None:
        """One runs."""
        self._running.append(generation)

    def ended(self, generation: Generation) -> None:
        """One ended, however."""
        self._running.remove(generation)
        self._tokens += generation.count

    @property
    def under_way(self) -> bool:
        """Whether one runs."""
        return bool(self._running)

    @property
    def lease(self) -> Lease | None:
        """Of the youngest that has a server."""
        leases = (running.lease for running in reversed(self._running))
        return next((lease for lease in leases if lease is not None), None)

    @property
    def tokens(self) -> int:
        """Made so far, those that streamed in included."""
        return self._tokens + sum(
            running.count + (running.arrived.count if running.arrived else 0)
            for running in self._running
        )


def _told(answer: SegmentResponse, server: str) -> IntegerArray:
    """The experts that an answer tells, or ProtocolError."""
    if answer.routed_experts is None:
        raise ProtocolError(
            f"{server} did not tell the experts that its tokens went through; start it with "
            "--enable-return-routed-experts"
        )
    return answer.routed_experts


def _joined(parts: Sequence[npt.NDArray[Scalar]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _seed_of_segment(seed: int, number: int) -> int:
    """Another seed for each segment: the same one would repeat the first segment's draws."""
    if number == 0:
        return seed
    words = [seed & _SEED_MASK, number]  # NumPy takes no negative one, and vLLM does
    return int(np.random.SeedSequence(words).generate_state(1)[0] & 0x7FFFFFFF)
