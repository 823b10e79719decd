"""What a server's dialect must be able to say: requests built, answers read, nothing sent.

Each operation is a pair: ``x(…) -> HttpRequest`` and ``parse_x(HttpResponse) -> …``. Every
``parse_x`` first maps the status (4xx: RequestRejected, 5xx: ServerError), then raises
ProtocolError for a body that does not follow the dialect. No error message carries a payload.

What every answer makes anew is a ``msgspec.Struct``: a frozen dataclass takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..types import (
    Float32Array,
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    Int32Array,
    IntegerArray,
    PauseMode,
    StopReason,
)
from .weights import WeightRequests


class VersionSpan(msgspec.Struct, frozen=True):
    """Tokens ``start … end-1`` were made by ``version``; None is a label that is no integer."""

    version: int | None
    start: int
    end: int


class SegmentRequest(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One HTTP question of a generation.

    Args:
        request_id: Unique on its server; abort names it.
        token_ids: int32[P + n], the prompt and the tokens generated so far.
        max_new_tokens: The remaining budget of this segment.
        min_new_tokens: What remains of the caller's minimum.
        gconfig: How to sample; its own token limits are superseded by the two above.
        model: The model or versioned adapter name; empty where the server needs none.
        seed: Of this segment's sampler (derived from the request's, another for each segment).
        messages: The prompt as a chat: for the server to turn into tokens, or beside ``token_ids``
            for its images. Empty where the tokens are all.
        experts_from: The first token whose experts are to be told, where that is asked for: those
            of the tokens before are there.
    """

    request_id: str
    token_ids: Int32Array
    max_new_tokens: int
    min_new_tokens: int = 0
    gconfig: GenerationHyperparameters
    model: str = ""
    seed: int | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    experts_from: int = 0


