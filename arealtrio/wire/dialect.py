"""What a server's dialect must be able to say: requests built, answers read, nothing sent.

Each operation is a pair: ``x(…) -> HttpRequest`` and ``parse_x(HttpResponse) -> …``. Every
``parse_x`` first maps the status (4xx: RequestRejected, 5xx: ServerError), then raises
ProtocolError for a body that does not follow the dialect. No error message carries a payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..types import (
    Float32Array,
    GenerationHyperparameters,
    HttpRequest,
    HttpResponse,
    Int32Array,
    PauseMode,
    StopReason,
)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens ``start … end-1`` were made by ``version``; None is a label that is no integer."""

    version: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentRequest:
    """One HTTP question of a generation.

    Args:
        request_id: Unique on its server; abort names it.
        token_ids: int32[P + n], the prompt and the tokens generated so far.
        max_new_tokens: The remaining budget of this segment.
        min_new_tokens: What remains of the caller's minimum.
        gconfig: How to sample; its own token limits are superseded by the two above.
        model: The model or versioned adapter name; empty where the server needs none.
        seed: Of this segment's sampler (derived from the request's, another for each segment).
    """

    request_id: str
    token_ids: Int32Array
    max_new_tokens: int
    min_new_tokens: int = 0
    gconfig: GenerationHyperparameters
    model: str = ""
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentResponse:
    """One HTTP answer of a generation, decoded.

    Args:
        token_ids: int32[N].
        logprobs: float32[N].
        stop_reason: ``abort`` where the server was told to stop: the generation may go on.
        versions: The server's own weight-version spans, covering all N tokens in order; None where
            this route reports none.
        message: The server's word on an abort, if any.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    stop_reason: StopReason
    versions: tuple[VersionSpan, ...] | None = None
    message: str = ""


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
    """

    model: str | None = None
    max_model_len: int | None = None
    max_concurrency: int | None = None
    vocab_size: int | None = None
    weight_version: int | None = None
    token_in_token_out: bool = False


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The server's own gauges; they may lag behind by an engine step."""

    running: int
    waiting: int
    requests_finished: int


class Dialect(Protocol):
    """The operations of one kind of server. Instances are immutable and shared."""

    name: str

    def discover(self) -> Sequence[HttpRequest]:
        """The questions whose answers, in this order, ``parse_discover`` reads."""

    def parse_discover(self, responses: Sequence[HttpResponse]) -> ServerInfo:
        """Read what the server is. An answer of 404 means that route is absent, not an error."""

    def generate(self, segment: SegmentRequest, info: ServerInfo) -> HttpRequest:
        """Ask for tokens, on the best route that ``info`` says is there."""

    def parse_generate(self, response: HttpResponse, info: ServerInfo) -> SegmentResponse:
        """Read tokens, logprobs and, where reported, version spans."""

    def abort(self, request_id: str, info: ServerInfo) -> HttpRequest:
        """Stop one request by the id ``generate`` gave it."""

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

    def weight_version(self) -> HttpRequest:
        """Ask for the label of the weights it serves."""

    def parse_weight_version(self, response: HttpResponse) -> int | None:
        """Read it; None where it is not an integer."""