class SegmentResponse(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One HTTP answer of a generation, decoded.

    Args:
        token_ids: int32[N].
        logprobs: float32[N].
        stop_reason: ``abort`` where the server was told to stop: the generation may go on.
        versions: The server's own weight-version spans, covering all N tokens in order; None where
            this route reports none.
        message: The server's word on an abort, if any.
        prompt_ids: int32[P], the prompt's tokens, where the server made them.
        routed_experts: The experts of each token but the last, of prompt and answer, in whatever
            shape the server tells: [tokens, layers, top_k], or all of it in one vector. None where
            it tells none.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    stop_reason: StopReason
    versions: tuple[VersionSpan, ...] | None = None
    message: str = ""
    prompt_ids: Int32Array | None = None
    routed_experts: IntegerArray | None = None

    def without_tokens(self) -> SegmentResponse:
        """Return the same answer, as if it had brought no tokens."""
        return msgspec.structs.replace(
            self, token_ids=self.token_ids[:0], logprobs=self.logprobs[:0], versions=()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says about itself; None where it does not say.

    Args:
        model: The served model's name, to be named in requests.
        max_model_len: Prompt and answer together at most, in tokens.
        max_concurrency: Requests it runs at once (vLLM ``max_num_seqs``, SGLang
            ``max_running_requests``).
        vocab_size: Token ids are below this.
        weight_version: The weights it serves; None where its label is not an integer.
        token_in_token_out: Whether the route that reports weight versions is there.
        streams_news: Whether an event of its stream holds the new tokens alone. Where each repeats
            all from the start, n tokens take n²/2 entries, and are not worth a stream.
        logprobs_tempered: Whether its logprobs are of the distribution that was sampled from, after
            the temperature, and not of the model's own before it.
        weights_backed_up: Whether its weights are still there after it slept, where its dialect
            does not promise that of every server.
        tells_experts: Whether it can tell which experts tokens went through.
    """

    model: str | None = None
    max_model_len: int | None = None
    max_concurrency: int | None = None
    vocab_size: int | None = None
    weight_version: int | None = None
    token_in_token_out: bool = False
    streams_news: bool = False
    logprobs_tempered: bool | None = None
    weights_backed_up: bool = False
    tells_experts: bool | None = None


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The server's own gauges; they may lag behind by an engine step.

    Args:
        running: Requests it decodes.
        waiting: Requests in its own queue.
        requests_finished: Since it started.
        preemptions: Running requests that it put back into its queue, since it started; 0 where it
            does not count them.
        preempted: How many of those are in its queue now; 0 where it does not say.
        kv_cache_usage: Share of its key-value cache in use, of its fullest engine.
    """

    running: int
    waiting: int
    requests_finished: int
    preemptions: int = 0
    preempted: int = 0
    kv_cache_usage: float = 0.0


class StreamParser(Protocol):
    """One streamed generation: bytes in, in whatever pieces they arrive, tokens kept.

    What came can be had at any moment, and also after ``feed`` raised RequestRejected or
    ServerError. After a ProtocolError nothing of it is to be believed.
    """

    @property
    def count(self) -> int:
        """Tokens that came so far."""

    @property
    def complete(self) -> bool:
        """Whether the server said how the generation ended: then every token is there."""

    def feed(self, data: bytes) -> None:
        """Take what arrived.

        Raises:
            ProtocolError: If it does not follow the dialect.
            RequestRejected: If the server says in mid-stream that the request is at fault.
            ServerError: If it says that it failed.
        """

    def arrived(self) -> SegmentResponse:
        """The tokens so far, as an answer that was aborted; no versions, which come at the end."""

    def answer(self) -> SegmentResponse:
        """The whole answer, equal to what ``parse_generate`` makes of an answer in one piece.

        Raises:
            ProtocolError: If it is not complete, or its version spans do not cover the tokens.
        """


class Dialect(WeightRequests, Protocol):
    """The operations of one kind of server. Instances are immutable and shared."""

    name: str
    dies_of_unknown_ids: bool
    """Whether a token id outside the vocabulary ends the server, and all that it runs."""

    def discover(self) -> Sequence[HttpRequest]:
        """The questions whose answers, in this order, ``parse_discover`` reads."""

    def parse_discover(self, responses: Sequence[HttpResponse]) -> ServerInfo:
        """Read what the server is. An answer of 404 means that route is absent, not an error."""

    def generate(
        self, segment: SegmentRequest, info: ServerInfo, *, stream: bool = False
    ) -> HttpRequest:
        """Ask for tokens, on the best route that ``info`` says is there; streamed, as they come."""

    def parse_generate(
        self, response: HttpResponse, info: ServerInfo, *, chat: bool = False
    ) -> SegmentResponse:
        """Read tokens, logprobs and, where reported, version spans; ``chat``: of messages."""

    def stream_parser(self, secrets: Sequence[str] = ()) -> StreamParser:
        """A fresh reader of one streamed generation, whose errors repeat none of these."""

    def abort(self, request_id: str, info: ServerInfo, *, chat: bool = False) -> HttpRequest:
        """Stop one request by the id ``generate`` gave it; ``chat``: it had messages."""

    def pause(self, mode: PauseMode) -> HttpRequest:
        """Stop generating. ConfigError for a mode that this dialect does not know."""

    def resume(self) -> HttpRequest:
        """Go on generating; harmless when not paused."""

    def load_weights(self, path: str, version: int) -> Sequence[HttpRequest]:
        """The requests, in order: load weights from disk, drop the prefix cache, set the label.

        The label comes last: a server that carries it has everything before it.
        """

    def label_weights(self, version: int) -> HttpRequest:
        """Set the version label alone, for weights that came another way, or none at the start."""

    def parse_control(self, response: HttpResponse) -> None:
        """Read the answer to abort, pause, resume or a step of load_weights; raise if it failed."""

    def health(self) -> HttpRequest:
        """Ask whether the server is alive."""

    def parse_health(self, response: HttpResponse) -> None:
        """Raise where it is not."""

    def load(self) -> HttpRequest:
        """Ask for the server's own gauges."""

    def parse_load(self, response: HttpResponse) -> ServerLoad:
        """Read them."""

    def started(self) -> HttpRequest | None:
        """Ask when its process started, which no other has in common; None: it does not tell."""

    def parse_started(self, response: HttpResponse) -> float | None:
        """Read it, in seconds since 1970; None where the server does not tell after all."""

    def sleeping(self) -> HttpRequest | None:
        """Ask whether it sleeps; None where no server of this kind tells."""

    def parse_sleeping(self, response: HttpResponse) -> bool:
        """Read it; a server without the route does not sleep."""

    def weight_version(self) -> HttpRequest:
        """Ask for the label of the weights it serves."""

    def parse_weight_version(self, response: HttpResponse) -> int | None:
        """Read it; None where it is not an integer."""
